"""The synthetic table: small ones, killed, resumed, moved, put together from files, refused."""

from __future__ import annotations

import itertools
import math
import shutil
import signal
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Folder, finish, one_line, wait_until
from matplotlib.contour import ContourSet

import datasets
import plot
import run_table_synth
from datasets import DataSettings, make_dataset
from models import MLP
from results import ORIGIN, compare, markdown
from run_demo_synth import DemoSettings, conclude, train_trial
from run_table_synth import TableSettings, train_cell
from settings import ModelSettings, TrainSettings, parse_flags
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
PRINTED = ("table_synth.md", "table_synth.csv", "table_synth.png")
FILES = (*PRINTED, CELLS_FILE)


def read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, engine="pyarrow")


def cell_runs(folder: Folder) -> list[mlflow.entities.Run]:
    return [run for run in folder.runs("flooding-table") if "dataset" in run.data.params]


def trained(folder: Folder) -> int:
    """How many cells the folder's file has."""
    path = folder.path / CELLS_FILE
    return len(read(path)[["dataset", "seed"]].drop_duplicates()) if path.exists() else 0


def assert_same_files(folder: Folder, whole: Folder, names: tuple[str, ...] = FILES) -> None:
    for name in names:
        assert (folder.path / name).read_bytes() == (whole.path / name).read_bytes(), name


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(run_table_synth, "train_with_early_stopping", None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, empty_store):
    """A folder with a table made in one go."""
    folder = Folder(tmp_path_factory.mktemp("whole"))
    shutil.copy(empty_store, folder.path / "mlflow.db")
    result = folder.run(SCRIPT, *SMALL)
    assert result.status == 0 and result.errors == "", result.errors
    assert "8 cells of 3 flood levels, 0 trained before" in result.output
    assert (folder.path / "table_synth.md").read_text() in result.output
    assert "viewStateShareKey=" in result.output.splitlines()[-1]
    left = {path.name for path in folder.path.iterdir()} - {"mlflow.db", "mlruns"}
    assert left == {*FILES, "table_synth.lock"}
    return folder


def test_defaults_are_the_papers(monkeypatch, empty_folder):
    """Protocol section 4."""
    monkeypatch.chdir(empty_folder.path)
    monkeypatch.setattr("sys.argv", [SCRIPT])
    table = parse_flags(TableSettings, "")
    expected = {
        **{"dataset": ("gaussian", "sinusoid2d", "spiral"), "label_noise": (0.01, 0.05, 0.1)},
        **{"trials": 10, "flood_max": 0.5, "flood_step": 0.01, "quick": False, "cells": ()},
        **{"train_samples": None, "val_samples": None, "test_samples": None, "spiral_noise": 0.0},
        **{"hidden_layers": 5, "hidden_units": 500, "batch_norm": False, "flood_on": "batch"},
        **{"optimizer": "adam", "learning_rate": 0.001, "momentum": 0.0, "weight_decay": 0.0},
        **{"batch_size": 100, "epochs": 500, "seed": 0, "device": "auto", "ray": None},
        "output_dir": Path("."),
    }
    assert asdict(table) == expected
    assert table.flood_levels() == [round(k / 100, 2) for k in range(51)]
    grid = table.grid()
    assert len(set(grid)) == 90 and [cell.seed for cell in grid[::9]] == [*range(10)]
    monkeypatch.setattr("sys.argv", [SCRIPT, "--quick"])
    quick = parse_flags(TableSettings, "")
    assert asdict(quick) == {**expected, "quick": True, "trials": 2, "flood_step": 0.1}
    assert quick.flood_levels() == [0, 0.1, 0.2, 0.3, 0.4, 0.5]
    assert TableSettings(flood_step=0.03).flood_levels()[-2:] == [0.45, 0.48]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--trials", 0], "--trials 0: at least 1"),
        (["--flood-max", -1], "--flood-max -1.0: a number of nats in (0, 100)"),
        (["--flood-step", "nan"], "--flood-step nan: from 0.0001 to --flood-max"),
        (["--flood-step", 0.6], "--flood-step 0.6: from 0.0001 to --flood-max"),
        (["--label-noise", 0.1, 1.5], "--label-noise 1.5: a fraction in [0, 1)"),
        (["--batch-norm", "--batch-size", 199], "--batch-size 199: with batch norm every"),
        (["--dataset"], "--dataset"),
        (["--label-noise"], "--label-noise"),
        (["--dataset", "moons"], None),
        (["--epochs", "many"], None),
    ],
)
def test_bad_flags(empty_folder, flags, said):
    result = empty_folder.run(SCRIPT, *flags)
    assert result.status == 2 and result.output == "" and "Traceback" not in result.errors
    if said:
        assert f"error: {said}" in one_line(result.errors)
    else:  # tyro's box
        assert all(flag in result.errors for flag in flags)
    assert not list(empty_folder.path.iterdir())


