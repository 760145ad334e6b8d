"""The synthetic table: small ones in this process, killed, resumed, side by side and from files."""

from __future__ import annotations

import math
import shutil
import signal
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Folder, finish, free_port, one_line, wait_until

import run_table_synth
from datasets import make_dataset
from models import MLP
from results import choose_flood_levels, compare, markdown
from settings import DataSettings, ModelSettings, TrainSettings
from train import train_with_early_stopping

SCRIPT = "run_table_synth.py"
SMALL = (
    *("--dataset", "gaussian", "sinusoid2d", "--label-noise", 0.1, "--trials", 4, "--seed", 5),
    *("--flood-max", 0.6, "--flood-step", 0.3, "--epochs", 30, "--batch-size", 16),
    *("--train-samples", 40, "--val-samples", 30, "--test-samples", 200),
    *("--hidden-layers", 2, "--hidden-units", 16, "--learning-rate", 0.003),
)
CELLS, LEVELS = 8, [0.0, 0.3, 0.6]
CELLS_FILE = "table_synth_cells.csv"
FILES = ("table_synth.md", "table_synth.csv", CELLS_FILE, "table_synth.png")


def cell_runs(folder):
    return [run for run in folder.runs("flooding-table") if "cell_key" in run.data.tags]


def finished(folder):
    return {run.info.run_id for run in cell_runs(folder) if run.info.status == "FINISHED"}


def assert_same_files(folder, whole):
    for name in FILES:
        assert (folder.path / name).read_bytes() == (whole.path / name).read_bytes(), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory, empty_store):
    """A folder with a table made in one go."""
    folder = Folder(tmp_path_factory.mktemp("whole"))
    shutil.copy(empty_store, folder.path / "mlflow.db")
    result = folder.run(SCRIPT, *SMALL)
    assert result.status == 0 and result.errors == "", result.errors
    assert "8 cells of 3 flood levels, 0 of them trained before" in result.output
    assert (folder.path / "table_synth.md").read_text() in result.output
    assert "viewStateShareKey=means" in result.output.splitlines()[-1]
    return folder


def test_defaults_are_the_papers(monkeypatch):
    """Protocol section 4."""
    monkeypatch.setattr(sys, "argv", [SCRIPT])
    _, arguments = run_table_synth.parse_arguments()
    expected = {
        "dataset": ["gaussian", "sinusoid2d", "spiral"],
        "label_noise": [0.01, 0.05, 0.1],
        "trials": 10,
        "flood_max": 0.5,
        "flood_step": 0.01,
        "quick": False,
        "cells": [],
        "spiral_noise": 0.0,
        "hidden_layers": 5,
        "hidden_units": 500,
        "batch_norm": False,
        "optimizer": "adam",
        "learning_rate": 0.001,
        "momentum": 0.0,
        "weight_decay": 0.0,
        "batch_size": 100,
        "epochs": 500,
        "seed": 0,
        "device": "auto",
        "output_dir": arguments.output_dir,
    }
    assert vars(arguments) == expected
    levels = run_table_synth.flood_grid(arguments.flood_max, arguments.flood_step)
    assert levels == [round(k / 100, 2) for k in range(51)]
    monkeypatch.setattr(sys, "argv", [SCRIPT, "--quick"])
    _, quick = run_table_synth.parse_arguments()
    assert vars(quick) == {**expected, "quick": True, "trials": 2, "flood_step": 0.1}


@pytest.mark.parametrize(
    ("step", "levels"),
    [
        (0.3, [0, 0.3]),
        (0.2, [0, 0.2, 0.4]),
        (0.1, [0, 0.1, 0.2, 0.3, 0.4, 0.5]),
        (0.03, [round(0.03 * k, 2) for k in range(17)]),  # ends at 0.48
        (0.5, [0, 0.5]),
    ],
)
def test_flood_max_is_never_passed(step, levels):
    assert run_table_synth.flood_grid(0.5, step) == levels


