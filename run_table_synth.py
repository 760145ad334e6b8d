"""Reproduce the paper's synthetic table, without and with early stopping.

Two Gaussians, sinusoid2d and spiral at three strengths of label noise, flood levels 0 to 0.50, ten
trials: 4 590 trainings. `table_synth_trials.csv` has every finished trial, so a stopped table goes
on where it was. With `--search starts` as many networks are trained without flooding, from weights
of their own, and `table_synth_starts.csv` has them: what the choice among trainings gains alone.
"""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import settings
from datasets import SIZES, Data, DatasetName
from settings import Model, SettingError, Training, check, exit_on, flag, flat, noting, tell

FILES = {"levels": "table_synth_trials.csv", "starts": "table_synth_starts.csv"}  # by search


@dataclass(frozen=True)
class Trial:
    """One draw of data and weights: its seed is that of data, initial weights and mini-batches."""

    data: Data
    seed: int

    def __str__(self) -> str:
        return f"{self.data}, seed {self.seed}"

    def key(self) -> tuple:
        """Return what tells it apart: the values of results.TRIAL."""
        return tuple(flat(self).values())


@dataclass(frozen=True, kw_only=True)
class Table:
    """All of a table: the paper's section 4.1, with the network and sizes nearest to its rows."""

    dataset: tuple[DatasetName, ...] = ("gaussian", "sinusoid2d", "spiral")
    """data sets"""
    label_noise: Annotated[tuple[float, ...], flag("FRACTION [FRACTION ...]")] = (0.01, 0.05, 0.1)
    """fractions of labels that are flipped: int(FRACTION * n) of the n labels of each split"""
    spiral_noise: Annotated[tuple[float, ...], flag("TAU [TAU ...]")] = (0.0,)
    """standard deviations of the points around the arms of the spiral (the paper's tau)"""
    train_samples: settings.Count = 200
    """training examples in all"""
    val_samples: settings.Count = 200
    """validation examples in all"""
    test_samples: settings.Count = 20_000
    """test examples in all"""
    model: Model = Model(hidden_layers=5)
    training: Training = Training(optimizer="adam", batch_size=200, epochs=500)
    trials: settings.Count = 10
    """trials of a setting; trial t draws data and weights from seed + t"""
    flood_max: Annotated[float, flag("B")] = 0.5
    """highest flood level, in nats; if it is no multiple of the step, the last one below it"""
    flood_step: Annotated[float, flag("B")] = 0.01
    """step of the flood levels, which start at 0"""
    search: Literal["levels", "starts"] = "levels"
    """train a network at each flood level, or as many without flooding, each from other weights"""
    workers: settings.Count = 1
    """trials that are trained side by side, each in a process of its own"""
    seed: settings.Seed = 0
    device: settings.DeviceName = "auto"
    output_dir: settings.OutputDir = Path(".")

    def __post_init__(self) -> None:
        settings.check_counts(self, "trials", "workers")
        settings.check_seed(self.seed, self.trials)
        for name in ("dataset", "label_noise", "spiral_noise"):
            check(len(getattr(self, name)) > 0, name, "()", "at least one value")
        highest, step = self.flood_max, self.flood_step
        check(0 < highest < 100, "flood_max", highest, "a number of nats in (0, 100)")
        allowed = f"from 0.0001 to --flood-max {highest:g}"
        check(0.0001 <= step <= highest, "flood_step", step, allowed)
        for tau in self.spiral_noise:
            check(tau == 0 or "spiral" in self.dataset, "spiral_noise", tau, "only with the spiral")
        for data in self.list_settings():
            self.training.check_batches(data.train_samples, self.model.batch_norm)

    def filled(self) -> "Table":
        """Return a copy that has the defaults of its training."""
        return replace(self, training=self.training.filled())

    def list_settings(self) -> list[Data]:
        """Return the data of each setting; network and training are the same in all."""
        sizes = {name: getattr(self, name) for name in SIZES}
        return [
            Data(dataset=name, label_noise=label_noise, spiral_noise=tau, **sizes)
            for name in dict.fromkeys(self.dataset)
            for tau in (sorted(set(self.spiral_noise)) if name == "spiral" else [0.0])
            for label_noise in sorted(set(self.label_noise))
        ]

    def list_trials(self) -> list[Trial]:
        """Return the trials, the seeds outermost: a table that is stopped has all settings."""
        seeds = range(self.seed, self.seed + self.trials)
        return [Trial(data, seed) for seed in seeds for data in self.list_settings()]

    def list_models(self, search: str) -> list[tuple[int, float]]:
        """Return (start, flood level) of a trial's models: 0, step, ..., or as many starts at 0."""
        steps = int(self.flood_max / self.flood_step + 1e-9)  # 0.5 / 0.1 may be a bit below 5
        if search == "starts":
            return [(start, 0.0) for start in range(steps + 1)]
        return [(0, round(level * self.flood_step, 10)) for level in range(steps + 1)]

    def shared(self) -> dict[str, object]:
        """Return what all trials of the table are trained with, by its names."""
        return {**flat(self.model), **flat(self.training), "version": settings.FIGURES_VERSION}


if __name__ == "__main__":  # before the heavy imports: --help and Ctrl-C are answered at once
    TABLE = settings.parse_flags(Table, __doc__)

import joblib
import numpy as np
import pandas as pd
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

import plot
import results
from datasets import make_dataset
from models import MLP
from results import TRIAL, TrialsError
from tracking import TableLog, TrackingError
from train import DivergenceError, prepare_process, provenance, score_last_and_best, split_models

TrainedTrial = tuple[Trial, pd.DataFrame, tuple[float, float]]  # its rows; from when to when


