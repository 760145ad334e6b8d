"""The MLflow store: away, back again, locked, not there; and what is said about it."""

from __future__ import annotations

import importlib.util
import logging
import sqlite3
import threading
import time

import mlflow
import pytest
import requests
import sqlalchemy.exc
from conftest import PICTURES, PROJECT, SMALL, one_line
from mlflow.exceptions import MlflowException

import run_demo_synth
import tracking
from train import METRICS

SCRIPT = "run_demo_synth.py"
FLAGS = (*SMALL, "--epochs", 2, "--flood-levels", 0.65)
ADDRESS = "http://me:secret@host"
FAILED = f"API request to {ADDRESS} failed"


def whole_runs(folder, *demos):
    """The names of the runs, or those of some demos; all are finished and have all they need."""
    runs = folder.runs("flooding-synth")
    runs = [run for run in runs if not demos or run.data.tags["demo"] in demos]
    for run in runs:
        assert run.info.status == "FINISHED"
        files = {file.path for file in folder.client.list_artifacts(run.info.run_id)}
        assert files >= {"history.csv", "boundary.npz"}
        if not run.info.run_name.startswith("result"):
            assert len(run.data.metrics) == len(METRICS)
            assert list(folder.curve(run, "test/loss_clean")) == [0, 1, 2]
    return sorted(run.info.run_name.removesuffix(" (chosen)") for run in runs)


@pytest.fixture
def after_trial(monkeypatch):
    """What is to be done when a trial of this number, from 1, has been trained."""
    train_trial, actions, numbers = run_demo_synth.train_trial, {}, iter(range(1, 10))

    def trained(*arguments):
        trial = train_trial(*arguments)
        actions.get(next(numbers), lambda: None)()
        return trial

    monkeypatch.setattr(run_demo_synth, "train_trial", trained)
    return actions