def test_runs_in_mlflow(whole):
    runs = cell_runs(whole)
    assert len(runs) == CELLS and {run.info.status for run in runs} == {"FINISHED"}
    cells = pd.read_csv(whole.path / CELLS_FILE, engine="pyarrow")
    for run in runs:
        params = run.data.params
        assert params["epochs"] == "30" and params["version"] == "1"
        assert params["setting"] == f"{params['dataset']}, noise 0.1"
        rows = cells[(cells.dataset == params["dataset"]) & (cells.seed == int(params["seed"]))]
        for stopping, section in (("last epoch", "last_epoch"), ("early", "early")):
            of_stopping = rows[rows.stopping == stopping]
            for name in ("test_accuracy_noisy", "val_loss_clean", "epoch"):
                curve = whole.curve(run, f"{section}/{name}")
                assert curve == dict(enumerate(of_stopping[name]))
        assert len(run.inputs.dataset_inputs) == 3
    assert {run.data.params["seed"] for run in runs} == {"5", "6", "7", "8"}
    [table] = [run for run in whole.runs("flooding-table") if "cell_key" not in run.data.tags]
    assert table.info.run_name == "table of 8 cells" and table.info.status == "FINISHED"
    found = {file.path for file in whole.client.list_artifacts(table.info.run_id)}
    assert found == set(FILES)


def test_a_cell_is_a_training_with_early_stopping(whole):
    cells = pd.read_csv(whole.path / CELLS_FILE, engine="pyarrow")
    cell = cells[(cells.seed == 6) & (cells.dataset == "gaussian")].reset_index(drop=True)
    sizes = {"train_samples": 40, "val_samples": 30, "test_samples": 200}
    data = make_dataset(DataSettings("gaussian", 0.1, **sizes), seed=6)
    generator = torch.Generator().manual_seed(6)
    network = MLP(10, ModelSettings(2, 16, batch_norm=False), generator)
    settings = TrainSettings("adam", 0.003, batch_size=16, epochs=30)
    device = torch.device("cpu")
    expected = train_with_early_stopping(network, data, LEVELS, settings, device, generator)
    pd.testing.assert_frame_equal(cell[expected.columns], expected)


def test_a_finished_table_is_drawn_again_without_training(whole, monkeypatch):
    monkeypatch.setattr("train.train", None)
    before = {name: (whole.path / name).read_bytes() for name in FILES}
    result = whole.run(SCRIPT, *SMALL)
    assert result.status == 0 and "8 of them trained before" in result.output, result.errors
    assert before == {name: (whole.path / name).read_bytes() for name in FILES}


def test_another_version_is_trained_anew(whole, monkeypatch):
    monkeypatch.setattr("run_table_synth.FIGURES_VERSION", 2)
    monkeypatch.setattr("train.train", None)
    result = None
    with pytest.raises(TypeError):  # it wants to train
        result = whole.run(SCRIPT, *SMALL)
    assert result is None


def test_cells_from_files_need_no_training(whole, folder, monkeypatch):
    """Two machines' figures put together, one of them with cells that nobody asked for."""
    cells = pd.read_csv(whole.path / CELLS_FILE, engine="pyarrow")
    cells[cells.seed < 7].to_csv(folder.path / "one.csv", index=False)
    rest = pd.concat([cells[cells.seed >= 7], cells[cells.seed == 8].assign(seed=99)])
    rest.to_csv(folder.path / "other.csv", index=False)
    with monkeypatch.context() as without:
        without.setattr("train.train", None)
        result = folder.run(SCRIPT, *SMALL, "--cells", "one.csv", "other.csv")
    assert result.status == 0 and "8 of them trained before" in result.output, result.errors
    assert_same_files(folder, whole)
    assert len(finished(folder)) == CELLS
    # Half of them in a file: the other half is trained.
    other = Folder(folder.path / "half")
    other.path.mkdir()
    result = other.run(SCRIPT, *SMALL, "--cells", "../one.csv")
    assert result.status == 0 and "4 of them trained before" in result.output, result.errors
    assert_same_files(other, whole)


