"""The MLflow store: silent, gone, refusing, moved; and what is said about it."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from unittest.mock import Mock

import mlflow.environment_variables as mlflow_settings
import pytest
import torch
from conftest import PICTURES, SMALL, Folder, one_line, wait_until
from mlflow.exceptions import MlflowException
from mlflow.server import constants

from tracking import DemoLog, TableLog, mlflow

SCRIPT = "run_demo_synth.py"
FLAGS = (*SMALL, "--epochs", 2, "--flood-levels", 0.65)
SECRETS = ("secret", "se%63ret", "word@")


def statuses(runs: list[mlflow.entities.Run]) -> list[str]:
    return [run.info.status for run in runs]


@pytest.fixture
def hasty(monkeypatch):
    """To save time, a store is asked once, for a second."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")


def test_a_call_to_a_store_that_has_died_costs_half_a_minute_at_most():
    retries, timeout, factor, jitter = (
        getattr(mlflow_settings, f"MLFLOW_HTTP_REQUEST_{name}").get()
        for name in ("MAX_RETRIES", "TIMEOUT", "BACKOFF_FACTOR", "BACKOFF_JITTER")
    )
    backoff = sum(factor * 2**k for k in range(1, retries))  # none before the first
    assert retries >= 2 and retries * jitter + backoff + (retries + 1) * timeout <= 30


