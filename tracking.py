"""What MLflow keeps of the experiments, a demo (`DemoLog`) and a table (`TableLog`).

Children are written when their trial is over. The store is what MLFLOW_TRACKING_URI says, else
`sqlite:///mlflow.db` in the current folder, which is what a bare `mlflow ui` there opens.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import quote

# A server that is gone is asked four times in 12 s, one that does not answer in 28 s.
for _name, _value in {
    "DISABLE_TELEMETRY": "true", "ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "SUPPRESS_PRINTING_URL_TO_STDOUT": "true", "LOGGING_LEVEL": "CRITICAL",
    "HTTP_REQUEST_MAX_RETRIES": "3", "HTTP_REQUEST_TIMEOUT": "4", "HTTP_REQUEST_BACKOFF_JITTER": "0"
}.items():  # fmt: skip
    os.environ.setdefault(f"MLFLOW_{_name}", _value)
try:
    Path.home()
except RuntimeError:  # neither HOME nor an entry for the user: then MLflow cannot be imported
    os.environ["HOME"] = tempfile.gettempdir()
import mlflow
import pandas as pd
import sqlalchemy
import torch
from filelock import FileLock
from mlflow.entities import Metric, Param
from mlflow.tracking.context.registry import resolve_tags

from results import SETTINGS_FILE, Files, Outcome, write_files
from settings import SPLITS
from train import provenance

logging.getLogger("urllib3").setLevel(logging.ERROR)  # which tells of every retry

PATIENCE_SECONDS = 15  # a store that has failed for longer, in all, is not asked again
MAX_POINTS = 1000  # of metrics in one call, MLflow's limit
NOTE, PARENT = "mlflow.note.content", "mlflow.parentRunId"
COLORS = ["#d55e00", "#6baed6", "#2171b5", "#08306b"]  # without flooding, then level by level

# Metrics as the charts show them, what is flooded first; their titles may be cut after 12 letters.
NAMES = {"train_batch_loss": "batch/loss", "train_flooded_fraction_so_far": "batch/share_below_b"}
for _split, _labels in itertools.product(SPLITS, ("clean", "noisy")):
    NAMES[f"{_split}_loss_{_labels}"] = f"{_split}/loss_{_labels}"
    NAMES[f"{_split}_accuracy_{_labels}"] = f"{_split}/{_labels}_accuracy"
BEST_NAMES = {"epoch": "best/epoch", "val_accuracy_noisy": "best/val_noisy_accuracy"}
BEST_NAMES |= {k: v.replace("test", "best") for k, v in NAMES.items() if k.startswith("test")}

ABOUT = """\
Flooding holds the training loss at a flood level b: where the loss of a mini-batch is below b, \
the step goes uphill. Labels as they are given, a part of them flipped, are *noisy*, the true ones \
*clean*, and *chosen* is the level of best validation accuracy. Look first at """
DEMO = f"""{ABOUT}`batch/loss`, which is what is flooded, and at `batch/share_below_b`, the share \
of steps so far that found it below b, then at the test curves and, for early stopping, at \
`best/...`, the test scores of the epoch of best noisy validation accuracy."""
TABLE = f"""{ABOUT}the noisy test accuracies of each trial without and with flooding, `last/...` \
after the last epoch and `best/...` after the one of best noisy validation accuracy."""


class TrackingError(Exception):
    """The store cannot be reached, refuses what it is given, or lacks what is asked of it."""


def tracking_uri() -> str:
    """Return the address of the store, a SQLite file's with its whole path."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    path = uri.partition("sqlite:///")[2]
    return f"sqlite:///{Path(path).absolute()}" if path and ":" not in path else uri


def shown_uri() -> str:
    """Return the address, or its variable where an @ or a query may come with a password."""
    secret = set("@?") & set(os.environ.get("MLFLOW_TRACKING_URI", ""))
    return "$MLFLOW_TRACKING_URI" if secret else tracking_uri()


def explain(error: BaseException) -> str:
    """Name the store, and say the first line of what the system or MLflow says."""
    said, cause = error, error
    while cause:  # the innermost of the system's: "[Errno 111] Connection refused"
        said = cause if isinstance(cause, OSError) and str(cause) else said
        cause = cause.__cause__ or cause.__context__
    systems = isinstance(said, OSError | ImportError) and type(said).__module__ == "builtins"
    harmless = systems or shown_uri() == tracking_uri()  # others may repeat the password
    text = str(said).partition("\n")[0] if harmless else ""
    return f"{shown_uri()}: {text or type(said).__name__}"


