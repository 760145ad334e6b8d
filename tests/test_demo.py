"""The demo as a user runs it and breaks it, and what MLflow then has."""

from __future__ import annotations

import fcntl
import importlib
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from dataclasses import fields, replace
from unittest.mock import Mock

import mlflow
import pytest
import torch
from conftest import PICTURES, PROJECT, SETTINGS, SMALL, finish, one_line, wait_until

import plot
import run_demo_synth
from settings import parse_flags
from train import METRICS

SCRIPT = "run_demo_synth.py"
FLAGS = (*SMALL, "--epochs", 3, "--flood-levels", 0.7, "--device", "cpu")
SECTIONS = {name: name.replace("_", "/", 1) for name in METRICS}  # as MLflow shows them


def pictures(path):
    return {file.name: file.read_bytes() for file in path.glob("*.png")}


def drawn_again(folder, run):
    """The pictures that `plot.py` makes of a run."""
    result = folder.run("plot.py", "--run-id", run.info.run_id, "--output-dir", run.info.run_id)
    assert result.status == 0 and result.errors == "", result.errors
    return pictures(folder.path / run.info.run_id)


@pytest.fixture
def parsed(monkeypatch, tmp_path):
    def parse(*flags):
        monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, flags)])
        return vars(parse_flags(run_demo_synth.DemoSettings, run_demo_synth.__doc__))

    monkeypatch.chdir(tmp_path)
    return parse


def test_defaults_are_the_authors(parsed):
    """Protocol section 3, setting 1; Adam's are those of setting 2."""
    sgd = {
        **{"dataset": "sinusoid2d", "label_noise": 0.1, "spiral_noise": 0.0},
        **{"train_samples": 100, "val_samples": 100, "test_samples": 20_000},
        **{"hidden_layers": 4, "hidden_units": 500, "batch_norm": True, "flood_on": "batch"},
        **{"optimizer": "sgd", "learning_rate": 0.01, "momentum": 0.9, "weight_decay": 0.0},
        **{"batch_size": 200, "epochs": 200, "eval_every": 1, "select_on": "clean"},
        **{"flood_levels": (0.0, 0.26, 0.27, 0.28), "trials": 1, "seed": 0, "device": "auto"},
    }
    adam = {"optimizer": "adam", "learning_rate": 0.001, "momentum": 0.0}
    adam["flood_levels"] = (0.0, 0.24, 0.25, 0.26)
    spiral = {"train_samples": 200, "val_samples": 200, "test_samples": 20_000}
    output = {"output_dir": parsed()["output_dir"]}
    assert str(output["output_dir"]) == "." and parsed() == {**sgd, **output}
    assert parsed("--optimizer", "adam") == {**sgd, **adam, **output}
    assert parsed("--dataset", "spiral").items() >= spiral.items()


