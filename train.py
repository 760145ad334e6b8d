"""Train K models at once, each with its flood level and start, and score them every epoch."""

import ctypes
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
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


def split_models(
    network: MLP, models: pd.DataFrame, device: torch.device
) -> Iterator[tuple[pd.DataFrame, MLP]]:
    """Yield models in as few groups as the device allows, each with a network of its own.

    A row of `models` has the `start`, a copy of `network` that the model starts as, and the
    `flood_level`; its group's network has it as a copy, in the same order.
    """
    groups = math.ceil(len(models) / MODELS_AT_ONCE[device.type])
    for rows in np.array_split(np.arange(len(models)), groups):
        group = models.iloc[rows].reset_index(drop=True)
        yield group, network.select([*group.start]).to(device)


def train(
    network: MLP, data: Dataset, models: pd.DataFrame, training: Training,
    generator: torch.Generator, splits: Sequence[str] = SPLITS, eval_every: int = 1,
    on_epoch: Callable[[int], object] = lambda count: None,
) -> Iterator[pd.DataFrame]:  # fmt: skip
    """Train a group of models, the copies of `network`; yield their metrics after each epoch.

    They share the data and the order of the mini-batches, which a copy of `generator` draws. The
    metrics are `models` with the `epoch` and, as `test_loss_noisy`, the SCORES of `splits` in
    evaluation mode, also before the first epoch (epoch 0). [released code] Losses are means in
    nats, accuracies are fractions. `train_batch_loss` is the epoch's mean of the mini-batches'
    losses in training mode, which are what is flooded; epoch 0 has none.
    `train_flooded_fraction_so_far` is the share of all mini-batches until now, or examples with
    `flood_on` "example", with a loss below the level. With `eval_every` > 1 epochs between are left
    out, the last one never. `on_epoch` is called after every epoch, with the number of models.

    Raises:
        SettingError: a flood level is no finite number >= 0.
        DivergenceError: a loss is not finite any more.
    """
    check_flood_levels(models.flood_level)
    training = training.filled()
    scored = {name: to_device(getattr(data, name), network) for name in splits}
    epochs = train_epochs(network, data.train, models.flood_level, training, generator)
    for epoch, batch_loss, flooded_fraction in epochs:
        metrics = {} if batch_loss is None else {"train_batch_loss": batch_loss}
        due = epoch % eval_every == 0 or epoch == training.epochs
        if due:
            metrics |= score(network, scored)
            metrics["train_flooded_fraction_so_far"] = flooded_fraction
        fetched = _fetch(metrics, models.assign(epoch=epoch), training)
        if epoch > 0:
            on_epoch(len(models))
        if due:
            yield fetched


def train_epochs(
    network: MLP, split: Split, flood_levels: Sequence[float], training: Training,
    generator: torch.Generator,
) -> Iterator[tuple[int, Tensor | None, Tensor]]:  # fmt: skip
    """Train the network's K copies, one flood level each; it may be read after every epoch.

    A copy of `generator` draws the order of the examples. Yields the epoch (first 0, before
    training), each model's mean loss over the epoch's mini-batches [K] in nats (None of epoch 0),
    and the share of all losses until now that were below the level [K].
    """
    split = to_device(split, network)
    inputs, labels = split.inputs, split.noisy_labels
    b = torch.tensor([*flood_levels], dtype=torch.float32, device=inputs.device)  # [K]
    optimizer = make_optimizer(network, training)
    generator = generator.clone_state()
    below, count = torch.zeros_like(b), 0
    yield 0, None, below
    for epoch in range(1, training.epochs + 1):
        network.train()
        batches = torch.randperm(len(labels), generator=generator).to(b.device)
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


def to_device(split: Split, network: MLP) -> Split:
    """Return a split of tensors on the network's device, which on a CPU share its memory."""
    device = next(network.parameters()).device
    return Split(**{name: torch.from_numpy(of).to(device) for name, of in vars(split).items()})


def score(network: MLP, splits: Mapping[str, Split]) -> dict[str, Tensor]:
    """Return loss and accuracy of splits on the device, against both labels, [K] each."""
    scores = {}
    for name, split in splits.items():
        logits = evaluate(network, split.inputs)
        predictions = logits.argmax(dim=-1)  # [n, K]
        for kind in ("noisy", "clean"):
            labels = getattr(split, f"{kind}_labels")
            correct = predictions == labels[:, None]
            scores[f"{name}_loss_{kind}"] = cross_entropy(logits, labels).mean(dim=0)
            scores[f"{name}_accuracy_{kind}"] = correct.sum(dim=0).double() / len(labels)
    return scores


@torch.no_grad()
def evaluate(network: MLP, inputs: Tensor) -> Tensor:
    """Return the logits [n, K, classes] in evaluation mode, in which the network is left."""
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
    return models.assign(**dict(zip(metrics, values)))


def score_last_and_best(
    network: MLP, data: Dataset, models: pd.DataFrame, training: Training,
    generator: torch.Generator, on_epoch: Callable[[int], object] = lambda count: None,
) -> pd.DataFrame:  # fmt: skip
    """Train a group as `train` does, all epochs, and score the last and the best one of each model.

    The best epoch is the first of highest accuracy on the noisy validation labels, epoch 0 left
    out: it is what early stopping would have kept. Returns a row a `scored_epoch` (of
    SCORED_EPOCHS) and model, first the last ones: `models`, the `epoch` that was scored, and the
    SCORES of validation and test split. Raises what `train` raises.
    """
    epochs = train(network, data, models, training, generator, ("val",), on_epoch=on_epoch)
    next(epochs)  # before training
    last = next(epochs)
    best, best_network = last.copy(), network.select(range(network.copies))
    for last in epochs:
        improved = np.flatnonzero(last.val_accuracy_noisy > best.val_accuracy_noisy)
        if len(improved):
            best.iloc[improved] = last.iloc[improved]
            best_network.update(network, improved)
    splits = {name: to_device(getattr(data, name), network) for name in SPLITS[1:]}
    rows = []
    for name, metrics, scored in zip(SCORED_EPOCHS, (last, best), (network, best_network)):
        row = metrics[["start", "flood_level", "epoch"]].assign(scored_epoch=name)
        rows.append(_fetch(score(scored, splits), row, training))
    return pd.concat(rows, ignore_index=True)


@dataclass(frozen=True)
class Boundary(Split):
    """What K networks make of the plane, and of a split's examples on it.

    `probability` [K, GRID, GRID] of class 1 at `axis` [GRID], rows x2, columns x1; the networks'
    `predictions` [K, n] of the examples' labels.
    """

    axis: np.ndarray
    probability: np.ndarray
    predictions: np.ndarray


def find_boundary(networks: Sequence[MLP], split: Split) -> Boundary:
    """Evaluate K networks, of one copy each, around the two-dimensional examples of a split."""
    reach = 1.08 * np.abs(split.inputs).max()
    axis = np.linspace(-reach, reach, GRID, dtype=np.float32)
    plane = np.stack([x.ravel() for x in np.meshgrid(axis, axis)], axis=1)
    inputs = torch.from_numpy(np.concatenate([plane, split.inputs]))
    logits = [evaluate(one, inputs.to(next(one.parameters()).device)) for one in networks]
    probability = torch.cat(logits, dim=1).softmax(dim=-1)[:, :, 1].T.cpu().numpy()
    on_plane, on_examples = np.split(probability, [GRID**2], axis=1)
    on_plane, predictions = on_plane.reshape(-1, GRID, GRID), (on_examples > 0.5).astype(int)
    return Boundary(**vars(split), axis=axis, probability=on_plane, predictions=predictions)
