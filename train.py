"""Train K models at once that differ in the flood level alone, and score them every epoch.

Needs torch and numpy, and knows nothing of MLflow, plots or the command line.
"""

from __future__ import annotations

import ctypes
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from datasets import Dataset, Split
from flooding import flood
from models import MLP, StackedMLP, folded_logits, with_constant

# What benchmarks/bench_train.py and trials of the table's cells found fastest on CPUs; the values
# for GPUs are not measured yet. Examples times models that go through the evaluation at a time:
# the activations should stay in the cache of a CPU, and be many on a GPU.
EVALUATION_ROWS = {"cpu": 2_000, "cuda": 200_000, "mps": 200_000}
# Models trained at once where there are more: 4 to 17 are equally fast on a CPU core, 51 slower.
MODELS_AT_ONCE = {"cpu": 8, "cuda": 204, "mps": 51}
# Metrics stay on the device and are fetched after the epoch in which this many seconds are
# over, so that a GPU is not made to wait for the host in every epoch.
FETCH_SECONDS = 0.5

SPLITS = ("train", "val", "test")
SCORES = ("loss", "accuracy", "loss_clean", "accuracy_clean")
LEVEL_SCORES = tuple(f"{split}_{score}" for split in ("val", "test") for score in SCORES)
METRICS = (*(f"{split}_{score}" for split in SPLITS for score in SCORES), "flooded_fraction")


def prepare_process(threads: int | None = None) -> None:
    """Set up this process for fast training; for a script to call once, before any tensor.

    Flushes denormal numbers to zero: the gradients of a model that reaches zero training loss
    are full of them, and the CPU multiplies them many times slower. Keeps freed memory: glibc
    would return the gradients' memory to the system after each step and fetch it anew, page by
    page, in the next, at the cost of the products themselves. `threads` is for PyTorch's
    operators; None leaves its default, the number of cores.
    """
    torch.set_flush_denormal(True)
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        m_trim_threshold, m_mmap_max = -1, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
    if threads is not None:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class TrainSettings:
    """How to train. `momentum` is SGD's; Adam has its own, with PyTorch's defaults.

    `eval_every` is in epochs; epoch 0 and the last one are always evaluated.

    Raises:
        ValueError: a value is outside its range.
    """

    optimizer: str
    learning_rate: float
    batch_size: int
    epochs: int
    momentum: float = 0.0
    weight_decay: float = 0.0
    eval_every: int = 1

    def __post_init__(self) -> None:
        if self.optimizer not in ("sgd", "adam"):
            raise ValueError(f"optimizer {self.optimizer!r}: sgd or adam")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate {self.learning_rate}: a finite number > 0")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum {self.momentum}: a number in [0, 1)")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay {self.weight_decay}: a finite number >= 0")
        for name in ("batch_size", "epochs", "eval_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: at least 1")

    def check_batches(self, train_samples: int, batch_norm: bool) -> None:
        """Raise ValueError if batch norm would see a mini-batch of one example."""
        if batch_norm and 1 in (train_samples % self.batch_size, self.batch_size):
            raise ValueError(
                f"batch_size {self.batch_size}: with batch norm every mini-batch needs at least 2 "
                f"examples, and {train_samples} training examples leave one of 1"
            )


@dataclass(frozen=True)
class History:
    """What a training measured: a row an evaluated epoch, a column a flood level.

    `flood_levels` [K], `epochs` [E] and `metrics`, a [E, K] array for each name in METRICS:
    losses are means in nats, accuracies and `flooded_fraction`, the share of the epoch's
    mini-batches whose loss was below the flood level, are fractions. `_clean` is against the
    clean labels. Epoch 0 is before training.
    """

    flood_levels: np.ndarray
    epochs: np.ndarray
    metrics: dict[str, np.ndarray]

    def choose(self, select_on: str) -> tuple[int, int]:
        """Return the indices of the chosen level and of the level to compare with no flooding.

        Chosen is the best last-epoch validation accuracy, against the "clean" labels [released
        code] or the "noisy" ones that a practitioner has. Where that is no flooding, index 0,
        the best of the other levels is compared, if there are any.
        """
        name = {"clean": "val_accuracy_clean", "noisy": "val_accuracy"}[select_on]
        accuracy = self.metrics[name][-1]
        chosen = choose_level(self.flood_levels, accuracy)
        if chosen == 0 and len(accuracy) > 1:
            return 0, 1 + choose_level(self.flood_levels[1:], accuracy[1:])
        return chosen, chosen


