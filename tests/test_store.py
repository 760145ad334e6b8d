"""The MLflow store: away, back again, locked, not there; and what is said about it."""

from __future__ import annotations

import signal
import sqlite3
import time
from types import SimpleNamespace
from unittest.mock import Mock

import mlflow
import pytest
import torch
from conftest import PICTURES, SMALL, finish, one_line, wait_until
from store import Store, TrackingError, without_password

from tracking import DemoLog, TableLog, how_to_look, metric_name
from train import METRICS

SCRIPT = "run_demo_synth.py"
FLAGS = (*SMALL, "--flood-levels", 0.65)
EPOCHS = 60


def runs_of(folder, seed):
    """The demo's runs by flood level; the server's store has those of other tests too."""
    return [run for run in folder.demo_runs() if run.data.params.get("seed") == str(seed)]


@pytest.fixture
def at_epoch(monkeypatch):
    """Have something done with a demo's store at some epoch."""
    monkeypatch.setattr("store.FLUSH_SECONDS", 0.01)

    def do(epoch, call):
        log = DemoLog.evaluation

        def evaluation(self, now):
            if now.epoch == epoch:
                call(self._store)
            log(self, now)
            time.sleep(0.01)

        monkeypatch.setattr(DemoLog, "evaluation", evaluation)

    return do


def test_a_demo_on_a_server(served):
    result = served.run(SCRIPT, *FLAGS, "--epochs", 3, "--seed", 10)
    assert result.status == 0 and result.errors == "", result.errors
    charts = one_line("\n".join(line for line in result.output.splitlines() if "Charts" in line))
    assert charts.startswith(f"Charts: {served.uri}/#/experiments/")
    assert "View run" not in result.output  # MLflow's chatter
    runs = runs_of(served, 10)
    assert len(runs) == 2 and {run.info.status for run in runs} == {"FINISHED"}
    assert sum(run.info.run_name.endswith(" (chosen)") for run in runs) == 1
    again = served.run("plot.py", "--run-id", runs[0].info.run_id, "--output-dir", "again")
    assert again.status == 0 and again.errors == "", again.errors
    assert {path.name for path in (served.path / "again").iterdir()} == PICTURES


def test_passwords_are_not_in_what_is_logged_or_shown(served, server):
    served.uri = server.uri.replace("//", "//me:secret@")
    result = served.run(SCRIPT, *FLAGS, "--epochs", 1, "--seed", 13)
    assert result.status == 0 and result.errors == "", result.errors
    assert f"Charts: {server.uri}/#" in result.output and "secret" not in result.output
    for run in runs_of(served, 13):
        assert "secret" not in str(run.to_dictionary())


