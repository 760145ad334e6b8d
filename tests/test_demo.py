"""The demo from the command line, as a user runs it and breaks it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from matplotlib.image import imread

from plot import draw_demo
from train import METRICS, History

SMALL = (
    *("--train-samples", 30, "--val-samples", 20, "--test-samples", 60),
    *("--hidden-layers", 2, "--hidden-units", 16),
)
SCRIPT = "run_demo_synth.py"


def curves(folder, child):
    """{metric: [values by step]} of a child run."""
    found = {}
    for name in METRICS:
        points = folder.client.get_metric_history(child.info.run_id, name)
        assert [point.step for point in points] == sorted({point.step for point in points})
        found[name] = {point.step: point.value for point in points}
    return found


def is_picture(path):
    height, width, _ = imread(path).shape
    return height > 500 and width > 800


def test_demo_end_to_end(folder):
    result = folder.run(SCRIPT, *SMALL, "--epochs", 4, "--seed", 3, "--device", "cpu")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""  # no bar, no migrations, no warnings
    lines = result.stdout.splitlines()
    assert lines[0].startswith("sinusoid2d, 10% of the labels flipped, 30 training examples")
    rows = [line for line in lines if line.startswith(("no flooding", "0.2"))]
    assert [row.split("  ")[0].strip() for row in rows] == ["no flooding", "0.26", "0.27", "0.28"]
    assert sum("<- chosen" in row for row in rows) == 1
    assert "mlflow ui --backend-store-uri sqlite:///mlflow.db" in lines[-1]
    written = {path.name for path in folder.path.iterdir()}
    assert written == {"synth_loss.png", "synth_acc.png", "mlflow.db", "mlruns"}
    assert is_picture(folder.path / "synth_loss.png") and is_picture(folder.path / "synth_acc.png")

    [(parent, children)] = folder.demos()
    assert [run.info.status for run in (parent, *children)] == ["FINISHED"] * 5
    assert [float(child.data.params["flood_level"]) for child in children] == [0, 0.26, 0.27, 0.28]
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
        "device": "cpu",
        "tf32": "False",
        "output_dir": ".",
    }
    assert parent.data.params == expected
    for child in children:
        flood_level = child.data.params["flood_level"]
        assert child.data.params == {**expected, "flood_level": flood_level}
        assert all(sorted(curve) == list(range(5)) for curve in curves(folder, child).values())
        assert child.data.tags["torch"] and child.data.tags["python"]
    assert parent.data.tags["device"] == "cpu"

    chosen = parent.data.metrics["chosen_flood_level"]
    accuracy = [child.data.metrics["val_accuracy_clean"] for child in children]
    assert chosen == [0, 0.26, 0.27, 0.28][accuracy.index(max(accuracy))]
    compared = next(
        child
        for child in children
        if float(child.data.params["flood_level"]) == parent.data.metrics["compared_flood_level"]
    )
    for name in ("test_accuracy", "test_loss", "test_accuracy_clean", "test_loss_clean"):
        for side, child in (("without", children[0]), ("with", compared)):
            assert parent.data.metrics[f"{name}_{side}_flooding"] == child.data.metrics[name]
    artifacts = {file.path for file in folder.client.list_artifacts(parent.info.run_id)}
    assert artifacts == {"synth_loss.png", "synth_acc.png"}

    # The same pictures again, from what MLflow has.
    again, unknown = folder.run_all(
        folder.command("plot.py", "--run-id", parent.info.run_id, "--output-dir", "again"),
        folder.command("plot.py", "--run-id", "nothing"),
    )
    assert again.returncode == 0 and again.stderr == "", again.stderr
    for name in artifacts:
        np.testing.assert_array_equal(
            imread(folder.path / name), imread(folder.path / "again" / name)
        )
    assert unknown.returncode == 2 and "--run-id nothing" in one_line(unknown.stderr)


def test_two_demos_at_once_are_both_logged_whole_and_bit_identical(folder):
    command = folder.command(SCRIPT, *SMALL, "--epochs", 8, "--flood-levels", 0.65, 0.7)
    for demo in folder.run_all(command, command):
        assert demo.returncode == 0 and demo.stderr == "", demo.stderr
    (_, first), (_, second) = folder.demos()
    for child, twin in zip(first, second):
        assert child.info.status == twin.info.status == "FINISHED"
        found = curves(folder, child)
        assert all(sorted(curve) == list(range(9)) for curve in found.values())
        assert found == curves(folder, twin)
    # Levels of one run differ, or the comparison above would show little.
    assert curves(folder, first[0]) != curves(folder, first[1])


def test_adam_has_the_authors_defaults_and_levels_have_the_baseline_once(ready_folder):
    for demo in ready_folder.run_all(
        ready_folder.command(SCRIPT, *SMALL, "--epochs", 1, "--optimizer", "adam"),
        ready_folder.command(
            *(SCRIPT, *SMALL, "--epochs", 3, "--eval-every", 2, "--no-batch-norm"),
            *("--flood-levels", 0.3, 0, 0.1, 0.3, "--output-dir", "new/folder"),
        ),
    ):
        assert demo.returncode == 0, demo.stderr
    assert is_picture(ready_folder.path / "new" / "folder" / "synth_loss.png")
    (adam, _), (_, children) = sorted(
        ready_folder.demos(), key=lambda family: family[0].data.params["optimizer"]
    )
    parameters = adam.data.params
    assert parameters["learning_rate"] == "0.001" and parameters["momentum"] == "0.0"
    assert parameters["flood_levels"] == "0 0.24 0.25 0.26"
    assert [float(child.data.params["flood_level"]) for child in children] == [0, 0.1, 0.3]
    assert sorted(curves(ready_folder, children[0])["test_loss"]) == [0, 2, 3]


def test_an_interrupted_demo_is_killed_with_its_curves(ready_folder):
    command = ready_folder.command(SCRIPT, *SMALL, "--epochs", 10**6)
    demos = {
        number: ready_folder.start([*command, "--seed", str(int(number))])
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:  # until the curves grow in the store
        children = [child for _, children in ready_folder.demos() for child in children]
        if len(children) == 8 and all("test_loss" in child.data.metrics for child in children):
            break
        time.sleep(0.5)
    for number, demo in demos.items():
        demo.send_signal(number)
        _, errors = demo.communicate(timeout=60)
        assert demo.returncode == 128 + number
        assert errors == f"\nstopped by {number.name}\n"
    for parent, children in ready_folder.demos():
        assert [run.info.status for run in (parent, *children)] == ["KILLED"] * 5
        lengths = {len(c) for child in children for c in curves(ready_folder, child).values()}
        assert len(lengths) == 1 and lengths.pop() > 1
    assert not list(ready_folder.path.glob("*.png"))


def test_a_diverging_demo_is_failed_and_says_where(ready_folder):
    result = ready_folder.run(
        SCRIPT, *SMALL, "--epochs", 5, "--no-batch-norm", "--learning-rate", 1e30
    )
    assert result.returncode == 1
    line = one_line(result.stderr)
    assert "flood level" in line and "epoch 1" in line and "learning rate 1e+30" in line
    [(parent, children)] = ready_folder.demos()
    assert [run.info.status for run in (parent, *children)] == ["FAILED"] * 5


def one_line(text):
    [line] = text.splitlines()
    return line


BAD_FLAGS = (
    (["--flood-levels", 0.1, -0.2], "--flood-levels -0.2"),
    (["--flood-levels", "nan"], "--flood-levels nan"),
    (["--flood-levels", "inf"], "--flood-levels inf"),
    (["--label-noise", 1], "--label-noise 1.0"),
    (["--label-noise", "much"], "--label-noise: invalid float value: 'much'"),
    (["--epochs", 0], "--epochs 0"),
    (["--hidden-layers", 0], "--hidden-layers 0"),
    (["--train-samples", 0], "--train-samples 0"),
    (["--batch-size", 1], "--batch-size 1"),
    (["--batch-size", 33], "--batch-size 33"),  # 100 = 3 * 33 + 1
    (["--optimizer", "adam", "--momentum", 0.5], "--momentum 0.5"),
    (["--seed", -1], "--seed -1"),
    (["--device", "cpu", "--tf32"], "--tf32 with device cpu"),
    (["--device", "tpu"], "--device: invalid choice: 'tpu'"),
    (["--output-dir", "/dev/null/pictures"], "--output-dir /dev/null/pictures"),
    (["--dataset", "moons"], "--dataset: invalid choice: 'moons'"),
)


def test_bad_flags(folder):
    results = folder.run_all(*(folder.command(SCRIPT, *flags) for flags, _ in BAD_FLAGS))
    for (_, said), result in zip(BAD_FLAGS, results):
        assert result.returncode == 2 and result.stdout == "", said
        assert said in one_line(result.stderr)
    assert not list(folder.path.iterdir())


def test_a_device_that_is_not_there(folder):
    result = folder.run(SCRIPT, "--device", "cuda", CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 2
    assert "--device cuda: not on this machine, which has" in one_line(result.stderr)
    assert not list(folder.path.iterdir())


def test_a_tracking_store_that_is_not_there(folder):
    uris = "sqlite:////dev/null/mlflow.db", "http://127.0.0.1:9", "nonsense://somewhere"
    demos = [folder.start(folder.command(SCRIPT, *SMALL), MLFLOW_TRACKING_URI=uri) for uri in uris]
    for uri, demo in zip(uris, demos):
        output, errors = demo.communicate(timeout=60)
        assert demo.returncode == 2 and output == ""
        assert f"MLFLOW_TRACKING_URI {uri}" in one_line(errors)
    assert not list(folder.path.iterdir())


def test_help_needs_no_heavy_import(folder):
    code = (
        "import runpy, sys; sys.modules.update(dict.fromkeys(['torch', 'mlflow', 'matplotlib']));"
        f"sys.argv = {folder.command(SCRIPT, '--help')[1:]};"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--flood-levels" in result.stdout


def test_plotting_without_a_store_makes_none(folder):
    result = folder.run("plot.py", "--run-id", "nothing")
    assert result.returncode == 2 and "--run-id nothing" in one_line(result.stderr)
    assert not list(folder.path.iterdir())


def history_with(val_accuracy_clean, val_accuracy):
    metrics = {name: np.full((2, 3), 0.5) for name in METRICS}
    metrics["val_accuracy_clean"][-1] = val_accuracy_clean
    metrics["val_accuracy"][-1] = val_accuracy
    return History(np.array([0.0, 0.1, 0.2]), np.array([0, 1]), metrics)


def test_choice_of_the_level():
    history = history_with([0.8, 0.9, 0.9], [0.9, 0.8, 0.85])
    assert history.choose("clean") == (1, 1)  # the lowest of equals
    assert history.choose("noisy") == (0, 2)  # no flooding wins: compared with the best other
    alone = History(np.array([0.0]), np.array([0]), {name: np.ones((1, 1)) for name in METRICS})
    assert alone.choose("clean") == (0, 0)


@pytest.mark.parametrize("noisy", [False, True])
def test_pictures_when_no_flooding_wins(tmp_path, noisy):
    parameters = {
        "dataset": "spiral",
        "label_noise": 0.05,
        "spiral_noise": 0.5,
        "train_samples": 9,
        "hidden_layers": 1,
        "hidden_units": 2,
        "batch_norm": False,
        "optimizer": "adam",
        "learning_rate": 0.1,
        "momentum": 0.0,
        "batch_size": 4,
        "epochs": 1,
        "seed": 0,
        "select_on": "noisy" if noisy else "clean",
    }
    history = history_with([0.8, 0.9, 0.9], [0.9, 0.8, 0.85])
    paths = draw_demo(history, parameters, tmp_path)
    assert all(is_picture(path) for path in paths)
    assert sorted(tmp_path.iterdir()) == sorted(paths)
