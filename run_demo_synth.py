"""Train with and without flooding on the paper's synthetic data and see the difference.

Without flags this is the authors' demo: the two-dimensional sinusoid with a tenth of the labels
flipped, an MLP without flooding and with three flood levels. It saves `synth_loss.png`,
`synth_acc.png` and `synth_boundary.png`, prints a table and logs every run to MLflow.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from arguments import DATASETS, Parser, add_shared_flags, fill_defaults, settings_from
from settings import DataSettings, ModelSettings, TrainSettings, check_flood_level

if TYPE_CHECKING:
    import pandas as pd

# The authors' demo [released code]: setting 1, SGD, is the one that it runs; setting 2, Adam,
# is present there but never run.
DEFAULTS = {
    "hidden_layers": 4,
    "batch_norm": True,
    "optimizer": "sgd",
    "batch_size": 200,
    "epochs": 200,
}
PATIENCE_SECONDS = 8.0  # how long the end of a demo waits for a store that is away
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
    parser.add_argument(
        "--trials", type=int, default=1, metavar="N",
        help="trials; trial t draws data and weights from seed + t",
    )  # fmt: skip
    add_shared_flags(parser, DEFAULTS)
    arguments = parser.parse_args()
    with parser.setting_errors():
        fill_defaults(arguments)
        levels = getattr(arguments, "flood_levels", FLOOD_LEVELS[arguments.optimizer])
        for level in levels:
            check_flood_level(level)
    arguments.flood_levels = sorted({0.0, *levels})
    return parser, arguments


def main() -> None:
    parser, arguments = parse_arguments()
    with parser.setting_errors():
        data_settings = settings_from(DataSettings, arguments)
        model_settings = settings_from(ModelSettings, arguments)
        train_settings = settings_from(TrainSettings, arguments)
        train_settings.check_batches(data_settings.train_samples, model_settings.batch_norm)

    # Heavy imports, only now: --help and wrong flags are answered at once.
    import pandas as pd
    import torch

    import plot
    import tracking
    from datasets import make_dataset
    from models import MLP
    from process import exit_on_signals, prepare_process
    from progress import progress_bar
    from results import summarize
    from store import Store, TrackingError
    from train import DivergenceError, count_epochs, find_boundary, train

    exit_on_signals()
    with parser.setting_errors():
        device = prepare_process(arguments.device)
    levels = arguments.flood_levels
    parameters = {
        **vars(arguments),
        **asdict(data_settings),
        "flood_levels": " ".join(f"{level:g}" for level in levels),
        "device": device.type,
    }
    try:
        tags = tracking.experiment_tags(tracking.DEMO_DESCRIPTION, group_by="flood_level")
        store = Store(tracking.DEMO_EXPERIMENT, tags, PATIENCE_SECONDS)
    except TrackingError as error:
        parser.error(str(error))
    log = tracking.DemoLog(store, parameters, levels, device)
    print(plot.describe(parameters).replace("\n", "; "), f"on {device.type}", flush=True)

    history, first, missing = [], {}, None
    total = arguments.trials * count_epochs(levels, arguments.epochs, device)
    try:
        with store, progress_bar(total, "epoch") as bar:
            for seed in range(arguments.seed, arguments.seed + arguments.trials):
                data = make_dataset(data_settings, seed)
                generator = torch.Generator().manual_seed(seed)
                network = MLP(data.train.inputs.shape[1], model_settings, generator)
                log.start_trial(data_settings, seed, data)
                for now in train(
                    network, data, levels, train_settings, device, generator, on_epoch=bar.update
                ):
                    log.evaluation(now)
                    of_models = levels[now.models]
                    columns = {"seed": seed, "flood_level": of_models, "epoch": now.epoch}
                    history.append(pd.DataFrame({**columns, **now.metrics}))
                    bar.set_postfix_str(losses(history[-1]), refresh=False)
                    if seed == arguments.seed:  # the first trial's networks are drawn
                        first_data = data
                        for model, level in enumerate(of_models):
                            first[level] = [matrix[model, None] for matrix in now.folded]
            history = pd.concat(history, ignore_index=True)
            results = summarize(history, arguments.select_on)
            chosen, compared = plot.compared_level(history, arguments.select_on)
            boundary = None
            if network.linears[0].in_features == 2:
                shown = [first[level] for level in dict.fromkeys([0.0, compared])]
                boundary = find_boundary(shown, first_data.train)
            pictures = plot.draw_demo(history, parameters, boundary)
            with tempfile.TemporaryDirectory() as folder:
                # Logged before they are moved into place, where another demo may replace them.
                files = plot.save(pictures, Path(folder))
                log.result(results, chosen, plot.colors(levels, compared), files, boundary)
            paths = plot.save(pictures, arguments.output_dir)
    except DivergenceError as error:
        sys.exit(f"{parser.prog}: error: {error}")
    except TrackingError as error:
        missing = error

    print(f"\n{results}\n")
    print("Pictures:", *paths)
    for line in log.how_to_look():
        print(line)
    if missing:
        sys.exit(f"{parser.prog}: error: {missing}")


def losses(rows: pd.DataFrame) -> str:
    """Return the current losses of the models that train, for the progress bar."""
    shown = (
        f"{r.flood_level:g}: {r.train_loss_noisy:.2f}/{r.test_loss_clean:.2f}"
        for r in rows[:5].itertuples()
    )
    return f"train/test loss {', '.join(shown)}{' ...' if len(rows) > 5 else ''}"


if __name__ == "__main__":
    main()
