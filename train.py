"""Train K models at once, each with its flood level and start, and score them every epoch."""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from datasets import Dataset, Split
from flooding import flood
from models import MLP
from settings import SCORED_EPOCHS, SPLITS, Training, check, check_flood_levels

# On CPUs the fastest of what was tried, on a GPU (NVIDIA H200) within a few percent of it. Rows are
# examples times models: the activations should stay in a CPU's cache, and be many on a GPU.
EVALUATION_ROWS = {"cpu": 6_000, "cuda": 200_000}
MODELS_AT_ONCE = {"cpu": 26, "cuda": 204}

GRID = 201  # points along a side of the plane that a boundary is drawn on


class DivergenceError(ArithmeticError):
    """A loss stopped being finite."""


@dataclass(frozen=True)
class Evaluation:
    """The models of one group after one epoch.

    `metrics` has a row a model: its `start`, `flood_level`, the `epoch`, and, as `test_loss_noisy`,
    the SCORES of each split that was asked for. Losses are means in nats, accuracies are fractions.
    `train_batch_loss` is the epoch's mean of the mini-batches' losses in training mode, which are
    what is flooded; epoch 0 has none. `train_flooded_fraction_so_far` is the share of all
    mini-batches until now, or examples with `flood_on` "example", with a loss below the level.
    `network` is the live one, whose copies are the models: it is trained on in the next epoch.
    """

    epoch: int
    metrics: pd.DataFrame
    network: MLP


def prepare_process(device: str) -> torch.device:
    """Set this process up for fast training, before its first tensor; return the device.

    That is a GPU if there is one for "auto", else the "cpu" or "cuda" asked for; SettingError is
    raised if it is not there. Flushes denormal numbers to zero: at zero training loss gradients
    are full of them, and a CPU multiplies them many times slower. Keeps freed memory: glibc would
    return the gradients' to the system after each step and fetch it anew, page by page, in the
    next, at the cost of the products themselves.
    """
    on_gpu = torch.cuda.is_available()
    check(device != "cuda" or on_gpu, "device", device, "no GPU is here: take cpu or auto")
    torch.set_flush_denormal(True)
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        m_trim_threshold, m_mmap_max = -1, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
    return torch.device("cpu" if device == "cpu" or not on_gpu else "cuda")


def provenance(device: torch.device) -> dict[str, str]:
    """Return what figures were computed with and on."""
    name = f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else "cpu"
    return {"torch": torch.__version__, "device": name}


def train(
    network: MLP, data: Dataset, flood_levels: Sequence[float], training: Training,
    device: torch.device, generator: torch.Generator, starts: Sequence[int] | None = None,
    splits: Sequence[str] = SPLITS, eval_every: int = 1,
    on_epoch: Callable[[], object] = lambda: None,
) -> Iterator[Iterator[Evaluation]]:  # fmt: skip
    """Train a model for each flood level; yield, for each group of models, its epochs.

    Model i starts as copy `starts[i]` of `network`, which is left as it is; by default all start
    as copy 0. They share the data and the order of the mini-batches, which `generator` (on the
    CPU) draws. As many train together as the device likes, one group after the other. The `splits`
    are scored in evaluation mode against noisy and clean labels, also before the first epoch
    (epoch 0). [released code] With `eval_every` > 1 epochs between are left out, the last one
    never. `on_epoch()` is called after every epoch of every group, of which there are
    `count_groups`.

    Raises:
        SettingError: a flood level is no finite number >= 0.
        DivergenceError: a loss is not finite any more.
    """
    check_flood_levels(flood_levels)
    training = training.filled()
    models = pd.DataFrame({"start": 0 if starts is None else starts, "flood_level": flood_levels})
    scored = {name: to_device(getattr(data, name), device) for name in splits}
    order = generator.get_state()

    def train_group(group: pd.DataFrame) -> Iterator[Evaluation]:
        copies = network.select(list(group.start)).to(device)
        epochs = train_epochs(copies, data.train, group.flood_level, training, order)
        for epoch, batch_loss, flooded_fraction in epochs:
            metrics = {"train_batch_loss": batch_loss} if epoch > 0 else {}
            due = epoch % eval_every == 0 or epoch == training.epochs
            if due:
                for name, split in scored.items():
                    metrics |= score(copies, name, split)
                metrics["train_flooded_fraction_so_far"] = flooded_fraction
            fetched = _fetch(metrics, group.assign(epoch=epoch), training)
            if epoch > 0:
                on_epoch()
            if due:
                yield Evaluation(epoch, fetched, copies)

    for group in np.array_split(np.arange(len(models)), count_groups(flood_levels, device)):
        yield train_group(models.iloc[group])