class DivergenceError(ArithmeticError):
    """A loss stopped being finite."""


def train(
    network: MLP,
    data: Dataset,
    flood_levels: Sequence[float],
    settings: TrainSettings,
    device: torch.device,
    generator: torch.Generator,
    on_epoch: Callable[[int, dict[str, np.ndarray]], None] = lambda epoch, metrics: None,
) -> History:
    """Train a copy of `network` for each flood level and evaluate all of them every epoch.

    All models share the data, the initial weights and the order of the mini-batches, which
    `generator` (on the CPU) draws. In evaluation mode, each split is scored against noisy and
    clean labels by one forward pass, also once before training. [released code] A mini-batch is
    `batch_size` examples, the last of an epoch what is left.

    `on_epoch(epoch, metrics)` is called for every epoch in order, shortly after it is over;
    `metrics` maps each name in METRICS to an array [K], and is empty for an epoch that was not
    evaluated.

    Raises:
        ValueError: a flood level is negative, NaN or infinite, or batch norm meets a mini-batch
            of one example.
        DivergenceError: a loss is not finite any more.
    """
    settings.check_batches(len(data.train.labels), bool(network.norms))
    stack = StackedMLP(network, len(flood_levels), device)
    splits = {
        name: EvaluationSplit(getattr(data, name), len(flood_levels), device) for name in SPLITS
    }
    rows, epochs = [], []
    pending, fetched_at = [], time.monotonic()
    for epoch, batch_losses, flooded in train_epochs(
        stack, data.train, flood_levels, settings, generator
    ):
        evaluated = epoch % settings.eval_every == 0 or epoch == settings.epochs
        row = [batch_losses]
        if evaluated:
            folded = stack.fold()
            row += [score for split in splits.values() for score in split.scores(folded)]
            row.append(flooded)
        pending.append((epoch, torch.stack(row)))
        if epoch == settings.epochs or time.monotonic() - fetched_at >= FETCH_SECONDS:
            fetched = torch.cat([tensor for _, tensor in pending]).cpu().double().numpy()
            for done, tensor in pending:
                values, fetched = np.split(fetched, [len(tensor)])
                metrics = dict(zip(METRICS, values[1:]))
                _check_finite(values[0], metrics, done, flood_levels, settings)
                if metrics:
                    epochs.append(done)
                    rows.append(values[1:])
                on_epoch(done, metrics)
            pending, fetched_at = [], time.monotonic()
    return History(
        np.array(flood_levels),
        np.array(epochs),
        dict(zip(METRICS, np.stack(rows).transpose(1, 0, 2))),
    )


@dataclass(frozen=True)
class LevelScores:
    """Scores of K models, one a flood level: an array [K] each, in nats and fractions.

    `scores` has the names in LEVEL_SCORES; `epochs` [K] are the epochs whose weights were scored.
    """

    flood_levels: np.ndarray
    epochs: np.ndarray
    scores: dict[str, np.ndarray]

    def choose(self) -> int:
        """Return the index of the level with the best noisy validation accuracy."""
        return choose_level(self.flood_levels, self.scores["val_accuracy"], self.scores["val_loss"])