def spoiled(cells):
    """Files that cannot be used, with what is said of them."""
    first = cells.seed == 5
    yield cells.drop(columns="val_loss_noisy"), "has no column val_loss_noisy"
    yield cells.assign(epochs=31), "epochs is 31, and 30 is asked for"
    yield cells.assign(version=2), "version is 2, and 1 is asked for"
    yield cells.iloc[:-1], "is cut short or has other flood levels: dataset sinusoid2d"
    yield pd.concat([cells, cells[first]]), "there is a cell twice"
    yield cells.assign(test_loss_noisy=math.nan), "is cut short, figures are missing"
    yield cells.replace({"flood_level": {0.3: 0.31}}), "other flood levels"
    yield cells.iloc[:0], "is cut short"
    yield cells.replace({"dataset": {"gaussian": "moons"}}), "dataset 'moons': one of"


def test_files_of_cells_that_do_not_fit(whole, folder):
    cells = pd.read_csv(whole.path / CELLS_FILE, engine="pyarrow")
    for spoiled_cells, said in spoiled(cells):
        spoiled_cells.to_csv(folder.path / "spoiled.csv", index=False)
        result = folder.run(SCRIPT, *SMALL, "--cells", "spoiled.csv")
        line = one_line(result.errors)
        assert result.status == 2 and "--cells " in line and said in line, line
    shutil.copy(whole.path / CELLS_FILE, folder.path / "a.csv")
    for files, said in (
        (["a.csv", "a.csv"], "a cell twice, also in a.csv"),
        (["b.csv"], "b.csv: cannot be read"),
    ):
        result = folder.run(SCRIPT, *SMALL, "--cells", *files)
        assert result.status == 2 and said in one_line(result.errors)
    assert not cell_runs(folder) and not (folder.path / "table_synth.md").exists()


def test_killed_and_resumed_equals_uninterrupted(whole, folder):
    killed = folder.fork(SCRIPT, *SMALL)
    wait_until(lambda: len(finished(folder)) >= 2)
    killed.kill()
    killed.communicate()
    before = finished(folder)
    assert 2 <= len(before) < CELLS

    resumed = folder.run(SCRIPT, *SMALL)
    assert resumed.status == 0 and resumed.errors == "", resumed.errors
    assert f"8 cells of 3 flood levels, {len(before)} of them trained" in resumed.output
    assert "RUNNING" not in {run.info.status for run in cell_runs(folder)}
    assert before < finished(folder) and len(finished(folder)) == CELLS
    assert_same_files(folder, whole)


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


def test_two_processes_equal_one_and_lose_nothing(whole, folder):
    result = finish(folder.spawn(*TORCHRUN, 2, SCRIPT, *SMALL))
    assert result.status == 0, result.errors
    assert "side by side: 2" in result.output and result.output.count("Saved:") == 1
    assert len(cell_runs(folder)) == CELLS == len(finished(folder))
    assert_same_files(folder, whole)


