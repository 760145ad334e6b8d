"""The command line that the scripts share: flags, one-line errors, devices and signals.

A flag means the same in every script; only the defaults differ. Nothing heavy is imported
here before the flags are read, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

if TYPE_CHECKING:
    import torch

Settings = TypeVar("Settings")

DATASETS = ("sinusoid2d", "sinusoid", "gaussian", "spiral")
LEARNING_RATES = {"sgd": 0.01, "adam": 0.001}  # [released code]
SGD_MOMENTUM = 0.9  # [released code]


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
    def value_errors(self) -> Iterator[None]:
        """Turn a ValueError that starts with a setting's name into an error about its flag."""
        try:
            yield
        except ValueError as error:
            name, _, rest = str(error).partition(" ")
            self.error(f"--{name.replace('_', '-')} {rest}")


def add_shared_flags(parser: Parser, defaults: Mapping[str, object]) -> None:
    """Add the flags of data, network, optimizer and machine, with this script's defaults."""
    data = parser.add_argument_group("data")
    data.add_argument(
        "--spiral-noise", type=float, default=0.0, metavar="TAU",
        help="standard deviation of the points around the arms of the spiral",
    )  # fmt: skip
    for split, size in (("train", "100"), ("val", "100"), ("test", "20 000")):
        doubled = "" if split == "test" else "; gaussian and spiral 200"
        data.add_argument(
            f"--{split}-samples", type=int, metavar="N", default=argparse.SUPPRESS,
            help=f"{split} examples in all (default: the authors' {size}{doubled})",
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
        "--momentum", type=float, default=argparse.SUPPRESS,
        help=f"momentum, of sgd only (default: {SGD_MOMENTUM})",
    )  # fmt: skip
    training.add_argument("--weight-decay", type=float, default=0.0, help="weight decay")
    training.add_argument(
        "--batch-size", type=int, metavar="N", default=defaults["batch_size"],
        help="examples of a mini-batch; the last one of an epoch has what is left",
    )  # fmt: skip
    training.add_argument(
        "--epochs", type=int, metavar="N", default=defaults["epochs"],
        help="passes over the training examples",
    )  # fmt: skip
    machine = parser.add_argument_group("run")
    machine.add_argument("--seed", type=int, default=0, help="seed of every random draw")
    machine.add_argument(
        "--device", choices=("auto", "cpu", "cuda", "mps"), default="auto",
        help="device to train on; auto is a GPU where there is one",
    )  # fmt: skip
    machine.add_argument(
        "--tf32", action="store_true",
        help="multiply in TF32 on a CUDA GPU: faster, with 10 bits of mantissa",
    )  # fmt: skip
    machine.add_argument(
        "--output-dir", type=Path, default=Path("."), metavar="DIR",
        help="folder for the files that the script saves",
    )  # fmt: skip


def fill_defaults(arguments: argparse.Namespace) -> None:
    """Set what follows from other flags: learning rate and momentum from the optimizer.

    Raises:
        ValueError: a momentum is given for Adam, or the seed is negative.
    """
    sgd = arguments.optimizer == "sgd"
    if "momentum" in arguments and not sgd:
        raise ValueError(f"momentum {arguments.momentum}: only with --optimizer sgd")
    if arguments.seed < 0:
        raise ValueError(f"seed {arguments.seed}: a whole number >= 0")
    given = vars(arguments)
    given.setdefault("learning_rate", LEARNING_RATES[arguments.optimizer])
    given.setdefault("momentum", SGD_MOMENTUM if sgd else 0.0)
    for split in ("train", "val", "test"):
        given.setdefault(f"{split}_samples", None)


def settings_from(settings_class: type[Settings], arguments: argparse.Namespace) -> Settings:
    """Make a settings dataclass from the flags that have its fields' names."""
    names = {field.name for field in fields(settings_class)}
    return settings_class(**{k: value for k, value in vars(arguments).items() if k in names})


def resolve_device(name: str, tf32: bool) -> torch.device:
    """Return the `torch.device` that `--device` names, set to multiply as `--tf32` says.

    Raises:
        ValueError: the device is not there, or cannot multiply in TF32.
    """
    import torch

    present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(device for device, there in present.items() if there)
    if not present[name]:
        there = ", ".join(device for device, is_there in present.items() if is_there)
        raise ValueError(f"device {name}: not on this machine, which has {there}")
    if tf32:
        if name != "cuda":
            raise ValueError(f"tf32 with device {name}: only with cuda")
        torch.set_float32_matmul_precision("high")
    return torch.device(name)


def check_output_dir(directory: Path) -> None:
    """Raise ValueError if files cannot be written to the folder; leaves nothing behind."""
    existing = directory.absolute()
    while not os.path.lexists(existing):
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(
            f"output_dir {directory}: a folder that can be written to ({error.strerror})"
        ) from error


def exit_on_signals() -> None:
    """End by SystemExit, with everything closed on the way, on Ctrl-C and on SIGTERM.

    A second signal does not disturb the closing. The exit status is 128 + the signal's number.
    """

    def leave(number: int, frame: object) -> NoReturn:
        for ignored in (signal.SIGINT, signal.SIGTERM):
            signal.signal(ignored, signal.SIG_IGN)
        print(f"\nstopped by {signal.Signals(number).name}", file=sys.stderr)
        sys.exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)
