"""The demo as a user runs it and breaks it, and what MLflow then has."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock
from urllib.parse import parse_qs

import matplotlib
import pandas as pd
import pytest
import torch
from conftest import PICTURES, PROJECT, SMALL, Folder, mlflow, one_line, parse, wait_until

import plot
import run_demo_synth
import tracking
from results import conclude, read_csv
from run_demo_synth import Demo
from settings import flat

SCRIPT = "run_demo_synth.py"
FLAGS = (*SMALL, "--epochs", 3, "--flood-levels", 0.7, "--device", "cpu")
KEPT = {"demo.json", "history.csv", "boundary.npz"}
SHOWN = {*tracking.NAMES.values(), *tracking.BEST_NAMES.values()}


def files(path: Path, pattern: str = "*") -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.glob(pattern) if file.is_file()}


def drawn_again(folder: Folder, run: mlflow.entities.Run) -> dict[str, bytes]:
    """The pictures that `plot.py` makes of the files that a run has in MLflow, and no others."""
    (place := folder.path / "again").mkdir()
    for name in folder.artifacts(run) - PICTURES:
        folder.client.download_artifacts(run.info.run_id, name, str(place))
    folder.succeed("plot.py", "--output-dir", "again")
    return files(place, "*.png")


def test_defaults_are_the_authors():
    """Protocol section 3, setting 1; Adam's are those of setting 2."""
    sgd, adam = parse(Demo), parse(Demo, "--optimizer", "adam")
    assert plot.describe(flat(sgd)) == (
        "sinusoid2d, 10% of the labels flipped, 100 training examples, MLP 4 × 500, batch norm\n"
        "SGD, learning rate 0.01, momentum 0.9, batches of 200, 200 epochs, seed 0"
    )
    assert "\nAdam, learning rate 0.001, batches of 200," in plot.describe(flat(adam))
    assert (sgd.data.val_samples, sgd.data.test_samples) == (100, 20_000)
    assert (sgd.select_on, sgd.eval_every, sgd.device) == ("clean", 1, "auto")
    assert sgd.flood_levels == (0.0, 0.26, 0.27, 0.28)
    assert adam.flood_levels == (0.0, 0.24, 0.25, 0.26)
    assert parse(Demo, "--flood-levels", 0.3, 0, 0.1, 0.3).flood_levels == (0.0, 0.1, 0.3)


def test_demo_end_to_end(folder):
    flags = (*SMALL, "--epochs", 4, "--seed", 3, "--device", "cpu", "--optimizer", "adam")
    output = folder.succeed(SCRIPT, *flags)
    first, *_, command, address = output.splitlines()
    assert first.startswith("sinusoid2d, 10% of the labels flipped, 30 training examples")
    assert first.endswith("batches of 30, 4 epochs, seed 3 on cpu")
    assert set(files(folder.path, "*.png")) == PICTURES
    assert f"{sys.executable} -m mlflow ui" in command
    assert command.endswith(f"sqlite:///{folder.path}/mlflow.db")

    # The parent is the result.
    [parent] = folder.parents()
    levels, info, params = [0.0, 0.24, 0.25, 0.26], parent.info, parent.data.params
    assert info.status == "FINISHED" and info.run_name == "sinusoid2d, 1 trial"
    assert folder.artifacts(parent) == {*PICTURES, *KEPT}
    used = {**flat(parse(Demo, *flags)), "batch_size": 30}
    assert params == {name: str(value) for name, value in used.items()}
    assert json.loads((folder.path / "demo.json").read_text()) == used
    history = read_csv(folder.path / "history.csv")
    outcome = conclude(history, used)
    assert outcome.summary in output
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
            points = folder.client.get_metric_history(run.info.run_id, name)
            curve = rows[metric].dropna()
            assert [(one.step, one.value) for one in points] == list(curve.items())
        best = max(range(1, 5), key=lambda epoch: rows.val_accuracy_noisy[epoch])
        for metric, name in tracking.BEST_NAMES.items():
            assert run.data.metrics[name] == rows[metric][best]
        assert set(run.data.metrics) == SHOWN and run.data.tags["torch"] == torch.__version__
        assert info.start_time <= run.info.start_time < run.info.end_time <= info.end_time
        assert run.info.status == "FINISHED"
        assert "goes uphill" in run.data.tags["mlflow.note.content"]
    assert len({run.data.tags["mlflow.runColor"] for run in children}) == 4
    # The page sorts its charts, and may cut their titles after 12 letters.
    assert len({name[:12] for name in SHOWN}) == len(SHOWN) == 20
    assert min(SHOWN, key=str.lower) == "batch/loss"

    # The printed address and the experiment's link show these children alone, in this order.
    address = address.removeprefix("and open http://127.0.0.1:5000/")
    note = folder.client.get_experiment(info.experiment_id).tags["mlflow.note.content"]
    assert note.startswith("Training with and without flooding") and f"]({address})" in note
    asked = {name: value for name, [value] in parse_qs(address.partition("?")[2]).items()}
    assert asked["compareRunsMode"] == "CHART" and asked["workflowType"] == "machine_learning"
    order = f"{asked['orderByKey']} {'ASC' if asked['orderByAsc'] == 'true' else 'DESC'}"
    found = folder.client.search_runs([info.experiment_id], asked["searchFilter"], order_by=[order])
    assert [run.info.run_id for run in found] == [run.info.run_id for run in children]