def two_ranks():
    """What torchrun says to two processes."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [{**shared, "RANK": str(rank)} for rank in range(2)]


def test_a_failing_rank_leaves_no_run_open(folder):
    """As torchrun does it: where one process fails, the others get SIGTERM."""
    first, second = two_ranks()
    flags = (*SMALL, "--epochs", 10**6)
    good = folder.fork(SCRIPT, *flags, **first)
    bad = folder.fork(SCRIPT, *flags, "--optimizer", "sgd", "--learning-rate", 1e30, **second)
    result = finish(bad)
    assert result.status == 1
    assert "run_table_synth.py: error: flood level 0" in one_line(result.errors)
    good.send_signal(signal.SIGTERM)
    result = finish(good)
    assert result.status == 128 + signal.SIGTERM
    assert result.errors.endswith("stopped by SIGTERM\n") and "Traceback" not in result.errors
    assert {run.info.status for run in cell_runs(folder)} == {"FAILED", "KILLED"}
    assert not list(folder.path.glob("table_synth*"))


def test_what_a_lost_rank_took_is_trained_by_the_first(whole, folder):
    first, second = two_ranks()
    # The second takes a cell and never ends it; its network is another, so that we know it.
    lost = folder.fork(SCRIPT, *SMALL, "--epochs", 10**6, **second)
    left = folder.fork(SCRIPT, *SMALL, **first)
    wait_until(lambda: len(cell_runs(folder)) == CELLS)  # the endless one among them
    assert len(finished(folder)) < CELLS
    lost.kill()
    result = finish(left)
    assert result.status == 0 and result.errors == "", result.errors
    assert len(finished(folder)) == CELLS
    assert_same_files(folder, whole)


def test_cells_that_a_dead_server_has_not_got_are_kept(whole, served, server, monkeypatch):
    monkeypatch.setattr("run_table_synth.PATIENCE_SECONDS", 0.5)
    train, trained = train_with_early_stopping, []

    def killing(*arguments):
        trained.append(arguments)
        if len(trained) == 3:
            server.kill()
        if len(trained) > 3:
            time.sleep(0.4)
        return train(*arguments)

    monkeypatch.setattr("train.train_with_early_stopping", killing)
    monkeypatch.setattr("store.FLUSH_SECONDS", 0.01)
    failed = served.run(SCRIPT, *SMALL)
    assert failed.status == 1 and "Traceback" not in failed.errors
    told, error = sorted(failed.errors.splitlines())
    assert f"error: MLFLOW_TRACKING_URI {served.uri}: the last " in error
    [kept] = served.path.glob("table_synth_cells_*.csv")
    assert told == f"cells that MLflow has not got, for --cells: {kept.name}"
    trained_first = len(trained)

    server.start()
    result = served.run(SCRIPT, *SMALL, "--cells", kept.name)
    assert result.status == 0 and result.errors == "", result.errors
    assert len(trained) == CELLS  # none of them twice
    assert len(finished(served)) == CELLS and trained_first < CELLS
    assert_same_files(served, whole)


def test_weights_that_blow_up_in_the_last_step_are_a_failure(folder):
    """No mini-batch sees them: one epoch of one batch."""
    flags = ("--optimizer", "sgd", "--learning-rate", 1e30, "--epochs", 1, "--batch-size", 200)
    result = folder.run(SCRIPT, *SMALL, *flags)
    assert result.status == 1
    assert "val_loss_noisy is" in one_line(result.errors)
    assert [run.info.status for run in cell_runs(folder)] == ["FAILED"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--trials", 0], "--trials 0"),
        (["--flood-max", -1], "--flood-max -1.0"),
        (["--flood-step", 0], "--flood-step 0.0"),
        (["--flood-step", "nan"], "--flood-step nan"),
        (["--flood-step", 0.6], "--flood-step 0.6"),
        (["--label-noise", 0.1, 1.5], "--label-noise 1.5"),
        (["--dataset", "gaussian", "moons"], "--dataset: invalid choice: 'moons'"),
    ],
)
def test_bad_flags(empty_folder, flags, said):
    result = empty_folder.run(SCRIPT, *flags)
    assert result.status == 2 and said in one_line(result.errors)
    assert result.output == "" and not list(empty_folder.path.iterdir())


def made_cells(stopping, figures, seed=0):
    """Rows of one cell from (flood level, val accuracy, val loss, test accuracy, clean)."""
    names = ("flood_level", "val_accuracy_noisy", "val_loss_noisy")
    rows = pd.DataFrame(figures, columns=[*names, "test_accuracy_noisy", "test_accuracy_clean"])
    setting = {"dataset": "spiral", "label_noise": 0.05, "spiral_noise": 0.0, "test_samples": 100}
    return rows.assign(**setting, stopping=stopping, seed=seed)


def test_choice_is_by_accuracy_then_loss_then_the_lower_level():
    rows = made_cells("early", [(0, 0.8, 1, 0, 0), (0.1, 0.9, 0.3, 0, 0), (0.2, 0.9, 0.2, 0, 0)])
    assert choose_flood_levels(rows, "noisy").flood_level.item() == 0.2
    rows.val_loss_noisy = 0.5
    assert choose_flood_levels(rows[::-1], "noisy").flood_level.item() == 0.1
    rows.val_accuracy_noisy = 0.9
    assert choose_flood_levels(rows[::-1], "noisy").flood_level.item() == 0
    clean = rows.assign(val_accuracy_clean=[0.8, 0.7, 0.8], val_loss_clean=[0.2, 0.0, 0.1])
    assert choose_flood_levels(clean, "clean").flood_level.item() == 0.2
    two = pd.concat([rows, rows.assign(seed=1, val_accuracy_noisy=[0.1, 0.2, 0.3])])
    assert list(choose_flood_levels(two, "noisy", ["seed"]).sort_values("seed").flood_level) == [
        0,
        0.2,
    ]


def table_of(without, flooded):
    """A table whose trials have these test accuracies without and with flooding."""
    cells = [
        made_cells("last epoch", [(0, 0.5, 1, a, 1.0), (0.25, 0.6, 1, b, 0.5)], seed)
        for seed, (a, b) in enumerate(zip(without, flooded))
    ]
    return compare(pd.concat(cells))


def test_the_table_of_known_figures():
    # Differences 0.10, 0.11, 0.12: t = 0.11 / (0.01 / sqrt(3)) = 19, p = 0.0027.
    table = table_of([0.80, 0.80, 0.80], [0.90, 0.91, 0.92])
    noisy, clean = table.to_dict("records")
    assert noisy["p_value"] == pytest.approx(0.00274, abs=1e-5)
    assert noisy["p_adjusted"] == noisy["p_value"]  # of one row
    assert (noisy["labels"], noisy["trials"], noisy["flood_level_mean"]) == ("noisy", 3, 0.25)
    assert noisy["with_flooding_std"] == pytest.approx(0.01)
    assert (noisy["best_possible"], clean["best_possible"]) == (0.95, 1.0)
    assert clean["p_value"] == 0  # every trial loses the same
    lines = markdown(table).splitlines()
    assert "| spiral | 5% | 95.0 | 80.0 (0.0) | **91.0 (1.0)** | 0.25 (0.00) |" in lines
    assert "| spiral | 5% | 100.0 | **100.0 (0.0)** | 50.0 (0.0) | 0.25 (0.00) |" in lines
    assert "**" not in markdown(table_of([0.80, 0.90, 0.80], [0.82, 0.83, 0.84])).split("Clean")[0]


def test_p_values_without_a_spread():
    assert math.isnan(table_of([0.8], [0.9]).p_value[0])
    assert table_of([0.8, 0.9], [0.8, 0.9]).p_value[0] == 1
    assert "80.0 (-)" in markdown(table_of([0.8], [0.9]))


def test_adjusted_p_values():
    """Benjamini and Hochberg by hand, over the rows of one kind of labels."""
    spread = [0.0, 0.01, 0.02, 0.05]
    tables = []
    for k, gain in enumerate((0.01, 0.03, 0.06)):
        cells = pd.concat(
            made_cells("early", [(0, 0.5, 1, 0.8, 1), (0.2, 0.6, 1, 0.8 + gain + s, 1)], seed)
            for seed, s in enumerate(spread)
        )
        tables.append(cells.assign(label_noise=(k + 1) / 100))
    table = compare(pd.concat(tables)).query("labels == 'noisy'")
    p = np.sort(table.p_value)[::-1]
    expected = np.minimum.accumulate(p * 3 / np.array([3, 2, 1]))
    np.testing.assert_allclose(np.sort(table.p_adjusted)[::-1], expected)
