"""The demo as a user runs it and breaks it, and what MLflow then has."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock
from urllib.parse import parse_qs

import matplotlib
import pandas as pd
import pytest
import torch
from conftest import PICTURES, PROJECT, SMALL, finish, one_line

import plot
import run_demo_synth
import tracking
from results import conclude, read_csv
from settings import flat, parse_flags

SCRIPT = "run_demo_synth.py"
FLAGS = (*SMALL, "--epochs", 3, "--flood-levels", 0.7, "--device", "cpu")
KEPT = {"demo.json", "history.csv"}
SHOWN = {*tracking.NAMES.values(), *tracking.BEST_NAMES.values()}


def files(path, pattern="*"):
    return {file.name: file.read_bytes() for file in path.glob(pattern) if file.is_file()}


def artifacts(folder, run):
    return {file.path for file in folder.client.list_artifacts(run.info.run_id)}


def drawn_again(folder, run):
    """The pictures that `plot.py` makes of a run."""
    result = folder.run("plot.py", "--run-id", run.info.run_id, "--output-dir", run.info.run_id)
    assert result.status == 0 and result.errors == "", result.errors
    return files(folder.path / run.info.run_id)


@pytest.fixture
def parsed(monkeypatch, tmp_path):
    def parse(*flags):
        monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, flags)])
        return flat(parse_flags(run_demo_synth.Demo, run_demo_synth.__doc__))

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
        "animate": False,
        **{"flood_levels": [0.0, 0.26, 0.27, 0.28], "trials": 1, "seed": 0, "device": "auto"},
        "output_dir": ".",
    }
    adam = {"optimizer": "adam", "learning_rate": 0.001, "momentum": 0.0}
    adam["flood_levels"] = [0.0, 0.24, 0.25, 0.26]
    assert parsed() == sgd
    assert parsed("--optimizer", "adam") == {**sgd, **adam}
    assert parsed("--flood-levels", 0.3, 0, 0.1, 0.3)["flood_levels"] == [0.0, 0.1, 0.3]
    assert parsed("--dataset", "spiral")["train_samples"] == 200


def test_demo_end_to_end(folder, monkeypatch, parsed):
    make_dataset, slept = run_demo_synth.make_dataset, []
    slow_data = lambda *of: slept.append(time.time()) or time.sleep(0.3) or make_dataset(*of)  # noqa: E731
    monkeypatch.setattr(run_demo_synth, "make_dataset", slow_data)
    flags = (*SMALL, "--epochs", 4, "--seed", 3, "--device", "cpu", "--optimizer", "adam")
    result = folder.run(SCRIPT, *flags)
    assert result.status == 0 and result.errors == "", result.errors
    lines = result.output.splitlines()
    assert lines[0].startswith("sinusoid2d, 10% of the labels flipped, 30 training examples")
    assert lines[0].endswith("batches of 30, 4 epochs, seed 3 on cpu")
    assert set(files(folder.path, "*.png")) == PICTURES
    assert f"{sys.executable} -m mlflow ui" in lines[-2]
    assert lines[-2].endswith(f"sqlite:///{folder.path}/mlflow.db")

    # The parent is the result.
    [parent] = folder.parents()
    levels, info, params = [0.0, 0.24, 0.25, 0.26], parent.info, parent.data.params
    assert info.status == "FINISHED" and info.run_name == "sinusoid2d, 1 trial"
    assert artifacts(folder, parent) == {*PICTURES, *KEPT, "boundary.npz"}
    used = {**parsed(*flags), "batch_size": 30}
    assert params == {name: str(value) for name, value in used.items()}
    history, parameters = read_csv(folder.path / "history.csv"), used
    assert json.loads((folder.path / "demo.json").read_text()) == parameters
    outcome = conclude(history, parameters)
    assert outcome.summary in result.output
    assert parent.data.tags["mlflow.note.content"].startswith(f"```\n{outcome.summary}\n```")
    last = history[history.epoch == 4].set_index("flood_level")
    metrics = {"chosen_b": outcome.chosen, "with/b": outcome.compared}
    for side, level in {"without": 0.0, "with": outcome.compared}.items():
        metrics[f"{side}/accuracy"] = last.test_accuracy_clean[level]
        metrics[f"{side}/loss"] = last.test_loss_clean[level]
    assert parent.data.metrics == metrics

    # A child for each level has its curves, and the best epoch beside the last.
    children = folder.children(parent)
    for level, run in zip(levels, children, strict=True):
        rows = history[history.flood_level == level].set_index("epoch", drop=False)
        assert run.info.run_name == (f"b = {level}" if level else "no flooding")
        assert run.data.params == {**params, "flood_level": str(level)}
        for metric, name in tracking.NAMES.items():
            assert folder.curve(run, name) == rows[metric].dropna().to_dict()
        best = rows.loc[
            max(range(1, 5), key=lambda epoch: (rows.val_accuracy_noisy[epoch], -epoch))
        ]
        for metric, name in tracking.BEST_NAMES.items():
            assert run.data.metrics[name] == best[metric]
        assert set(run.data.metrics) == SHOWN and run.data.tags["torch"] == torch.__version__
        began, ended = run.info.start_time / 1000, run.info.end_time / 1000
        assert run.info.status == "FINISHED" and abs(began - slept[0]) < 0.1 and ended > began + 0.3
        assert "goes uphill" in run.data.tags["mlflow.note.content"]
    assert len({run.data.tags["mlflow.runColor"] for run in children}) == 4

    # The printed address and the experiment's link show these children alone, in this order.
    address = lines[-1].removeprefix("and open http://127.0.0.1:5000/")
    experiment = folder.client.get_experiment(info.experiment_id)
    note = experiment.tags["mlflow.note.content"]
    assert note.startswith("Training with and without flooding") and f"]({address})" in note
    asked = {name: value for name, [value] in parse_qs(address.partition("?")[2]).items()}
    assert asked["compareRunsMode"] == "CHART" and asked["workflowType"] == "machine_learning"
    order = f"{asked['orderByKey']} {'ASC' if asked['orderByAsc'] == 'true' else 'DESC'}"
    found = folder.client.search_runs([info.experiment_id], asked["searchFilter"], order_by=[order])
    assert [run.info.run_id for run in found] == [run.info.run_id for run in children]
    # The same pictures again, from what MLflow has, whichever run is named.
    assert (
        drawn_again(folder, parent)
        == drawn_again(folder, children[2])
        == files(folder.path, "*.png")
    )


def test_the_titles_of_charts_differ_though_they_are_cut():
    assert len({name[:12] for name in SHOWN}) == len(SHOWN) == 20
    assert min(SHOWN, key=str.lower) == "batch/loss"  # the page sorts its sections and charts


def test_trials_are_the_demos_of_their_seeds(folder, monkeypatch):
    trials, drawn, train, draw_demo = [], [], run_demo_synth.train, plot.draw_demo

    def spied(network, data, levels, training, device, generator, **more):
        weights = torch.cat([weight.flatten() for weight in network.state_dict().values()])
        trials.append((torch.tensor(data.train.inputs), weights, generator.get_state()))
        return train(network, data, levels, training, device, generator, **more)

    monkeypatch.setattr(run_demo_synth, "train", spied)
    monkeypatch.setattr(plot, "draw_demo", lambda *of: drawn.append(of) or draw_demo(*of))
    flags = ("--select-on", "noisy", "--flood-levels", 0.3, 0.7, "--eval-every", 2)
    moving, draw_moving = {}, plot.draw_moving_boundary

    def spied_moving(outcome, boundaries):
        moving.update(boundaries)
        return draw_moving(outcome, moving.items())

    monkeypatch.setattr(plot, "draw_moving_boundary", spied_moving)
    monkeypatch.setattr("tqdm.tqdm.update", lambda bar, n=1: True)  # as where a bar is seen
    result = folder.run(SCRIPT, *FLAGS, *flags, "--seed", 3, "--trials", 2, "--animate")
    assert result.status == 0 and result.errors == "", result.errors
    saved = files(folder.path, "*.png")
    alone = folder.run(SCRIPT, *FLAGS, *flags, "--seed", 4)
    assert alone.status == 0 and alone.errors == "", alone.errors
    # Data, initial weights and the generator of the mini-batches are each trial's own.
    for different, ours, same in zip(*trials):
        assert torch.equal(ours, same) and not torch.equal(ours, different)
    (outcome, boundary), (alone, _) = drawn
    ours = outcome.history[outcome.history.seed == 4].reset_index(drop=True)
    pd.testing.assert_frame_equal(ours, alone.history, check_exact=True)
    assert sorted(set(ours.epoch)) == [0, 2, 3] and sorted(set(ours.flood_level)) == [0, 0.3, 0.7]
    assert torch.equal(torch.tensor(boundary.inputs), trials[0][0])  # the first trial's
    assert list(moving) == [2, 3]
    assert (moving[3].probability == boundary.probability).all()
    history = outcome.history.set_index(["seed", "epoch", "flood_level"]).train_accuracy_noisy
    for epoch, then in moving.items():
        accuracies = (then.predictions == then.noisy_labels).mean(axis=1)
        assert list(accuracies) == [history[3, epoch, b] for b in (0.0, outcome.compared)]

    parent, _ = folder.parents()
    assert artifacts(folder, parent) == {*KEPT, *saved, "boundary.npz", "synth_boundary.gif"}
    assert parent.info.run_name == "sinusoid2d, 2 trials"
    last = outcome.history.query("epoch == 3 and flood_level == 0").test_accuracy_clean
    mean, deviation = last.mean(), abs(last.diff().iloc[1]) / 2**0.5
    assert parent.data.metrics["without/accuracy"] == pytest.approx(mean)
    assert parent.data.metrics["without/sd_accuracy"] == pytest.approx(deviation)
    assert f"{100 * mean:.1f} ± {100 * deviation:.1f}" in result.output
    assert outcome.chosen == conclude(outcome.history, {"select_on": "noisy"}).chosen
    children = folder.children(parent)
    assert [run.info.run_name for run in children[:3]] == [
        f"{name}, seed 3" for name in ("no flooding", "b = 0.3", "b = 0.7")
    ]
    assert [run.data.params["seed"] for run in children] == ["3"] * 3 + ["4"] * 3
    assert children[3].info.start_time >= children[0].info.end_time
    assert drawn_again(folder, children[4]) == saved


ODD_PLACE = """if True:
    import pwd, runpy, sys
    def getpwuid(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")
    pwd.getpwuid = getpwuid
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")"""


def test_two_first_demos_at_once_and_one_in_an_odd_place(empty_folder):
    """From a notebook, with no user's name, another matplotlibrc, ASCII only, without stderr.

    Both come to the same, bit by bit, and the other says nothing on stderr, such as migrations.
    """
    path = empty_folder.path
    (path / "matplotlibrc").write_text("text.usetex: True\nsavefig.dpi: 30\n")
    odd = ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-c", ODD_PLACE, PROJECT / SCRIPT]
    environment = {
        "MPLBACKEND": "module://matplotlib_inline.backend_inline", "PYTHONIOENCODING": "ascii",
        "MATPLOTLIBRC": str(path), "PYTHONPATH": str(PROJECT), "PATH": os.environ["PATH"],
        "MPLCONFIGDIR": matplotlib.get_cachedir(), "OMP_NUM_THREADS": "1",
        "MLFLOW_TRACKING_URI": empty_folder.uri,
    }  # fmt: skip
    command = [str(word) for word in (*odd, *FLAGS, "--output-dir", "odd")]
    usual = empty_folder.spawn(SCRIPT, *FLAGS, MATPLOTLIBRC="")
    odd = subprocess.run(command, cwd=path, env=environment, capture_output=True, timeout=300)
    usual = finish(usual, 300)
    assert usual.status == 0 and usual.errors == "", usual.errors
    assert odd.returncode == 0 and b"MLP 2 ? 16" in odd.stdout, odd.stdout
    assert files(path / "odd", "*.png") == files(path, "*.png")
    written = {file.name for file in path.iterdir()} - {"odd", "matplotlibrc"}
    assert written == {*PICTURES, *KEPT, "mlflow.db", "mlflow.db.lock", "mlruns"}
    both = [empty_folder.children(parent) for parent in empty_folder.parents()]
    assert [run.info.status for runs in both for run in runs] == ["FINISHED"] * 4
    ours, theirs = ([run.data.metrics for run in children] for children in both)
    assert ours == theirs and ours[0] != ours[1]


def test_a_reader_that_leaves_costs_only_what_it_does_not_read(folder):
    """As `| head -1` does."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as nobody_reads:
        result = folder.run(SCRIPT, *FLAGS, stdout=nobody_reads)
    assert result.status == 1 and "Broken pipe" in one_line(result.errors)
    [parent] = folder.parents()
    assert parent.info.status == "FINISHED" and artifacts(folder, parent) >= PICTURES
    assert set(files(folder.path, "*.png")) == PICTURES


def test_drawing_or_a_disk_that_fails_costs_only_the_pictures(folder, monkeypatch):
    (folder.path / "synth_loss.png").mkdir()  # no picture can be put there
    result = folder.run(SCRIPT, *FLAGS)
    assert result.status == 1 and "synth_loss.png" in one_line(result.errors)
    monkeypatch.setattr(plot, "draw_demo", Mock(side_effect=RuntimeError("latex\nis not there")))
    result = folder.run(SCRIPT, *FLAGS, "--output-dir", "new")
    assert result.status == 1 and one_line(result.errors) == f"{SCRIPT}: error: latex is not there"
    assert "<- chosen" in result.output and "Charts:" in result.output
    assert set(files(folder.path / "new")) == KEPT
    for parent, pictures in zip(folder.parents(), (PICTURES, set())):
        assert parent.info.status == "FINISHED" and len(folder.children(parent)) == 2
        assert artifacts(folder, parent) == {*KEPT, *pictures, "boundary.npz"}


def test_data_out_of_the_plane_have_no_boundary(folder):
    flags = ("--dataset", "gaussian", "--flood-levels", 0, "--no-batch-norm")
    result = folder.run(SCRIPT, *FLAGS, *flags)
    assert result.status == 0 and result.errors == "", result.errors
    [parent] = folder.parents()
    expected = PICTURES - {"synth_boundary.png"}
    assert artifacts(folder, parent) == {*KEPT, *expected}
    assert drawn_again(folder, parent) == files(folder.path, "*.png")
    assert set(files(folder.path, "*.png")) == expected


def test_a_diverging_demo_says_where(folder):
    result = folder.run(SCRIPT, *FLAGS, "--no-batch-norm", "--learning-rate", 1e30)
    said = f"{SCRIPT}: error: .*flood level .* in epoch 1, with learning rate 1e\\+30"
    assert result.status == 1 and re.fullmatch(said, one_line(result.errors)), result.errors
    [parent] = folder.parents()
    assert parent.info.status == "FAILED" and not folder.children(parent)
    assert not files(folder.path, "*.png")


def test_an_interrupted_demo_keeps_its_finished_trials(folder, monkeypatch):
    def interrupted(demo, data, seed, *more):
        if seed == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return train_trial(demo, data, seed, *more)

    train_trial = run_demo_synth.train_trial
    monkeypatch.setattr(run_demo_synth, "train_trial", interrupted)
    result = folder.run(SCRIPT, *FLAGS, "--trials", 2)
    assert result.status == 130 and result.errors == "\nstopped by SIGINT\n"
    [parent] = folder.parents()
    assert parent.info.status == "FAILED" and not files(folder.path, "*.png")
    assert [run.info.status for run in folder.children(parent)] == ["FINISHED"] * 2


@pytest.mark.parametrize(
    "flags",
    re.split(
        r";\s+",
        """--flood-levels -0.2; --flood-levels nan; --flood-levels inf; --eval-every 0; --trials 0;
        --seed -1; --seed 4294967296; --label-noise 1.0; --hidden-units 0; --learning-rate nan;
        --optimizer adam --momentum 0.5; --batch-size 33; --output-dir /dev/null/pictures;
        --animate --dataset gaussian; --device cuda""",
    ),
)
def test_flags_out_of_range_are_refused_in_one_line(empty_folder, monkeypatch, flags):
    """And leave nothing behind: a batch size of 33 leaves one of 100 examples alone."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = empty_folder.run(SCRIPT, *flags.split())
    assert result.status == 2 and result.output == ""
    name, value = flags.split()[-2:]
    said = f"{SCRIPT}: error: {name} {re.escape(value)}: [a-z].+"
    assert re.fullmatch(said, one_line(result.errors))
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
    for name in ("dataset", "hidden-layers", "optimizer", "seed", "output-dir"):
        assert re.search(rf"--{name}\b(?!-)", shown.output), name
    assert refused.status == 2 and "--label-noise 2.0: " in one_line(refused.errors)
    assert unreadable.status == 2 and "Traceback" not in unreadable.errors
    assert "--epochs" in unreadable.errors and "some" in unreadable.errors
    assert not list(empty_folder.path.iterdir())


def test_plotting_only_reads_and_says_where_it_looked(folder):
    assert folder.run(SCRIPT, *FLAGS).status == 0
    [parent] = folder.parents()
    moved = Path(parent.info.artifact_uri)
    moved.rename(moved.with_name("moved"))
    before = files(folder.path, "**/*")
    for run_id, said in (("nothing", "nothing"), (parent.info.run_id, str(moved))):
        result = folder.run("plot.py", "--run-id", run_id)
        assert result.status == 2 and said in one_line(result.errors).partition(run_id)[2]
        assert files(folder.path, "**/*") == before
    (folder.path / "mlflow.db").unlink()
    result = folder.run("plot.py", "--run-id", run_id)
    assert result.status == 2 and f"there is no {folder.path}/mlflow.db" in one_line(result.errors)
    assert not (folder.path / "mlflow.db").exists()