def test_trials_are_the_demos_of_their_seeds(folder, monkeypatch):
    trials, drawn, moving = [], [], {}
    train, draw_demo, draw_moving = run_demo_synth.train, plot.draw_demo, plot.draw_moving_boundary

    def spied(network, data, models, training, generator, **more):
        weights = torch.cat([weight.flatten() for weight in network.state_dict().values()])
        trials.append((torch.tensor(data.train.inputs), weights, generator.get_state()))
        return train(network, data, models, training, generator, **more)

    def spied_moving(outcome, boundaries):
        moving.update(boundaries)
        return draw_moving(outcome, moving.items())

    monkeypatch.setattr(run_demo_synth, "train", spied)
    monkeypatch.setattr(plot, "draw_demo", lambda *of: drawn.append(of) or draw_demo(*of))
    monkeypatch.setattr(plot, "draw_moving_boundary", spied_moving)
    monkeypatch.setattr("tqdm.tqdm.update", lambda bar, n=1: True)  # as where a bar is seen
    flags = ("--select-on", "noisy", "--flood-levels", 0.6, 5, "--eval-every", 2)
    flags += ("--learning-rate", 0.1)  # so that the levels differ after three epochs
    output = folder.succeed(SCRIPT, *FLAGS, *flags, "--seed", 3, "--trials", 2, "--animate")
    saved = files(folder.path, "*.png")
    monkeypatch.setattr(plot, "png", lambda figure: b"")  # to save time
    folder.succeed(SCRIPT, *FLAGS, *flags, "--seed", 4)
    monkeypatch.undo()
    # Data, initial weights and the generator of the mini-batches are each trial's own.
    for different, ours, same in zip(*trials):
        assert torch.equal(ours, same) and not torch.equal(ours, different)
    (outcome, boundary), (alone, _) = drawn
    ours = outcome.history[outcome.history.seed == 4].reset_index(drop=True)
    pd.testing.assert_frame_equal(ours, alone.history, check_exact=True)
    assert sorted(set(ours.epoch)) == [0, 2, 3] and sorted(set(ours.flood_level)) == [0, 0.6, 5]
    assert torch.equal(torch.tensor(boundary.inputs), trials[0][0])  # the first trial's
    assert list(moving) == [2, 3] and outcome.compared == 0.6  # neither first nor last
    assert (moving[3].probability == boundary.probability).all()
    history = outcome.history.set_index(["seed", "epoch", "flood_level"]).train_accuracy_noisy
    for epoch, then in moving.items():
        accuracies = (then.predictions == then.noisy_labels).mean(axis=1)
        assert list(accuracies) == [history[3, epoch, b] for b in (0.0, outcome.compared)]

    parent, _ = folder.parents()
    expected = {*KEPT, *saved, "synth_boundary.gif"}
    assert folder.artifacts(parent) == expected and parent.info.run_name == "sinusoid2d, 2 trials"
    last = outcome.history.query("epoch == 3 and flood_level == 0").test_accuracy_clean
    mean, deviation = last.mean(), abs(last.diff().iloc[1]) / 2**0.5
    assert parent.data.metrics["without/accuracy"] == pytest.approx(mean)
    assert parent.data.metrics["without/sd_accuracy"] == pytest.approx(deviation)
    assert f"{100 * mean:.1f} ± {100 * deviation:.1f}" in output
    assert outcome.chosen == conclude(outcome.history, {"select_on": "noisy"}).chosen
    children = folder.children(parent)
    names = [f"{name}, seed 3" for name in ("no flooding", "b = 0.6", "b = 5")]
    assert [run.info.run_name for run in children[:3]] == names
    assert [run.data.params["seed"] for run in children] == ["3"] * 3 + ["4"] * 3
    assert children[3].info.start_time >= children[0].info.end_time
    assert drawn_again(folder, parent) == saved