def test_demo_end_to_end(folder, monkeypatch, parsed):
    make_dataset, train_trial, times = run_demo_synth.make_dataset, run_demo_synth.train_trial, []

    def timed_trial(*arguments):
        times.append(time.time())
        return train_trial(*arguments), times.append(time.time())

    slow_data = lambda *of: time.sleep(0.3) or make_dataset(*of)  # noqa: E731
    monkeypatch.setattr(run_demo_synth, "make_dataset", slow_data)
    monkeypatch.setattr(run_demo_synth, "train_trial", lambda *of: timed_trial(*of)[0])
    flags = (*SMALL, "--epochs", 4, "--seed", 3, "--device", "cpu")
    result = folder.run(SCRIPT, *flags)
    assert result.status == 0 and result.errors == "", result.errors
    lines = result.output.splitlines()
    assert lines[0].startswith("sinusoid2d, 10% of the labels flipped, 30 training examples")
    assert lines[0].endswith("4 epochs; seed 3 on cpu")
    titles = ["train, noisy", "val, clean", "test, clean", "test loss, clean"]
    assert re.split(" {3,}", lines[4]) == ["flood level", *titles]
    rows, levels = lines[5:9], ["0", "0.26", "0.27", "0.28"]
    assert f"{sys.executable} -m mlflow ui" in lines[-2]
    assert f"sqlite:///{folder.path}/mlflow.db" in lines[-2]
    assert "workflowType=machine_learning&compareRunsMode=CHART&searchFilter=tags.demo" in lines[-1]
    assert set(pictures(folder.path)) == PICTURES

    runs = folder.demo_runs()
    scores = {name: [run.data.metrics[SECTIONS[name]] for run in runs] for name in METRICS}
    accuracy, loss = scores["val_accuracy_clean"], scores["val_loss_clean"]
    best = min(range(4), key=lambda k: (-accuracy[k], loss[k], k))
    assert [k for k in range(4) if "<- chosen" in rows[k]] == [best]
    shown = [("train_accuracy_noisy", 100, 1), ("val_accuracy_clean", 100, 1)]
    shown += [("test_accuracy_clean", 100, 1), ("test_loss_clean", 1, 3)]
    params = {**parsed(*flags), "flood_levels": " ".join(levels)}
    for k, (run, level, row) in enumerate(zip(runs, levels, rows)):
        name, tags = f"b = {level}" if k else "no flooding", run.data.tags
        figures = [f"{scale * scores[score][k]:.{digits}f}" for score, scale, digits in shown]
        assert row[:11].strip() == (level if k else name) and row[11:].split()[:4] == figures
        assert run.info.run_name == (f"{name} (chosen)" if k == best else name)
        expected = {**params, "flood_level": float(level)}.items()
        assert run.data.params == {name: str(value) for name, value in expected}
        for name in METRICS:
            steps = range(name == "train_batch_loss", 5)  # there is none before training
            assert list(folder.curve(run, SECTIONS[name])) == list(steps)
        assert tags["chosen"] == ("yes" if k == best else "no") and tags["demo"] in lines[-1]
        assert tags["torch"] == torch.__version__ and tags["device"] == "cpu"
        assert rows[best] in tags["mlflow.note.content"]
        files = {file.path for file in folder.client.list_artifacts(run.info.run_id)}
        assert files == {*PICTURES, "history.csv", "boundary.npz"}
        contexts = {i.tags[0].value: i.dataset for i in run.inputs.dataset_inputs}
        assert set(contexts) == {"train", "validation", "test"}
        assert len({dataset.digest for dataset in contexts.values()}) == 3
        assert contexts["test"].name == "sinusoid2d, label noise 0.1"
        assert '"features_shape": [60, 2]' in contexts["test"].profile
        assert '"seed": 3' in contexts["test"].source
        began, ended = run.info.start_time / 1000, run.info.end_time / 1000
        assert run.info.status == "FINISHED" and ended - began >= 0.299
        assert times[0] - 0.001 <= began < times[0] + 0.25 and ended <= times[1]
    colors = [run.data.tags["mlflow.runColor"] for run in runs]
    assert colors[0] == plot.WITHOUT_COLOR and colors.count(plot.WITH_COLOR) == 1
    assert best == 0 or colors[best] == plot.WITH_COLOR
    experiment = folder.client.get_experiment_by_name("flooding-synth")
    address = f"#/experiments/{experiment.experiment_id}/runs"
    assert address in experiment.tags["mlflow.note.content"]
    view = f"mlflow.sharedViewState.{runs[0].data.tags['demo']}"
    assert "flood_level" in experiment.tags[view]
    # The same pictures again, from what MLflow has, whichever run is named.
    assert drawn_again(folder, runs[2]) == pictures(folder.path)


def test_trials_are_the_demos_of_their_seeds(folder, monkeypatch):
    trials, train, drawn, png_files = [], run_demo_synth.train, [], plot.png_files

    def spied(network, data, levels, settings, device, generator, **more):
        weights = torch.cat([weight.flatten() for weight in network.state_dict().values()])
        trials.append((torch.tensor(data.train.inputs), weights, generator.get_state()))
        return train(network, data, levels, settings, device, generator, **more)

    monkeypatch.setattr(run_demo_synth, "train", spied)
    monkeypatch.setattr(plot, "png_files", lambda made: drawn.append(made) or png_files(made))
    result = folder.run(SCRIPT, *FLAGS, "--seed", 3, "--trials", 2)
    assert result.status == 0 and result.errors == "", result.errors
    saved = pictures(folder.path)
    assert "viewStateShareKey=" in result.output
    assert folder.run(SCRIPT, *FLAGS, "--seed", 4).status == 0
    bands = [made["synth_loss.png"].axes[0].collections for made in drawn]
    assert bands[0] and not bands[1]
    # Data, initial weights and the generator of the mini-batches are each trial's own.
    for different, ours, same in zip(*trials):
        assert torch.equal(ours, same) and not torch.equal(ours, different)

    keys = [("3", "2"), ("4", "2"), ("4", "1")]
    of_first, of_second, alone = (
        [r for r in folder.demo_runs() if (r.data.params["seed"], r.data.params["trials"]) == key]
        for key in keys
    )
    assert len(of_first) == len(of_second) == len(alone) == 2
    for different, ours, same in zip(of_first, of_second, alone):
        for name in SECTIONS.values():
            assert folder.curve(ours, name) == folder.curve(same, name)
        assert ours.data.metrics != different.data.metrics
        assert ours.info.run_name == same.info.run_name
        assert ours.info.start_time >= different.info.end_time
    accuracy = [100 * of[0].data.metrics["test/accuracy_clean"] for of in (of_first, of_second)]
    deviation = abs(accuracy[0] - accuracy[1]) / 2**0.5
    assert f"{sum(accuracy) / 2:.1f} ± {deviation:.1f}" in result.output

    runs = folder.runs("flooding-synth")
    [whole] = [run for run in runs if "flood_level" not in run.data.params]
    assert whole.info.run_name == "result of 2 trials" and whole.info.status == "FINISHED"
    assert whole.info.start_time == of_first[0].info.start_time
    assert whole.data.tags["demo"] == of_first[0].data.tags["demo"]
    assert whole.data.tags["mlflow.note.content"].strip("`\n") in result.output
    assert drawn_again(folder, whole) == saved
    assert drawn_again(folder, of_second[0]) == pictures(folder.path)  # the demo of seed 4


