"""What an experiment is made from, and the command lines made from it.

A setting is said once, here, with the data sets or, if one script alone has it, at the top of that
script: its name is the flag, the string under it the flag's help (tyro reads both). A dataclass
checks itself when it is made, and raises SettingError, without any heavy import.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NoReturn, TypeVar

import tyro
from tqdm import tqdm

# Raised by hand whenever a change to data, network or training changes the figures: cells of the
# table that an older version trained are then refused.
FIGURES_VERSION = 1

SPLITS = ("train", "val", "test")
# What a network is scored by, against the noisy and the clean labels of a split, and when.
SCORES = ("loss_noisy", "accuracy_noisy", "loss_clean", "accuracy_clean")
STOPPINGS = ("last epoch", "early")  # the epoch of best noisy validation accuracy

DEFAULT_LEARNING_RATES = {"sgd": 0.01, "adam": 0.001}  # [released code]
DEFAULT_SGD_MOMENTUM = 0.9  # [released code]

Flags = TypeVar("Flags")


class SettingError(Exception):
    """A setting is out of range: its name, its value and what is allowed."""

    def __str__(self) -> str:
        return "{} {}: {}".format(*self.args)


def check(fits: bool, name: str, value: object, allowed: str) -> None:
    """Raise SettingError unless the value fits."""
    if not fits:
        raise SettingError(name, value, allowed)


def check_flood_levels(levels: Iterable[float]) -> None:
    """Raise SettingError unless the flood levels are finite numbers of nats >= 0."""
    for level in levels:
        check(0 <= level < math.inf, "flood_levels", level, "finite numbers of nats >= 0")


def check_counts(settings: object, *names: str) -> None:
    """Raise SettingError unless the settings of these names are at least 1."""
    for name in names:
        check(getattr(settings, name) >= 1, name, getattr(settings, name), "at least 1")


def fill(settings: object, **defaults: object) -> None:
    """Set the settings that are None to defaults that depend on others."""
    for name, default in defaults.items():
        if getattr(settings, name) is None:
            object.__setattr__(settings, name, default)


def flag(metavar: str, default: str | None = None) -> object:
    """How `--help` shows a flag: the name of its value, and what is said of its default."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=default)


OptimizerName = Literal["sgd", "adam"]
Count = Annotated[int, flag("N")]
LearningRate = Annotated[float | None, flag("RATE", "(default: 0.01 for sgd, 0.001 for adam)")]


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
        check_counts(self, "hidden_layers", "hidden_units")


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How to train. Adam has PyTorch's defaults for all that is not said here."""

    optimizer: OptimizerName
    """optimizer"""
    learning_rate: LearningRate = None
    """learning rate"""
    batch_size: Count
    """examples of a mini-batch; the last one of an epoch has what is left"""
    epochs: Count
    """passes over the training examples"""
    momentum: Annotated[float | None, flag("M", f"(default: {DEFAULT_SGD_MOMENTUM})")] = None
    """momentum, of sgd only"""
    weight_decay: Annotated[float, flag("RATE")] = 0.0
    """weight decay"""
    flood_on: Literal["batch", "example"] = "batch"
    """flood the mean loss of a batch, as the paper does, or each example's (iFlood, ICLR 2022)"""

    def __post_init__(self) -> None:
        rates, sgd = DEFAULT_LEARNING_RATES, self.optimizer == "sgd"
        check(self.optimizer in rates, "optimizer", repr(self.optimizer), "sgd or adam")
        momentum = DEFAULT_SGD_MOMENTUM if sgd else 0.0
        fill(self, learning_rate=rates[self.optimizer], momentum=momentum)
        rate, momentum, decay = self.learning_rate, self.momentum, self.weight_decay
        check(0 < rate < math.inf, "learning_rate", rate, "a finite number > 0")
        check(0 <= momentum < 1, "momentum", momentum, "a number in [0, 1)")
        check(sgd or momentum == 0, "momentum", momentum, "only with sgd")
        check(0 <= decay < math.inf, "weight_decay", decay, "a finite number >= 0")
        flood_on = self.flood_on
        check(flood_on in ("batch", "example"), "flood_on", repr(flood_on), "batch or example")
        check_counts(self, "batch_size", "epochs")

    def check_batches(self, train_samples: int, batch_norm: bool) -> None:
        """Raise SettingError if batch norm would see a mini-batch of one example."""
        alone = batch_norm and 1 in (train_samples % self.batch_size, self.batch_size)
        allowed = "with batch norm every mini-batch needs at least 2 examples, and of "
        check(not alone, "batch_size", self.batch_size, f"{allowed}{train_samples} one is alone")


@dataclass(frozen=True, kw_only=True)
class OutputSettings:
    """Where files go."""

    output_dir: Annotated[Path, flag("DIR")] = Path(".")
    """folder for the files that the script saves, made if it is not there"""

    def __post_init__(self) -> None:
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.output_dir).close()
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
        check(0 <= self.seed < 2**32, "seed", self.seed, "from 0 to 4294967295")
        super().__post_init__()


def parse_flags(settings: type[Flags], description: str) -> Flags:
    """Make a settings dataclass from the command line; what is wrong with it ends the script.

    `description` is a script's docstring, of which `--help` shows the first paragraph.
    """
    first = " ".join(description.split("\n\n")[0].split())
    with ending_on(SettingError, status=2):
        return tyro.cli(settings, description=first, config=(tyro.conf.HelptextFromCommentsOff,))


@contextlib.contextmanager
def ending_on(*errors: type[Exception], status: int = 1) -> Iterator[None]:
    """End the script with one line on standard error where one of the errors is raised."""
    try:
        yield
    except errors as error:
        text = " ".join(str(error).split())
        if isinstance(error, SettingError):
            name, value, allowed = error.args
            text = f"--{name.replace('_', '-')} {value}: {allowed}"
        print(f"{Path(sys.argv[0]).name}: error: {text}", file=sys.stderr)
        sys.exit(status)


def exit_on_signals() -> None:
    """End by SystemExit, and no traceback, on Ctrl-C and on SIGTERM; 128 + the signal's number."""

    def leave(number: int, frame: object) -> NoReturn:
        signal.signal(number, signal.SIG_DFL)  # a second one ends it at once
        print(f"\nstopped by {signal.Signals(number).name}", file=sys.stderr)
        sys.unraisablehook = lambda _: None  # a library that was in the middle of something
        sys.exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)


def progress_bar(total: int, unit: str, digits: int = 0) -> tqdm:
    """Return a bar that counts `unit`s, with the time left; in a log file one every 30 seconds."""
    seconds, columns = 30, 0
    if sys.stderr.isatty():  # which may not say its width
        seconds, columns = 0.1, os.get_terminal_size(sys.stderr.fileno()).columns
    counted = f"{{n:.{digits}f}} of {{total}} {unit}s [{{elapsed}}<{{remaining}}{{postfix}}]"
    return tqdm(
        total=total, leave=False, miniters=0, mininterval=seconds, maxinterval=seconds,
        delay=seconds - 0.1, ncols=columns or 80, bar_format="{percentage:3.0f}%|{bar}| " + counted,
    )  # fmt: skip
