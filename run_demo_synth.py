"""Train with and without flooding on the paper's synthetic data and see the difference.

Without flags this is the authors' demo: the two-dimensional sinusoid with a tenth of the labels
flipped, an MLP without flooding and with three flood levels. It saves `synth_loss.png` and
`synth_acc.png`, prints a table and logs every run to MLflow.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from arguments import (
    DATASETS,
    Parser,
    add_shared_flags,
    check_output_dir,
    exit_on_signals,
    fill_defaults,
    resolve_device,
    settings_from,
)

if TYPE_CHECKING:
    import numpy as np

    from train import History

# The authors' demo [released code]: setting 1, SGD, is the one that it runs; setting 2, Adam,
# is present there but never run.
DEFAULTS = {
    "hidden_layers": 4,
    "batch_norm": True,
    "optimizer": "sgd",
    "batch_size": 200,
    "epochs": 200,
}
FLOOD_LEVELS = {"sgd": (0.26, 0.27, 0.28), "adam": (0.24, 0.25, 0.26)}


def parse_arguments() -> tuple[Parser, argparse.Namespace]:
    parser = Parser(" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--dataset", choices=DATASETS, default="sinusoid2d", help="data set")
    parser.add_argument(
        "--label-noise", type=float, default=0.1, metavar="FRACTION",
        help="fraction of the labels of each split that is flipped, in [0, 1)",
    )  # fmt: skip
    parser.add_argument(
        "--flood-levels", type=float, nargs="+", metavar="B", default=argparse.SUPPRESS,
        help="flood levels in nats (default: 0.26 0.27 0.28 for sgd, 0.24 0.25 0.26 for adam); "
        "0, no flooding, is always among them",
    )  # fmt: skip
    parser.add_argument(
        "--select-on", choices=("clean", "noisy"), default="clean",
        help="validation labels whose last-epoch accuracy chooses the level; the authors' choice "
        "is clean, in practice there are only noisy ones",
    )  # fmt: skip
    parser.add_argument(
        "--eval-every", type=int, default=1, metavar="N",
        help="epochs between evaluations; the last epoch is always evaluated",
    )  # fmt: skip
    add_shared_flags(parser, DEFAULTS)
    arguments = parser.parse_args()
    with parser.value_errors():
        fill_defaults(arguments)
        check_output_dir(arguments.output_dir)
    levels = getattr(arguments, "flood_levels", FLOOD_LEVELS[arguments.optimizer])
    for level in levels:
        if not 0 <= level < math.inf:
            parser.error(f"--flood-levels {level}: finite numbers >= 0")
    arguments.flood_levels = sorted({0.0, *levels})
    return parser, arguments


def main() -> None:
    parser, arguments = parse_arguments()
    exit_on_signals()

    # Heavy imports, only now: --help and most wrong flags are answered at once.
    import torch

    from datasets import DataSettings, make_dataset
    from models import MLP, ModelSettings
    from train import DivergenceError, TrainSettings, prepare_process, train

    prepare_process()
    with parser.value_errors():
        device = resolve_device(arguments.device, arguments.tf32)
        data_settings = settings_from(DataSettings, arguments)
        model_settings = settings_from(ModelSettings, arguments)
        train_settings = settings_from(TrainSettings, arguments)
        train_settings.check_batches(data_settings.train_samples, model_settings.batch_norm)
    parameters = {
        **vars(arguments),
        **asdict(data_settings),
        "flood_levels": " ".join(f"{level:g}" for level in arguments.flood_levels),
        "device": device.type,
    }

    from plot import describe, draw_demo
    from tracking import DEMO_EXPERIMENT, DemoTracker, Store, TrackingError, ui_command

    try:
        store = Store(DEMO_EXPERIMENT)
    except TrackingError as error:
        parser.error(str(error))
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    setting = describe(parameters)
    print(setting.replace("\n", "; "), f"on {device.type}", flush=True)

    name = f"{arguments.dataset} {arguments.label_noise:g} {arguments.optimizer} {arguments.seed}"
    data = make_dataset(data_settings, arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    network = MLP(data.train.inputs.shape[1], model_settings, generator=generator)
    try:
        with (
            DemoTracker(store, name, parameters, arguments.flood_levels, device) as tracker,
            EpochBar(arguments.epochs, arguments.flood_levels) as bar,
        ):

            def on_epoch(epoch: int, metrics: Mapping[str, np.ndarray]) -> None:
                tracker.log_epoch(epoch, metrics)
                bar.show(epoch, metrics)

            history = train(
                network,
                data,
                arguments.flood_levels,
                train_settings,
                device,
                generator,
                on_epoch,
            )
            chosen, compared = history.choose(arguments.select_on)
            tracker.log_result(history, chosen, compared)
            pictures = []
            # Logged before they are moved into place, where another demo may replace them.
            with tempfile.TemporaryDirectory(dir=arguments.output_dir) as folder:
                for drawing in draw_demo(history, parameters, Path(folder)):
                    tracker.log_artifact(drawing)
                    pictures.append(drawing.replace(arguments.output_dir / drawing.name))
    except DivergenceError as error:
        sys.exit(f"{parser.prog}: error: {error}")

    print_table(history, chosen)
    print("\nPictures:", *pictures)
    print(f"Runs: {ui_command()}")


def print_table(history: History, chosen: int) -> None:
    """Print a row a flood level: last-epoch scores against the clean labels."""
    print("\nLast epoch, clean labels, accuracies in %:\n")
    print("flood level   train     val    test   test loss")
    for model, level in enumerate(history.flood_levels):
        train_accuracy, val_accuracy, test_accuracy = (
            100 * history.metrics[f"{split}_accuracy_clean"][-1, model]
            for split in ("train", "val", "test")
        )
        print(
            f"{f'{level:g}' if level else 'no flooding':11}"
            f"{train_accuracy:8.1f}{val_accuracy:8.1f}{test_accuracy:8.1f}"
            f"{history.metrics['test_loss_clean'][-1, model]:12.3f}"
            f"{'  <- chosen' if model == chosen else ''}"
        )


class EpochBar:
    """A progress bar over the epochs with the current losses; none where output is no terminal."""

    def __init__(self, epochs: int, flood_levels: Sequence[float]) -> None:
        from tqdm import tqdm

        self._flood_levels = flood_levels
        self._bar = tqdm(total=epochs, unit="epoch", disable=None, dynamic_ncols=True, leave=False)

    def __enter__(self) -> EpochBar:
        return self

    def __exit__(self, *exception) -> None:
        self._bar.close()

    def show(self, epoch: int, metrics: Mapping[str, np.ndarray]) -> None:
        if metrics:
            losses = (
                f"{level:g}: {train:.2f}/{test:.2f}"
                for level, train, test in zip(
                    self._flood_levels, metrics["train_loss"], metrics["test_loss_clean"]
                )
            )
            self._bar.set_postfix_str(f"train/test loss {', '.join(losses)}", refresh=False)
        self._bar.update(epoch - self._bar.n)


if __name__ == "__main__":
    main()
