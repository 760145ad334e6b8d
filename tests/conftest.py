"""Run the scripts in a folder and a store of their own, in this process."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; small matrices, and two cores

import importlib
import io
import re
import shutil
import signal
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TextIO

import pytest
import sqlalchemy

from settings import parse_flags
from tracking import mlflow  # as the project sets it up

PROJECT = Path(__file__).parent.parent
PICTURES = {"synth_acc.png", "synth_boundary.png", "synth_loss.png"}
PARENT = "mlflow.parentRunId"
SMALL = (
    *("--train-samples", 30, "--val-samples", 20, "--test-samples", 60),
    *("--hidden-layers", 2, "--hidden-units", 16),
)


@sqlalchemy.event.listens_for(sqlalchemy.Engine, "connect")
def do_not_wait_for_the_disk(connection, _record) -> None:
    """A store of these tests need not outlive a power cut, and waiting took most of its time."""
    connection.execute("PRAGMA synchronous = OFF")


def parse(settings: type, *flags: object) -> object:
    """What a script makes of these flags."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["script.py", *map(str, flags)])
        patch.setattr("settings.exit_on_signals", lambda: None)
        return parse_flags(settings, "")


def one_line(text: str) -> str:
    [line] = text.splitlines()
    return line


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for something that happens in another process."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


Result = namedtuple("Result", "status output errors")  # how a script ended, what it printed


class Folder:
    """A folder to run scripts in, with a view of its MLflow store."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.uri = f"sqlite:///{path}/mlflow.db"

    def run(self, script: str, *flags: object, stdout: TextIO | None = None) -> Result:
        """Run a script's `main` in this process."""
        module = importlib.import_module(script.removesuffix(".py"))
        settings, _ = module.main.__annotations__.values()
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        output, errors, status = io.StringIO(), io.StringIO(), 0
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.path)
            patch.setattr(sys, "argv", [str(PROJECT / script), *map(str, flags)])
            patch.setenv("MLFLOW_TRACKING_URI", self.uri)
            try:
                with redirect_stdout(stdout or output), redirect_stderr(errors):
                    module.main(parse_flags(settings, module.__doc__))
            except SystemExit as leaving:
                status = leaving.code
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)
        said = re.sub(r"[^\r\n]*\r *", "", errors.getvalue())  # no bar, which slow ones show
        return Result(status, output.getvalue(), said)

    def succeed(self, script: str, *flags: object) -> str:
        """Run a script that has nothing to complain of; return what it prints."""
        result = self.run(script, *flags)
        assert (result.status, result.errors) == (0, ""), result.errors
        return result.output

    def refuse(self, script: str, *flags: object) -> str:
        """Run a script that ends before it does anything; return the one line that says why."""
        result = self.run(script, *flags)
        assert (result.status, result.output) == (2, ""), result
        name, said = one_line(result.errors).split(": error: ", 1)
        assert name == script
        return said

    @property
    def client(self) -> mlflow.MlflowClient:
        return mlflow.MlflowClient(self.uri)

    def parents(self, experiment: str = "flooding-synth") -> list[mlflow.entities.Run]:
        """The runs that a demo or a table has as a whole, oldest first."""
        found = self.client.get_experiment_by_name(experiment)
        if found is None:
            return []
        runs = self.client.search_runs([found.experiment_id], order_by=["start_time"])
        return [run for run in runs if PARENT not in run.data.tags]

    def children(self, parent: mlflow.entities.Run) -> list[mlflow.entities.Run]:
        """A parent's children by seed and flood level, which MLflow sorts as text."""
        query = f"tags.`{PARENT}` = '{parent.info.run_id}'"
        order = ["params.seed", "params.flood_level"]
        return self.client.search_runs([parent.info.experiment_id], query, order_by=order)

    def artifacts(self, run: mlflow.entities.Run) -> set[str]:
        return {file.path for file in self.client.list_artifacts(run.info.run_id)}


@pytest.fixture(scope="session")
def make_folder(tmp_path_factory) -> Callable[[], Folder]:
    """Make folders whose store is set up already, which takes longer than most of the tests."""
    first = Folder(tmp_path_factory.mktemp("store"))
    first.client.search_experiments()

    def make() -> Folder:
        folder = Folder(tmp_path_factory.mktemp("folder"))
        shutil.copy(first.path / "mlflow.db", folder.path)
        return folder

    return make


@pytest.fixture
def folder(make_folder) -> Folder:
    return make_folder()


@pytest.fixture
def empty_folder(tmp_path) -> Folder:
    """A folder without a store."""
    return Folder(tmp_path)
