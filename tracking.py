"""Log runs to MLflow, and read them back.

The store is what MLFLOW_TRACKING_URI says, else `sqlite:///mlflow.db` in the current folder,
which is what a bare `mlflow ui` there opens.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from train import LEVEL_SCORES, METRICS, History, LevelScores

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
import mlflow
from mlflow.entities import Metric, Param, Run, RunStatus
from mlflow.exceptions import MlflowException

DEMO_EXPERIMENT = "flooding-synth"
TABLE_EXPERIMENT = "flooding-table"
FLUSH_SECONDS = 3.0  # what a crash loses at most
PARENT_TAG = "mlflow.parentRunId"

# The database set-up of a new store reports every migration.
for chatty in ("mlflow", "alembic"):
    logging.getLogger(chatty).setLevel(logging.ERROR)


class TrackingError(Exception):
    """The tracking store cannot be reached, or lacks what is asked of it."""


def tracking_uri() -> str:
    """Return where the runs are kept: MLFLOW_TRACKING_URI, else SQLite in the current folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"


def ui_command() -> str:
    """Return how a user sees the runs; a database's password stays out of it."""
    uri = tracking_uri()
    if uri.startswith(("http:", "https:")):
        return f"open {uri}"
    shown = uri if uri.startswith("sqlite:") else "$MLFLOW_TRACKING_URI"
    return f"mlflow ui --backend-store-uri {shown}"


class Store:
    """An experiment of the tracking store, made if it is not there.

    Raises:
        TrackingError: the store cannot be reached.
    """

    def __init__(self, experiment: str) -> None:
        uri = tracking_uri()
        try:
            with _few_retries(), _set_up_alone(uri):
                self.client = mlflow.MlflowClient(uri)
                self.experiment_id = self._experiment_id(experiment)
        # SQLAlchemy, the HTTP client and the file system have errors of their own.
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise TrackingError(f"MLFLOW_TRACKING_URI {uri}: {reason}") from error

    def _experiment_id(self, name: str) -> str:
        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return self.client.create_experiment(name)
            except MlflowException:  # another process was quicker
                experiment = self.client.get_experiment_by_name(name)
                if experiment is None:
                    raise
        return experiment.experiment_id

    @contextlib.contextmanager
    def run(
        self, name: str, parameters: Mapping[str, object], tags: Mapping[str, str]
    ) -> Iterator[str]:
        """Hold a run open and yield its id.

        It ends FINISHED; FAILED where an error passes through; KILLED where the program is
        interrupted (SystemExit, KeyboardInterrupt).
        """
        run = self.client.create_run(self.experiment_id, tags=dict(tags), run_name=name)
        with self.resume(run.info.run_id) as run_id:
            self.client.log_batch(
                run_id, params=[Param(key, str(value)) for key, value in parameters.items()]
            )
            yield run_id

    @contextlib.contextmanager
    def resume(self, run_id: str) -> Iterator[str]:
        """Hold a run that is there open, as `run` does."""
        status = RunStatus.KILLED
        try:
            self.client.update_run(run_id, RunStatus.to_string(RunStatus.RUNNING))
            yield run_id
            status = RunStatus.FINISHED
        except Exception:
            status = RunStatus.FAILED
            raise
        finally:
            self.client.set_terminated(run_id, RunStatus.to_string(status))


