"""Train with and without flooding on the paper's synthetic data, and compare.

Without flags this is the authors' demo: the two-dimensional sinusoid with a tenth of the labels
flipped, an MLP without flooding and with three flood levels. It saves `synth_loss.png`,
`synth_acc.png` and `synth_boundary.png`, prints a table and logs every run to MLflow.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import settings
from datasets import DatasetName, DataSettings
from settings import Count, ModelSettings, RunSettings, TrainSettings, ending_on

FLOOD_LEVELS = {"sgd": (0.26, 0.27, 0.28), "adam": (0.24, 0.25, 0.26)}


@dataclass(frozen=True, kw_only=True)
class DemoSettings(RunSettings, TrainSettings, ModelSettings, DataSettings):
    """All of a demo. The defaults are the authors' [released code].

    Setting 1, SGD, is the one that they run; setting 2, Adam, is there but never run.
    """

    dataset: DatasetName = "sinusoid2d"
    label_noise: Annotated[float, settings.flag("FRACTION")] = 0.1
    hidden_layers: Count = 4
    batch_norm: bool = True
    optimizer: settings.OptimizerName = "sgd"
    batch_size: Count = 200
    epochs: Count = 200
    flood_levels: Annotated[
        tuple[float, ...] | None,
        settings.flag("B [B ...]", "(default: 0.26 0.27 0.28 for sgd, 0.24 0.25 0.26 for adam)"),
    ] = None
    """flood levels in nats; 0, no flooding, is always among them"""
    select_on: Literal["clean", "noisy"] = "clean"
    """validation labels whose last-epoch accuracy chooses the level; in practice all are noisy"""
    eval_every: Count = 1
    """epochs between evaluations; the last epoch is always evaluated"""
    trials: Count = 1
    """trials; trial t draws data and weights from seed + t"""

    def __post_init__(self) -> None:
        for part in (DataSettings, ModelSettings, TrainSettings):
            part.__post_init__(self)
        settings.fill(self, flood_levels=FLOOD_LEVELS[self.optimizer])
        settings.check_flood_levels(self.flood_levels)
        object.__setattr__(self, "flood_levels", tuple(sorted({0.0, *self.flood_levels})))
        settings.check_counts(self, "eval_every", "trials")
        self.check_batches(self.train_samples, self.batch_norm)
        RunSettings.__post_init__(self)  # last: it makes the folder


if __name__ == "__main__":  # before the heavy imports: --help and Ctrl-C are answered at once
    settings.exit_on_signals()
    DEMO = settings.parse_flags(DemoSettings, __doc__)

import pandas as pd
import torch
from tqdm import tqdm

import plot
from datasets import Dataset, make_dataset
from models import MLP
from results import compared_level, summarize, write_files
from tracking import DemoLog, Outcome, TrackingError
from train import DivergenceError, count_epochs, find_boundary, prepare_process, train


@dataclass(frozen=True)
class Trial:
    """A trial that is over: when, in seconds since 1970; its history, see `Outcome`; its networks.

    `networks` are the last epoch's, folded, by flood level.
    """

    seed: int
    times: tuple[float, float]
    data: Dataset
    history: pd.DataFrame
    networks: dict[float, list[torch.Tensor]]


def main(demo: DemoSettings) -> None:
    settings.exit_on_signals()
    shown_levels = " ".join(f"{level:g}" for level in demo.flood_levels)
    with ending_on(settings.SettingError, TrackingError, status=2):
        device = prepare_process(demo.device)
        parameters = {**asdict(demo), "flood_levels": shown_levels, "device": device.type}
        log = DemoLog(demo, parameters, device)
    print(plot.describe(parameters).replace("\n", "; "), f"on {device.type}", flush=True)

    trials = []
    epochs = demo.trials * count_epochs(demo.flood_levels, demo.epochs, device)
    with ending_on(DivergenceError), settings.progress_bar(epochs, "epoch") as bar:
        for seed in range(demo.seed, demo.seed + demo.trials):
            trials.append(train_trial(demo, seed, device, bar))
            if demo.trials > 1:
                log.trial(seed, trials[-1].times, conclude(demo, trials[-1:]), pictures={})

    outcome = conclude(demo, trials)
    pictures = plot.png_files(plot.draw_demo(outcome.history, parameters, outcome.boundary))
    print(f"\n{outcome.summary}\n")
    print("Pictures:", *write_files(pictures, demo.output_dir), flush=True)
    if demo.trials > 1:
        log.result(trials[0].times[0], outcome, pictures)
    else:
        log.trial(demo.seed, trials[0].times, outcome, pictures)
    print(log.how_to_look(means=demo.trials > 1))
    with ending_on(TrackingError):
        log.finish()


def train_trial(demo: DemoSettings, seed: int, device: torch.device, bar: tqdm) -> Trial:
    """Draw a trial's data and network, and train a copy of it for each flood level."""
    started = time.time()
    data = make_dataset(demo, seed)
    generator = torch.Generator().manual_seed(seed)
    network = MLP(data.train.inputs.shape[1], demo, generator)
    history, networks = [], {}
    for now in train(
        network, data, demo.flood_levels, demo, device, generator,
        eval_every=demo.eval_every, on_epoch=bar.update,
    ):  # fmt: skip
        history.append(now.metrics.assign(seed=seed))
        networks |= now.networks()
    return Trial(seed, (started, time.time()), data, pd.concat(history), networks)


def conclude(demo: DemoSettings, trials: Sequence[Trial]) -> Outcome:
    """Sum trials up, and choose the level; the boundary is that of the first one's networks."""
    history = pd.concat([trial.history for trial in trials], ignore_index=True)
    chosen, compared = compared_level(history, demo.select_on)
    first, boundary = trials[0], None
    if first.data.train.inputs.shape[1] == 2:
        shown = [first.networks[level] for level in dict.fromkeys([0.0, compared])]
        boundary = find_boundary(shown, first.data.train)
    colors = plot.colors(demo.flood_levels, compared)
    return Outcome(history, summarize(history, demo.select_on), chosen, colors, boundary)


if __name__ == "__main__":
    main(DEMO)
