"""What an experiment is made from: the settings of data, network and training.

Each checks itself when it is made, and needs nothing heavy to do so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# Raised by hand whenever a change to data, network or training changes the figures: cells of the
# table that an older version trained are then trained again.
FIGURES_VERSION = 1

# Examples in all, of train, validation and test. The released code counts `gaussian` and
# `spiral` per class: 100, 100 and 10 000.
DEFAULT_SAMPLES = {
    "sinusoid2d": (100, 100, 20_000),
    "sinusoid": (100, 100, 20_000),
    "gaussian": (200, 200, 20_000),
    "spiral": (200, 200, 20_000),
}

SPLITS = ("train", "val", "test")
# What a network is scored by, against the noisy and the clean labels of a split, and when.
SCORES = ("loss_noisy", "accuracy_noisy", "loss_clean", "accuracy_clean")
STOPPINGS = ("last epoch", "early")  # the epoch of best noisy validation accuracy


class SettingError(ValueError):
    """A setting is out of range: its name, its value and what is allowed."""

    def __init__(self, name: str, value: object, allowed: str) -> None:
        super().__init__(f"{name} {value}: {allowed}")
        self.name, self.value, self.allowed = name, value, allowed


def check(fits: bool, name: str, value: object, allowed: str) -> None:
    """Raise SettingError unless the value fits."""
    if not fits:
        raise SettingError(name, value, allowed)


def check_flood_level(level: float) -> None:
    """Raise SettingError unless the flood level is a finite number of nats >= 0."""
    check(0 <= level < math.inf, "flood_levels", level, "finite numbers of nats >= 0")


@dataclass(frozen=True)
class DataSettings:
    """What a data set is made from; together with the seed it fixes every bit of it.

    Sample counts are examples in all; None is the authors' size. `label_noise` is the fraction
    of labels flipped, `spiral_noise` the standard deviation (the paper's tau) around the arms.

    Raises:
        SettingError: the data set is unknown, or a value is outside what is said above.
    """

    dataset: str
    label_noise: float
    spiral_noise: float = 0.0
    train_samples: int | None = None
    val_samples: int | None = None
    test_samples: int | None = None

    def __post_init__(self) -> None:
        known = ", ".join(DEFAULT_SAMPLES)
        check(self.dataset in DEFAULT_SAMPLES, "dataset", repr(self.dataset), f"one of {known}")
        check(0 <= self.label_noise < 1, "label_noise", self.label_noise, "a fraction in [0, 1)")
        fits = 0 <= self.spiral_noise < math.inf
        check(fits, "spiral_noise", self.spiral_noise, "a finite number >= 0")
        for split, default in zip(SPLITS, DEFAULT_SAMPLES[self.dataset]):
            name = f"{split}_samples"
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")


@dataclass(frozen=True)
class ModelSettings:
    """The shape of the network.

    Raises:
        SettingError: a count is below 1.
    """

    hidden_layers: int
    hidden_units: int
    batch_norm: bool

    def __post_init__(self) -> None:
        for name in ("hidden_layers", "hidden_units"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")


@dataclass(frozen=True)
class TrainSettings:
    """How to train. `momentum` is SGD's; Adam has its own, with PyTorch's defaults.

    `eval_every` is in epochs; epoch 0 and the last one are always evaluated.

    Raises:
        SettingError: a value is outside its range.
    """

    optimizer: str
    learning_rate: float
    batch_size: int
    epochs: int
    momentum: float = 0.0
    weight_decay: float = 0.0
    eval_every: int = 1

    def __post_init__(self) -> None:
        check(self.optimizer in ("sgd", "adam"), "optimizer", repr(self.optimizer), "sgd or adam")
        rate, decay = self.learning_rate, self.weight_decay
        check(0 < rate < math.inf, "learning_rate", rate, "a finite number > 0")
        check(0 <= self.momentum < 1, "momentum", self.momentum, "a number in [0, 1)")
        check(0 <= decay < math.inf, "weight_decay", decay, "a finite number >= 0")
        for name in ("batch_size", "epochs", "eval_every"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")

    def check_batches(self, train_samples: int, batch_norm: bool) -> None:
        """Raise SettingError if batch norm would see a mini-batch of one example."""
        check(
            not (batch_norm and 1 in (train_samples % self.batch_size, self.batch_size)),
            "batch_size",
            self.batch_size,
            f"with batch norm every mini-batch needs at least 2 examples, and of {train_samples} "
            f"one would be alone",
        )