class DemoTracker:
    """One demo in MLflow: a parent run, and a nested child run a flood level.

    A context manager; `log_epoch` fits the hook of `train.train`. Metrics are collected and
    written in batches every few seconds.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        parameters: Mapping[str, object],
        flood_levels: Sequence[float],
        device: torch.device,
    ) -> None:
        self._store = store
        self._name = name
        self._parameters = dict(parameters)
        self._flood_levels = flood_levels
        self._tags = environment_tags(device)
        self._pending: list[list[Metric]] = [[] for _ in flood_levels]

    def __enter__(self) -> DemoTracker:
        with contextlib.ExitStack() as stack:
            self.run_id = stack.enter_context(
                self._store.run(self._name, self._parameters, self._tags)
            )
            self._children = [
                stack.enter_context(
                    self._store.run(
                        f"flood level {level:g}" if level else "no flooding",
                        {**self._parameters, "flood_level": level},
                        {**self._tags, PARENT_TAG: self.run_id},
                    )
                )
                for level in self._flood_levels
            ]
            stack.callback(self._flush)  # first to run, whatever ends the demo
            self._stack = stack.pop_all()
        self._flushed_at = time.monotonic()
        return self

    def __exit__(self, *exception) -> bool | None:
        return self._stack.__exit__(*exception)

    def log_epoch(self, epoch: int, metrics: Mapping[str, np.ndarray]) -> None:
        """Take an epoch's metrics, an array [K] a name."""
        now = int(time.time() * 1000)
        for name, values in metrics.items():
            for pending, value in zip(self._pending, values):
                pending.append(Metric(name, float(value), now, epoch))
        if time.monotonic() - self._flushed_at >= FLUSH_SECONDS:
            self._flush()

    def _flush(self) -> None:
        for run_id, pending in zip(self._children, self._pending):
            while pending:
                self._store.client.log_batch(run_id, metrics=pending[:1000])  # MLflow's limit
                del pending[:1000]
        self._flushed_at = time.monotonic()

    def log_result(self, history: History, chosen: int, compared: int) -> None:
        """Log to the parent the chosen level and the last epoch without and with flooding.

        `chosen` and `compared` come from `History.choose`.
        """
        now = int(time.time() * 1000)
        scores = {
            "chosen_flood_level": history.flood_levels[chosen],
            "compared_flood_level": history.flood_levels[compared],
        }
        for side, model in (("without_flooding", 0), ("with_flooding", compared)):
            for metric in METRICS:
                if metric.startswith("test_"):
                    scores[f"{metric}_{side}"] = history.metrics[metric][-1, model]
        self._store.client.log_batch(
            self.run_id,
            metrics=[
                Metric(name, float(value), now, int(history.epochs[-1]))
                for name, value in scores.items()
            ],
        )

    def log_artifact(self, path: Path) -> None:
        """Keep a file with the parent run."""
        self._store.client.log_artifact(self.run_id, str(path))


