"""The demo as a user runs it and breaks it, and what MLflow then has."""

from __future__ import annotations

import os
import signal
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import PICTURES, PROJECT, SMALL, finish, one_line, wait_until
from matplotlib.image import imread

import run_demo_synth
from plot import WITH_COLOR, WITHOUT_COLOR
from tracking import metric_name
from train import METRICS

SCRIPT = "run_demo_synth.py"


def pictures(path):
    return {file.name for file in path.glob("*.png")}


def test_defaults_are_the_authors(monkeypatch, empty_folder):
    """Protocol section 3, setting 1; Adam's are those of setting 2."""
    monkeypatch.setattr(sys, "argv", [SCRIPT])
    _, arguments = run_demo_synth.parse_arguments()
    assert vars(arguments) == {
        "dataset": "sinusoid2d",
        "label_noise": 0.1,
        "spiral_noise": 0.0,
        "hidden_layers": 4,
        "hidden_units": 500,
        "batch_norm": True,
        "optimizer": "sgd",
        "learning_rate": 0.01,
        "momentum": 0.9,
        "weight_decay": 0.0,
        "batch_size": 200,
        "epochs": 200,
        "eval_every": 1,
        "flood_levels": [0.0, 0.26, 0.27, 0.28],
        "select_on": "clean",
        "trials": 1,
        "seed": 0,
        "device": "auto",
        "output_dir": arguments.output_dir,
    }
    monkeypatch.setattr(sys, "argv", [SCRIPT, "--optimizer", "adam"])
    _, adam = run_demo_synth.parse_arguments()
    assert (adam.learning_rate, adam.momentum) == (0.001, 0.0)
    assert adam.flood_levels == [0.0, 0.24, 0.25, 0.26]


def test_demo_end_to_end(folder):
    result = folder.run(SCRIPT, *SMALL, "--epochs", 4, "--seed", 3, "--device", "cpu")
    assert result.status == 0 and result.errors == "", result.errors
    lines = result.output.splitlines()
    assert lines[0].startswith("sinusoid2d, 10% of the labels flipped, 30 training examples")
    assert lines[0].endswith("4 epochs; seed 3 on cpu")
    rows = [line for line in lines if line.startswith(("no flooding", "0.2"))]
    assert [row.split("  ")[0].strip() for row in rows] == ["no flooding", "0.26", "0.27", "0.28"]
    [chosen_row] = [row for row in rows if "<- chosen" in row]
    assert f"{sys.executable} -m mlflow ui" in lines[-2]
    assert f"sqlite:///{folder.path}/mlflow.db" in lines[-2]
    assert "workflowType=machine_learning&compareRunsMode=CHART&searchFilter=tags.demo" in lines[-1]
    assert pictures(folder.path) == PICTURES

    runs = folder.demo_runs()
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert [run.data.params["flood_level"] for run in runs] == ["0.0", "0.26", "0.27", "0.28"]
    assert runs[0].data.tags["demo"] in lines[-1]
    expected = {
        "dataset": "sinusoid2d",
        "label_noise": "0.1",
        "spiral_noise": "0.0",
        "train_samples": "30",
        "val_samples": "20",
        "test_samples": "60",
        "optimizer": "sgd",
        "learning_rate": "0.01",
        "momentum": "0.9",
        "weight_decay": "0.0",
        "batch_size": "200",
        "epochs": "4",
        "flood_levels": "0 0.26 0.27 0.28",
        "hidden_layers": "2",
        "hidden_units": "16",
        "batch_norm": "True",
        "select_on": "clean",
        "eval_every": "1",
        "seed": "3",
        "trials": "1",
        "device": "cpu",
        "output_dir": ".",
    }
    chosen = [run for run in runs if run.data.tags["chosen"] == "yes"]
    for run in runs:
        level = run.data.params["flood_level"]
        assert run.data.params == {**expected, "flood_level": level}
        for name in METRICS:
            assert list(folder.curve(run, metric_name(name))) == list(range(5))
        assert run.data.tags["torch"] and run.data.tags["device"] == "cpu"
        assert chosen_row in run.data.tags["mlflow.note.content"]
        name = "no flooding" if level == "0.0" else f"b = {level}"
        assert run.info.run_name == (f"{name} (chosen)" if run in chosen else name)
        found = [file.path for file in folder.client.list_artifacts(run.info.run_id)]
        assert set(found) >= PICTURES
        contexts = {i.tags[0].value: i.dataset for i in run.inputs.dataset_inputs}
        assert set(contexts) == {"train", "validation", "test"}
        assert contexts["test"].name == "sinusoid2d, label noise 0.1"
        assert '"num_rows": 60' in contexts["test"].profile
        assert len({dataset.digest for dataset in contexts.values()}) == 3
    accuracy = [run.data.metrics["val/accuracy_clean"] for run in runs]
    loss = [run.data.metrics["val/loss_clean"] for run in runs]
    best = min(range(4), key=lambda model: (-accuracy[model], loss[model], model))
    assert chosen == [runs[best]]
    colors = [run.data.tags["mlflow.runColor"] for run in runs]
    assert colors[0] == WITHOUT_COLOR and colors.count(WITH_COLOR) == 1
    assert chosen_row.startswith("no flooding" if best == 0 else f"{[0, 0.26, 0.27, 0.28][best]}")

    experiment = folder.client.get_experiment_by_name("flooding-synth")
    assert (
        f"#/experiments/{experiment.experiment_id}/runs" in experiment.tags["mlflow.note.content"]
    )
    assert "flood_level" in experiment.tags["mlflow.sharedViewState.means"]

    # The same pictures again, from what MLflow has, whichever run is named.
    again = folder.run("plot.py", "--run-id", runs[2].info.run_id, "--output-dir", "new/again")
    assert again.status == 0 and again.errors == "", again.errors
    for name in PICTURES:
        drawn = imread(folder.path / name), imread(folder.path / "new" / "again" / name)
        np.testing.assert_array_equal(*drawn)


