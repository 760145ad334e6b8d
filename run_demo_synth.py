"""Train with and without flooding on the paper's synthetic data, and compare.

Without flags this is the authors' demo: the two-dimensional sinusoid with a tenth of the labels
flipped, an MLP without flooding and with three flood levels. It saves `synth_loss.png`,
`synth_acc.png` and `synth_boundary.png`, prints a table and logs every run to MLflow.
"""

import io
import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import settings
from datasets import DATASETS, Data
from settings import Count, Model, Switch, Training, exit_on, flag, noting, tell

FRAMES = 50  # of the moving picture, at most
FLOOD_LEVELS = {"sgd": (0.26, 0.27, 0.28), "adam": (0.24, 0.25, 0.26)}


@dataclass(frozen=True, kw_only=True)
class Demo:
    """All of a demo. The defaults are the authors' [released code].

    Setting 1, SGD, is the one that they run; setting 2, Adam, is there but never run.
    """

    data: Data = Data(dataset="sinusoid2d", label_noise=0.1)
    model: Model = Model()
    training: Training = Training(optimizer="sgd", batch_size=200, epochs=200)
    flood_levels: Annotated[
        tuple[float, ...] | None,
        flag("B [B ...]", "(default: 0.26 0.27 0.28 for sgd, 0.24 0.25 0.26 for adam)"),
    ] = None
    """flood levels in nats; 0, no flooding, is always among them"""
    select_on: Literal["clean", "noisy"] = "clean"
    """validation labels whose last-epoch accuracy chooses the level; in practice all are noisy"""
    eval_every: Count = 1
    """epochs between evaluations, the last always among them; MLflow's best/... is of these"""
    trials: Count = 1
    """trials; trial t draws data and weights from seed + t"""
    animate: Switch = False
    """save synth_boundary.gif too: the boundaries over the epochs"""
    seed: settings.Seed = 0
    device: settings.DeviceName = "auto"
    output_dir: settings.OutputDir = Path(".")

    def __post_init__(self) -> None:
        settings.check_flood_levels(self.flood_levels or ())
        settings.check_counts(self, "eval_every", "trials")
        settings.check_seed(self.seed, self.trials)
        samples = self.data.filled().train_samples
        self.training.check_batches(samples, self.model.batch_norm)
        in_plane = DATASETS[self.data.dataset].boundary is not None
        allowed = "spiral or sinusoid2d with --animate, which shows data in the plane"
        settings.check(in_plane or not self.animate, "dataset", self.data.dataset, allowed)

    def filled(self) -> "Demo":
        """Return a copy that has all defaults, and the levels in order, 0 among them."""
        filled = settings.fill(self, flood_levels=FLOOD_LEVELS[self.training.optimizer])
        levels = tuple(sorted({0.0, *filled.flood_levels}))
        data, training = self.data.filled(), self.training.filled()
        return replace(self, data=data, training=training, flood_levels=levels)


if __name__ == "__main__":  # before the heavy imports: --help and Ctrl-C are answered at once
    DEMO = settings.parse_flags(Demo, __doc__)

import numpy as np
import pandas as pd
import torch

import plot
import results
from datasets import make_dataset
from models import MLP
from results import Files, Outcome, conclude, write_files
from tracking import DemoLog, TrackingError
from train import Boundary, DivergenceError, find_boundary, prepare_process, split_models, train