def test_a_server_that_comes_back_misses_nothing(served, server, at_epoch):
    def away(store):
        server.kill()
        at_epoch(2 * EPOCHS // 3, lambda store: server.start())

    at_epoch(EPOCHS // 3, away)
    result = served.run(SCRIPT, *FLAGS, "--epochs", EPOCHS, "--seed", 12)
    assert result.status == 0 and result.errors == "", result.errors
    runs = runs_of(served, 12)
    assert len(runs) == 2 and {run.info.status for run in runs} == {"FINISHED"}
    for run in runs:
        for name in METRICS:
            assert list(served.curve(run, metric_name(name))) == list(range(EPOCHS + 1))
        found = {file.path for file in served.client.list_artifacts(run.info.run_id)}
        assert found >= PICTURES


def test_a_server_that_is_killed_costs_only_its_log(served, server, at_epoch, monkeypatch):
    monkeypatch.setattr("run_demo_synth.PATIENCE_SECONDS", 1.0)

    def killed(store):
        store.flush()
        server.kill()

    at_epoch(EPOCHS // 2, killed)
    result = served.run(SCRIPT, *FLAGS, "--epochs", EPOCHS, "--seed", 11)
    assert result.status == 1
    line = one_line(result.errors)
    assert f"MLFLOW_TRACKING_URI {served.uri}: the last " in line and "missing there" in line
    assert "<- chosen" in result.output and "Pictures:" in result.output
    assert {path.name for path in served.path.iterdir()} == PICTURES
    served.uri = server.store_uri  # what it has got is there
    runs = runs_of(served, 11)
    assert len(runs) == 2 and {run.info.status for run in runs} == {"RUNNING"}
    assert all("test/loss_clean" in run.data.metrics for run in runs)


def test_signals_are_heard_while_the_server_is_away(served, server):
    long = ("--epochs", 10**6, "--eval-every", 50)
    demos = {
        number: served.fork(SCRIPT, *FLAGS, *long, "--seed", 20 + number)
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    wait_until(
        lambda: sum(bool(run.data.metrics) for n in demos for run in runs_of(served, 20 + n)) == 4
    )
    server.kill()
    time.sleep(1)
    for number, demo in demos.items():
        demo.send_signal(number)
    time.sleep(1)
    demos[signal.SIGINT].send_signal(signal.SIGINT)  # the second one ends it at once
    for number, demo in demos.items():
        result = finish(demo, timeout=30)
        assert result.status == 128 + number
        assert f"stopped by {number.name}" in result.errors and "Traceback" not in result.errors
        assert ("are missing there" in result.errors) == (number == signal.SIGTERM)


def test_a_locked_database_is_waited_for_but_not_for_long(folder, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", folder.uri)
    with Store("some", lambda id: {}, patience=0.5) as experiment:
        run = experiment.start("one", {}, {})
        experiment.flush()
        other = sqlite3.connect(folder.path / "mlflow.db", isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        started = time.monotonic()
        experiment.log_metrics(run, {"loss": 1.0}, 0)
        with pytest.raises(TrackingError, match="the last 1 entries of the log are missing"):
            experiment.flush()
        assert time.monotonic() - started < 10  # SQLite itself would wait for 20
        other.execute("ROLLBACK")
        other.close()
        wait_until(lambda: not experiment._queue)
        experiment.end(run)
    [run] = folder.runs("some")
    assert run.data.metrics == {"loss": 1.0} and run.info.status == "FINISHED"


def test_a_run_whose_answer_was_lost_is_not_made_twice(folder, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", folder.uri)
    with Store("some", lambda id: {}, patience=30.0) as experiment:
        create = experiment.client.create_run
        answers = iter([False, True])

        def lossy(*arguments, **more):
            made = create(*arguments, **more)
            if not next(answers):
                raise ConnectionError("no answer")
            return made

        monkeypatch.setattr(experiment.client, "create_run", lossy)
        run = experiment.start("one", {"a": 1}, {})
        experiment.log_metrics(run, {"loss": 1.0}, 0)
        experiment.end(run)
    [run] = folder.runs("some")
    assert (run.data.params, run.data.metrics) == ({"a": "1"}, {"loss": 1.0})


@pytest.mark.parametrize("script", [SCRIPT, "run_table_synth.py"])
@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://me:secret@127.0.0.1:9", "http://me:***@127.0.0.1:9"),
        ("http://127.0.0.1:9", "http://127.0.0.1:9"),
        ("sqlite:////dev/null/mlflow.db", "sqlite:////dev/null/mlflow.db"),
        ("postgresql://me:secret@127.0.0.1:9/runs", "postgresql://me:***@127.0.0.1:9/runs"),
        ("postgresql+nothing://me:sec%72et@host/runs", "postgresql+nothing://me:***@host/runs"),
        ("nothing://me:secret@host", "nothing://me:***@host"),
    ],
)
def test_a_store_that_is_not_there(empty_folder, script, uri, shown):
    empty_folder.uri = uri
    result = empty_folder.run(script, *SMALL, "--epochs", 1)
    line = one_line(result.errors)
    assert result.status == 2 and f"MLFLOW_TRACKING_URI {shown}: " in line
    assert "secret" not in line and "sec%72et" not in line
    assert result.output == "" and not list(empty_folder.path.iterdir())


@pytest.mark.parametrize(
    "uri",
    [
        "http://me:secret@127.0.0.1:9",
        "postgresql+nothing://me:secret@host/runs",
        "nothing://me:secret@host",
        "sqlite:///nothing.db?timeout=9",
    ],
)
def test_plotting_from_a_store_that_is_not_there(empty_folder, uri):
    empty_folder.uri = uri
    result = empty_folder.run("plot.py", "--run-id", "some")
    assert result.status == 2 and "secret" not in one_line(result.errors)
    assert "--run-id some: " in result.errors and not list(empty_folder.path.iterdir())


@pytest.mark.parametrize("password", ["secret", "sec@ret", "sec/ret"])
def test_the_address_of_the_charts_has_no_password(monkeypatch, password):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{password}@host:5000/path")
    [shown] = how_to_look(SimpleNamespace(experiment_id="7"), "")
    assert shown.startswith("Charts: http://host:5000/path/#/experiments/7/runs")


def test_a_table_that_cannot_be_read_back_shows_no_password(folder, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", folder.uri)
    with Store("some", lambda id: {}, patience=30.0) as experiment:
        log = TableLog(experiment, [0.0], torch.device("cpu"))
        with pytest.raises(TrackingError, match=r"has lost a cell: {'seed': 3}"):
            log.load([{"seed": 3}])
        error = mlflow.MlflowException("API request to http://me:secret@host failed")
        monkeypatch.setattr(experiment, "search", Mock(side_effect=error))
        with pytest.raises(TrackingError, match=r"read back: API request to http://me:\*\*\*@host"):
            log.load([{"seed": 3}])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("no password in sqlite:///mlflow.db", "no password in sqlite:///mlflow.db"),
        ("postgresql://me:a:b@c@host/x", "postgresql://me:***@host/x"),
        ("postgresql://host/x?user=me&password=secret&more=1", "postgresql://host/x?user=me&password=***&more=1"),
        ("mssql://host?PWD=secret;x=1", "mssql://host?PWD=***;x=1"),
        ("postgresql://:secret@host/x", "postgresql://:***@host/x"),
        ("http://me:sec/ret@host/path", "http://me:***@host/path"),
    ],
)  # fmt: skip
def test_without_password(text, shown):
    assert without_password(text) == shown
