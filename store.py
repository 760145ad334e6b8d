"""Write to an MLflow store without waiting for it, and read from it.

The store is what MLFLOW_TRACKING_URI says, else `sqlite:///mlflow.db` in the current folder,
which is what a bare `mlflow ui` there opens.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import re
import secrets
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

for name, value in {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # The store is tried again here, without keeping the training or a Ctrl-C waiting.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
}.items():
    os.environ.setdefault(name, value)
import mlflow
from mlflow.entities import DatasetInput, Metric, Param, RunTag

FLUSH_SECONDS = 3.0  # between two writes: what a crash loses at most
HURRIED_SECONDS = 5.0  # how long a script that was interrupted or failed waits for the store
MAX_POINTS = 1000  # of metrics in one call, MLflow's limit

# A new store reports its migrations, a locked one its tracebacks.
for chatty in ("mlflow", "alembic"):
    logging.getLogger(chatty).setLevel(logging.CRITICAL)


class TrackingError(Exception):
    """The tracking store cannot be reached, or lacks what is asked of it."""


def tracking_uri() -> str:
    """Return where the runs are kept: MLFLOW_TRACKING_URI, else SQLite in the current folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"


def without_password(text: str) -> str:
    """Return a text about the store that is fit to be shown: addresses lose their passwords."""
    with contextlib.suppress(ValueError):  # an address that cannot be parsed
        if password := urlsplit(tracking_uri()).password:
            for secret in (password, unquote(password)):
                text = text.replace(secret, "***")
    text = re.sub(r"(://[^\s:/@]*):\S*@", r"\1:***@", text)
    return re.sub(r"(?i)([?&;](?:password|passwd|pwd|token)=)[^\s&;]*", r"\1***", text)


def reason(error: BaseException) -> str:
    """Return what an error comes from, or says in its first line, fit to be shown."""
    cause: BaseException | None = error
    while cause:
        if isinstance(cause, OSError) and cause.strerror:  # "Connection refused"
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    lines = str(error).strip().splitlines() or [repr(error)]
    return without_password(lines[0])


class Run:
    """A run of the store: `id` is None until the store has it."""

    def __init__(self) -> None:
        self.id: str | None = None
        self.points: deque[Metric] = deque()
        self.flush_is_due = False
        self.ended = False  # in the store


