"""What an experiment is made of, the command lines made from it, and how a script ends.

A setting is said once: here, in `datasets.Data`, or, if one script alone has it, at the top of that
script; a table, which has several values of some of `Data`'s, says these anew. Its name is the
flag, the string under it (or in `flag`) the flag's help: tyro reads them. A script's settings
*have* these parts; each part checks itself when it is made and raises SettingError, without any
heavy import. A setting whose default hangs on others is None until `filled()` makes a copy with it.
"""

import contextlib
import io
import json
import math
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, NoReturn, TextIO, TypeVar

import tyro
from tqdm import tqdm

# Raised by hand whenever a change to data, network or training changes the figures: raw figures of
# the table that an older version trained are then refused.
FIGURES_VERSION = 2

SPLITS = ("train", "val", "test")
# What a network is scored by, against the noisy and the clean labels of a split.
SCORES = ("loss_noisy", "accuracy_noisy", "loss_clean", "accuracy_clean")
SCORED_EPOCHS = ("last", "best")  # best: the first of highest noisy validation accuracy

DEFAULT_LEARNING_RATES = {"sgd": 0.01, "adam": 0.001}  # [released code]
RATES = ", ".join(f"{rate:g} for {name}" for name, rate in DEFAULT_LEARNING_RATES.items())
DEFAULT_SGD_MOMENTUM = 0.9  # [released code]

Settings = TypeVar("Settings")


class SettingError(Exception):
    """A setting is out of range: its name, its value and what is allowed."""

    def __str__(self) -> str:
        return "{} {}: {}".format(*self.args)


def check(fits: bool, name: str, value: object, allowed: str) -> None:
    """Raise SettingError unless the value fits."""
    if not fits:
        raise SettingError(name, value, allowed)


def check_counts(settings: object, *names: str) -> None:
    """Raise SettingError unless the settings of these names are at least 1, or to be filled in."""
    for name in names:
        count = getattr(settings, name)
        check(count is None or count >= 1, name, count, "at least 1")


def check_flood_levels(levels: Iterable[float]) -> None:
    """Raise SettingError unless the flood levels are finite numbers of nats >= 0."""
    for level in levels:
        check(0 <= level < math.inf, "flood_levels", level, "finite numbers of nats >= 0")


def check_seed(seed: int, trials: int) -> None:
    """Raise SettingError unless every generator takes the seed of every trial."""
    allowed = "from 0 to 4294967295, the last trial's too"
    check(0 <= seed <= 2**32 - trials, "seed", seed, allowed)


def make_output_dir(folder: Path) -> None:
    """Make the folder if it is not there; SettingError unless files can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        allowed = f"a folder that can be written to ({error.strerror})"
        raise SettingError("output_dir", folder, allowed) from error


def fill(settings: Settings, **defaults: object) -> Settings:
    """Return a copy in which settings that are None have these defaults."""
    missing = [name for name in defaults if getattr(settings, name) is None]
    return replace(settings, **{name: defaults[name] for name in missing})


def flat(settings: object) -> dict[str, object]:
    """Return settings by their names, those of their parts among them, as JSON keeps them."""
    values = {}
    for name, value in json.loads(json.dumps(asdict(settings), default=str)).items():
        values |= value if isinstance(value, dict) else {name: value}
    return values


def flag(metavar: str | None = None, default: str | None = None, help: str | None = None) -> object:
    """How `--help` shows a flag: the name of its value, what is said of its default, its text."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=default, help=help)


Count = Annotated[int, flag("N")]
Switch = Annotated[bool, tyro.conf.FlagCreatePairsOff]  # no --no-... beside it
# Settings of more than one script, with their help.
Seed = Annotated[int, flag("N", help="seed of every random draw, from 0 to 4294967295")]
DeviceName = Annotated[
    Literal["auto", "cpu", "cuda"],
    flag(help="device to train on; auto is a GPU where there is one"),
]
OutputDir = Annotated[
    Path, flag("DIR", help="folder for the files that the script saves, made if it is not there")
]


@dataclass(frozen=True, kw_only=True)
class Model:
    """The shape of the network."""

    hidden_layers: Count = 4
    """hidden layers"""
    hidden_units: Count = 500
    """units of a hidden layer"""
    batch_norm: bool = True
    """batch normalisation after each hidden linear layer, which then has no bias"""

    def __post_init__(self) -> None:
        check_counts(self, "hidden_layers", "hidden_units")


