"""Run the scripts as a user does: in a folder of their own, from the command line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest

PROJECT = Path(__file__).parent.parent


class Folder:
    """An empty folder with the scripts at hand and a view of its MLflow store."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("MLFLOW") and name not in ("RANK", "WORLD_SIZE")
        }

    def command(self, script: str, *flags: object) -> list[str]:
        return [sys.executable, str(PROJECT / script), *map(str, flags)]

    def start(self, command: list[str], **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            command,
            cwd=self.path,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run_all(
        self, *commands: list[str], **environment: str
    ) -> list[subprocess.CompletedProcess]:
        """Run commands side by side to their ends."""
        processes = [self.start(command, **environment) for command in commands]
        results = []
        for process in processes:
            output, errors = process.communicate(timeout=120)
            results.append(
                subprocess.CompletedProcess(process.args, process.returncode, output, errors)
            )
        return results

    def run(self, script: str, *flags: object, **environment: str) -> subprocess.CompletedProcess:
        return self.run_all(self.command(script, *flags), **environment)[0]

    @property
    def client(self) -> mlflow.MlflowClient:
        return mlflow.MlflowClient(f"sqlite:///{self.path}/mlflow.db")

    def runs(self, experiment: str) -> list[mlflow.entities.Run]:
        """All runs of an experiment, oldest first."""
        found = self.client.get_experiment_by_name(experiment)
        if found is None:
            return []
        return self.client.search_runs([found.experiment_id], order_by=["start_time"])

    def demos(self) -> list[tuple[mlflow.entities.Run, list[mlflow.entities.Run]]]:
        """Each demo's parent run with its children by flood level."""
        return families(self.runs("flooding-synth"))


def families(runs):
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = {parent.info.run_id: [] for parent in parents}
    for run in runs:
        if run not in parents:
            children[run.data.tags["mlflow.parentRunId"]].append(run)
    return [
        (
            parent,
            sorted(
                children[parent.info.run_id],
                key=lambda run: float(run.data.params.get("flood_level", 0)),
            ),
        )
        for parent in parents
    ]


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(tmp_path)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory) -> Path:
    """A store that is set up already: that takes longer than most demos of the tests."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def ready_folder(folder, empty_store) -> Folder:
    shutil.copy(empty_store, folder.path / "mlflow.db")
    return folder
