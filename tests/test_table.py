"""The synthetic table: small ones from the command line, killed, resumed and side by side."""

from __future__ import annotations

import csv
import shutil
import sys
import time

import numpy as np
import pytest
import torch
from conftest import Folder, families
from test_train import plain_loop, plain_scores

from datasets import DataSettings, make_dataset
from models import MLP, ModelSettings
from run_table_synth import Row, markdown_table, mean_and_deviation, table_rows
from train import LEVEL_SCORES, LevelScores, TrainSettings

SCRIPT = "run_table_synth.py"
SMALL = (
    *("--dataset", "gaussian", "sinusoid2d", "--label-noise", 0.1, "--trials", 4, "--seed", 5),
    *("--flood-max", 0.6, "--flood-step", 0.3, "--epochs", 30, "--batch-size", 16),
    *("--train-samples", 40, "--val-samples", 30, "--test-samples", 200),
    *("--hidden-layers", 2, "--hidden-units", 16, "--learning-rate", 0.003),
)
CELLS = 8
FILES = ("table_synth.md", "table_synth.csv", "table_synth.png")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # as torchrun sets it


def finished_cells(folder):
    runs = folder.runs("flooding-table")
    return [r for r in runs if "cell_key" in r.data.tags and r.info.status == "FINISHED"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, empty_store):
    """A folder with a table made in one go, in one process."""
    folder = Folder(tmp_path_factory.mktemp("whole"))
    shutil.copy(empty_store, folder.path / "mlflow.db")
    result = folder.run(SCRIPT, *SMALL, **ONE_THREAD)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert "8 cells of 3 flood levels, 0 of them trained before" in result.stdout
    assert (folder.path / "table_synth.md").read_text() in result.stdout
    return folder


def test_runs_in_mlflow(whole):
    [(table, cells)] = families(whole.runs("flooding-table"))
    assert table.info.status == "FINISHED" and len(cells) == CELLS
    artifacts = {file.path for file in whole.client.list_artifacts(table.info.run_id)}
    assert artifacts == set(FILES)
    for cell in cells:
        assert cell.info.status == "FINISHED"
        assert cell.data.params["flood_step"] == "0.3" and cell.data.params["epochs"] == "30"
        for side in "AB":
            assert cell.data.metrics[f"{side}_chosen_flood_level"] in (0, 0.3, 0.6)
            assert 0 < cell.data.metrics[f"{side}_test_accuracy_with_flooding"] <= 1
    assert {cell.data.params["seed"] for cell in cells} == {"5", "6", "7", "8"}


def test_a_cell_equals_a_loop_over_single_models(whole):
    cell = next(
        run
        for run in finished_cells(whole)
        if run.data.params["seed"] == "6" and run.data.params["dataset"] == "gaussian"
    )
    path = whole.client.download_artifacts(cell.info.run_id, "levels.csv")
    with open(path, newline="") as file:
        levels = list(csv.DictReader(file))
    assert [float(row["flood_level"]) for row in levels] == [0, 0.3, 0.6]

    sizes = {"train_samples": 40, "val_samples": 30, "test_samples": 200}
    data = make_dataset(DataSettings("gaussian", 0.1, **sizes), seed=6)
    generator = torch.Generator().manual_seed(6)
    network = MLP(10, ModelSettings(2, 16, batch_norm=False), generator=generator)
    start = generator.get_state()
    settings = TrainSettings("adam", 0.003, batch_size=16, epochs=30)
    for row in levels:
        generator.set_state(start)
        best_accuracy = -1.0
        loop = plain_loop(network, data.train, float(row["flood_level"]), settings, generator)
        for epoch, (model, _) in enumerate(loop, start=1):
            accuracy = plain_scores(model, data.val)[1]
            if accuracy > best_accuracy:
                best_accuracy, best_epoch = accuracy, epoch
                best = plain_scores(model, data.val) + plain_scores(model, data.test)
        last = plain_scores(model, data.val) + plain_scores(model, data.test)
        assert int(row["A_epoch"]) == 30 and int(row["B_epoch"]) == best_epoch
        for side, expected in (("A", last), ("B", best)):
            found = [float(row[f"{side}_{name}"]) for name in LEVEL_SCORES]
            np.testing.assert_allclose(found, expected, atol=1e-3)


def test_killed_and_resumed_equals_uninterrupted(whole, ready_folder):
    killed = ready_folder.start(ready_folder.command(SCRIPT, *SMALL), **ONE_THREAD)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len(finished_cells(ready_folder)) < 2:
        time.sleep(0.05)
    killed.kill()
    killed.communicate()
    before = {run.info.run_id for run in finished_cells(ready_folder)}
    assert 2 <= len(before) < CELLS

    resumed = ready_folder.run(SCRIPT, *SMALL, **ONE_THREAD)
    assert resumed.returncode == 0 and resumed.stderr == "", resumed.stderr
    assert f"8 cells of 3 flood levels, {len(before)} of them trained" in resumed.stdout
    runs = ready_folder.runs("flooding-table")
    assert not [run for run in runs if run.info.status == "RUNNING"]
    assert sum("table_key" in run.data.tags for run in runs) == 1
    after = {run.info.run_id for run in finished_cells(ready_folder)}
    assert before < after and len(after) == CELLS
    for name in FILES:
        assert (ready_folder.path / name).read_bytes() == (whole.path / name).read_bytes()


