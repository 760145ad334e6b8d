"""Run the scripts in a folder and a store of their own, in this process or as a user does."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; small matrices, and two cores

import importlib
import io
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

import store  # noqa: F401 - before MLflow, whose environment it sets  # isort: skip
import mlflow

PROJECT = Path(__file__).parent.parent
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

    def __init__(self, path: Path, uri: str | None = None) -> None:
        self.path = path
        self.uri = uri or f"sqlite:///{path}/mlflow.db"
        self.processes: list[subprocess.Popen] = []

    def run(self, script: str, *flags: object) -> Result:
        """Run a script's `main` in this process: where the process is not the point."""
        before = os.getcwd(), sys.argv, os.environ.get("MLFLOW_TRACKING_URI")
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        output, errors, status = io.StringIO(), io.StringIO(), 0
        os.chdir(self.path)
        sys.argv = [str(PROJECT / script), *map(str, flags)]
        os.environ["MLFLOW_TRACKING_URI"] = self.uri
        try:
            with redirect_stdout(output), redirect_stderr(errors):
                importlib.import_module(script.removesuffix(".py")).main()
        except SystemExit as leaving:
            status = leaving.code if isinstance(leaving.code, int) else 1
            if isinstance(leaving.code, str):
                errors.write(leaving.code + "\n")
        finally:
            os.chdir(before[0])
            sys.argv = before[1]
            if before[2] is None:
                del os.environ["MLFLOW_TRACKING_URI"]
            else:
                os.environ["MLFLOW_TRACKING_URI"] = before[2]
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return Result(status, output.getvalue(), errors.getvalue())

    def start(self, *command: object, **environment: str) -> subprocess.Popen:
        """Start a real process: a script with its flags, or python flags before it."""
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