@pytest.mark.parametrize(
    ("labels", "marks", "levels"),
    [
        ("noisy", (" chosen by 1", " chosen by 2"), ["0.7", "0.0", "0.7"]),
        ("clean", (" chosen by 3", ""), ["0.0"] * 3),
    ],
)
def test_the_level_is_chosen_by_the_labels_asked_for(folder, monkeypatch, labels, marks, levels):
    train_trial = run_demo_synth.train_trial

    def changed(*arguments):
        trial = train_trial(*arguments)
        flooded = trial.history.flood_level > 0
        scores = {"val_accuracy_clean": 0.9 - 0.8 * flooded}
        scores["val_accuracy_noisy"] = 0.1 + 0.8 * (flooded if trial.seed != 1 else ~flooded)
        return replace(trial, history=trial.history.assign(**scores))

    monkeypatch.setattr(run_demo_synth, "train_trial", changed)
    result = folder.run(SCRIPT, *FLAGS, "--trials", 3, "--select-on", labels)
    assert result.status == 0 and result.errors == "", result.errors
    shown = {line[:11].strip(): line.partition("<-")[2] for line in result.output.splitlines()}
    assert (shown["no flooding"], shown["0.7"]) == marks
    chosen = [run for run in folder.demo_runs() if run.data.tags["chosen"] == "yes"]
    assert [run.data.params["flood_level"] for run in chosen] == levels
    assert all(run.info.run_name.endswith(" (chosen)") for run in chosen)


def test_two_demos_at_once_in_a_new_folder_are_whole_and_bit_identical(empty_folder):
    demos = [empty_folder.spawn(SCRIPT, *FLAGS) for _ in range(2)]
    for demo in map(finish, demos):
        assert demo.status == 0 and demo.errors == "", demo.errors  # no bar, no migrations
    written = {path.name for path in empty_folder.path.iterdir()}
    assert written == {*PICTURES, "mlflow.db", "mlruns"}
    runs = empty_folder.demo_runs()
    assert len(runs) == 4 and {run.info.status for run in runs} == {"FINISHED"}
    curves = [[empty_folder.curve(run, name) for name in SECTIONS.values()] for run in runs]
    assert curves[:2] == curves[2:] and curves[0] != curves[1]


def test_sparse_evaluation_without_batch_norm_and_data_without_boundary(folder):
    flags = ("--dataset", "spiral", "--eval-every", 2, "--no-batch-norm", "--output-dir", "new/one")
    result = folder.run(SCRIPT, *FLAGS, *flags, "--flood-levels", 0.3, 0, 0.1, 0.3)
    assert result.status == 0 and result.errors == "", result.errors
    assert set(pictures(folder.path / "new" / "one")) == PICTURES
    runs = folder.demo_runs()
    assert [run.data.params["flood_level"] for run in runs] == ["0.0", "0.1", "0.3"]
    assert list(folder.curve(runs[0], "test/loss_noisy")) == [0, 2, 3]
    result = folder.run(SCRIPT, *FLAGS, "--dataset", "gaussian", "--flood-levels", 0)
    assert result.status == 0 and result.errors == "", result.errors
    assert set(pictures(folder.path)) == {"synth_acc.png", "synth_loss.png"}


