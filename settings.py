"""What an experiment is made from, and the command lines made from it.

A setting is said once, here or, if one script alone has it, at the top of that script: its name
is the flag, the string under it the flag's help (tyro reads both). A dataclass checks itself when
it is made, and raises SettingError; it needs nothing heavy to do so.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NoReturn, TypeVar

import tyro
from tqdm import tqdm

from datasets import DATASETS

# Raised by hand whenever a change to data, network or training changes the figures: cells of the
# table that an older version trained are then refused.
FIGURES_VERSION = 1

SPLITS = ("train", "val", "test")
# What a network is scored by, against the noisy and the clean labels of a split, and when.
SCORES = ("loss_noisy", "accuracy_noisy", "loss_clean", "accuracy_clean")
STOPPINGS = ("last epoch", "early")  # the epoch of best noisy validation accuracy

DEFAULT_LEARNING_RATES = {"sgd": 0.01, "adam": 0.001}  # [released code]
DEFAULT_SGD_MOMENTUM = 0.9  # [released code]
MAX_SEED = 2**32 - 1

DatasetName = Literal[tuple(DATASETS)]
OptimizerName = Literal["sgd", "adam"]
FloodedLoss = Literal["batch", "example"]
Flags = TypeVar("Flags")


def flag(metavar: str, default: str | None = None) -> object:
    """How `--help` shows a flag: the name of its value, and what is said of its default."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=default)


Count = Annotated[int, flag("N")]
SplitSize = Annotated[int | None, flag("N", "(default: the authors' size, see the README)")]


class SettingError(Exception):
    """A setting is out of range: its name, its value and what is allowed."""

    def __init__(self, name: str, value: object, allowed: str) -> None:
        super().__init__(name, value, allowed)  # from which pickle makes it again
        self.name, self.value, self.allowed = name, value, allowed

    def __str__(self) -> str:
        return f"{self.name} {self.value}: {self.allowed}"


def check(fits: bool, name: str, value: object, allowed: str) -> None:
    """Raise SettingError unless the value fits."""
    if not fits:
        raise SettingError(name, value, allowed)


def check_flood_level(level: float) -> None:
    """Raise SettingError unless the flood level is a finite number of nats >= 0."""
    check(0 <= level < math.inf, "flood_levels", level, "finite numbers of nats >= 0")


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """What a data set is made from; together with the seed it fixes every bit of it."""

    dataset: DatasetName
    """data set"""
    label_noise: Annotated[float, flag("FRACTION")]
    """fraction of the labels of each split that is flipped, in [0, 1)"""
    spiral_noise: Annotated[float, flag("TAU")] = 0.0
    """standard deviation of the points around the arms of the spiral (the paper's tau)"""
    train_samples: SplitSize = None
    """training examples in all"""
    val_samples: SplitSize = None
    """validation examples in all"""
    test_samples: SplitSize = None
    """test examples in all"""

    def __post_init__(self) -> None:
        known = ", ".join(DATASETS)
        check(self.dataset in DATASETS, "dataset", repr(self.dataset), f"one of {known}")
        check(0 <= self.label_noise < 1, "label_noise", self.label_noise, "a fraction in [0, 1)")
        fits = 0 <= self.spiral_noise < math.inf
        check(fits, "spiral_noise", self.spiral_noise, "a finite number >= 0")
        for split, size in zip(SPLITS, DATASETS[self.dataset].samples):
            name = f"{split}_samples"
            if getattr(self, name) is None:
                object.__setattr__(self, name, size)
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")