def open_experiment(name: str) -> tuple[mlflow.MlflowClient, str]:
    """Open the store and an experiment, made or restored if need be; return client and id."""
    uri = tracking_uri()
    file = Path(uri.partition("sqlite:///")[2].partition("?")[0])
    with contextlib.ExitStack() as locked:
        if file.is_absolute():  # a SQLite file; two that set it up at once break it
            file.parent.mkdir(parents=True, exist_ok=True)
            locked.enter_context(FileLock(f"{file}.lock", timeout=60))
        with contextlib.suppress(sqlalchemy.exc.ArgumentError, sqlalchemy.exc.NoSuchModuleError):
            sqlalchemy.inspect(sqlalchemy.create_engine(uri))  # MLflow asks a broken one for 100 s
        mlflow.set_tracking_uri(uri)
        client = mlflow.MlflowClient()
        found = client.get_experiment_by_name(name)
        if found and found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
        experiment = mlflow.set_experiment(name)
    folder = Path(experiment.artifact_location.removeprefix("file://"))
    here = file.parent / "mlruns" / experiment.experiment_id
    copied = file.is_absolute() and here.exists() and here.resolve() != folder.resolve()
    if folder.is_absolute() and (copied or not folder.parent.parent.exists()):
        mend = "and are not any more: move it back, or take another MLFLOW_TRACKING_URI"
        raise FileNotFoundError(f"the files of {name} were in {folder}, {mend}")
    return client, experiment.experiment_id


def noting_failures(method: Callable) -> Callable:
    """Let a method of ParentRun note what the store raises; one that is too slow is left alone."""

    def tried(log: "ParentRun", *arguments: object) -> None:
        began = time.monotonic()
        try:
            if log.seconds_lost < PATIENCE_SECONDS:
                method(log, *arguments)
        except Exception as error:  # of whatever the store is made of
            log.seconds_lost += time.monotonic() - began
            log.failures.append(TrackingError(explain(error)))

    return tried


class ParentRun(contextlib.AbstractContextManager):
    """A run with children and files; those that are not finished when it is left are FAILED.

    It is open when its store has taken a file, else TrackingError is raised; what the store refuses
    later is noted in `failures`. With a `key` the parent that has it goes on, if there is one. Its
    page has the charts of its children, in the order of the parameter `sort`.
    """

    experiment: str  # said by each subclass, as are these two
    settings_file: str
    about: str  # Markdown that the parent and every child have

    def __init__(
        self, name: str, parameters: Mapping[str, object], tags: Mapping[str, str], sort: str,
        key: str = "",
    ) -> None:  # fmt: skip
        self.failures, self.seconds_lost = [], 0.0
        self._unfinished = []
        self._parameters = parameters
        self._tags = {**resolve_tags(), NOTE: self.about, **tags}
        try:
            self._client, self._experiment_id = open_experiment(self.experiment)
            query = f"tags.key = '{key}'"
            runs = self._client.search_runs([self._experiment_id], query) if key else []
            if runs:
                self._unfinished = [runs[0].info.run_id]
                self._client.update_run(self._unfinished[0], "RUNNING")
            else:
                self._create(name, {"key": key} if key else {}, parameters, time.time())
            self._id = self._unfinished[0]
            self._add_files({self.settings_file: json.dumps(parameters, indent=1)})
        except BaseException as error:  # Ctrl-C, too
            self.__exit__()
            if not isinstance(error, Exception):
                raise
            raise TrackingError(explain(error)) from error
        runs = f"#/experiments/{self._experiment_id}/runs?workflowType=machine_learning"
        children = f"&compareRunsMode=CHART&searchFilter=tags.`{PARENT}` = '{self._id}'"
        # Sorted like this, the page does not fold children into their parent. It shows ten.
        self._page = runs + quote(f"{children}&orderByKey=params.`{sort}`&orderByAsc=true", "=&")

    def __exit__(self, *raised: object) -> None:
        """Mark what is not finished; the store may be what has failed, and is asked once."""
        before = dict(os.environ)
        os.environ |= {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "1"}
        for run_id in self._unfinished:
            self._fail(run_id)
        os.environ |= before

    @noting_failures
    def _fail(self, run_id: str) -> None:
        self._client.set_terminated(run_id, "FAILED")

    def _create(
        self, name: str, tags: Mapping[str, str], parameters: Mapping[str, object], began: float
    ) -> str:
        """Make a run that began then, in s since 1970; return its id."""
        tags = {**self._tags, **tags}
        run = self._client.create_run(self._experiment_id, int(1000 * began), tags, name)
        self._unfinished.append(run.info.run_id)
        params = [Param(name, str(value)) for name, value in parameters.items()]
        self._client.log_batch(run.info.run_id, params=params)
        return run.info.run_id

    def _finish(self, run_id: str, figures: Mapping[str, object], ended: float) -> None:
        """Write a run's figures, numbers or series by step, and that it ended then."""
        ended = int(1000 * ended)
        points = [
            Metric(name, float(value), ended, int(step))
            for name, figure in figures.items()
            for step, value in pd.Series(figure).dropna().items()
        ]
        for start in range(0, len(points), MAX_POINTS):
            self._client.log_batch(run_id, points[start : start + MAX_POINTS])
        self._client.set_terminated(run_id, "FINISHED", ended)
        self._unfinished.remove(run_id)

    def _add_files(self, files: Files) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for path in write_files(files, Path(folder)):
                self._client.log_artifact(self._id, str(path))

    add_files = noting_failures(_add_files)  # {name: content}

    @noting_failures
    def add_child(
        self, name: str, parameters: Mapping[str, object], figures: Mapping[str, object],
        times: tuple[float, float], tags: Mapping[str, str],
    ) -> None:  # fmt: skip
        """Write a child, from one time to another in s since 1970; the experiment leads to it."""
        tags = {PARENT: self._id, **tags}
        run_id = self._create(name, tags, {**self._parameters, **parameters}, times[0])
        self._finish(run_id, figures, times[1])
        lead = f"Training with and without flooding, [**the last runs**]({self._page})."
        self._client.set_experiment_tag(self._experiment_id, NOTE, f"{lead}\n\n{self.about}")

    @noting_failures
    def conclude(self, result: str, metrics: Mapping[str, float], files: Files) -> None:
        """Write what it has come to, which ends it."""
        self._add_files(files)
        self._client.set_tag(self._id, NOTE, f"{result}\n\n{self.about}")
        self._finish(self._id, metrics, time.time())

    def how_to_look(self) -> str:
        """Return how to see the children, and no other runs, in a browser."""
        uri, page = shown_uri(), self._page
        if tracking_uri().startswith("http"):
            return f"Charts: {uri.rstrip('/')}/{page}"
        command = f"{shlex.quote(sys.executable)} -m mlflow ui --workers 1 --backend-store-uri"
        quoted = f'"{uri}"' if uri.startswith("$") else shlex.quote(uri)
        return f"Charts: {command} {quoted}\nand open http://127.0.0.1:5000/{page}"