def test_a_diverging_demo_says_where_and_logs_nothing(folder):
    result = folder.run(SCRIPT, *FLAGS, "--no-batch-norm", "--learning-rate", 1e30)
    said = f"{SCRIPT}: error: flood level .* in epoch 1, with learning rate 1e\\+30"
    assert result.status == 1 and re.fullmatch(said, one_line(result.errors))
    assert not folder.runs("flooding-synth") and not pictures(folder.path)


def test_an_interrupted_trial_is_not_logged_those_before_are(folder):
    """Real processes: one is stopped in its only trial, one in the second of two."""
    only = folder.spawn(SCRIPT, *FLAGS, "--epochs", 10**6, "--eval-every", 100)
    long = ("--epochs", 1500, "--eval-every", 750, "--trials", 2, "--seed", 8)
    second = folder.spawn(SCRIPT, *FLAGS, *long)
    only.stdout.readline()  # what is trained, said just before
    time.sleep(0.3)
    only.send_signal(signal.SIGTERM)
    stopped = finish(only)
    assert (stopped.status, stopped.errors) == (143, "\nstopped by SIGTERM\n")
    wait_until(lambda: [r.info.status for r in folder.demo_runs()] == ["FINISHED"] * 2)
    second.send_signal(signal.SIGINT)
    stopped = finish(second)
    assert (stopped.status, stopped.errors) == (130, "\nstopped by SIGINT\n")
    runs = folder.runs("flooding-synth")
    assert [(run.info.status, run.data.params["seed"]) for run in runs] == [("FINISHED", "8")] * 2
    assert not pictures(folder.path)


def test_a_signal_is_all_that_is_told_when_it_leaves_a_library_broken(folder):
    """As SQLAlchemy's objects are when their bookkeeping was cut in two."""
    code = """if True:
        import os, settings, signal
        class Broken:
            def __del__(self):
                raise AssertionError
        def interrupted(broken):
            os.kill(os.getpid(), signal.SIGTERM)
        settings.exit_on_signals()
        interrupted(Broken())"""
    stopped = finish(folder.spawn("-c", code, PYTHONPATH=str(PROJECT)))
    assert (stopped.status, stopped.errors) == (143, "\nstopped by SIGTERM\n")