def main(table: Table) -> None:
    lock = FileLock(table.output_dir / "table_synth.lock", blocking=False)  # until the process ends
    with exit_on(SettingError, TrialsError, TrackingError, status=2):
        prepare_process(table.device)
        settings.make_output_dir(table.output_dir)
        try:
            lock.acquire()
        except Timeout as error:
            allowed = "another table is made there"
            raise SettingError("output_dir", table.output_dir, allowed) from error
        folder, shared = table.output_dir, table.shared()
        trained = {
            search: results.read_trials(folder / name, shared, table.list_models(search))
            for search, name in FILES.items()
        }
        parameters = {**flat(table), **shared}
        for name in ("trials", "seed", "workers", "device"):
            del parameters[name]  # the same is trained, however and however far
        log = TableLog({**parameters, "output_dir": str(folder.absolute())})
    with log:
        trained[table.search] = train_missing(table, trained[table.search], log)
        finish(table, trained, log)
    tell(log.failures, log.how_to_look())
    settings.end_with(log.failures)


def train_missing(table: Table, trained: pd.DataFrame, log: TableLog) -> pd.DataFrame:
    """Train the trials that are not trained yet, and write each when it is; return all figures."""
    wanted = table.list_trials()
    known = set(trained[TRIAL].itertuples(index=False, name=None))
    missing = [trial for trial in wanted if trial.key() not in known]
    models, before = len(table.list_models(table.search)), len(wanted) - len(missing)
    tell(log.failures, f"{len(wanted)} trials of {models} {table.search}, {before} trained before")
    with (
        exit_on(SettingError, status=2),
        exit_on(DivergenceError, BrokenProcessPool, OSError),
        settings.ProgressBar(len(missing), "trial", digits=1) as bar,
    ):
        for trial, rows, times in train_trials(table, missing, bar):
            trained = results.add_trials(trained, rows.assign(commit=log.commit))
            results.write_files({FILES[table.search]: trained}, table.output_dir)
            log.add_child(str(trial), flat(trial), summarize_trial(rows), times, {})
    return trained


def finish(table: Table, trained: dict[str, pd.DataFrame], log: TableLog) -> None:
    """Print, save, draw and log the table, with the fair search if the folder has its starts."""
    wanted = [trial.key() for trial in table.list_trials()]
    asked = {name: rows[rows.set_index(TRIAL).index.isin(wanted)] for name, rows in trained.items()}
    files = {FILES[table.search]: trained[table.search]}
    text = f"No table without the trials of the flood levels ({FILES['levels']})"
    if len(asked["levels"]):
        compared = results.compare(asked["levels"], asked["starts"])
        text = results.markdown(compared)
        files |= {"table_synth.md": text, "table_synth.csv": compared}
        with noting(log.failures, Exception):
            files["table_synth.png"] = plot.png(plot.draw_table(asked["levels"], compared))
    tell(log.failures, f"\n{text}")
    with noting(log.failures, OSError):
        tell(log.failures, "Saved:", *results.write_files(files, table.output_dir))
    log.conclude(text, {}, files)


def train_trials(table: Table, trials: Sequence[Trial], bar: tqdm) -> Iterator[TrainedTrial]:
    """Train trials one after the other in this process, or side by side in others, in any order."""
    if table.workers == 1:
        for trial in trials:
            bar.set_postfix_str(str(trial), refresh=False)
            yield train_trial(table, trial, bar.update)
        return
    warnings.filterwarnings("ignore", module="joblib")  # which tells what a stop has cancelled
    jobs = (joblib.delayed(train_trial)(table, trial) for trial in trials)
    for trained in joblib.Parallel(table.workers, return_as="generator_unordered")(jobs):
        yield trained
        bar.update()


def train_trial(
    table: Table, trial: Trial, on_progress: Callable[[float], object] = lambda share: None
) -> TrainedTrial:
    """Train a trial in this process, a worker or the only one."""
    started = time.time()
    device = prepare_process(table.device)
    data = make_dataset(trial.data, trial.seed)
    models = pd.DataFrame(table.list_models(table.search), columns=["start", "flood_level"])
    generators = [start_generator(trial.seed, start) for start in models.start.unique()]
    network = MLP(data.train.inputs.shape[1], table.model, generators)
    total = table.training.epochs * len(models)
    rows = [
        score_last_and_best(
            live, data, group, table.training, generators[0], lambda n: on_progress(n / total)
        )
        for group, live in split_models(network, models, device)
    ]
    rows = pd.concat(rows)
    rows = pd.concat([rows[rows.scored_epoch == name] for name in settings.SCORED_EPOCHS])
    rows = rows.assign(**flat(trial), **table.shared(), **provenance(device))
    return trial, rows, (started, time.time())


def summarize_trial(rows: pd.DataFrame) -> dict[str, float]:
    """Return what one trial comes to: noisy test accuracies and chosen b, by scored epoch."""
    starts = rows if rows.start.any() else None
    table = results.compare(rows[rows.start == 0], starts)
    names = ["with_flooding", "flood_level"] if starts is None else ["best_start"]
    return {
        f"{row.scored_epoch}/{name}": row[f"{name}_mean"]
        for _, row in table[table.labels == "noisy"].iterrows()
        for name in ("without_flooding", *names)
    }


def start_generator(seed: int, start: int) -> torch.Generator:
    """Return the generator of a start's initial weights.

    Start 0 is the trial's own: seeded with the trial's seed, it draws the mini-batches, too. Start
    k > 0 is seeded with the 32 bits that NumPy's SeedSequence makes of (seed, k).
    """
    if start > 0:  # PyTorch's generator for CPUs has no more than 32 bits of a seed
        seed = int(np.random.SeedSequence((seed, start)).generate_state(1)[0])
    return torch.Generator().manual_seed(seed)


if __name__ == "__main__":
    main(TABLE)