class Store:
    """An experiment of the tracking store, made if it is not there, and written to beside us.

    What is to be written waits in a queue, in order, for a thread that writes it; what the store
    does not take is tried again until `flush` gives up, so nobody waits for a store that is away.

    Args:
        experiment: its name.
        tags: its tags, made from its id.
        patience: seconds that a store may take no answer before `check` and `flush` give up.

    Raises:
        TrackingError: the store cannot be reached.
    """

    def __init__(
        self, experiment: str, tags: Callable[[str], Mapping[str, str]], patience: float
    ) -> None:
        uri = tracking_uri()
        try:
            with _set_up_alone():
                self.client = mlflow.MlflowClient(uri)
                self.experiment_id = self._experiment_id(experiment)
                for tag, value in tags(self.experiment_id).items():
                    self.client.set_experiment_tag(self.experiment_id, tag, value)
        # SQLAlchemy, the HTTP client and the file system have errors of their own.
        except Exception as error:
            shown = without_password(uri)
            raise TrackingError(f"MLFLOW_TRACKING_URI {shown}: {reason(error)}") from error
        self._patience = patience
        self._queue: deque[Callable[[], object]] = deque()
        self._error: BaseException | None = None  # of the last try
        self._waiting_since: float | None = None  # for the store to take what it was given
        self._open_runs: list[Run] = []
        self._hurry, self._closed = threading.Event(), threading.Event()
        self._writer = threading.Thread(target=self._write, daemon=True)
        self._writer.start()

    def _experiment_id(self, name: str) -> str:
        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return self.client.create_experiment(name)
            except mlflow.MlflowException:  # another process was quicker
                experiment = self.client.get_experiment_by_name(name)
                if experiment is None:
                    raise
        return experiment.experiment_id

    def _write(self) -> None:
        while not self._closed.is_set():
            self._hurry.wait(FLUSH_SECONDS)
            while self._queue and not self._closed.is_set():
                self._waiting_since = self._waiting_since or time.monotonic()
                try:
                    self._queue[0]()
                except Exception as error:  # of whatever the store is made of; tried again
                    self._error = error
                    self._closed.wait(0.5)
                else:
                    self._queue.popleft()
                    self._error = self._waiting_since = None
            self._hurry.clear()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        """End the runs that are open: FAILED, or KILLED where the program is interrupted."""
        status = "FAILED" if kind and issubclass(kind, Exception) else "KILLED"
        for run in list(self._open_runs):
            self.end(run, status)
        if kind:
            self._patience = min(self._patience, HURRIED_SECONDS)
        try:
            self.flush()
        except TrackingError as error:
            if not kind:
                raise
            if not issubclass(kind, TrackingError):
                print(f"also: {error}", file=sys.stderr)
        finally:
            self._closed.set()
            self._hurry.set()

    def flush(self) -> None:
        """Wait until all is written; raises what `check` raises."""
        while self._queue:
            self._hurry.set()
            self.check()
            time.sleep(0.02)

    def check(self) -> None:
        """Check that the store takes what it is given.

        Raises:
            TrackingError: it has not for `patience` seconds; says how much it lacks, and why.
        """
        if self._is_away(self._patience):
            why = reason(self._error) if self._error else "no answer"
            raise TrackingError(
                f"MLFLOW_TRACKING_URI {without_password(tracking_uri())}: the last "
                f"{len(self._queue)} entries of the log are missing there: {why}"
            )

    def _is_away(self, after: float) -> bool:
        """Whether the store has been given something for so many seconds and not taken it."""
        since = self._waiting_since
        return since is not None and time.monotonic() - since > after

    def start(
        self,
        name: str,
        parameters: Mapping[str, object],
        tags: Mapping[str, str],
        datasets: Sequence[DatasetInput] = (),
    ) -> Run:
        """Start a run that is open until `end`."""
        run = Run()
        # The token finds a run that the store made although its answer was lost.
        token, started = secrets.token_hex(8), int(time.time() * 1000)
        tags = {**tags, "token": token}
        tries = itertools.count()

        def create() -> None:
            if next(tries) and (found := self.search(f"tags.token = '{token}'")):
                run.id = found[0].info.run_id
                return
            made = self.client.create_run(self.experiment_id, started, tags=tags, run_name=name)
            run.id = made.info.run_id

        def describe() -> None:
            params = [Param(key, str(value)) for key, value in parameters.items()]
            self.client.log_batch(run.id, params=params)
            if datasets:
                self.client.log_inputs(run.id, datasets)

        self._open_runs.append(run)
        self.write(create)
        self.write(describe)
        return run

    def write(self, call: Callable[..., object], *arguments: object) -> None:
        """Put a call that writes to the store into the queue."""
        self._queue.append(functools.partial(call, *arguments))

    def end(self, run: Run, status: str = "FINISHED") -> None:
        """End a run: FINISHED, FAILED or KILLED."""
        self._open_runs.remove(run)
        ended = int(time.time() * 1000)

        def terminate() -> None:
            self.client.set_terminated(run.id, status, ended)
            run.ended = True

        self.write(terminate)

    def log_metrics(self, run: Run, metrics: Mapping[str, float], step: int) -> None:
        """Log a point a metric; waits for a store that is slow, not for one that is away."""
        while len(run.points) > 2 * MAX_POINTS and not self._is_away(after=1.0):
            self._hurry.set()
            time.sleep(0.01)
        now = int(time.time() * 1000)
        for name, value in metrics.items():
            run.points.append(Metric(name, float(value), now, step))
        if not run.flush_is_due:
            run.flush_is_due = True
            self.write(self._flush, run)

    def _flush(self, run: Run) -> None:
        run.flush_is_due = False  # first: points that come from now on have a flush of their own
        while run.points:
            batch = list(itertools.islice(run.points, MAX_POINTS))
            self.client.log_batch(run.id, metrics=batch)
            self._waiting_since = time.monotonic()  # it does answer
            for _ in batch:
                run.points.popleft()

    def set_tags(self, run: Run, tags: Mapping[str, str]) -> None:
        """Set tags of a run; `mlflow.` ones mean something to the UI."""
        self.write(
            lambda: self.client.log_batch(run.id, tags=[RunTag(*item) for item in tags.items()])
        )

    def log_file(self, run: Run, path: Path) -> None:
        """Keep a file with a run; it is read at once, and may change afterwards."""
        name, content = path.name, path.read_bytes()

        def log() -> None:
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / name).write_bytes(content)
                self.client.log_artifact(run.id, str(Path(folder) / name))

        self.write(log)

    def ask(self, query: str) -> list[mlflow.entities.Run]:
        """Search; a store that is away has no answer, and what is to be written will say so."""
        try:
            return self.search(query)
        except Exception as error:
            self._error = error
            return []

    def search(self, query: str) -> list[mlflow.entities.Run]:
        """Return the experiment's runs that fit an MLflow query, oldest first."""
        return list(
            self.client.search_runs(
                [self.experiment_id], query, max_results=50_000, order_by=["start_time"]
            )
        )


def reading_client() -> mlflow.MlflowClient:
    """Return a client that only reads: it makes no store where there is none.

    Raises:
        TrackingError: there is no such SQLite file.
    """
    uri = tracking_uri()
    path = uri.removeprefix("sqlite:///").partition("?")[0]
    if uri.startswith("sqlite:///") and not Path(path).exists():
        raise TrackingError(f"there is no {uri}")
    return mlflow.MlflowClient(uri)


@contextlib.contextmanager
def _set_up_alone() -> Iterator[None]:
    """Keep two processes from setting up one new SQLite store at once, which MLflow cannot."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with (Path(tempfile.gettempdir()) / f"flooding-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