@pytest.fixture
def server(folder) -> Iterator[tuple[str, subprocess.Popen]]:
    """MLflow's server of the folder's store, one process: its address, and to be stopped."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = {
        constants.BACKEND_STORE_URI_ENV_VAR: folder.uri,
        constants.ARTIFACT_ROOT_ENV_VAR: "mlflow-artifacts:/",
        constants.ARTIFACTS_DESTINATION_ENV_VAR: "files",
        constants.SERVE_ARTIFACTS_ENV_VAR: "true",
    }
    command = [sys.executable, "-m", "flask", "--app", "mlflow.server:app", "run"]
    process = subprocess.Popen(
        [*command, "--port", str(port)],
        cwd=folder.path,
        env={**os.environ, **store},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def listens() -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_until(listens)
        yield f"http://me:se%63ret@127.0.0.1:{port}", process
    finally:
        process.kill()
        process.wait()


def test_a_server_that_is_silent_and_then_dies_costs_only_its_log(
    folder, empty_folder, server, hasty, monkeypatch
):
    """Silent in the first of three trials, killed in the last one; what is between is logged.

    And its password is not in what is shown or logged.
    """

    def trained(log, seed, *more):
        process.send_signal((signal.SIGSTOP, signal.SIGCONT, signal.SIGKILL)[seed])
        trial(log, seed, *more)

    trial = DemoLog.trial
    monkeypatch.setattr(DemoLog, "trial", trained)
    empty_folder.uri, process = server
    result = empty_folder.run(SCRIPT, *FLAGS, "--trials", 3)
    line = one_line(result.errors)  # what it met first
    assert result.status == 1 and "timed out" in line
    assert line.startswith(f"{SCRIPT}: error: $MLFLOW_TRACKING_URI: ")
    assert "Charts: $MLFLOW_TRACKING_URI/#/experiments/" in result.output
    assert "<- chosen" in result.output
    assert {file.name for file in empty_folder.path.iterdir()} >= PICTURES
    [parent] = folder.parents()
    children = [run for run in folder.children(parent) if run.data.params.get("seed") == "1"]
    assert statuses(children) == ["FINISHED"] * 2 and statuses([parent]) == ["RUNNING"]
    logged = str([run.to_dictionary() for run in [parent, *children]])
    assert not any(secret in text for secret in SECRETS for text in (logged, line, result.output))


def test_ctrl_c_while_a_store_is_silent_ends_at_once(empty_folder):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        empty_folder.uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
        began = time.monotonic()
        result = empty_folder.run(SCRIPT, *FLAGS)
    assert time.monotonic() - began < 3
    assert result.status == 130 and result.errors == "\nstopped by SIGINT\n"


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("http://127.0.0.1:9", "http://127.0.0.1:9: [Errno 111] Connection refused"),
        ("http://me:secret@127.0.0.1:9", "$MLFLOW_TRACKING_URI: [Errno 111] Connection refused"),
        ("http://me:secret/word@127.0.0.1:9", "$MLFLOW_TRACKING_URI: "),
        ("http://127.0.0.1:9?password=secret", "$MLFLOW_TRACKING_URI: "),
        ("http://[secret@host", "$MLFLOW_TRACKING_URI: "),
        ("postgresql+psycopg://me:se%63ret@host/runs", "$MLFLOW_TRACKING_URI: No module named"),
        ("postgresql+nothing://me:secret@word/runs", "$MLFLOW_TRACKING_URI: NoSuchModule"),
        ("nothing://me:secret@host", "$MLFLOW_TRACKING_URI: "),
        ("sqlite:////dev/null/mlflow.db", "sqlite:////dev/null/mlflow.db: "),
        ("./mlruns", "./mlruns: "),  # file stores are history
    ],
)
def test_a_store_that_is_not_there(empty_folder, hasty, uri, said):
    """One line, before training, without a password; nothing is left behind."""
    empty_folder.uri = uri
    line = empty_folder.refuse(SCRIPT, *FLAGS)
    assert line.startswith(said) and len(line) > len(said) - 2
    assert not any(secret in line for secret in SECRETS)
    assert not list(empty_folder.path.iterdir())


@pytest.mark.parametrize("copied", [True, False])
def test_a_folder_that_was_moved_or_copied_is_refused_before_training(folder, monkeypatch, copied):
    """MLflow would write to the old place without a word."""
    old, new = folder.path / "old", Folder(folder.path / "new")
    old.mkdir()
    shutil.move(folder.path / "mlflow.db", old)
    monkeypatch.chdir(old)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    with DemoLog({"dataset": "spiral", "trials": 1}, torch.device("cpu")):
        pass
    shutil.copytree(old, new.path) if copied else old.rename(new.path)
    line = new.refuse(SCRIPT, *FLAGS)
    assert f"{old}/mlruns/1" in line and "move it back" in line
    assert len(new.parents()) == 1 and old.exists() == copied


def test_files_that_cannot_be_written_are_refused_before_training(folder):
    (folder.path / "mlruns").touch()
    assert f"{folder.path}/mlruns" in folder.refuse(SCRIPT, *FLAGS)
    assert statuses(folder.parents()) == ["FAILED"]


def test_a_run_that_is_refused_costs_only_itself(folder, monkeypatch):
    def refuse_one(self, run_id, *metrics, params=()):
        if metrics and self.get_run(run_id).info.run_name == "no flooding, seed 1":
            raise MlflowException("no metrics today\nand more")
        log_batch(self, run_id, *metrics, params=params)

    log_batch = mlflow.MlflowClient.log_batch
    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", refuse_one)
    result = folder.run(SCRIPT, *FLAGS, "--trials", 2)
    said = f"{SCRIPT}: error: {folder.uri}: no metrics today"
    assert result.status == 1 and one_line(result.errors) == said
    [parent] = folder.parents()
    assert statuses(folder.children(parent)) == ["FINISHED", "FINISHED", "FAILED", "FINISHED"]
    assert parent.info.status == "FINISHED" and "<- chosen" in result.output


def test_a_store_that_has_failed_for_long_is_not_asked_again(folder, monkeypatch):
    refuse = Mock(side_effect=MlflowException("not now"))
    monkeypatch.setattr(mlflow.MlflowClient, "set_experiment_tag", refuse)  # when a child is there
    monkeypatch.setattr("tracking.PATIENCE_SECONDS", 1e-9)
    result = folder.run(SCRIPT, *FLAGS)
    assert result.status == 1 and "not now" in one_line(result.errors)
    [parent] = folder.parents()
    assert refuse.call_count == len(folder.children(parent)) == 1
    assert parent.info.status == "RUNNING" and "<- chosen" in result.output


def test_whatever_ends_a_demo_early_no_run_stays_running(folder, monkeypatch):
    """Ctrl-C while it is opened; a child that the store would not even mark."""

    def refuse_children(self, run_id, *how):
        if "mlflow.parentRunId" in self.get_run(run_id).data.tags:
            raise MlflowException("not this one")
        set_terminated(self, run_id, *how)

    set_terminated = mlflow.MlflowClient.set_terminated
    monkeypatch.setattr(mlflow.MlflowClient, "set_terminated", refuse_children)
    monkeypatch.setattr("run_demo_synth.conclude", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        folder.run(SCRIPT, *FLAGS)
    monkeypatch.setattr(mlflow.MlflowClient, "log_artifact", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        folder.run(SCRIPT, *FLAGS)
    assert statuses(folder.parents()) == ["FAILED", "FAILED"]


def test_a_table_goes_on_in_its_parent_though_it_was_deleted(folder, monkeypatch):
    monkeypatch.chdir(folder.path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{folder.uri}?timeout=10")  # may be a password
    given, other = {"epochs": 7, "batch_norm": True}, {"epochs": 8, "batch_norm": True}

    def add(log, seed):
        figures = {"last/without_flooding": 0.5 + seed, "best/flood_level": 0.02}
        parameters = {**given, "dataset": "spiral", "seed": seed}
        log.add_child(f"seed {seed}", parameters, figures, (100.0 + seed, 200.5), {})

    with pytest.raises(KeyboardInterrupt), TableLog(given) as log:
        add(log, 1)
        raise KeyboardInterrupt
    [parent] = folder.parents("flooding-table")
    assert parent.info.status == "FAILED"
    folder.client.delete_experiment(parent.info.experiment_id)  # then it is restored
    with TableLog(dict(reversed(given.items()))) as log:
        add(log, 0)
        assert statuses(folder.parents("flooding-table")) == ["RUNNING"]
        log.conclude("the table", {}, {"table.csv": b"figures"})
    assert '--backend-store-uri "$MLFLOW_TRACKING_URI"\n' in log.how_to_look()
    with TableLog(other):
        pass
    assert not log.failures
    whole, unfinished = folder.parents("flooding-table")
    assert statuses([whole, unfinished]) == ["FINISHED", "FAILED"]
    assert "the table" in whole.data.tags["mlflow.note.content"]
    assert "table.csv" in folder.artifacts(whole)
    assert whole.data.params == {"epochs": "7", "batch_norm": "True"}
    first, second = folder.children(whole)
    assert not folder.children(unfinished)
    assert second.data.metrics == {"last/without_flooding": 1.5, "best/flood_level": 0.02}
    assert (second.info.run_name, second.info.start_time) == ("seed 1", 101_000)
    expected = {**whole.data.params, "dataset": "spiral", "seed": "1"}
    assert second.data.params == expected and second.info.end_time == 200_500
    assert first.data.metrics["last/without_flooding"] == 0.5