@dataclass(frozen=True, kw_only=True)
class Cell(DataSettings):
    """A cell of the table: one trial of one setting, with all its flood levels.

    The seed is the trial's: its data, initial weights and mini-batches are drawn from it.
    """

    seed: int

    def __str__(self) -> str:
        return f"{self.dataset}, label noise {self.label_noise:g}, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The shape of the network."""

    hidden_layers: Count
    """hidden layers"""
    hidden_units: Count = 500
    """units of a hidden layer"""
    batch_norm: bool
    """batch normalisation after each hidden linear layer, which then has no bias"""

    def __post_init__(self) -> None:
        for name in ("hidden_layers", "hidden_units"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How to train. Adam has PyTorch's defaults for all that is not said here."""

    optimizer: OptimizerName
    """optimizer"""
    learning_rate: Annotated[
        float | None, flag("RATE", "(default: 0.01 for sgd, 0.001 for adam)")
    ] = None
    """learning rate"""
    batch_size: Count
    """examples of a mini-batch; the last one of an epoch has what is left"""
    epochs: Count
    """passes over the training examples"""
    momentum: Annotated[float | None, flag("M", f"(default: {DEFAULT_SGD_MOMENTUM})")] = None
    """momentum, of sgd only"""
    weight_decay: Annotated[float, flag("RATE")] = 0.0
    """weight decay"""
    flood_on: FloodedLoss = "batch"
    """flood the mean loss of a mini-batch, the paper's method, or each example's (iFlood, ICLR 2022)"""

    def __post_init__(self) -> None:
        sgd = self.optimizer == "sgd"
        check(sgd or self.optimizer == "adam", "optimizer", repr(self.optimizer), "sgd or adam")
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", DEFAULT_LEARNING_RATES[self.optimizer])
        if self.momentum is None:
            object.__setattr__(self, "momentum", DEFAULT_SGD_MOMENTUM if sgd else 0.0)
        rate, decay = self.learning_rate, self.weight_decay
        on = self.flood_on
        check(on in ("batch", "example"), "flood_on", repr(on), "batch or example")
        check(0 < rate < math.inf, "learning_rate", rate, "a finite number > 0")
        check(0 <= self.momentum < 1, "momentum", self.momentum, "a number in [0, 1)")
        check(sgd or self.momentum == 0, "momentum", self.momentum, "only with sgd")
        check(0 <= decay < math.inf, "weight_decay", decay, "a finite number >= 0")
        for name in ("batch_size", "epochs"):
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


@dataclass(frozen=True, kw_only=True)
class OutputSettings:
    """Where files go."""

    output_dir: Annotated[Path, flag("DIR")] = Path(".")
    """folder for the files that the script saves, made if it is not there"""

    def __post_init__(self) -> None:
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.output_dir):
                pass
        except OSError as error:
            allowed = f"a folder that can be written to ({error.strerror})"
            raise SettingError("output_dir", self.output_dir, allowed) from error


@dataclass(frozen=True, kw_only=True)
class RunSettings(OutputSettings):
    """Where an experiment starts, and on what it runs."""

    seed: Count = 0
    """seed of every random draw, from 0 to 4294967295"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """device to train on; auto is a GPU where there is one"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 <= self.seed <= MAX_SEED, "seed", self.seed, f"from 0 to {MAX_SEED}")


def parse_flags(settings: type[Flags], description: str) -> Flags:
    """Make a settings dataclass from the command line; what is wrong with it ends the script.

    `description` is a script's docstring, of which `--help` shows the first paragraph.
    """
    first = " ".join(description.split("\n\n")[0].split())
    with setting_errors():
        return tyro.cli(settings, description=first, config=(tyro.conf.HelptextFromCommentsOff,))


@contextlib.contextmanager
def setting_errors() -> Iterator[None]:
    """End the script with an error about the flag that a SettingError is about."""
    try:
        yield
    except SettingError as error:
        fail(f"--{error.name.replace('_', '-')} {error.value}: {error.allowed}", status=2)


def fail(message: str, status: int = 1) -> NoReturn:
    """End the script with one line on standard error."""
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


def exit_on_signals() -> None:
    """End by SystemExit, and no traceback, on Ctrl-C and on SIGTERM; 128 + the signal's number."""

    def leave(number: int, frame: object) -> NoReturn:
        signal.signal(number, signal.SIG_DFL)  # a second one ends it at once
        print(f"\nstopped by {signal.Signals(number).name}", file=sys.stderr)
        sys.exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)


def progress_bar(total: int, unit: str, digits: int = 0) -> tqdm:
    """Return a bar with the time left; in a log file it is drawn every 30 seconds.

    It counts `unit`s with so many `digits`. A terminal that does not say its width has 80 columns.
    """
    seconds = 0.1 if sys.stderr.isatty() else 30
    return tqdm(
        total=total,
        leave=False,
        miniters=0,
        delay=0 if sys.stderr.isatty() else seconds,
        mininterval=seconds,
        maxinterval=seconds,
        ncols=shutil.get_terminal_size().columns,
        bar_format=f"{{percentage:3.0f}}%|{{bar}}| {{n:.{digits}f}} of {{total}} {unit}s "
        f"[{{elapsed}}<{{remaining}}{{postfix}}]",
    )
