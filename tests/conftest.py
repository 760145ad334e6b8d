"""Run the scripts in a folder and a store of their own, in this process or as a user does."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; small matrices, and two cores

import importlib
import io
import multiprocessing
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

import store  # before MLflow, whose environment it sets  # isort: skip
import mlflow

PROJECT = Path(__file__).parent.parent
PICTURES = {"synth_acc.png", "synth_boundary.png", "synth_loss.png"}
SMALL = (
    *("--train-samples", 30, "--val-samples", 20, "--test-samples", 60),
    *("--hidden-layers", 2, "--hidden-units", 16),
)


@dataclass
class Result:
    """How a script ended and what it printed."""

    status: int
    output: str
    errors: str


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["conftest", "run_demo_synth", "run_table_synth", "plot", "tracking"])


class Fork:
    """A script in a process of its own, with what tests need of `subprocess.Popen`."""

    def __init__(
        self,
        path: Path,
        uri: str,
        script: str,
        flags: Sequence[object],
        environment: Mapping[str, str],
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._streams = [Path(self._folder.name) / name for name in ("output", "errors")]
        self._process = FORKS.Process(
            target=_run_forked,
            args=(path, uri, script, [*map(str, flags)], environment, self._streams),
        )
        self._process.start()
        self.returncode: int | None = None

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        if self.returncode is None:
            self._process.kill()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; returns what it printed, the first time."""
        if self.returncode is not None:
            return "", ""
        self._process.join(timeout)
        assert self._process.exitcode is not None, "still running"
        self.returncode = self._process.exitcode
        output, errors = (path.read_text() for path in self._streams)
        self._folder.cleanup()
        return output, errors


def _run_forked(
    path: Path,
    uri: str,
    script: str,
    flags: list[str],
    environment: Mapping[str, str],
    streams: Sequence[Path],
) -> None:
    for number, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT), number)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    os.chdir(path)
    os.environ.update({"MLFLOW_TRACKING_URI": uri, **environment})
    sys.argv = [str(PROJECT / script), *flags]
    import process

    store.FLUSH_SECONDS = 0.2  # so that tests see sooner what is logged, or who is lost
    process.LOST_SECONDS = 1.0
    importlib.import_module(script.removesuffix(".py")).main()


class Folder:
    """An empty folder to run scripts in, with a view of its MLflow store."""

    def __init__(self, path: Path, uri: str | None = None) -> None:
        self.path = path
        self.uri = uri or f"sqlite:///{path}/mlflow.db"
        self.processes: list[subprocess.Popen | Fork] = []

    def run(self, script: str, *flags: object) -> Result:
        """Run a script's `main` in this process: where the process is not the point."""
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        output, errors, status = io.StringIO(), io.StringIO(), 0
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.path)
            patch.setattr(sys, "argv", [str(PROJECT / script), *map(str, flags)])
            patch.setenv("MLFLOW_TRACKING_URI", self.uri)
            try:
                with redirect_stdout(output), redirect_stderr(errors):
                    importlib.import_module(script.removesuffix(".py")).main()
            except SystemExit as leaving:
                status = leaving.code if isinstance(leaving.code, int) else 1
                if isinstance(leaving.code, str):
                    errors.write(leaving.code + "\n")
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)
        return Result(status, output.getvalue(), errors.getvalue())

    def spawn(self, *command: object, **environment: str) -> subprocess.Popen:
        """Start a process as a user does: a script with its flags, or python flags before it."""
        script = [str(PROJECT / part) if str(part).endswith(".py") else part for part in command]
        process = subprocess.Popen(
            [sys.executable, *map(str, script)],
            cwd=self.path,
            env={**os.environ, "MLFLOW_TRACKING_URI": self.uri, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        return process

    def fork(self, script: str, *flags: object, **environment: str) -> Fork:
        """Start a process that has imported everything: seconds sooner than `spawn`."""
        process = Fork(self.path, self.uri, script, flags, environment)
        self.processes.append(process)
        return process

    def stop(self) -> None:
        """Leave no process behind."""
        for process in self.processes:
            process.kill()
            process.communicate()

    @property
    def client(self) -> mlflow.MlflowClient:
        return mlflow.MlflowClient(self.uri)

    def runs(self, experiment: str) -> list[mlflow.entities.Run]:
        """All runs of an experiment, oldest first."""
        found = self.client.get_experiment_by_name(experiment)
        if found is None:
            return []
        return self.client.search_runs([found.experiment_id], order_by=["start_time"])

    def demo_runs(self) -> list[mlflow.entities.Run]:
        """The demos' runs by demo, seed and flood level."""
        return sorted(
            self.runs("flooding-synth"),
            key=lambda run: (
                run.data.tags["demo"],
                int(run.data.params.get("seed", 0)),
                float(run.data.params.get("flood_level", 0)),
            ),
        )

    def curve(self, run: mlflow.entities.Run, name: str) -> dict[int, float]:
        """A metric by step, each logged once."""
        points = self.client.get_metric_history(run.info.run_id, name)
        curve = {point.step: point.value for point in points}
        assert len(curve) == len(points)
        return curve


class Server:
    """A real `mlflow server`, to be killed and started again on the same store."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.store_uri = f"sqlite:///{path}/mlflow.db"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        store = ("--backend-store-uri", self.store_uri, "--artifacts-destination", "files")
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(self.port), *store]
        with (self.path / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--workers", "1"],
                cwd=self.path,
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_until(self._answers)

    def _answers(self) -> bool:
        assert self.process.poll() is None
        try:
            urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
        except (urllib.error.URLError, TimeoutError):
            return False
        return True

    def kill(self) -> None:
        """Kill it with its workers; nothing listens afterwards."""
        if self.process:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for something that happens in another process or thread."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def finish(process: subprocess.Popen | Fork, timeout: float = 100) -> Result:
    """Wait for a process's end."""
    output, errors = process.communicate(timeout=timeout)
    return Result(process.returncode, output, errors)


def one_line(text: str) -> str:
    [line] = text.splitlines()
    return line


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory) -> Path:
    """A store that is set up already: that takes longer than most runs of the tests."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def empty_folder(tmp_path) -> Iterator[Folder]:
    """A folder without a store."""
    folder = Folder(tmp_path)
    yield folder
    folder.stop()


@pytest.fixture
def folder(empty_folder, empty_store) -> Folder:
    """A folder with a store that is set up."""
    shutil.copy(empty_store, empty_folder.path / "mlflow.db")
    return empty_folder


@pytest.fixture(scope="session")
def server(tmp_path_factory, empty_store) -> Iterator[Server]:
    """A server, see `served`."""
    path = tmp_path_factory.mktemp("server")
    shutil.copy(empty_store, path / "mlflow.db")
    server = Server(path)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def served(tmp_path, server) -> Iterator[Folder]:
    """A folder whose runs go to the server, which a test may leave killed."""
    if server.process is None:
        server.start()
    folder = Folder(tmp_path, server.uri)
    yield folder
    folder.stop()