def test_trials_are_the_demos_of_their_seeds(folder):
    flags = (*SMALL, "--epochs", 3, "--flood-levels", 0.65)
    result = folder.run(SCRIPT, *flags, "--seed", 4, "--trials", 2)
    assert result.status == 0 and result.errors == "", result.errors
    assert "mean ± standard deviation of 2 trials" in result.output
    assert "viewStateShareKey=means" in result.output
    for seed in (4, 5):
        assert folder.run(SCRIPT, *flags, "--seed", seed).status == 0
    of_trials = [run for run in folder.demo_runs() if run.data.params["trials"] == "2"]
    alone = [run for run in folder.demo_runs() if run.data.params["trials"] == "1"]
    alone.sort(key=lambda run: (run.data.params["seed"], float(run.data.params["flood_level"])))
    assert len(of_trials) == len(alone) == 4
    for ours, theirs in zip(of_trials, alone):
        assert ours.data.params["seed"] == theirs.data.params["seed"]
        assert ours.data.metrics == theirs.data.metrics
    accuracy = pd.Series([100 * run.data.metrics["test/accuracy_clean"] for run in alone[::2]])
    assert f"{accuracy.mean():.1f} ± {accuracy.std():.1f}" in result.output
    again = folder.run("plot.py", "--run-id", of_trials[0].info.run_id, "--output-dir", "again")
    assert again.status == 0
    for name in PICTURES:
        assert (folder.path / "again" / name).exists()


def test_two_demos_at_once_are_both_logged_whole_and_bit_identical(empty_folder):
    flags = (*SMALL, "--epochs", 8, "--flood-levels", 0.65, 0.7)
    demos = [empty_folder.spawn(SCRIPT, *flags) for _ in range(2)]
    for demo in map(finish, demos):
        assert demo.status == 0 and demo.errors == "", demo.errors  # no bar, no migrations
    written = {path.name for path in empty_folder.path.iterdir()}
    assert written == {*PICTURES, "mlflow.db", "mlruns"}
    runs = empty_folder.demo_runs()
    assert len(runs) == 6 and {run.info.status for run in runs} == {"FINISHED"}
    curves = [
        {name: empty_folder.curve(run, metric_name(name)) for name in METRICS} for run in runs
    ]
    assert all(list(curve) == list(range(9)) for run in curves for curve in run.values())
    assert curves[:3] == curves[3:]
    assert curves[0] != curves[1]  # or the comparison above would show little


def test_sparse_evaluation_of_a_spiral_without_batch_norm(folder):
    result = folder.run(
        *(SCRIPT, *SMALL, "--dataset", "spiral", "--epochs", 3, "--eval-every", 2),
        *("--no-batch-norm", "--flood-levels", 0.3, 0, 0.1, 0.3, "--output-dir", "new/folder"),
    )
    assert result.status == 0 and result.errors == "", result.errors
    assert pictures(folder.path / "new" / "folder") == PICTURES
    runs = folder.demo_runs()
    assert [run.data.params["flood_level"] for run in runs] == ["0.0", "0.1", "0.3"]
    assert list(folder.curve(runs[0], "test/loss_noisy")) == [0, 2, 3]


def test_more_dimensions_have_no_boundary(folder):
    result = folder.run(SCRIPT, *SMALL, "--dataset", "gaussian", "--epochs", 1)
    assert result.status == 0 and result.errors == "", result.errors
    assert pictures(folder.path) == {"synth_acc.png", "synth_loss.png"}


