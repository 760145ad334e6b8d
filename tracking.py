"""What MLflow keeps of the experiments, and how a demo is read back.

A run is one flood level of one trial of the demo, or one cell of the table, written at one go when
it is over: the store has it whole or not at all. A tag ties runs together for the chart view. The
store is what MLFLOW_TRACKING_URI says, else `sqlite:///mlflow.db` in the current folder, which is
what a bare `mlflow ui` there opens.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import io
import json
import logging
import os
import secrets
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

# What a store refuses is tried again here, not by MLflow.
for name, value in {
    "DISABLE_TELEMETRY": "true", "ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "SUPPRESS_PRINTING_URL_TO_STDOUT": "true", "HTTP_REQUEST_MAX_RETRIES": "0",
    "HTTP_REQUEST_TIMEOUT": "5",
}.items():  # fmt: skip
    os.environ.setdefault(f"MLFLOW_{name}", value)
import mlflow
import numpy as np
import pandas as pd
import sqlalchemy.exc
import torch
from filelock import FileLock
from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.entities import DatasetInput, InputTag, Metric, Param
from mlflow.tracking.context.registry import resolve_tags

from datasets import Cell, DataSettings, make_dataset
from results import FIGURES, csv, write_files
from settings import SPLITS
from train import METRICS, Boundary, where

PATIENCE_SECONDS = 5.0  # how long a store that refuses runs is asked again at a time
MAX_POINTS = 1000  # of metrics in one call, MLflow's limit
HISTORY_FILE, BOUNDARY_FILE = "history.csv", "boundary.npz"  # what a demo's pictures come from

# The first line is what the folded description shows.
DEMO_DESCRIPTION = """\
[**Show the charts**]({charts}) of training with and without flooding, or the last demo's \
[**means over its trials**]({means}) by flood level.

By `run_demo_synth.py`. Each run is one flood level of one trial, and the level that a trial chose
is marked in its name. `_noisy` is against the labels as they are given, a part of them flipped,
`_clean` against the true ones.
"""
TABLE_DESCRIPTION = """\
[**Show the charts**]({means}) of the last table: means over the trials, a curve a setting.