def test_runs_in_mlflow(whole):
    runs = cell_runs(whole)
    cells = read(whole.path / CELLS_FILE)
    assert len(runs) == CELLS and {run.data.params["seed"] for run in runs} == set("5678")
    times = sorted((run.info.start_time, run.info.end_time) for run in runs)
    assert all(start < end for start, end in times)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(times))
    for run in runs:
        params = run.data.params
        assert run.info.status == "FINISHED"
        rows = cells[(cells.dataset == params["dataset"]) & (cells.seed == int(params["seed"]))]
        constant = {name: str(value) for name, value in rows.loc[:, :"version"].iloc[0].items()}
        assert params == {**constant, "setting": f"{params['dataset']}, noise 0.1"}
        assert (run.data.tags["torch"], run.data.tags["device"]) == (torch.__version__, "cpu")
        for stopping in ("last epoch", "early"):
            for name in ("test_accuracy_noisy", "val_loss_clean", "epoch"):
                curve = whole.curve(run, f"{stopping.replace(' ', '_')}/{name}")
                assert curve == dict(enumerate(rows[rows.stopping == stopping][name]))
        contexts = [entry.tags[0].value for entry in run.inputs.dataset_inputs]
        assert contexts == ["train", "validation", "test"]
    [table] = [run for run in whole.runs("flooding-table") if "dataset" not in run.data.params]
    assert table.info.run_name == "table of 8 cells" and table.info.status == "FINISHED"
    assert table.info.start_time <= times[0][0] and table.info.end_time >= times[-1][1]
    assert {run.data.tags["table"] for run in runs} == {table.data.tags["table"]}
    for name in FILES:
        kept = whole.client.download_artifacts(table.info.run_id, name)
        assert Path(kept).read_bytes() == (whole.path / name).read_bytes()


def test_a_cell_is_a_training_with_early_stopping(whole):
    cells = read(whole.path / CELLS_FILE)
    cell = cells[(cells.seed == 6) & (cells.dataset == "gaussian")].reset_index(drop=True)
    sizes = {"train_samples": 40, "val_samples": 30, "test_samples": 200}
    data = make_dataset(DataSettings(dataset="gaussian", label_noise=0.1, **sizes), seed=6)
    generator = torch.Generator().manual_seed(6)
    network = MLP(10, ModelSettings(hidden_layers=2, hidden_units=16, batch_norm=False), generator)
    settings = TrainSettings(optimizer="adam", learning_rate=0.003, batch_size=16, epochs=30)
    device = torch.device("cpu")
    expected = train_with_early_stopping(network, data, LEVELS, settings, device, generator)
    pd.testing.assert_frame_equal(cell[expected.columns], expected, check_exact=True)


def test_a_finished_table_is_drawn_again_without_training(whole, empty_folder, no_training):
    """And without the store that it was logged to."""
    shutil.copy(whole.path / CELLS_FILE, empty_folder.path)
    result = empty_folder.run(SCRIPT, *SMALL)
    assert result.status == 0 and "8 trained before" in result.output, result.errors
    assert_same_files(empty_folder, whole)
    [table] = empty_folder.runs("flooding-table")
    assert table.info.run_name == "table of 8 cells"


