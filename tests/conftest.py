"""Run the scripts in a folder and a store of their own, in this process or as a user does."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; small matrices, and two cores

import importlib
import io
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import pytest

from settings import parse_flags
from tracking import mlflow  # as the project sets it up

PROJECT = Path(__file__).parent.parent
SETTINGS = {"run_demo_synth.py": "Demo", "run_table_synth.py": "Table", "plot.py": "PlotSettings"}
PICTURES = {"synth_acc.png", "synth_boundary.png", "synth_loss.png"}
PARENT = "mlflow.parentRunId"
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


class Folder:
    """An empty folder to run scripts in, with a view of its MLflow store."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.uri = f"sqlite:///{path}/mlflow.db"
        self.processes: list[subprocess.Popen] = []

    def run(self, script: str, *flags: object, stdout: TextIO | None = None) -> Result:
        """Run a script's `main` in this process: where the process is not the point."""
        module = importlib.import_module(script.removesuffix(".py"))
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        output, errors, status = io.StringIO(), io.StringIO(), 0
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.path)
            patch.setattr(sys, "argv", [str(PROJECT / script), *map(str, flags)])
            patch.setenv("MLFLOW_TRACKING_URI", self.uri)
            try:
                with redirect_stdout(stdout or output), redirect_stderr(errors):
                    module.main(parse_flags(getattr(module, SETTINGS[script]), module.__doc__))
            except SystemExit as leaving:
                status = leaving.code
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

    def parents(self, experiment: str = "flooding-synth") -> list[mlflow.entities.Run]:
        """The runs that a demo or a table has as a whole, oldest first."""
        return [run for run in self.runs(experiment) if PARENT not in run.data.tags]

    def children(self, parent: mlflow.entities.Run) -> list[mlflow.entities.Run]:
        """A parent's children by seed and flood level."""
        query = f"tags.`{PARENT}` = '{parent.info.run_id}'"
        children = self.client.search_runs([parent.info.experiment_id], query)
        given = [run.data.params for run in children]
        order = [(int(one["seed"]), float(one.get("flood_level", 0))) for one in given]
        return [children[k] for k in sorted(range(len(children)), key=order.__getitem__)]

    def curve(self, run: mlflow.entities.Run, name: str) -> dict[int, float]:
        """A metric by step, each logged once."""
        points = self.client.get_metric_history(run.info.run_id, name)
        curve = {point.step: point.value for point in points}
        assert len(curve) == len(points)
        return curve


class Server:
    """A real `mlflow server` of the store in a folder, on a free port."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.uri = f"http://127.0.0.1:{free.getsockname()[1]}"
        store = ("--backend-store-uri", f"sqlite:///{path}/mlflow.db", "--workers", "1")
        command = [sys.executable, "-m", "mlflow", "server", "--port", self.uri.split(":")[2]]
        with (path / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *store, "--artifacts-destination", "files"],
                cwd=path,
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def answers(self) -> bool:
        assert self.process.poll() is None
        try:
            urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
        except (urllib.error.URLError, TimeoutError):
            return False
        return True

    def send(self, number: signal.Signals) -> None:
        """Send it and its workers a signal; one that is stopped takes connections in silence."""
        os.killpg(self.process.pid, number)


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for something that happens in another process."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def finish(process: subprocess.Popen, timeout: float = 100) -> Result:
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
