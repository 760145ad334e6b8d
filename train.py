"""Train K models at once that differ in the flood level alone, and score them every epoch."""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from datasets import Dataset, Split
from flooding import flood
from models import MLP, StackedMLP, folded_logits, with_constant
from settings import SCORES, SPLITS, STOPPINGS, TrainSettings, check, check_flood_levels

# What benchmarks/bench_train.py found fastest on CPUs; the values for GPUs are not measured. Rows
# are examples times models: the activations should stay in a CPU's cache, and be many on a GPU.
EVALUATION_ROWS = {"cpu": 2_000, "cuda": 200_000}
MODELS_AT_ONCE = {"cpu": 26, "cuda": 204}

METRICS = [f"{split}_{score}" for split in SPLITS for score in SCORES]
METRICS += ["train_batch_loss", "train_flooded_fraction_so_far"]
GRID = 201  # points along a side of the plane that a boundary is drawn on


class DivergenceError(ArithmeticError):
    """A loss stopped being finite."""


@dataclass(frozen=True)
class Evaluation:
    """The models of one group after one epoch.

    `metrics` has a row a model: its `flood_level`, the `epoch`, and those of the METRICS whose
    split was asked for. Losses are means in nats, accuracies are fractions. `train_batch_loss` is
    the epoch's mean of the mini-batches' losses in training mode, which are what is flooded; epoch
    0 has none. `train_flooded_fraction_so_far` is the share of all mini-batches until now, or
    examples with `flood_on` "example", with a loss below the level. `folded` are the networks.
    """

    epoch: int
    metrics: pd.DataFrame
    folded: list[Tensor]

    def networks(self) -> dict[float, list[Tensor]]:
        """Return each flood level's network, folded, as a stack of one."""
        of_models = zip(*(matrix.split(1) for matrix in self.folded))
        return dict(zip(self.metrics.flood_level, of_models))


def prepare_process(device: str) -> torch.device:
    """Set this process up for fast training, before its first tensor; return the device.

    That is a GPU if there is one for "auto", else the "cpu" or "cuda" asked for; SettingError is
    raised if it is not there. Flushes denormal numbers to zero: at zero training loss gradients
    are full of them, and a CPU multiplies them many times slower. Keeps freed memory: glibc would
    return the gradients' to the system after each step and fetch it anew, page by page, in the
    next, at the cost of the products themselves.
    """
    on_gpu = torch.cuda.is_available()
    check(device != "cuda" or on_gpu, "device", device, "not on this machine, which has cpu")
    torch.set_flush_denormal(True)
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        m_trim_threshold, m_mmap_max = -1, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
    return torch.device("cpu" if device == "cpu" or not on_gpu else "cuda")


def where(device: torch.device) -> dict[str, str]:
    """Return what figures were computed with and on."""
    name = f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else "cpu"
    return {"torch": torch.__version__, "device": name}


