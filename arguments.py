"""The command line that the scripts share: flags and one-line errors.

A flag means the same in every script; only the defaults differ. Nothing heavy is imported
here before the flags are read, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import NoReturn, TypeVar

from settings import DEFAULT_SAMPLES, SettingError, check

Settings = TypeVar("Settings")

DATASETS = tuple(DEFAULT_SAMPLES)
LEARNING_RATES = {"sgd": 0.01, "adam": 0.001}  # [released code]
SGD_MOMENTUM = 0.9  # [released code]
MAX_SEED = 2**32 - 1


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line on standard error and exit status 2."""

    def __init__(self, description: str) -> None:
        super().__init__(
            description=description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        # Under torchrun all processes of a machine find the same mistake, and one tells.
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n" if first else None)

    @contextlib.contextmanager
    def setting_errors(self) -> Iterator[None]:
        """Turn a SettingError into an error about the flag of the setting's name."""
        try:
            yield
        except SettingError as error:
            self.error(f"--{error.name.replace('_', '-')} {error.value}: {error.allowed}")


def add_shared_flags(parser: Parser, defaults: Mapping[str, object]) -> None:
    """Add the flags of data, network, optimizer and machine, with this script's defaults."""
    data = parser.add_argument_group("data")
    data.add_argument(
        "--spiral-noise", type=float, default=0.0, metavar="TAU",
        help="standard deviation of the points around the arms of the spiral",
    )  # fmt: skip
    double = "; gaussian and spiral 200"
    for split, name, size in (
        ("train", "training", f"100{double}"),
        ("val", "validation", f"100{double}"),
        ("test", "test", "20 000"),
    ):
        data.add_argument(
            f"--{split}-samples", type=int, metavar="N", default=argparse.SUPPRESS,
            help=f"{name} examples in all (default: the authors' {size})",
        )  # fmt: skip
    network = parser.add_argument_group("network")
    network.add_argument(
        "--hidden-layers", type=int, metavar="N", default=defaults["hidden_layers"],
        help="hidden layers",
    )  # fmt: skip
    network.add_argument(
        "--hidden-units", type=int, metavar="N", default=500, help="units of a hidden layer"
    )
    network.add_argument(
        "--batch-norm", action=argparse.BooleanOptionalAction, default=defaults["batch_norm"],
        help="batch normalisation after each hidden linear layer, which then has no bias",
    )  # fmt: skip
    training = parser.add_argument_group("training")
    training.add_argument(
        "--optimizer", choices=tuple(LEARNING_RATES), default=defaults["optimizer"],
        help="optimizer",
    )  # fmt: skip
    training.add_argument(
        "--learning-rate", type=float, metavar="RATE", default=argparse.SUPPRESS,
        help="learning rate (default: 0.01 for sgd, 0.001 for adam)",
    )  # fmt: skip
    training.add_argument(
        "--momentum", type=float, metavar="M", default=argparse.SUPPRESS,
        help=f"momentum, of sgd only (default: {SGD_MOMENTUM})",
    )  # fmt: skip
    training.add_argument(
        "--weight-decay", type=float, metavar="RATE", default=0.0, help="weight decay"
    )
    training.add_argument(
        "--batch-size", type=int, metavar="N", default=defaults["batch_size"],
        help="examples of a mini-batch; the last one of an epoch has what is left",
    )  # fmt: skip
    training.add_argument(
        "--epochs", type=int, metavar="N", default=defaults["epochs"],
        help="passes over the training examples",
    )  # fmt: skip
    machine = parser.add_argument_group("run")
    machine.add_argument(
        "--seed", type=int, metavar="N", default=0,
        help=f"seed of every random draw, from 0 to {MAX_SEED}",
    )  # fmt: skip
    machine.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto",
        help="device to train on; auto is a GPU where there is one",
    )  # fmt: skip
    add_output_dir(machine)


def add_output_dir(parser: argparse._ActionsContainer) -> None:
    """Add the flag of the folder that files are saved in."""
    parser.add_argument(
        "--output-dir", type=Path, default=Path("."), metavar="DIR",
        help="folder for the files that the script saves, made if it is not there",
    )  # fmt: skip


def fill_defaults(arguments: argparse.Namespace) -> None:
    """Check the shared flags, and set what follows from others: learning rate and momentum.

    Raises:
        SettingError: a momentum is given for Adam, the seed or the number of trials is out of
            range, or the output folder cannot be written to.
    """
    sgd = arguments.optimizer == "sgd"
    given = vars(arguments)
    check(sgd or "momentum" not in given, "momentum", given.get("momentum"), "only with sgd")
    check(0 <= arguments.seed <= MAX_SEED, "seed", arguments.seed, f"from 0 to {MAX_SEED}")
    check(arguments.trials >= 1, "trials", arguments.trials, "at least 1")
    given.setdefault("learning_rate", LEARNING_RATES[arguments.optimizer])
    given.setdefault("momentum", SGD_MOMENTUM if sgd else 0.0)
    check_output_dir(arguments.output_dir)


def settings_from(
    settings_class: type[Settings], arguments: argparse.Namespace, **changes: object
) -> Settings:
    """Make a settings dataclass from the flags that have its fields' names."""
    names = {field.name for field in fields(settings_class)}
    given = {**vars(arguments), **changes}
    return settings_class(**{name: value for name, value in given.items() if name in names})


def check_output_dir(directory: Path) -> None:
    """Raise SettingError if files cannot be written to the folder; leaves nothing behind."""
    existing = directory.absolute()
    while not os.path.lexists(existing):
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        allowed = f"a folder that can be written to ({error.strerror})"
        raise SettingError("output_dir", directory, allowed) from error