@dataclass(frozen=True, kw_only=True)
class Training:
    """How to train. Adam has PyTorch's defaults for all that is not said here."""

    optimizer: Literal["sgd", "adam"]
    """optimizer"""
    learning_rate: Annotated[float | None, flag("RATE", f"(default: {RATES})")] = None
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
        rate, momentum, decay = self.learning_rate, self.momentum, self.weight_decay
        optimizer, flood_on = self.optimizer, self.flood_on
        check(optimizer in DEFAULT_LEARNING_RATES, "optimizer", repr(optimizer), "sgd or adam")
        check(flood_on in ("batch", "example"), "flood_on", repr(flood_on), "batch or example")
        check(rate is None or 0 < rate < math.inf, "learning_rate", rate, "a finite number > 0")
        check(momentum is None or 0 <= momentum < 1, "momentum", momentum, "a number in [0, 1)")
        check(optimizer == "sgd" or not momentum, "momentum", momentum, "only with sgd")
        check(0 <= decay < math.inf, "weight_decay", decay, "a finite number >= 0")
        check_counts(self, "batch_size", "epochs")

    def filled(self) -> "Training":
        """Return a copy that has the defaults of learning rate and momentum for its optimizer."""
        momentum = DEFAULT_SGD_MOMENTUM if self.optimizer == "sgd" else 0.0
        return fill(self, learning_rate=DEFAULT_LEARNING_RATES[self.optimizer], momentum=momentum)

    def check_batches(self, train_samples: int, batch_norm: bool) -> None:
        """Raise SettingError if batch norm would see a mini-batch of one example."""
        alone = batch_norm and 1 in (train_samples % self.batch_size, self.batch_size)
        allowed = "with batch norm every mini-batch needs at least 2 examples, and of "
        check(not alone, "batch_size", self.batch_size, f"{allowed}{train_samples} one is alone")


def parse_flags(settings: type[Settings], description: str | None) -> Settings:
    """Make a script's settings, filled, from the command line; a wrong one ends the script.

    `description` is the script's docstring, of which `--help` shows the first paragraph; under
    `python -OO` there is none. The flags of the settings' parts stand beside the script's own. From
    here on no stream stops the script, and signals end it without a traceback.
    """
    mend_streams()
    exit_on_signals()
    first = " ".join((description or "").split("\n\n")[0].split())
    if shutil.get_terminal_size().columns < 40:
        os.environ["COLUMNS"] = "40"  # in less tyro may never end
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.HelptextFromCommentsOff)
    with exit_on(SettingError, status=2):
        try:
            made = tyro.cli(settings, description=first, config=config)
        except BrokenPipeError:  # --help | head
            _silence(sys.stdout)
            sys.exit()
        return made.filled() if hasattr(made, "filled") else made


@contextlib.contextmanager
def exit_on(*errors: type[Exception], status: int = 1) -> Iterator[None]:
    """End the script with one line on standard error where one of the errors is raised."""
    try:
        yield
    except errors as error:
        _complain(error)
        sys.exit(status)


def _complain(error: Exception) -> None:
    text = " ".join(str(error).split())
    if isinstance(error, SettingError):
        text = f"--{error.args[0].replace('_', '-')} {text.partition(' ')[2]}"
    print(f"{Path(sys.argv[0]).name}: error: {text}", file=sys.stderr)


@contextlib.contextmanager
def noting(failures: list[Exception], *errors: type[Exception]) -> Iterator[None]:
    """Note one of the errors where it is raised, and go on: it costs only what raised it."""
    try:
        yield
    except errors as error:
        failures.append(error)


def tell(failures: list[Exception], *words: object) -> None:
    """Print, and go on where nobody reads it any more or a disk is full."""
    try:
        print(*words, flush=True)
    except OSError as error:
        failures.append(error)
        _silence(sys.stdout)


def _silence(stream: TextIO) -> None:
    """Send what is left in a broken stream, and what comes, nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def end_with(failures: Sequence[Exception]) -> None:
    """End the script with status 1, and a line for the first failure of each kind, if any."""
    for kind in dict.fromkeys(map(type, failures)):
        _complain(next(failure for failure in failures if type(failure) is kind))
    if failures:
        sys.exit(1)


def exit_on_signals() -> None:
    """End by SystemExit, and no traceback, on Ctrl-C and on SIGTERM; 128 + the signal's number."""

    def leave(number: int, frame: object) -> NoReturn:
        signal.signal(number, signal.SIG_DFL)  # a second one ends it at once
        print(f"\nstopped by {signal.Signals(number).name}", file=sys.stderr)
        sys.exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)


def mend_streams() -> None:
    """Let no output stop a script: its streams may be closed, or know no character but ASCII."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # a library's file would take its number
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        if isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="replace")


class ProgressBar(tqdm):
    """Counts `unit`s, with the time left; in a log file it writes a line every 30 seconds.

    Given an iterable, it counts what is taken of it. Where nobody reads it any more it is silent.
    """

    def __init__(self, total: int, unit: str, digits: int = 0, **options: object) -> None:
        seconds, columns = 30, 0
        if sys.stderr.isatty():  # which may not say its size
            seconds, columns = 0.1, os.get_terminal_size(sys.stderr.fileno()).columns
        counted = f"{{n:.{digits}f}} of {{total}} {unit}s [{{elapsed}}<{{remaining}}{{postfix}}]"
        super().__init__(
            total=total, leave=False, miniters=0, mininterval=seconds, delay=seconds - 0.1,
            ncols=columns or 80, nrows=20, bar_format="{percentage:3.0f}%|{bar}| " + counted,
            **options,
        )  # fmt: skip

    def display(self, *arguments: object, **options: object) -> None:
        try:
            super().display(*arguments, **options)
        except OSError:
            _silence(sys.stderr)