By `run_table_synth.py`. Each run is a cell, one trial of one setting, that was trained here. Its
curves go over the flood levels, not over time: step k is the k-th level. `last_epoch` is without,
`early` with early stopping. A run named `table of ...` has the finished table as its artifacts.
"""


class Outcome(NamedTuple):
    """What a demo, or one trial of it, comes to.

    `history` has a row a `seed`, `flood_level` and `epoch` with the METRICS; `summary` is the
    printed table; `colors` are those of the flood levels.
    """

    history: pd.DataFrame
    summary: str
    chosen: float
    colors: Mapping[float, str]
    boundary: Boundary | None


class TrackingError(Exception):
    """The tracking store cannot be reached, or lacks what is asked of it."""


def tracking_uri() -> str:
    """Return the address of the store."""
    return os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"


def store_name() -> str:
    """Return what to call the store: its address only where that surely has no password."""
    uri = tracking_uri()
    return "MLFLOW_TRACKING_URI" if set(uri) & set("@?;") else f"MLFLOW_TRACKING_URI {uri}"


def reason(error: BaseException) -> str:
    """Return what the operating system or the database says; other texts may have a password."""
    cause: BaseException | None = error
    while cause:
        if isinstance(cause, OSError) and cause.strerror:  # "Connection refused"
            return cause.strerror
        # A driver takes what follows the first "@" for the host, and names it.
        named = tracking_uri().count("@") > 1
        if isinstance(cause, sqlalchemy.exc.DBAPIError) and str(cause.orig) and not named:
            return str(cause.orig).splitlines()[0]
        if isinstance(cause, (ImportError, sqlalchemy.exc.NoSuchModuleError)):  # of a driver
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    return getattr(error, "error_code", None) or type(error).__name__


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep what MLflow logs, of migrations or of a locked database, from the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


class Experiment:
    """An experiment of the store, made if it is not there; TrackingError if it is out of reach.

    `description` is Markdown with places for the addresses of its `charts` and of their `means`;
    `tie` is name and value of the tag of this demo's or table's runs. Means by the parameter
    `group_by` are a view, saved as MLflow's own "share" button does it: an address cannot say that.
    """

    def __init__(self, name: str, description: str, tie: tuple[str, str], group_by: str) -> None:
        self._tie, self._query = dict([tie]), f"tags.{tie[0]} = '{tie[1]}'"
        self._pending: list[tuple] = []
        keys = [{"mode": "param", "groupByData": group_by}]
        group = {"aggregateFunction": "average", "groupByKeys": keys}
        state = json.dumps({"searchFilter": self._query, "groupBy": group})
        view = {"name": f"means by {group_by}", "createdAt": 0, "updatedAt": 0, "state": state}
        # Two processes that set the same new store up at once break it.
        lock = FileLock(Path(tempfile.gettempdir()) / f"flooding-{getpass.getuser()}.lock")
        try:
            with _quietly(), lock:
                mlflow.set_tracking_uri(tracking_uri())
                self._id = mlflow.set_experiment(name).experiment_id
                runs = f"#/experiments/{self._id}/runs"
                charts = f"{runs}?workflowType=machine_learning&compareRunsMode=CHART"
                self._charts = f"{charts}&searchFilter={quote(self._query)}"
                self._means = f"{charts}&viewStateShareKey={tie[1]}"
                tags = {
                    "mlflow.note.content": description.format(charts=charts, means=self._means),
                    "mlflow.experimentKind": "custom_model_development",
                    f"mlflow.sharedViewState.{tie[1]}": json.dumps(view),
                }
                mlflow.set_experiment_tags(tags)
        except Exception as error:  # of whatever the store is made of
            raise TrackingError(f"{store_name()}: {reason(error)}") from error

    def how_to_look(self, means: bool) -> str:
        """Return how to see this demo's or this table's charts in a browser, or their means."""
        page, uri = self._means if means else self._charts, tracking_uri()
        if uri not in store_name():
            uri = "$MLFLOW_TRACKING_URI"
        elif uri.startswith("sqlite:///"):
            uri = f"sqlite:///{Path(uri.removeprefix('sqlite:///')).absolute()}"
        if tracking_uri().startswith("http"):
            return f"Charts: {uri.rstrip('/')}/{page}"
        command = [sys.executable, "-m", "mlflow", "ui", "--workers", "1", "--backend-store-uri"]
        shown = f'"{uri}"' if uri.startswith("$") else shlex.quote(uri)
        return f"Charts: {shlex.join(command)} {shown}\nand open http://127.0.0.1:5000/{page}"

    def log(self, *runs: tuple) -> Exception | None:
        """Write runs, see `_write`, and those not taken before; returns why some are left."""
        self._pending += runs
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self._pending:
            run = self._pending.pop(0)
            try:
                with _quietly():
                    self._write(*run)
            except Exception as error:  # of whatever the store is made of
                self._pending.append(run)  # behind the others: it may be refused alone
                if time.monotonic() > deadline:
                    return error
                time.sleep(0.2)
        return None

    def finish(self) -> None:
        """Try once more what is left; TrackingError says how much is missing then, and why."""
        if error := self.log():
            missing = f"{len(self._pending)} runs are missing there"
            raise TrackingError(f"{store_name()}: {missing}: {reason(error)}")

    def _write(
        self, name: str, times: tuple[float, float], parameters: Mapping[str, object],
        tags: Mapping[str, str], files: Mapping[str, bytes],
        curves: Mapping[str, pd.Series], datasets: Sequence[DatasetInput],
    ) -> None:  # fmt: skip
        """Write a run from one time to another, in s since 1970; files by name, curves by step."""
        client = mlflow.MlflowClient()
        started, ended = (int(1000 * time) for time in times)
        self._delete(name, started)
        tags = {**resolve_tags(), **self._tie, **tags}
        run_id = client.create_run(self._id, started, tags, name).info.run_id
        try:
            params = [Param(key, str(value)) for key, value in parameters.items()]
            client.log_batch(run_id, params=params)
            client.log_inputs(run_id, list(datasets))
            points = [
                Metric(metric, float(value), ended, step)
                for metric, curve in curves.items()
                for step, value in curve.dropna().items()
            ]
            for start in range(0, len(points), MAX_POINTS):
                client.log_batch(run_id, points[start : start + MAX_POINTS])
            with tempfile.TemporaryDirectory() as folder:
                if write_files(files, Path(folder)):
                    client.log_artifacts(run_id, folder)
            client.set_terminated(run_id, "FINISHED", ended)
        except BaseException:  # Ctrl-C too
            with contextlib.suppress(Exception):  # then before the next try
                self._delete(name, started)
            raise

    def _delete(self, name: str, started: int) -> None:
        """Delete what an earlier try has left of a run, also if its answer was lost."""
        query = f"{self._query} and run_name = '{name}' and attributes.start_time = {started}"
        for run in mlflow.MlflowClient().search_runs([self._id], query):
            mlflow.MlflowClient().delete_run(run.info.run_id)


class DemoLog(Experiment):
    """One demo in MLflow: a run a flood level of each trial, and one for several trials' result."""

    def __init__(
        self, data: DataSettings, parameters: Mapping[str, object], device: torch.device
    ) -> None:
        tie = "demo", secrets.token_hex(4)
        super().__init__("flooding-synth", DEMO_DESCRIPTION, tie, "flood_level")
        self._data, self._parameters, self._where = data, parameters, where(device)

    def trial(
        self, seed: int, times: tuple[float, float], outcome: Outcome, pictures: Mapping[str, bytes]
    ) -> None:
        """Log a trial's runs; `times` are its begin and end in seconds since 1970."""
        tags, files = self._said_and_kept(outcome, pictures)
        datasets, runs = describe_datasets(self._data, seed), []
        for level, rows in outcome.history.groupby("flood_level"):
            chosen = level == outcome.chosen
            name = (f"b = {level:g}" if level else "no flooding") + " (chosen)" * chosen
            parameters = {**self._parameters, "seed": seed, "flood_level": level}
            marks = {"chosen": "yes" if chosen else "no", "mlflow.runColor": outcome.colors[level]}
            curves = rows.set_index("epoch")[METRICS]
            curves.columns = [name.replace("_", "/", 1) for name in METRICS]  # makes sections
            runs.append((name, times, parameters, {**tags, **marks}, files, curves, datasets))
        self.log(*runs)

    def result(self, started: float, outcome: Outcome, pictures: Mapping[str, bytes]) -> None:
        """Log what several trials come to, as a run of its own."""
        name, times = f"result of {self._parameters['trials']} trials", (started, time.time())
        self.log((name, times, self._parameters, *self._said_and_kept(outcome, pictures), {}, ()))

    def _said_and_kept(self, outcome: Outcome, pictures: Mapping[str, bytes]) -> tuple[dict, dict]:
        """The tags and the files of an outcome; `load_demo` reads the files."""
        tags = {**self._where, "mlflow.note.content": f"```\n{outcome.summary}\n```\n"}
        files = {HISTORY_FILE: csv(outcome.history), **pictures}
        if outcome.boundary:
            np.savez_compressed(content := io.BytesIO(), **vars(outcome.boundary))
            files[BOUNDARY_FILE] = content.getvalue()
        return tags, files