def test_four_processes_equal_one_and_lose_nothing(whole, ready_folder):
    command = ready_folder.command(SCRIPT, *SMALL)[1:]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "4",
    ]
    [result] = ready_folder.run_all([*torchrun, *command], **ONE_THREAD)
    assert result.returncode == 0, result.stderr
    assert "side by side: 4" in result.stdout and result.stdout.count("Saved:") == 1
    [(table, cells)] = families(ready_folder.runs("flooding-table"))
    [(_, expected)] = families(whole.runs("flooding-table"))
    assert table.info.status == "FINISHED" and len(cells) == CELLS

    def logged(runs):
        return sorted((sorted(r.data.params.items()), sorted(r.data.metrics.items())) for r in runs)

    assert logged(cells) == logged(expected)
    for name in FILES:
        assert (ready_folder.path / name).read_bytes() == (whole.path / name).read_bytes()


def test_a_failing_rank_fails_the_job_with_its_own_error(ready_folder):
    diverging = ready_folder.command(
        *(SCRIPT, *SMALL, "--optimizer", "sgd", "--learning-rate", 1e30)
    )
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    [result] = ready_folder.run_all([*torchrun, *diverging[1:]], **ONE_THREAD)
    assert result.returncode == 1
    assert "run_table_synth.py: error: model 0 (flood level 0)" in result.stderr
    statuses = {run.info.status for run in ready_folder.runs("flooding-table")}
    assert "FAILED" in statuses and statuses <= {"FAILED", "KILLED"}
    assert not list(ready_folder.path.glob("table_synth*"))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--trials", 0], "--trials 0"),
        (["--flood-max", -1], "--flood-max -1.0"),
        (["--flood-step", 0], "--flood-step 0.0"),
        (["--flood-step", "nan"], "--flood-step nan"),
        (["--label-noise", 0.1, 1.5], "--label-noise 1.5"),
        (["--dataset", "gaussian", "moons"], "--dataset: invalid choice: 'moons'"),
    ],
)
def test_bad_flags(folder, flags, said):
    result = folder.run(SCRIPT, *flags)
    assert result.returncode == 2
    [line] = result.stderr.splitlines()
    assert said in line
    assert result.stdout == "" and not list(folder.path.iterdir())


def level_scores(val_accuracy, val_loss, test_accuracy, test_accuracy_clean):
    scores = {name: np.zeros(3) for name in LEVEL_SCORES}
    scores["val_accuracy"] = np.array(val_accuracy)
    scores["val_loss"] = np.array(val_loss)
    scores["test_accuracy"] = np.array(test_accuracy)
    scores["test_accuracy_clean"] = np.array(test_accuracy_clean)
    return LevelScores(np.array([0.0, 0.1, 0.2]), np.full(3, 9), scores)


def test_rows_choose_by_noisy_validation_accuracy_then_loss():
    first = level_scores([0.8, 0.9, 0.9], [1, 0.3, 0.2], [0.5, 0.6, 0.7], [0.1, 0.2, 0.3])
    second = level_scores([0.9, 0.9, 0.8], [0.5, 0.5, 0.1], [0.4, 0.6, 0.7], [0.2, 0.2, 0.3])
    rows = table_rows({("gaussian", 0.05): [(first, second), (second, first)]})
    assert [(row.labels, row.stopping) for row in rows] == [
        ("noisy", "A"),
        ("noisy", "B"),
        ("clean", "A"),
        ("clean", "B"),
    ]
    np.testing.assert_array_equal(rows[0].flood_levels, [0.2, 0.0])
    np.testing.assert_array_equal(rows[0].without_flooding, [0.5, 0.4])
    np.testing.assert_array_equal(rows[0].with_flooding, [0.7, 0.4])
    np.testing.assert_array_equal(rows[3].with_flooding, [0.2, 0.3])


def row(stopping, without, flooded):
    levels = np.full(len(without), 0.25)
    return Row("spiral", 0.05, stopping, "noisy", np.array(without), np.array(flooded), levels)


def test_the_tables_formatting():
    # Differences 0.10, 0.11, 0.12: t = 0.11 / (0.01 / sqrt(3)) = 19, p = 0.0027.
    better = row("A", [0.80, 0.80, 0.80], [0.90, 0.91, 0.92])
    worse = row("B", [0.90, 0.91, 0.92], [0.80, 0.80, 0.80])
    unclear = row("B", [0.80, 0.90, 0.80], [0.82, 0.83, 0.84])
    assert better.p_value == pytest.approx(0.00274, abs=1e-5)
    assert markdown_table([better, worse], "noisy").splitlines()[2] == (
        "| spiral | 5% | 80.0 (0.0) | **91.0 (1.0)** | 0.25 (0.00) "
        "| **91.0 (1.0)** | 80.0 (0.0) | 0.25 (0.00) |"
    )
    assert "**" not in markdown_table([unclear, unclear], "noisy")
    assert markdown_table([better, worse], "clean").count("\n") == 2
    assert row("A", [0.8], [0.9]).p_value == 1.0
    assert mean_and_deviation(np.array([0.8]), 2) == "0.80 (-)"
    assert mean_and_deviation(np.array([0.8, 1.0]), 2) == "0.90 (0.14)"