def train_early_stopping(
    network: MLP,
    data: Dataset,
    flood_levels: Sequence[float],
    settings: TrainSettings,
    device: torch.device,
    generator: torch.Generator,
    on_epoch: Callable[[], None] = lambda: None,
) -> tuple[LevelScores, LevelScores]:
    """Train a copy of `network` for each flood level; score it without and with early stopping.

    Without: the weights of the last epoch. With: those of the epoch of best noisy validation
    accuracy, the first of equals. Only the validation split is evaluated every epoch, the test
    split twice at the end. All levels share the data, the initial weights and the order of the
    mini-batches; MODELS_AT_ONCE of them train together, and `on_epoch()` is called
    `count_epochs` times. Raises what `train` raises.
    """
    settings.check_batches(len(data.train.labels), bool(network.norms))
    start = generator.get_state()
    parts = []
    for group in _groups(flood_levels, device):
        generator.set_state(start)
        parts.append(
            _train_group_early_stopping(network, data, group, settings, device, generator, on_epoch)
        )
    last, best = (
        LevelScores(
            np.concatenate([part.flood_levels for part in side]),
            np.concatenate([part.epochs for part in side]),
            {name: np.concatenate([p.scores[name] for p in side]) for name in side[0].scores},
        )
        for side in zip(*parts)
    )
    return last, best


def count_epochs(flood_levels: Sequence[float], epochs: int, device: torch.device) -> int:
    """Return how many epochs of groups of models `train_early_stopping` trains."""
    return len(_groups(flood_levels, device)) * epochs


def _groups(flood_levels: Sequence[float], device: torch.device) -> list[Sequence[float]]:
    size = MODELS_AT_ONCE[device.type]
    return [flood_levels[first : first + size] for first in range(0, len(flood_levels), size)]


def _train_group_early_stopping(
    network: MLP,
    data: Dataset,
    flood_levels: Sequence[float],
    settings: TrainSettings,
    device: torch.device,
    generator: torch.Generator,
    on_epoch: Callable[[], None],
) -> tuple[LevelScores, LevelScores]:
    stack = StackedMLP(network, len(flood_levels), device)
    val = EvaluationSplit(data.val, len(flood_levels), device)
    best_folded = stack.fold()
    best_accuracy = torch.full([len(flood_levels)], -1.0, device=device)
    best_epoch = torch.zeros(len(flood_levels), dtype=torch.int64, device=device)
    for epoch, batch_losses, _ in train_epochs(
        stack, data.train, flood_levels, settings, generator
    ):
        if epoch == 0:
            continue
        folded = stack.fold()
        accuracy = val.scores(folded)[SCORES.index("accuracy")]
        improved = accuracy > best_accuracy
        # The one wait for a GPU in an epoch.
        losses, any_improved = (
            torch.cat([batch_losses, improved.any()[None]]).cpu().split([len(flood_levels), 1])
        )
        _check_finite(losses.numpy(), {}, epoch, flood_levels, settings)
        if any_improved:
            best_accuracy[improved] = accuracy[improved]
            best_epoch[improved] = epoch
            for best_matrix, matrix in zip(best_folded, folded):
                best_matrix[improved] = matrix[improved]
        on_epoch()
    last_epoch = torch.full_like(best_epoch, settings.epochs)
    test = EvaluationSplit(data.test, len(flood_levels), device)
    return tuple(
        LevelScores(
            np.array(flood_levels),
            epochs.cpu().numpy(),
            {
                f"{name}_{score}": values.cpu().double().numpy()
                for name, split in (("val", val), ("test", test))
                for score, values in zip(SCORES, split.scores(matrices))
            },
        )
        for epochs, matrices in ((last_epoch, folded), (best_epoch, best_folded))
    )