class DemoLog(ParentRun):
    """A demo in MLflow: its result, and a child for each flood level of each trial."""

    experiment, settings_file, about = "flooding-synth", SETTINGS_FILE, DEMO

    def __init__(self, parameters: Mapping[str, object], device: torch.device) -> None:
        several = parameters["trials"] > 1
        name = f"{parameters['dataset']}, {parameters['trials']} trial{'s' if several else ''}"
        sort = "seed" if several else "flood_level"
        super().__init__(name, parameters, provenance(device), sort)

    def trial(self, seed: int, times: tuple[float, float], history: pd.DataFrame) -> None:
        """Log a trial that is over, from one time to another in s since 1970."""
        for rank, (level, rows) in enumerate(history.groupby("flood_level")):
            name = f"b = {level:g}" if level else "no flooding"
            name += f", seed {seed}" if self._parameters["trials"] > 1 else ""
            rows = rows.set_index("epoch", drop=False)
            best = rows.loc[rows[rows.epoch > 0].val_accuracy_noisy.idxmax()]
            figures = {shown: rows[metric] for metric, shown in NAMES.items()}
            figures |= {shown: best[metric] for metric, shown in BEST_NAMES.items()}
            color = {"mlflow.runColor": COLORS[min(rank, len(COLORS) - 1)]}
            lasted = times[0] - rank / 1000, times[1]  # the page has the latest first
            self.add_child(name, {"flood_level": level, "seed": seed}, figures, lasted, color)

    def finish(self, outcome: Outcome, files: Files) -> None:
        """Keep the result: clean test scores, and the files that pictures are drawn from."""
        last = outcome.history[outcome.history.epoch == outcome.history.epoch.max()]
        metrics = {"chosen_b": outcome.chosen, "with/b": outcome.compared}
        for side, level in {"without": 0.0, "with": outcome.compared}.items():
            for score in ("accuracy", "loss"):
                scores = last[last.flood_level == level][f"test_{score}_clean"]
                metrics |= {f"{side}/{score}": scores.mean(), f"{side}/sd_{score}": scores.std()}
        self.conclude(f"```\n{outcome.summary}\n```", metrics, files)


class TableLog(ParentRun):
    """A table in MLflow: its files, and a child for each trial that was trained here."""

    experiment, settings_file, about = "flooding-table", "table_synth.json", TABLE

    def __init__(self, parameters: Mapping[str, object]) -> None:
        key = hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()[:16]
        super().__init__("table", parameters, {}, "seed", key)
        self.commit = self._tags.get("mlflow.source.git.commit", "")