ODD_PLACE = """if True:
    import pwd, runpy, sys
    def getpwuid(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")
    pwd.getpwuid = getpwuid
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")"""


def test_two_first_demos_at_once_one_in_an_odd_place(empty_folder):
    """From a notebook, with no user's name, another matplotlibrc, ASCII only, without stderr.

    Both come to the same, bit by bit, and say nothing on stderr, such as migrations.
    """
    path, flags = empty_folder.path, (*FLAGS, "--output-dir")
    (path / "matplotlibrc").write_text("text.usetex: True\nsavefig.dpi: 30\n")
    odd = ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-c", ODD_PLACE, PROJECT / SCRIPT]
    environment = {
        "MPLBACKEND": "module://matplotlib_inline.backend_inline", "PYTHONIOENCODING": "ascii",
        "MATPLOTLIBRC": str(path), "PYTHONPATH": str(PROJECT), "PATH": os.environ["PATH"],
        "MPLCONFIGDIR": matplotlib.get_cachedir(), "OMP_NUM_THREADS": "1",
        "MLFLOW_TRACKING_URI": empty_folder.uri,
    }  # fmt: skip
    command = [str(word) for word in (*odd, *flags, "odd")]
    with subprocess.Popen(command, cwd=path, env=environment, stdout=subprocess.PIPE) as odd:
        wait_until((path / "odd").exists)  # now it opens its store
        empty_folder.succeed(SCRIPT, *flags, "usual")
        said, _ = odd.communicate(timeout=300)
    assert odd.returncode == 0 and b"MLP 2 ? 16" in said, said
    for name in PICTURES:
        assert (path / "usual" / name).read_bytes() == (path / "odd" / name).read_bytes()
    left = {"mlflow.db", "mlflow.db.lock", "mlruns", "matplotlibrc", "usual", "odd"}
    assert {file.name for file in path.iterdir()} == left
    assert set(files(path / "usual")) == {*PICTURES, *KEPT}
    demos = [empty_folder.children(parent) for parent in empty_folder.parents()]
    assert [run.info.status for runs in demos for run in runs] == ["FINISHED"] * 4
    metrics, others = ([run.data.metrics for run in children] for children in demos)
    assert metrics == others and metrics[0] != metrics[1]


def test_a_reader_that_leaves_and_a_picture_that_fails_cost_only_themselves(folder, monkeypatch):
    """The reader as `| head -1` does."""
    (folder.path / "synth_loss.png").mkdir()  # no picture can be put there
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as nobody_reads:
        result = folder.run(SCRIPT, *FLAGS, stdout=nobody_reads)
    reader, disk = result.errors.splitlines()
    assert result.status == 1 and "Broken pipe" in reader and "synth_loss.png" in disk
    assert set(files(folder.path)) >= KEPT
    monkeypatch.setattr(plot, "draw_demo", Mock(side_effect=RuntimeError("latex\nis not there")))
    result = folder.run(SCRIPT, *FLAGS, "--output-dir", "new/one")
    assert result.status == 1 and one_line(result.errors) == f"{SCRIPT}: error: latex is not there"
    assert "<- chosen" in result.output and "Charts:" in result.output
    assert set(files(folder.path / "new" / "one")) == KEPT
    for parent, pictures in zip(folder.parents(), (PICTURES, set())):
        assert parent.info.status == "FINISHED" and len(folder.children(parent)) == 2
        assert folder.artifacts(parent) == {*KEPT, *pictures}