def main(demo: Demo) -> None:
    with exit_on(settings.SettingError, TrackingError, status=2):
        device = prepare_process(demo.device)
        settings.make_output_dir(demo.output_dir)
        batch_size = min(demo.training.batch_size, demo.data.train_samples)
        parameters = {**settings.flat(demo), "batch_size": batch_size, "device": device.type}
        log = DemoLog(parameters, device)
    failures = log.failures  # after training, each costs only itself
    with log:
        tell(failures, plot.describe(parameters).replace("\n", "; "), f"on {device.type}")
        history, networks = train_trials(demo, device, log)
        outcome = conclude(history, parameters)
        tell(failures, f"\n{outcome.summary}\n")
        shown = dict.fromkeys([0.0, outcome.compared])
        compared = {epoch: [by[level] for level in shown] for epoch, by in networks.items()}
        data = make_dataset(demo.data, demo.seed).train
        boundary = None
        if DATASETS[demo.data.dataset].boundary:
            boundary = find_boundary(compared[demo.training.epochs], data)
        files = demo_files(outcome, boundary)
        with noting(failures, OSError):
            tell(failures, "Result:", *write_files(files, demo.output_dir))
            stale = {results.BOUNDARY_FILE, "synth_boundary.png", "synth_boundary.gif"} - {*files}
            for name in stale:  # of an earlier demo
                (demo.output_dir / name).unlink(missing_ok=True)
        log.finish(outcome, files)
        with noting(failures, Exception):  # whatever drawing may raise
            figures = plot.draw_demo(outcome, boundary)
            save({name: plot.png(figure) for name, figure in figures.items()}, demo, log)
            if demo.animate:  # takes a minute
                frames = settings.ProgressBar(len(compared), "frame", iterable=compared.items())
                boundaries = ((epoch, find_boundary(of, data)) for epoch, of in frames)
                moving = plot.draw_moving_boundary(outcome, boundaries)
                save({"synth_boundary.gif": moving}, demo, log)
    tell(failures, log.how_to_look())
    settings.end_with(failures)


def train_trials(
    demo: Demo, device: torch.device, log: DemoLog
) -> tuple[pd.DataFrame, dict[int, dict[float, MLP]]]:
    """Train and log one trial after the other: a network a flood level, all from the same weights.

    Returns their history, see `results.Outcome`, and the first trial's networks by epoch and level:
    of the last epoch, and of those that a moving picture shows.
    """
    last, every = demo.training.epochs, demo.eval_every
    step = every * math.ceil(last / (FRAMES * every))
    frames = range(step, last, step) if demo.animate else ()
    networks = {epoch: {} for epoch in (*frames, last)}
    histories = []
    models = pd.DataFrame({"start": 0, "flood_level": demo.flood_levels})
    with exit_on(DivergenceError), settings.ProgressBar(demo.trials * last, "epoch") as bar:
        options = {"eval_every": every, "on_epoch": lambda n: bar.update(n / len(models))}
        for seed in range(demo.seed, demo.seed + demo.trials):
            began, history = time.time(), []
            data = make_dataset(demo.data, seed)
            generator = torch.Generator().manual_seed(seed)
            network = MLP(data.train.inputs.shape[1], demo.model, [generator])
            for group, live in split_models(network, models, device):
                for metrics in train(live, data, group, demo.training, generator, **options):
                    history.append(metrics.drop(columns="start").assign(seed=seed))
                    if (epoch := metrics.epoch[0]) in networks and seed == demo.seed:
                        for copy, level in enumerate(group.flood_level):
                            networks[epoch][level] = live.select([copy])
            histories.append(pd.concat(history))
            log.trial(seed, (began, time.time()), histories[-1])
    return pd.concat(histories, ignore_index=True), networks


def demo_files(outcome: Outcome, boundary: Boundary | None) -> Files:
    """Return what a demo's pictures are drawn from, every bit of it."""
    files = {results.SETTINGS_FILE: json.dumps(outcome.parameters, indent=1)}
    files[results.HISTORY_FILE] = outcome.history
    if boundary:
        np.savez_compressed(content := io.BytesIO(), **vars(boundary))
        files[results.BOUNDARY_FILE] = content.getvalue()
    return files


def save(pictures: Files, demo: Demo, log: DemoLog) -> None:
    """Log pictures and write them into the demo's folder."""
    log.add_files(pictures)
    tell(log.failures, "Pictures:", *write_files(pictures, demo.output_dir))


if __name__ == "__main__":
    main(DEMO)