class TableLog(Experiment):
    """The table's cells that are trained here, a run each, and the finished table's files."""

    def __init__(self, shared: Mapping[str, object], flood_levels: Sequence[float]) -> None:
        text = json.dumps([*flood_levels, *map(str, shared.items())])
        tie = "table", hashlib.sha256(text.encode()).hexdigest()[:8]
        super().__init__("flooding-table", TABLE_DESCRIPTION, tie, "setting")
        self._shared = shared
        self.commit = resolve_tags().get("mlflow.source.git.commit", "")

    def cell(self, cell: Cell, rows: pd.DataFrame, times: tuple[float, float]) -> None:
        """Log a cell's scores, a row a stopping and flood level, as curves over the levels."""
        setting = f"{cell.dataset}, noise {cell.label_noise:g}"
        curves = {
            f"{stopping.replace(' ', '_')}/{name}": curve
            for stopping, of_stopping in rows.groupby("stopping", sort=False)
            for name, curve in of_stopping[FIGURES].reset_index(drop=True).items()
        }
        parameters = {**asdict(cell), **self._shared, "setting": setting}
        origin = rows[["torch", "device"]].iloc[0].to_dict()
        datasets = describe_datasets(cell, cell.seed)
        self.log((str(cell), times, parameters, origin, {}, curves, datasets))

    def table(self, name: str, files: Mapping[str, bytes], started: float) -> None:
        """Keep a finished table's files in a run of their own."""
        self.log((name, (started, time.time()), self._shared, {}, files, {}, ()))


def describe_datasets(settings: DataSettings, seed: int) -> list[DatasetInput]:
    """Return what MLflow shows of a data set: of each split its name, shape and digest."""
    source = {field.name: getattr(settings, field.name) for field in fields(DataSettings)}
    source, data = CodeDatasetSource({**source, "seed": seed}), make_dataset(settings, seed)
    name, inputs = f"{settings.dataset}, label noise {settings.label_noise:g}", []
    for split_name, context in zip(SPLITS, ("train", "validation", "test")):
        split = getattr(data, split_name)
        labels = {"label": split.labels, "clean_label": split.clean_labels}
        dataset = mlflow.data.from_numpy(split.inputs, source, labels, name)
        tags = [InputTag("mlflow.data.context", context)]
        inputs.append(DatasetInput(dataset._to_mlflow_entity(), tags))
    return inputs


def load_demo(run_id: str) -> tuple[pd.DataFrame, dict[str, str], Boundary | None]:
    """Read back what a run has of a demo: history, parameters, what the boundary is drawn from.

    A run of a flood level has its own trial, the result of several trials all of them. Raises
    TrackingError if there is no such run, or it is not a demo's.
    """
    uri = tracking_uri()
    path = uri.removeprefix("sqlite:///").partition("?")[0]
    if uri.startswith("sqlite:///") and not Path(path).exists():  # MLflow would make it
        raise TrackingError(f"--run-id {run_id}: there is no {path}")
    try:
        with _quietly(), tempfile.TemporaryDirectory() as folder:
            client = mlflow.MlflowClient(uri)
            parameters = client.get_run(run_id).data.params
            files = Path(client.download_artifacts(run_id, "", folder))
            if not (files / HISTORY_FILE).exists():
                raise FileNotFoundError(0, "no demo's run, or one that an earlier version logged")
            history, boundary = pd.read_csv(files / HISTORY_FILE, engine="pyarrow"), None
            if (files / BOUNDARY_FILE).exists():
                with np.load(files / BOUNDARY_FILE) as arrays:
                    boundary = Boundary(**arrays)
    except Exception as error:  # of whatever the store is made of
        raise TrackingError(f"--run-id {run_id}: it cannot be read: {reason(error)}") from error
    return history, parameters, boundary