def test_data_out_of_the_plane_have_no_boundary(folder, monkeypatch):
    monkeypatch.setattr("train.MODELS_AT_ONCE", {"cpu": 1})
    for name in ("boundary.npz", "synth_boundary.png", "synth_boundary.gif"):
        (folder.path / name).write_text("left by another demo")
    flags = ("--dataset", "gaussian", "--flood-levels", 0.3, "--no-batch-norm")
    folder.succeed(SCRIPT, *FLAGS, *flags)
    [parent] = folder.parents()
    expected = PICTURES - {"synth_boundary.png"}
    assert folder.artifacts(parent) == {*KEPT, *expected} - {"boundary.npz"}
    drawn = files(folder.path, "*.png")
    folder.succeed("plot.py")
    assert files(folder.path, "*.png") == drawn and set(drawn) == expected
    assert not [*folder.path.glob("*boundary*")]
    history, said = (folder.path / "history.csv").read_text(), []
    for name, text in {"history.csv": history[:-200], "demo.json": "{}"}.items():
        (folder.path / name).write_text(text)
        said.append(folder.refuse("plot.py"))
        assert said[-1].startswith("--output-dir .: a folder with the files of a demo (")
    assert "history.csv is cut short" in said[0]


def test_a_demo_that_diverges_keeps_its_finished_trials(folder, monkeypatch):
    def diverging(network, data, models, training, *more, **options):
        rates.append(1e30 if rates else 0.01)
        training = replace(training, learning_rate=rates[-1])
        return train(network, data, models, training, *more, **options)

    rates, train = [], run_demo_synth.train
    monkeypatch.setattr(run_demo_synth, "train", diverging)
    result = folder.run(SCRIPT, *FLAGS, "--no-batch-norm", "--trials", 2)
    said = f"{SCRIPT}: error: .*flood level .* in epoch 1, with learning rate 1e\\+30"
    assert result.status == 1 and re.fullmatch(said, one_line(result.errors)), result.errors
    [parent] = folder.parents()
    assert parent.info.status == "FAILED" and not files(folder.path, "*.png")
    assert [run.info.status for run in folder.children(parent)] == ["FINISHED"] * 2
    before = files(folder.path, "**/*")
    assert "demo.json" in folder.refuse("plot.py")
    assert files(folder.path, "**/*") == before


@pytest.mark.parametrize(
    "flags",
    re.split(
        r";\s+",
        """--flood-levels -0.2; --flood-levels nan; --flood-levels inf; --eval-every 0; --trials 0;
        --seed -1; --trials 2 --seed 4294967295; --label-noise 1.0; --label-noise nan;
        --label-noise -0.1; --train-samples 0; --test-samples -3;
        --dataset spiral --spiral-noise -1.0;
        --dataset spiral --spiral-noise inf; --spiral-noise 0.5; --hidden-units 0;
        --hidden-layers 0; --learning-rate nan; --learning-rate 0.0; --learning-rate inf;
        --weight-decay -1.0; --momentum 1.0; --momentum -0.1; --optimizer adam --momentum 0.5;
        --epochs 0; --batch-size 0; --batch-size 1; --batch-size 33; --animate --dataset gaussian;
        --output-dir /dev/null/pictures; --output-dir /proc/self; --device cuda""",
    ),
)
def test_flags_out_of_range_are_refused_in_one_line(empty_folder, monkeypatch, flags):
    """And leave nothing behind: a batch size of 33 leaves one of 100 examples alone."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    name, value = flags.split()[-2:]
    said = empty_folder.refuse(SCRIPT, *flags.split())
    assert re.fullmatch(f"{name} {re.escape(value)}: [a-z].+", said)
    assert not list(empty_folder.path.iterdir())