class TableTracker:
    """The synthetic table in MLflow: a parent run a table, a nested child run a cell.

    A cell is known by its parameters: one that is FINISHED in the store is not trained again,
    whatever table it was trained for.
    """

    def __init__(self, store: Store, device: torch.device) -> None:
        self._store = store
        self._tags = environment_tags(device)

    def find_or_create_table(self, name: str, parameters: Mapping[str, object]) -> str:
        """Return the run id of the table with these parameters.

        Cells that an earlier start left RUNNING when it was killed are marked KILLED: two jobs
        are not to work on one table at a time.
        """
        key = self.key(parameters)
        runs = self._search(f"tags.table_key = '{key}'")
        if not runs:
            with self._store.run(name, parameters, {**self._tags, "table_key": key}) as run_id:
                return run_id
        run_id = runs[0].info.run_id
        for cell in self._search(f"tags.`{PARENT_TAG}` = '{run_id}' and status = 'RUNNING'"):
            self._store.client.set_terminated(cell.info.run_id, "KILLED")
        return run_id

    def finished_cells(self) -> dict[str, str]:
        """Return the run ids of all FINISHED cells in the store by their keys."""
        return {
            run.data.tags["cell_key"]: run.info.run_id
            for run in self._search("tags.cell_key != '' and status = 'FINISHED'")
        }

    def table(self, run_id: str) -> contextlib.AbstractContextManager[str]:
        """Hold the table's run open; it ends as `Store.run` says."""
        return self._store.resume(run_id)

    def cell(
        self, table_id: str, name: str, parameters: Mapping[str, object]
    ) -> contextlib.AbstractContextManager[str]:
        """Hold a new run of a cell open and yield its id."""
        tags = {**self._tags, PARENT_TAG: table_id, "cell_key": self.key(parameters)}
        return self._store.run(name, parameters, tags)

    def log_cell(self, run_id: str, last: LevelScores, best: LevelScores) -> None:
        """Log a cell's chosen levels and scores, and all levels' figures as `levels.csv`.

        A is without, B with early stopping, as in the paper's table.
        """
        now, points = int(time.time() * 1000), []
        for side, scores in (("A", last), ("B", best)):
            chosen = scores.choose()
            values = {"chosen_flood_level": scores.flood_levels[chosen]}
            for name in LEVEL_SCORES:
                values[f"{name}_without_flooding"] = scores.scores[name][0]
                values[f"{name}_with_flooding"] = scores.scores[name][chosen]
            points += [Metric(f"{side}_{k}", float(v), now, 0) for k, v in values.items()]
        columns = {"flood_level": last.flood_levels}
        for side, scores in (("A", last), ("B", best)):
            columns[f"{side}_epoch"] = scores.epochs
            columns.update((f"{side}_{name}", scores.scores[name]) for name in LEVEL_SCORES)
        lines = [",".join(columns)]
        lines += [",".join(str(value.item()) for value in row) for row in zip(*columns.values())]
        self._store.client.log_text(run_id, "\n".join(lines) + "\n", "levels.csv")
        self._store.client.log_batch(run_id, metrics=points)

    def load_cell(self, run_id: str) -> tuple[LevelScores, LevelScores]:
        """Read a cell's `levels.csv` back: the scores of A and of B."""
        with tempfile.TemporaryDirectory() as folder:
            path = self._store.client.download_artifacts(run_id, "levels.csv", folder)
            with Path(path).open(newline="") as file:
                rows = list(csv.DictReader(file))
        columns = {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}
        last, best = (
            LevelScores(
                columns["flood_level"],
                columns[f"{side}_epoch"].astype(int),
                {name: columns[f"{side}_{name}"] for name in LEVEL_SCORES},
            )
            for side in ("A", "B")
        )
        return last, best

    def log_artifact(self, run_id: str, path: Path) -> None:
        """Keep a file with a run."""
        self._store.client.log_artifact(run_id, str(path))

    @staticmethod
    def key(parameters: Mapping[str, object]) -> str:
        """Return the key of a cell or a table: a hash of its parameters."""
        text = json.dumps({name: str(value) for name, value in parameters.items()}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def _search(self, query: str) -> list[Run]:
        return list(
            self._store.client.search_runs([self._store.experiment_id], query, max_results=50_000)
        )


def load_demo(run_id: str) -> tuple[dict[str, str], History]:
    """Read the parameters and the whole history of a demo back.

    `run_id` is the parent run or one of its children.

    Raises:
        TrackingError: there is no such run, or it is no demo that logged an epoch.
    """
    sqlite_file = tracking_uri().removeprefix("sqlite:///")
    if sqlite_file != tracking_uri() and not Path(sqlite_file).exists():
        raise TrackingError(f"--run-id {run_id}: there is no {tracking_uri()}")
    client = Store(DEMO_EXPERIMENT).client
    try:
        run = client.get_run(run_id)
        parent = client.get_run(run.data.tags.get(PARENT_TAG, run_id))
    except MlflowException as error:
        raise TrackingError(f"--run-id {run_id}: no such run in {tracking_uri()}") from error
    children = client.search_runs(
        [parent.info.experiment_id], f"tags.`{PARENT_TAG}` = '{parent.info.run_id}'"
    )
    children = [child for child in children if "flood_level" in child.data.params]
    children.sort(key=lambda child: float(child.data.params["flood_level"]))
    curves = {
        name: [
            {
                point.step: point.value
                for point in client.get_metric_history(child.info.run_id, name)
            }
            for child in children
        ]
        for name in METRICS
    }
    logged = [set(curve) for of_children in curves.values() for curve in of_children]
    epochs = sorted(set.intersection(*logged)) if logged else []
    if not epochs:
        raise TrackingError(f"--run-id {run_id}: no demo of {DEMO_EXPERIMENT} with logged epochs")
    history = History(
        np.array([float(child.data.params["flood_level"]) for child in children]),
        np.array(epochs),
        {
            name: np.array([[curve[epoch] for curve in of_children] for epoch in epochs])
            for name, of_children in curves.items()
        },
    )
    return parent.data.params, history


def environment_tags(device: torch.device) -> dict[str, str]:
    """What the run ran on: versions, device and, in a git checkout, the commit."""
    on_gpu = device.type == "cuda"
    tags = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mlflow.source.name": Path(sys.argv[0]).name,
        "device": f"cuda ({torch.cuda.get_device_name(device)})" if on_gpu else device.type,
    }
    with contextlib.suppress(OSError):  # git is not installed
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
        )
        if commit.returncode == 0:
            tags["mlflow.source.git.commit"] = commit.stdout.strip()
    return tags


@contextlib.contextmanager
def _few_retries() -> Iterator[None]:
    """Let a server that is not there be reported in seconds; MLflow retries for minutes."""
    names = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update({name: value for name, value in names.items() if before[name] is None})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]


@contextlib.contextmanager
def _set_up_alone(uri: str) -> Iterator[None]:
    """Keep two processes from setting up one new SQLite store at once, which MLflow cannot."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    key = hashlib.sha256(f"{os.getuid()} {Path.cwd()} {uri}".encode()).hexdigest()[:16]
    with (Path(tempfile.gettempdir()) / f"flooding-{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