def test_an_interrupted_demo_is_killed_with_its_curves(folder):
    demos = {
        number: folder.fork(
            SCRIPT, *SMALL, "--epochs", 10**6, "--eval-every", 50, "--seed", int(number)
        )
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    wait_until(lambda: [bool(run.data.metrics) for run in folder.demo_runs()] == [True] * 8)
    for number, demo in demos.items():
        demo.send_signal(number)
        result = finish(demo)
        assert result.status == 128 + number
        assert result.errors == f"\nstopped by {number.name}\n"
    runs = folder.demo_runs()
    assert [run.info.status for run in runs] == ["KILLED"] * 8
    for of_demo in (runs[:4], runs[4:]):
        lengths = {len(folder.curve(run, metric_name(n))) for run in of_demo for n in METRICS[::6]}
        assert len(lengths) == 1 and lengths.pop() > 1
    assert not pictures(folder.path)


def test_a_diverging_demo_is_failed_and_says_where(folder):
    flags = ("--epochs", 5, "--no-batch-norm", "--learning-rate", 1e30)
    result = folder.run(SCRIPT, *SMALL, *flags)
    assert result.status == 1
    line = one_line(result.errors)
    assert "flood level" in line and "epoch 1" in line and "learning rate 1e+30" in line
    assert [run.info.status for run in folder.demo_runs()] == ["FAILED"] * 4
    assert not pictures(folder.path)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--flood-levels", 0.1, -0.2], "--flood-levels -0.2"),
        (["--flood-levels", "nan"], "--flood-levels nan"),
        (["--flood-levels", "inf"], "--flood-levels inf"),
        (["--label-noise", 1], "--label-noise 1.0"),
        (["--label-noise", "much"], "--label-noise: invalid float value: 'much'"),
        (["--epochs", 0], "--epochs 0"),
        (["--trials", 0], "--trials 0"),
        (["--hidden-layers", 0], "--hidden-layers 0"),
        (["--train-samples", 0], "--train-samples 0"),
        (["--batch-size", 1], "--batch-size 1"),
        (["--batch-size", 33], "--batch-size 33"),  # 100 = 3 * 33 + 1
        (["--optimizer", "adam", "--momentum", 0.5], "--momentum 0.5"),
        (["--seed", -1], "--seed -1"),
        (["--seed", 2**64], "--seed 18446744073709551616"),
        (["--device", "tpu"], "--device: invalid choice: 'tpu'"),
        (["--output-dir", "/dev/null/pictures"], "--output-dir /dev/null/pictures"),
        (["--dataset", "moons"], "--dataset: invalid choice: 'moons'"),
    ],
)
def test_bad_flags(empty_folder, flags, said):
    result = empty_folder.run(SCRIPT, *flags)
    assert result.status == 2 and result.output == ""
    assert said in one_line(result.errors)
    assert not list(empty_folder.path.iterdir())


def test_a_device_that_is_not_there(empty_folder, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = empty_folder.run(SCRIPT, "--device", "cuda")
    assert result.status == 2
    assert "--device cuda: not on this machine, which has cpu" in one_line(result.errors)
    assert not list(empty_folder.path.iterdir())


def test_help_and_wrong_flags_need_no_heavy_import(empty_folder):
    code = (
        "import runpy, sys; blocked = 'torch', 'mlflow', 'matplotlib', 'pandas', 'numpy';"
        "sys.modules.update(dict.fromkeys(blocked)); sys.argv = sys.argv[1:];"
        f"sys.path.insert(0, {str(PROJECT)!r});"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    for script in (SCRIPT, "run_table_synth.py"):
        shown, refused = (
            finish(empty_folder.spawn("-c", code, PROJECT / script, *flags))
            for flags in (["--help"], ["--label-noise", 2])
        )
        assert shown.status == 0 and "--flood-" in shown.output, shown.errors
        assert refused.status == 2 and "--label-noise 2.0" in one_line(refused.errors)


def test_plotting_only_reads(folder):
    result = folder.run("plot.py", "--run-id", "nothing")
    assert result.status == 2 and "--run-id nothing" in one_line(result.errors)
    assert folder.client.get_experiment_by_name("flooding-synth") is None
    os.remove(folder.path / "mlflow.db")
    result = folder.run("plot.py", "--run-id", "nothing")
    assert result.status == 2 and "--run-id nothing" in one_line(result.errors)
    assert not list(folder.path.iterdir())


def test_an_earlier_versions_runs_do_no_harm(folder):
    experiment = folder.client.create_experiment("flooding-synth")
    old = folder.client.create_run(experiment, run_name="sinusoid2d 0.1 sgd 0")
    result = folder.run("plot.py", "--run-id", old.info.run_id)
    assert result.status == 2 and "an earlier version" in one_line(result.errors)
    result = folder.run(SCRIPT, *SMALL, "--epochs", 1)
    assert result.status == 0, result.errors