def test_a_moved_folder_goes_on(whole, folder, empty_store):
    old, new = folder.path / "old", Folder(folder.path / "new")
    old.mkdir()
    shutil.copy(empty_store, old / "mlflow.db")
    assert Folder(old).run(SCRIPT, *SMALL, "--trials", 3).status == 0
    shutil.move(old, new.path)
    result = new.run(SCRIPT, *SMALL)
    assert result.status == 0 and result.errors == "", result.errors
    assert "8 cells of 3 flood levels, 6 trained before" in result.output
    assert len(cell_runs(new)) == CELLS
    assert_same_files(new, whole)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_ended_and_resumed_equals_uninterrupted(whole, folder, number):
    """And another job in the same folder, while the first is at it, does nothing."""
    first = folder.spawn(SCRIPT, *SMALL)
    wait_until(lambda: trained(folder) >= 2)
    second = folder.run(SCRIPT, *SMALL)
    assert second.status == 2 and second.output == ""
    assert one_line(second.errors).endswith("--output-dir .: another table is made there")
    first.send_signal(number)
    result = finish(first)
    before, runs = trained(folder), cell_runs(folder)
    assert 2 <= before < CELLS and len(runs) in (before, before - 1)
    assert not (folder.path / "table_synth.md").exists()
    if number == signal.SIGTERM:
        assert result.status == 128 + signal.SIGTERM
        assert result.errors == "\nstopped by SIGTERM\n"
        assert {run.info.status for run in runs} == {"FINISHED"}

    resumed = folder.run(SCRIPT, *SMALL)
    assert resumed.status == 0 and resumed.errors == "", resumed.errors
    assert f"8 cells of 3 flood levels, {before} trained before" in resumed.output
    assert len(cell_runs(folder)) == len(runs) + CELLS - before
    assert_same_files(folder, whole)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--epochs", 31], "epochs is 30, and 31 is asked for"),
        (["--flood-step", 0.2], "has other flood levels: dataset gaussian"),
        (["--flood-on", "example"], "flood_on is batch, and example is asked for"),
        ([], "version is 1, and 2 is asked for"),
    ],
)
def test_other_settings_are_refused(whole, folder, no_training, monkeypatch, flags, said):
    before = (whole.path / CELLS_FILE).read_bytes()
    (folder.path / CELLS_FILE).write_bytes(before)
    if not flags:
        monkeypatch.setattr("settings.FIGURES_VERSION", 2)
    result = folder.run(SCRIPT, *SMALL, *flags)
    assert result.status == 2 and result.output == ""
    assert f"error: {CELLS_FILE}: " in one_line(result.errors) and said in result.errors
    assert (folder.path / CELLS_FILE).read_bytes() == before and not cell_runs(folder)
    assert not any((folder.path / name).exists() for name in PRINTED)


def test_other_cells_are_added_and_none_is_lost(whole, folder):
    shutil.copy(whole.path / CELLS_FILE, folder.path)
    other = ("--dataset", "spiral", "--label-noise", 0, 0.2, "--trials", 1, "--test-samples", 100)
    result = folder.run(SCRIPT, *SMALL, *other)
    assert result.status == 0 and "2 cells of 3 flood levels, 0 trained" in result.output
    assert "| spiral | 20% |" in result.output and "gaussian" not in result.output
    assert not any("gaussian" in (folder.path / name).read_text() for name in PRINTED[:2])
    lines, before = ((one.path / CELLS_FILE).read_text().splitlines() for one in (folder, whole))
    assert [line for line in lines if not line.startswith("spiral")] == before
    assert len(lines) == len(before) + 2 * 2 * len(LEVELS)
    assert "8 trained before" in folder.run(SCRIPT, *SMALL).output
    assert_same_files(folder, whole, PRINTED)


def test_cells_from_files(whole, folder):
    """Those of two machines that share a trial, one of an earlier version; the rest is trained."""
    cells = read(whole.path / CELLS_FILE)
    earlier = cells[cells.seed < 7].drop(columns=[*ORIGIN, "flood_on"])
    earlier.to_csv(folder.path / "one.csv", index=False)
    overlap = cells[(cells.seed == 6) | (cells.seed == 7)].assign(torch="another")
    unasked = cells[cells.seed == 8].assign(seed=99)
    pd.concat([overlap, unasked]).to_csv(folder.path / "other.csv", index=False)
    result = folder.run(SCRIPT, *SMALL, "--cells", "one.csv", "other.csv")
    assert result.status == 0 and result.errors == "", result.errors
    assert "8 cells of 3 flood levels, 6 trained before" in result.output
    together = read(folder.path / CELLS_FILE)
    asked = together[together.seed != 99]
    figures = [name for name in cells if name not in ORIGIN]
    assert asked[figures].equals(cells[figures]) and len(together) == len(cells) + 12
    origin = asked.fillna("-").groupby("seed").torch.unique().explode()
    assert origin.to_dict() == {5: "-", 6: "-", 7: "another", 8: torch.__version__}
    assert {run.data.params["seed"] for run in cell_runs(folder)} == {"8"}
    assert_same_files(folder, whole, PRINTED)


def spoiled(cells):
    """Files that cannot be used, with what is said of them."""
    worse = cells[cells.seed == 5].assign(test_loss_noisy=9.0)
    yield cells.drop(columns="val_loss_noisy"), "has no column val_loss_noisy"
    yield cells.assign(version=2), "version is 2, and 1 is asked for"
    yield cells.iloc[:-1], "cut short or has other flood levels: dataset sinusoid2d, label"
    yield cells.replace({"flood_level": {0.3: 0.31}}), "has other flood levels: dataset gaussian"
    yield cells.assign(test_loss_noisy=math.nan), "is cut short, figures are missing"
    yield cells.iloc[:0], "is cut short, figures are missing"
    yield worse, "a cell is there twice, with other figures: dataset gaussian"