def count_groups(models: Sequence, device: torch.device) -> int:
    """Return in how many groups `train` trains models: as few as the device allows."""
    return math.ceil(len(models) / MODELS_AT_ONCE[device.type])


def train_epochs(
    network: MLP, split: Split, flood_levels: Sequence[float], training: Training, order: Tensor
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Train the network's K copies, one flood level each; it may be read after every epoch.

    `order` is the state of the generator that draws the order of the examples. Yields the epoch
    (first 0, before training), each model's mean loss over the epoch's mini-batches [K] in nats,
    and the share of all losses until now that were below the level [K].
    """
    device = next(network.parameters()).device
    split = to_device(split, device)
    inputs, labels = split.inputs, split.noisy_labels
    b = torch.tensor(list(flood_levels), dtype=torch.float32, device=device)  # [K]
    optimizer = make_optimizer(network, training)
    generator = torch.Generator().set_state(order)
    below, count = torch.zeros_like(b), 0
    yield 0, torch.zeros_like(b), below
    for epoch in range(1, training.epochs + 1):
        network.train()
        batches = torch.randperm(len(labels), generator=generator).to(device)
        batches = batches.split(training.batch_size)  # the last one has what is left
        loss_sum = torch.zeros_like(b)
        for batch in batches:
            losses = cross_entropy(network(inputs[batch]), labels[batch])  # [n, K]
            if training.flood_on == "batch":
                losses = losses.mean(dim=0, keepdim=True)  # J of each model, [1, K]
            optimizer.zero_grad()
            flood(losses, b).mean(dim=0).sum().backward()  # the sum gives each its own gradient
            optimizer.step()
            losses = losses.detach()
            loss_sum += losses.mean(dim=0)
            below += (losses < b).sum(dim=0)
            count += len(losses)
        yield epoch, loss_sum / len(batches), below / count


def make_optimizer(network: nn.Module, training: Training) -> torch.optim.Optimizer:
    """Return the optimizer; it acts element by element, so that the models do not mix."""
    options = {"lr": training.learning_rate, "weight_decay": training.weight_decay, "fused": True}
    if training.optimizer == "sgd":
        return torch.optim.SGD(network.parameters(), momentum=training.momentum, **options)
    return torch.optim.Adam(network.parameters(), **options)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return each example's loss in each model, [n, K] in nats, of logits [n, K, classes]."""
    labels = labels[:, None].expand(logits.shape[:2])
    return nn.functional.cross_entropy(logits.mT, labels, reduction="none")


def to_device(split: Split, device: torch.device) -> Split:
    """Return a split of tensors on the device, which on a CPU share its memory."""
    return Split(**{name: torch.from_numpy(of).to(device) for name, of in vars(split).items()})


def score(network: MLP, name: str, split: Split) -> dict[str, Tensor]:
    """Return the loss and accuracy of a split on the device, against both labels, [K] each."""
    logits, scores = evaluate(network, split.inputs), {}
    predictions = logits.argmax(dim=-1)  # [n, K]
    for kind in ("noisy", "clean"):
        labels = getattr(split, f"{kind}_labels")
        correct = predictions == labels[:, None]
        scores[f"{name}_loss_{kind}"] = cross_entropy(logits, labels).mean(dim=0)
        scores[f"{name}_accuracy_{kind}"] = correct.sum(dim=0).double() / len(labels)
    return scores


@torch.no_grad()
def evaluate(network: MLP, inputs: Tensor) -> Tensor:
    """Return the logits [n, K, classes] in evaluation mode, in which the network is left.

    It goes in chunks, small enough that the activations stay in a CPU's cache.
    """
    chunk = max(1, EVALUATION_ROWS[inputs.device.type] // network.copies)
    network.eval()
    return torch.cat([network(rows) for rows in inputs.split(chunk)])


def _fetch(metrics: dict[str, Tensor], models: pd.DataFrame, training: Training) -> pd.DataFrame:
    """Bring metrics from the device at one go, a row a model; DivergenceError if not finite."""
    values = torch.stack([value.double() for value in metrics.values()]).cpu().numpy()
    if not np.isfinite(values).all():
        metric, model = np.argwhere(~np.isfinite(values))[0]
        row = models.iloc[model]
        raise DivergenceError(
            f"flood level {row.flood_level:g}: {list(metrics)[metric]} is {values[metric, model]} "
            f"in epoch {row.epoch:g}, with learning rate {training.learning_rate:g}"
        )
    return models.assign(**dict(zip(metrics, values))).reset_index(drop=True)


def score_last_and_best(
    network: MLP, data: Dataset, flood_levels: Sequence[float], training: Training,
    device: torch.device, generator: torch.Generator, starts: Sequence[int] | None = None,
    on_epoch: Callable[[], object] = lambda: None,
) -> pd.DataFrame:  # fmt: skip
    """Train as `train` does, all epochs, and score the last and the best one of every model.

    The best epoch is the first of highest accuracy on the noisy validation labels, epoch 0 left
    out: it is what early stopping would have kept. Returns a row a `scored_epoch` (of
    SCORED_EPOCHS) and model, first all last ones: its `start`, `flood_level`, the `epoch` that was
    scored, and the SCORES of validation and test split. Raises what `train` raises.
    """
    training = training.filled()
    val, test = (to_device(split, device) for split in (data.val, data.test))
    rows = {scored_epoch: [] for scored_epoch in SCORED_EPOCHS}
    arguments = network, data, flood_levels, training, device, generator, starts, ("val",)
    for epochs in train(*arguments, on_epoch=on_epoch):
        next(epochs)  # the untrained networks
        now = next(epochs)
        best, best_network = now.metrics.copy(), now.network.select(range(now.network.copies))
        for now in epochs:
            improved = np.flatnonzero(now.metrics.val_accuracy_noisy > best.val_accuracy_noisy)
            if len(improved):
                best.iloc[improved] = now.metrics.iloc[improved]
                best_network.update(now.network, improved)
        for scored_epoch, models, scored in (
            ("last", now.metrics, now.network), ("best", best, best_network)
        ):  # fmt: skip
            scores = score(scored, "val", val) | score(scored, "test", test)
            models = models[["start", "flood_level", "epoch"]]
            rows[scored_epoch].append(_fetch(scores, models, training))
    return pd.concat(
        [pd.concat(rows[name]).assign(scored_epoch=name) for name in rows], ignore_index=True
    )


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
    noisy_labels: np.ndarray
    clean_labels: np.ndarray


def find_boundary(networks: Sequence[MLP], split: Split) -> Boundary:
    """Evaluate K networks, of one copy each, around the two-dimensional examples of a split."""
    reach = 1.08 * np.abs(split.inputs).max()
    axis = np.linspace(-reach, reach, GRID, dtype=np.float32)
    plane = np.stack([x.ravel() for x in np.meshgrid(axis, axis)], axis=1)
    inputs = torch.from_numpy(np.concatenate([plane, split.inputs]))
    logits = [evaluate(one, inputs.to(next(one.parameters()).device)) for one in networks]
    probability = torch.cat(logits, dim=1).softmax(dim=-1)[:, :, 1].T.cpu().numpy()
    on_plane, on_examples = np.split(probability, [GRID**2], axis=1)
    return Boundary(
        axis, on_plane.reshape(-1, GRID, GRID), (on_examples > 0.5).astype(int),
        split.inputs, split.noisy_labels, split.clean_labels,
    )  # fmt: skip