def train(
    network: MLP, data: Dataset, flood_levels: Sequence[float], settings: TrainSettings,
    device: torch.device, generator: torch.Generator, splits: Sequence[str] = SPLITS,
    eval_every: int = 1, on_epoch: Callable[[], object] = lambda: None,
) -> Iterator[Evaluation]:  # fmt: skip
    """Train a copy of `network` for each flood level; yield an `Evaluation` of every epoch.

    All models share the data, the initial weights and the order of the mini-batches, which
    `generator` (on the CPU) draws. The `splits` are scored in evaluation mode against noisy and
    clean labels, also before the first epoch (epoch 0). [released code] With `eval_every` > 1
    epochs between are left out, the last one never. As many models train together as the device
    likes, one group after the other. `on_epoch()` is called after every epoch of every group,
    `count_epochs` times.

    Raises:
        SettingError: a flood level is no finite number >= 0, or batch norm meets one example alone.
        DivergenceError: a loss is not finite any more.
    """
    check_flood_levels(flood_levels)
    settings.check_batches(len(data.train.labels), bool(network.norms))
    evaluated = [EvaluationSplit(name, getattr(data, name), device) for name in splits]
    start = generator.get_state()
    count, groups = len(flood_levels), count_epochs(flood_levels, 1, device)
    for number in range(groups):  # of nearly the same size
        generator.set_state(start)
        group = list(flood_levels[count * number // groups : count * (number + 1) // groups])
        levels = torch.tensor(group, dtype=torch.float32, device=device)
        stack = StackedMLP(network, len(levels), device)
        epochs = train_epochs(stack, data.train, levels, settings, generator)
        for epoch, batch_loss, flooded in epochs:
            metrics = {"train_batch_loss": batch_loss} if epoch > 0 else {}
            if due := epoch % eval_every == 0 or epoch == settings.epochs:
                folded = stack.fold()
                for split in evaluated:
                    metrics |= split.scores(folded)
                metrics["train_flooded_fraction_so_far"] = flooded
            metrics = _fetch(metrics, epoch, group, settings.learning_rate)
            if epoch > 0:
                on_epoch()
            if due:
                yield Evaluation(epoch, metrics, folded)


def count_epochs(flood_levels: Sequence[float], epochs: int, device: torch.device) -> int:
    """Return how many epochs `train` trains: of as few groups of models as the device allows."""
    return epochs * math.ceil(len(flood_levels) / MODELS_AT_ONCE[device.type])


def train_epochs(
    stack: StackedMLP, split: Split, levels: Tensor, settings: TrainSettings,
    generator: torch.Generator,
) -> Iterator[tuple[int, Tensor, Tensor]]:  # fmt: skip
    """Train the stack's K models, one flood level each; it may be read after every epoch.

    Yields the epoch (first 0, before training), each model's mean loss over the epoch's
    mini-batches [K] in nats, and the share of all losses until now that were below the level [K].
    """
    parameters = list(stack.parameters.values())
    inputs = torch.from_numpy(split.inputs).to(levels.device)
    labels = torch.from_numpy(split.labels).to(levels.device)
    # The fused optimizers act element by element, so the stacked models do not mix.
    options = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay, "fused": True}
    if settings.optimizer == "sgd":
        optimizer = torch.optim.SGD(parameters, momentum=settings.momentum, **options)
    else:
        optimizer = torch.optim.Adam(parameters, **options)
    reduction = "mean" if settings.flood_on == "batch" else "none"
    below, count = torch.zeros_like(levels), 0
    yield 0, torch.zeros_like(levels), below
    for epoch in range(1, settings.epochs + 1):
        order = torch.randperm(len(labels), generator=generator).to(levels.device)
        batches = order.split(settings.batch_size)  # the last one has what is left
        loss_sum = torch.zeros_like(levels)
        for batch in batches:
            losses = stack.losses(inputs[batch], labels[batch], reduction)
            losses = losses.view(len(levels), -1)  # [K, 1], or [K, examples]
            level_of = levels[:, None].expand_as(losses)
            flooded = flood(losses.flatten(), level_of.flatten()).view_as(losses)
            optimizer.zero_grad()
            flooded.mean(dim=1).sum().backward()
            optimizer.step()
            loss_sum += losses.detach().mean(dim=1)
            below += (losses.detach() < level_of).sum(dim=1)
            count += losses.shape[1]
        yield epoch, loss_sum / len(batches), below / count


class EvaluationSplit:
    """A split on the device, ready to score K folded networks."""

    def __init__(self, name: str, split: Split, device: torch.device) -> None:
        self.name = name
        self.inputs = with_constant(torch.from_numpy(split.inputs).to(device))
        labels = np.stack([split.labels, split.clean_labels])
        self.labels = dict(zip(("noisy", "clean"), torch.from_numpy(labels).to(device)))

    @torch.no_grad()
    def scores(self, folded: list[Tensor]) -> dict[str, Tensor]:
        """Return the split's loss and accuracy against both labels, [K] each, in one pass."""
        copies, scores = len(folded[0]), {}
        chunk = max(1, EVALUATION_ROWS[self.inputs.device.type] // copies)
        logits = folded_logits(folded, self.inputs, chunk)
        log_probabilities, predictions = logits.log_softmax(dim=-1), logits.argmax(dim=-1)
        for kind, labels in self.labels.items():
            index = labels.expand(copies, -1).unsqueeze(-1)
            loss = -log_probabilities.gather(-1, index).mean(dim=(1, 2))
            correct = (predictions == labels).sum(dim=1)
            scores[f"{self.name}_loss_{kind}"] = loss
            scores[f"{self.name}_accuracy_{kind}"] = correct.double() / len(labels)
        return scores


def _fetch(
    metrics: dict[str, Tensor], epochs: int | np.ndarray, levels: Sequence[float], rate: float
) -> pd.DataFrame:
    """Bring metrics from the device at one go, a row a model; DivergenceError if not finite."""
    values = torch.stack([value.double() for value in metrics.values()]).cpu().numpy()
    columns = {"flood_level": levels, "epoch": epochs, **dict(zip(metrics, values))}
    fetched = pd.DataFrame(columns)
    for metric, model in np.argwhere(~np.isfinite(values)):
        row = fetched.iloc[model]
        raise DivergenceError(
            f"flood level {row.flood_level:g}: {list(metrics)[metric]} is {values[metric, model]} "
            f"in epoch {row.epoch:g}, with learning rate {rate:g}"
        )
    return fetched


def train_with_early_stopping(
    network: MLP, data: Dataset, flood_levels: Sequence[float], settings: TrainSettings,
    device: torch.device, generator: torch.Generator,
    on_epoch: Callable[[], object] = lambda: None,
) -> pd.DataFrame:  # fmt: skip
    """Train as `train` does, and score the last epoch and the best epoch of every model.

    The best epoch is the first of highest accuracy on the noisy validation labels, epoch 0 left
    out. Returns a row a `stopping` (of STOPPINGS) and `flood_level`, with the `epoch` whose weights
    were scored and the SCORES of validation and test split. Raises what `train` raises.
    """
    rows = []
    splits = [EvaluationSplit(name, getattr(data, name), device) for name in SPLITS[1:]]
    for now in train(
        network, data, flood_levels, settings, device, generator, ("val",), on_epoch=on_epoch
    ):
        accuracy = now.metrics.val_accuracy_noisy.to_numpy(copy=True)
        if now.epoch <= 1:
            best_folded, best_accuracy = now.folded, accuracy
            best_epoch = np.full(len(accuracy), now.epoch)
        elif (improved := accuracy > best_accuracy).any():
            best_accuracy[improved], best_epoch[improved] = accuracy[improved], now.epoch
            index = torch.from_numpy(np.flatnonzero(improved)).to(device)
            for best, matrix in zip(best_folded, now.folded):
                best[index] = matrix[index]
        if now.epoch == settings.epochs:
            last, best = (now.epoch, now.folded), (best_epoch, best_folded)
            for stopping, (epochs, folded) in zip(STOPPINGS, (last, best)):
                scores = {k: v for split in splits for k, v in split.scores(folded).items()}
                levels, rate = now.metrics.flood_level, settings.learning_rate
                rows.append(_fetch(scores, epochs, levels, rate))
                rows[-1].insert(0, "stopping", stopping)
    # Of all groups of models, first the last epoch's.
    return pd.concat(rows[::2] + rows[1::2], ignore_index=True)


@dataclass(frozen=True)
class Boundary:
    """What K networks make of the plane, and of the training examples on it.

    `probability` [K, GRID, GRID] of class 1 at `axis` [GRID], rows x2, columns x1; the examples
    as in `datasets.Split`, and the networks' `predictions` [K, n] of their labels.
    """

    axis: np.ndarray
    probability: np.ndarray
    predictions: np.ndarray
    inputs: np.ndarray
    labels: np.ndarray
    clean_labels: np.ndarray


def find_boundary(networks: Sequence[list[Tensor]], split: Split) -> Boundary:
    """Evaluate folded networks on a square around the two-dimensional examples of a split."""
    reach = 1.08 * np.abs(split.inputs).max()
    axis = np.linspace(-reach, reach, GRID, dtype=np.float32)
    plane = np.stack([x.ravel() for x in np.meshgrid(axis, axis)], axis=1)
    inputs = with_constant(torch.from_numpy(np.concatenate([plane, split.inputs])))
    probability = []
    for folded in networks:
        logits = folded_logits(folded, inputs.to(folded[0].device), EVALUATION_ROWS["cpu"])
        probability.append(logits[0].softmax(dim=-1)[:, 1].cpu().numpy())
    plane_probability, of_examples = np.split(np.stack(probability), [GRID**2], axis=1)
    return Boundary(
        axis, plane_probability.reshape(-1, GRID, GRID), (of_examples > 0.5).astype(int),
        split.inputs, split.labels, split.clean_labels,
    )  # fmt: skip