@pytest.mark.parametrize("store", ["there", "away"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_runs_are_written(folder, monkeypatch, number, store):
    """It ends the demo, and a store that answers has no half-written run."""
    log_artifacts, calls = mlflow.MlflowClient.log_artifacts, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            if store == "away":
                away = Mock(side_effect=ConnectionError)
                monkeypatch.setattr(mlflow.MlflowClient, "delete_run", away)
            os.kill(os.getpid(), number)
        log_artifacts(*arguments)

    monkeypatch.setattr(mlflow.MlflowClient, "log_artifacts", interrupted)
    result = folder.run(SCRIPT, *FLAGS)
    assert result.status == 128 + number and result.errors == f"\nstopped by {number.name}\n"
    assert "<- chosen" in result.output and set(pictures(folder.path)) == PICTURES
    runs = folder.demo_runs()
    assert sorted(run.info.status for run in runs) == ["FINISHED"] + ["RUNNING"] * (store == "away")


@pytest.mark.parametrize(
    "flags",
    re.split(
        r";\s+",
        """--flood-levels -0.2; --flood-levels nan; --flood-levels inf; --label-noise 1.0;
        --label-noise -0.1; --spiral-noise inf; --train-samples 0; --val-samples 0; --seed -1;
        --test-samples -1; --hidden-layers 0; --hidden-units 0; --epochs 0; --eval-every 0;
        --trials 0; --seed 4294967296; --learning-rate 0.0; --learning-rate nan; --batch-size 33;
        --weight-decay -1.0; --momentum 1.0; --optimizer adam --momentum 0.5; --batch-size 0;
        --batch-size 1; --output-dir /dev/null/pictures""",
    ),
)
def test_flags_out_of_range_are_refused_in_one_line(empty_folder, flags):
    """And leave nothing: a batch size of 33 leaves one of 100 examples alone."""
    folder = () if "-dir" in flags else ("--output-dir", "new/folder")
    result = empty_folder.run(SCRIPT, *folder, *flags.split())
    assert result.status == 2 and result.output == ""
    name, value = flags.split()[-2:]
    said = f"{SCRIPT}: error: {name} {re.escape(value)}: [a-z].+"
    assert re.fullmatch(said, one_line(result.errors))
    assert not list(empty_folder.path.iterdir())


@pytest.mark.parametrize(
    "flags",
    re.split(
        r";\s+",
        """--label-noise much; --epochs 1.5; --device tpu; --dataset moons; --optimizer lion;
        --select-on test; --flood-on run; --nothing 1""",
    ),
)
def test_flags_that_cannot_be_read_are_refused(empty_folder, flags):
    result = empty_folder.run(SCRIPT, *flags.split(), "--output-dir", "new")
    assert result.status == 2 and result.output == ""
    assert all(word in result.errors for word in flags.split())
    assert "Traceback" not in result.errors and not list(empty_folder.path.iterdir())


def test_a_device_that_is_not_there(empty_folder, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = empty_folder.run(SCRIPT, "--device", "cuda")
    said = "--device cuda: not on this machine, which has cpu"
    assert result.status == 2 and said in one_line(result.errors)
    assert not list(empty_folder.path.iterdir())


@pytest.mark.parametrize("script", [SCRIPT, "run_table_synth.py"])
def test_help_and_wrong_flags_need_no_heavy_import(empty_folder, script):
    code = (
        "import runpy, sys\nclass Blocked:\n def find_spec(name, *more):\n"
        "  assert name not in ('torch', 'mlflow', 'matplotlib', 'pandas'), name\n"
        "sys.meta_path.insert(0, Blocked); sys.argv = sys.argv[1:]\n"
        f"sys.path.insert(0, {str(PROJECT)!r})\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    shown, refused, unreadable = (
        finish(empty_folder.spawn("-c", code, script, *flags, COLUMNS="80"))
        for flags in (["--help"], ["--label-noise", 2], ["--epochs", "some"])
    )
    assert shown.status == 0 and shown.errors == "" and "None" not in shown.output
    usage, *lines = shown.output.splitlines()
    assert usage.startswith("usage: ") and max(map(len, lines)) <= 80
    settings = getattr(importlib.import_module(script.removesuffix(".py")), SETTINGS[script])
    for field in fields(settings):
        assert re.search(rf"--{field.name.replace('_', '-')}\b(?!-)", shown.output), field.name
    assert refused.status == 2 and "--label-noise 2.0: " in one_line(refused.errors)
    assert unreadable.status == 2 and "Traceback" not in unreadable.errors
    assert "--epochs" in unreadable.errors and "some" in unreadable.errors
    assert not list(empty_folder.path.iterdir())


@pytest.mark.parametrize("redirected", [False, True])
@pytest.mark.parametrize("columns", [0, 40])
def test_the_progress_bar_fits_the_terminal_and_says_the_time_left(columns, redirected):
    code = "import settings, time\nbar = settings.progress_bar(2000, 'epoch')\n"
    code += "bar.set_postfix_str('sinusoid2d, label noise 0.1', refresh=False)\n"
    code += "time.sleep(0.2)\nbar.update(100)"
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    output = subprocess.DEVNULL if redirected else theirs
    command = [sys.executable, "-c", code]
    subprocess.run(command, cwd=PROJECT, env=environment, stdout=output, stderr=theirs, check=True)
    lines = re.split(r"[\r\n]+", os.read(ours, 10_000).decode())
    [line] = [line for line in lines if "100 of 2000 epochs" in line]
    assert re.search(r"<\d\d:\d\d", line) and len(line) <= (columns or 80)


@pytest.mark.parametrize("run_id", ["nothing", "0" * 32, "a/b", "old"])
def test_plotting_only_reads(folder, monkeypatch, run_id):
    monkeypatch.chdir(folder.path)  # where an experiment's artifacts go is decided here
    if run_id == "old":
        experiment = folder.client.create_experiment("flooding-synth")
        run_id = folder.client.create_run(experiment).info.run_id
        assert folder.run(SCRIPT, *FLAGS).status == 0  # the old run does no harm
    before = {path.name for path in folder.path.iterdir()}
    result = folder.run("plot.py", "--run-id", run_id)
    said = f"plot.py: error: --run-id {run_id}: it cannot be read: "
    assert result.status == 2 and one_line(result.errors).startswith(said)
    assert ("an earlier version" in result.errors) == ("mlruns" in before)
    assert {path.name for path in folder.path.iterdir()} == before
    os.remove(folder.path / "mlflow.db")
    result = folder.run("plot.py", "--run-id", run_id)
    assert result.status == 2 and f"there is no {folder.path}/mlflow.db" in one_line(result.errors)
    assert {path.name for path in folder.path.iterdir()} == before - {"mlflow.db"}