def test_files_of_cells_that_do_not_fit(whole, folder, no_training):
    cells = read(whole.path / CELLS_FILE)
    shutil.copy(whole.path / CELLS_FILE, folder.path)
    path = folder.path / "spoiled.csv"
    for text, said in (
        *((frame.to_csv(index=False), said) for frame, said in spoiled(cells)),
        (cells.to_csv(index=False)[:-400], "spoiled.csv: "),
        (None, "cannot be read"),
    ):
        path.unlink() if text is None else path.write_text(text)
        result = folder.run(SCRIPT, *SMALL, "--cells", path.name)
        assert result.status == 2 and "spoiled.csv" in result.errors
        assert said in one_line(result.errors)
    assert not cell_runs(folder) and not (folder.path / "table_synth.md").exists()
    assert (folder.path / CELLS_FILE).read_bytes() == (whole.path / CELLS_FILE).read_bytes()


def test_a_store_that_fails_costs_no_figure(whole, folder, monkeypatch):
    """It takes two runs, and of others no more than the beginning, which does not stay."""
    monkeypatch.setattr("tracking.PATIENCE_SECONDS", 0)
    log_batch, calls = mlflow.MlflowClient.log_batch, itertools.count()

    def failing(*arguments, **options):
        if next(calls) >= 4:  # two for each run
            raise ConnectionRefusedError(111, "Connection refused")
        return log_batch(*arguments, **options)

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", failing)
    result = folder.run(SCRIPT, *SMALL)
    assert result.status == 1 and "Saved: " in result.output
    assert one_line(result.errors).endswith(": 7 runs are missing there: Connection refused")
    assert [run.info.status for run in folder.runs("flooding-table")] == ["FINISHED"] * 2
    assert_same_files(folder, whole)


def test_a_divergence_keeps_the_finished_cells(whole, folder, monkeypatch):
    """Also one of the weights in the last step of all, which no mini-batch sees."""
    trainings = itertools.count()
    worse = {"optimizer": "sgd", "learning_rate": 1e30, "batch_size": 40, "epochs": 1}

    def train(network, data, levels, settings, *rest):
        settings = replace(settings, **worse) if next(trainings) == 2 else settings
        return train_with_early_stopping(network, data, levels, settings, *rest)

    monkeypatch.setattr(run_table_synth, "train_with_early_stopping", train)
    result = folder.run(SCRIPT, *SMALL)
    assert result.status == 1
    line = one_line(result.errors)
    assert line.startswith("run_table_synth.py: error: flood level 0: val_loss_noisy is")
    assert line.endswith("in epoch 1, with learning rate 1e+30")
    assert [run.info.status for run in folder.runs("flooding-table")] == ["FINISHED"] * 2
    lines = (folder.path / CELLS_FILE).read_text().splitlines()
    assert lines == (whole.path / CELLS_FILE).read_text().splitlines()[: len(lines)]
    assert trained(folder) == 2 and not (folder.path / "table_synth.md").exists()


def half_circles(samples, _spiral_noise, generator):
    labels, angle = np.arange(samples) % 2, np.pi * generator.random(samples)
    upper = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return np.where(labels[:, None] == 1, [1, 0.5] - upper, upper), labels


def test_a_data_set_is_said_in_one_place(monkeypatch):
    """One more entry is all that a new one needs, and no other's formula is used for it."""
    monkeypatch.setitem(datasets.DATASETS, "moons", datasets.Source((40, 30, 200), half_circles))
    shape = {"hidden_layers": 1, "hidden_units": 8, "epochs": 2}
    table = TableSettings(dataset=("moons",), label_noise=(0.1,), trials=2, flood_step=0.5, **shape)
    split = make_dataset(table.grid()[0], seed=0).test
    upper = split.inputs[split.clean_labels == 0]
    np.testing.assert_allclose(np.hypot(*upper.T), 1, rtol=1e-6)
    result = compare(pd.concat(train_cell(table, cell)[1] for cell in table.grid()))
    assert result.best_possible.isna().all()
    assert markdown(result).count("| moons | 10% | unknown |") == 2
    demo = DemoSettings(dataset="moons", flood_levels=(0.0, 0.5), **shape)
    silent = SimpleNamespace(update=lambda: None)
    outcome = conclude(demo, [train_trial(demo, 0, torch.device("cpu"), silent)])
    pictures = plot.draw_demo(outcome.history, asdict(demo), outcome.boundary)
    figure = pictures["synth_boundary.png"]
    assert "true boundary" not in [text.get_text() for text in figure.legends[0].get_texts()]
    for axes in figure.axes:  # the network's boundary alone
        assert sum(isinstance(shown, ContourSet) for shown in axes.collections) == 1