def train_epochs(
    stack: StackedMLP,
    split: Split,
    flood_levels: Sequence[float],
    settings: TrainSettings,
    generator: torch.Generator,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Train the stack's K models, one flood level each, and yield after every epoch.

    Yields the epoch (first 0, before training), each model's mean loss over the epoch's
    mini-batches [K] in nats, and the share of the mini-batches that were flooded [K], both on
    the device. The caller may read the stack between epochs.
    """
    parameters = list(stack.parameters.values())
    device = parameters[0].device
    levels = _flood_level_tensor(flood_levels, device)
    inputs = torch.from_numpy(split.inputs).to(device)
    labels = torch.from_numpy(split.labels).to(device)
    # The fused optimizers act element by element, so the stacked models do not mix.
    if settings.optimizer == "sgd":
        optimizer = torch.optim.SGD(
            parameters,
            lr=settings.learning_rate,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            fused=True,
        )
    else:
        optimizer = torch.optim.Adam(
            parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )

    yield 0, torch.zeros_like(levels), torch.zeros_like(levels)
    for epoch in range(1, settings.epochs + 1):
        batches = torch.randperm(len(labels), generator=generator).to(device, non_blocking=True)
        batches = batches.split(settings.batch_size)
        loss_sum = torch.zeros_like(levels)
        flooded = torch.zeros_like(levels)
        for batch in batches:
            losses = stack.losses(inputs[batch], labels[batch])
            optimizer.zero_grad()
            flood(losses, levels).sum().backward()
            optimizer.step()
            loss_sum += losses.detach()
            flooded += losses.detach() < levels
        yield epoch, loss_sum / len(batches), flooded / len(batches)


def _flood_level_tensor(flood_levels: Sequence[float], device: torch.device) -> Tensor:
    for level in flood_levels:
        if not 0 <= level < math.inf:
            raise ValueError(f"flood_levels {level}: finite numbers >= 0")
    return torch.tensor(flood_levels, dtype=torch.float32, device=device)


class EvaluationSplit:
    """A split on the device, ready to score K models."""

    def __init__(self, split: Split, copies: int, device: torch.device) -> None:
        self.inputs = with_constant(torch.from_numpy(split.inputs).to(device))
        self.targets = [
            torch.from_numpy(labels).to(device) for labels in (split.labels, split.clean_labels)
        ]
        self.chunk = max(1, EVALUATION_ROWS[device.type] // copies)

    @torch.no_grad()
    def scores(self, folded: list[Tensor]) -> list[Tensor]:
        """Return the four SCORES of K folded networks, [K] each, from one forward pass."""
        logits = folded_logits(folded, self.inputs, self.chunk)
        log_probabilities = logits.log_softmax(dim=-1)
        predictions = logits.argmax(dim=-1)
        scores = []
        for labels in self.targets:
            index = labels.expand(len(logits), -1).unsqueeze(-1)
            scores.append(-log_probabilities.gather(-1, index).mean(dim=(1, 2)))
            scores.append((predictions == labels).float().mean(dim=1))
        return scores


def _check_finite(
    batch_losses: np.ndarray,
    metrics: dict[str, np.ndarray],
    epoch: int,
    flood_levels: Sequence[float],
    settings: TrainSettings,
) -> None:
    named = {"mini-batch loss": batch_losses}
    named.update((name, values) for name, values in metrics.items() if "loss" in name)
    for name, values in named.items():
        for model in np.flatnonzero(~np.isfinite(values)):
            raise DivergenceError(
                f"model {model} (flood level {flood_levels[model]:g}): {name} is {values[model]} "
                f"in epoch {epoch}, with learning rate {settings.learning_rate:g}"
            )


def choose_level(
    flood_levels: Sequence[float],
    val_accuracy: Sequence[float],
    val_loss: Sequence[float] | None = None,
) -> int:
    """Return the index of the flood level with the best validation accuracy.

    Among equal accuracies the lower validation loss wins where losses are given, then the lower
    level. 0, no flooding, is a level like any other.
    """
    losses = np.zeros(len(flood_levels)) if val_loss is None else np.asarray(val_loss)
    return int(np.lexsort((flood_levels, losses, -np.asarray(val_accuracy)))[0])