def test_logging_is_left_alone(folder, monkeypatch):
    loggers = [logging.getLogger(n) for n in ("mlflow", "mlflow.store.db", "alembic", "sqlalchemy")]
    monkeypatch.setattr(logging.root.manager, "disable", 3)
    for logger in loggers:
        monkeypatch.setattr(logger, "level", 17)
    spec = importlib.util.spec_from_file_location("tracking_again", PROJECT / "tracking.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert folder.run(SCRIPT, *FLAGS).status == 0
    assert folder.run("plot.py", "--run-id", "nothing").status == 2
    assert logging.root.manager.disable == 3 and {logger.level for logger in loggers} == {17}


def test_a_server_that_comes_back_misses_nothing(served, server, after_trial, monkeypatch):
    monkeypatch.setattr(tracking, "PATIENCE_SECONDS", 0.5)
    after_trial |= {1: server.kill, 2: server.start}
    result = served.run(SCRIPT, *FLAGS, "--trials", 3)
    assert result.status == 0 and result.errors == "", result.errors
    assert f"Charts: {served.uri}/#/experiments/" in result.output
    view = result.output.partition("viewStateShareKey=")[2].strip()
    expected = [*["b = 0.65"] * 3, *["no flooding"] * 3, "result of 3 trials"]
    assert whole_runs(served, view) == expected


def test_a_password_is_not_in_what_is_logged_or_shown(served, server):
    served.uri = server.uri.replace("//", "//me:se%63ret@")
    result = served.run(SCRIPT, *FLAGS)
    assert result.status == 0 and result.errors == "", result.errors
    assert "Charts: $MLFLOW_TRACKING_URI/#/experiments/" in result.output
    assert "View run" not in result.output  # MLflow's chatter
    runs = [run for run in served.demo_runs() if run.data.tags["demo"] in result.output]
    again = served.run("plot.py", "--run-id", runs[1].info.run_id, "--output-dir", "again")
    assert again.status == 0 and again.errors == "", again.errors
    for name in PICTURES:
        assert (served.path / name).read_bytes() == (served.path / "again" / name).read_bytes()
    experiment = served.client.get_experiment_by_name("flooding-synth")
    logged = str([run.to_dictionary() for run in runs]) + str(experiment.tags)
    assert len(runs) == 2 and not any(s in result.output + logged for s in ("se%63ret", "secret"))


def test_a_server_that_is_killed_costs_only_its_log(served, server, after_trial, monkeypatch):
    """And a few seconds, not a few for each of nine levels."""
    monkeypatch.setattr(tracking, "PATIENCE_SECONDS", 1.0)
    times = []
    after_trial[1] = lambda: times.append(server.kill() or time.monotonic())
    result = served.run(SCRIPT, *FLAGS, *(level / 10 for level in range(1, 8)))
    assert time.monotonic() - times[0] < 7
    expected = f"MLFLOW_TRACKING_URI {served.uri}: 9 runs are missing there: Connection refused"
    assert result.status == 1 and one_line(result.errors) == f"{SCRIPT}: error: {expected}"
    assert "<- chosen" in result.output and "Pictures:" in result.output
    assert {path.name for path in served.path.iterdir()} == PICTURES


@pytest.mark.parametrize("call", ["create_run", "log_batch", "log_artifacts", "set_terminated"])
def test_an_answer_that_is_lost_leaves_no_half_run(folder, monkeypatch, call):
    """The store does what it is asked to and goes away; it refuses to delete at first, too."""
    method, delete_run = getattr(mlflow.MlflowClient, call), mlflow.MlflowClient.delete_run
    lost = [call, "delete_run"]

    def lossy(*arguments, **more):
        answer = method(*arguments, **more)
        if call in lost:
            lost.remove(call)
            raise ConnectionError(FAILED)
        return answer

    def delete(*arguments):
        if "delete_run" in lost:
            lost.remove("delete_run")
            raise ConnectionError(FAILED)
        delete_run(*arguments)

    monkeypatch.setattr(mlflow.MlflowClient, call, lossy)
    monkeypatch.setattr(mlflow.MlflowClient, "delete_run", delete)
    result = folder.run(SCRIPT, *FLAGS)
    assert result.status == 0 and result.errors == "", result.errors
    assert whole_runs(folder) == ["b = 0.65", "no flooding"]


@pytest.mark.parametrize("call", ["create_run", "log_artifacts"])
def test_a_run_that_is_refused_for_good_does_not_keep_the_others_out(folder, monkeypatch, call):
    monkeypatch.setattr(tracking, "PATIENCE_SECONDS", 0.3)
    create_run, log_artifacts = mlflow.MlflowClient.create_run, mlflow.MlflowClient.log_artifacts
    name_of = {}

    def refuse(name, of_call):
        if of_call == call and name.startswith("no flooding"):
            raise MlflowException(FAILED)

    def created(self, experiment, started, tags, name):
        refuse(name, "create_run")
        run = create_run(self, experiment, started, tags, name)
        name_of[run.info.run_id] = name
        return run

    def logged(self, run_id, path):
        refuse(name_of[run_id], "log_artifacts")
        log_artifacts(self, run_id, path)

    monkeypatch.setattr(mlflow.MlflowClient, "create_run", created)
    monkeypatch.setattr(mlflow.MlflowClient, "log_artifacts", logged)
    result = folder.run(SCRIPT, *FLAGS, "--trials", 2)
    assert result.status == 1 and "<- chosen" in result.output
    assert one_line(result.errors).endswith(": 2 runs are missing there: INTERNAL_ERROR")
    assert whole_runs(folder) == ["b = 0.65", "b = 0.65", "result of 2 trials"]


def test_a_locked_database_is_waited_for(folder, after_trial):
    """While somebody else writes; but at the start, and for a picture, that is an error."""
    folder.uri += "?timeout=10"  # an address with a ? may have a password and is not shown
    other = sqlite3.connect(
        folder.path / "mlflow.db", isolation_level=None, check_same_thread=False
    )

    def lock():
        other.execute("BEGIN EXCLUSIVE")
        threading.Timer(1, other.execute, ["ROLLBACK"]).start()

    after_trial[1] = lock
    result = folder.run(SCRIPT, *FLAGS)
    assert result.status == 0 and result.errors == "", result.errors
    assert whole_runs(folder) == ["b = 0.65", "no flooding"]
    assert '--backend-store-uri "$MLFLOW_TRACKING_URI"\n' in result.output
    run_id = folder.demo_runs()[0].info.run_id
    other.execute("BEGIN EXCLUSIVE")
    folder.uri = folder.uri.replace("=10", "=0.1")  # another address: MLflow keeps its connections
    for script, *flags in ((SCRIPT, *FLAGS), ("plot.py", "--run-id", run_id)):
        result = folder.run(script, *flags)
        assert result.status == 2 and one_line(result.errors).endswith(": database is locked")
    other.close()


@pytest.mark.parametrize("script", [SCRIPT, "run_table_synth.py", "plot.py"])
@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("http://127.0.0.1:9", " http://127.0.0.1:9: Connection refused"),
        ("http://me:secret@127.0.0.1:9", ": Connection refused"),
        ("http://me:secret@word@127.0.0.1:9", ": Connection refused"),
        ("http://me:secret/word@127.0.0.1:9", ": INTERNAL_ERROR"),
        ("http://127.0.0.1:9?password=secret", ": Connection refused"),
        ("http://[secret@host", ": ValueError"),
        ("sqlite:////dev/null/mlflow.db", " sqlite:////dev/null/mlflow.db: File exists"),
        ("postgresql+nothing://me:se%63ret@host/runs", ": Can't load plugin: sqlalchemy.dialects"),
        ("postgresql+psycopg://host/runs?user=me&password=secret", ": No module named 'psycopg'"),
        ("nothing://me:secret@host", ": INVALID_PARAMETER_VALUE"),
        ("databricks", " databricks: INTERNAL_ERROR"),
    ],
)
def test_a_store_that_is_not_there(empty_folder, monkeypatch, script, uri, said):
    """One line, without a password, and nothing is left behind but a table's lock."""
    monkeypatch.setenv("DATABRICKS_CONFIG_FILE", "/dev/null")
    empty_folder.uri = uri
    flags = ("--run-id", "some") if script == "plot.py" else (*SMALL, "--epochs", 1)
    result = empty_folder.run(script, *flags)
    line = one_line(result.errors)
    if script == "plot.py":
        assert line.startswith("plot.py: error: --run-id some: ")
    else:
        assert line.startswith(f"{script}: error: MLFLOW_TRACKING_URI{said}")
    assert result.status == 2 and result.output == ""
    assert not any(secret in line for secret in ("secret", "se%63ret", "word"))
    assert {path.name for path in empty_folder.path.iterdir()} <= {"table_synth.lock"}


def because_of(cause, error):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MlflowException(FAILED), "INTERNAL_ERROR"),
        (requests.ConnectionError(FAILED), "ConnectionError"),
        (because_of(OSError(111, "refused"), MlflowException(FAILED)), "refused"),
        (because_of(ImportError("No module named 'x'"), OSError(FAILED)), "No module named 'x'"),
        (OSError(2, "No such file or directory", ADDRESS), "No such file or directory"),
        (sqlalchemy.exc.OperationalError(FAILED, {}, Exception("locked\nmore")), "locked"),
        (sqlalchemy.exc.OperationalError(FAILED, {}, Exception("")), "OperationalError"),
        (sqlalchemy.exc.ArgumentError(FAILED), "ArgumentError"),
        (ValueError(FAILED), "ValueError"),
    ],
)
def test_the_reason_of_an_error_has_no_address(error, said):
    assert tracking.reason(error) == said


def test_what_a_database_says_may_have_a_part_of_a_password(monkeypatch):
    """SQLAlchemy takes what is between the first @ and the / for the host, and drivers name it."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:sec@ret@host/runs")
    said = Exception('could not translate host name "ret@host" to address')
    assert "ret@" not in tracking.reason(sqlalchemy.exc.OperationalError("", {}, said))
