"""The synthetic table: small ones, stopped, resumed, put together from files, refused."""

import os
import shutil
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Folder, one_line, parse

import run_table_synth
from datasets import Data, make_dataset
from models import MLP
from results import COLUMNS, FIGURES, MODEL, ORIGIN, read_csv
from run_table_synth import FILES, Table, start_generator
from settings import Model, Training, flat
from train import score_last_and_best

SCRIPT = "run_table_synth.py"
SMALL = (
    *("--dataset", "gaussian", "sinusoid2d", "--label-noise", 0.1, "--trials", 3, "--seed", 5),
    *("--flood-max", 0.6, "--flood-step", 0.3, "--epochs", 12, "--batch-size", 16),
    *("--train-samples", 40, "--val-samples", 30, "--test-samples", 200, "--no-batch-norm"),
    *("--hidden-layers", 2, "--hidden-units", 16, "--learning-rate", 0.003),
)
TRIALS_FILE, STARTS_FILE = FILES["levels"], FILES["starts"]
PRINTED = ("table_synth.md", "table_synth.csv", "table_synth.png")
TRAINING = Training(optimizer="adam", learning_rate=0.003, batch_size=16, epochs=12)


def trained(folder: Folder) -> int:
    """How many trials the folder's file has."""
    path = folder.path / TRIALS_FILE
    return len(read_csv(path)[["dataset", "seed"]].drop_duplicates()) if path.exists() else 0


def assert_same_files(one: Folder, other: Folder, names: Sequence[str] = PRINTED) -> None:
    for name in names:
        assert (one.path / name).read_bytes() == (other.path / name).read_bytes(), name


@pytest.fixture(scope="module")
def whole(make_folder) -> Folder:
    """A folder with a table made in one go."""
    folder = make_folder()
    output = folder.succeed(SCRIPT, *SMALL)
    assert "6 trials of 3 levels, 0 trained before" in output
    assert (folder.path / "table_synth.md").read_text() in output
    return folder


def test_defaults_are_the_papers_with_the_nearest_network():
    """Protocol section 4, and what the rule of RESULTS.md has chosen; another is a flag away."""
    table = parse(Table)
    training = Training(optimizer="adam", learning_rate=0.001, batch_size=200, epochs=500)
    assert (table.training, table.model) == (training.filled(), Model(hidden_layers=5))
    assert flat(Model()) == {"hidden_layers": 4, "hidden_units": 500, "batch_norm": True}
    assert table.list_models("levels") == [(0, round(k / 100, 2)) for k in range(51)]
    assert table.list_models("starts") == [(k, 0.0) for k in range(51)]
    assert [trial.seed for trial in table.list_trials()[::9]] == [*range(10)]
    sizes = {"train_samples": 200, "val_samples": 200, "test_samples": 20_000}
    assert table.list_settings() == [
        Data(dataset=name, label_noise=p, **sizes)
        for name in ("gaussian", "sinusoid2d", "spiral")
        for p in (0.01, 0.05, 0.1)
    ]
    for highest, levels in ((0.35, [0, 0.1, 0.2, 0.3]), (0.3, [0, 0.1, 0.2, 0.3])):
        coarse = parse(Table, "--flood-step", 0.1, "--flood-max", highest)
        assert [b for _, b in coarse.list_models("levels")] == levels
    parse(Table, "--batch-size", 199, "--no-batch-norm")  # there one example may be alone
    candidate = parse(Table, "--dataset", "gaussian", "--val-samples", 50)
    assert {(x.train_samples, x.val_samples) for x in candidate.list_settings()} == {(200, 50)}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--flood-max", -1], "--flood-max -1.0: a number of nats in (0, 100)"),
        (["--flood-max", 0.005], "--flood-step 0.01: from 0.0001 to --flood-max 0.005"),
        (["--label-noise", 0.1, 1.5], "--label-noise 1.5: a fraction in [0, 1)"),
        (["--label-noise"], "--label-noise (): at least one"),
        (["--dataset", "gaussian", "--spiral-noise", 1], "--spiral-noise 1.0: only with"),
        (["--batch-size", 199], "--batch-size 199: with batch norm every"),
        (["--output-dir", "/dev/null/x"], "--output-dir /dev/null/x: a folder that can be written"),
    ],
)
def test_bad_flags(empty_folder, flags, said):
    assert empty_folder.refuse(SCRIPT, *flags).startswith(said)
    assert not list(empty_folder.path.iterdir())


def test_raw_figures_are_of_a_training_that_scores_last_and_best(whole, monkeypatch):
    table, shares = parse(Table, *SMALL), []
    monkeypatch.setattr("train.MODELS_AT_ONCE", {"cpu": 2})
    _, rows, _ = run_table_synth.train_trial(table, table.list_trials()[0], shares.append)
    assert [*rows.scored_epoch] == ["last"] * 3 + ["best"] * 3
    assert [*rows.flood_level] == [0, 0.3, 0.6] * 2
    assert sum(shares) == pytest.approx(1) and len(shares) == 2 * 12
    raw = read_csv(whole.path / TRIALS_FILE)
    assert list(raw) == COLUMNS
    rows = raw[(raw.seed == 6) & (raw.dataset == "gaussian")].reset_index(drop=True)
    sizes = {"train_samples": 40, "val_samples": 30, "test_samples": 200}
    data = make_dataset(Data(dataset="gaussian", label_noise=0.1, **sizes), seed=6)
    generator, models = torch.Generator().manual_seed(6), pd.DataFrame({"start": [0, 0, 0]})
    network = MLP(10, Model(hidden_layers=2, hidden_units=16, batch_norm=False), [generator])
    models, network = models.assign(flood_level=[0, 0.3, 0.6]), network.select([0] * 3)
    expected = score_last_and_best(network, data, models, TRAINING, generator)
    figures = [*MODEL, *FIGURES]
    pd.testing.assert_frame_equal(rows[figures], expected[figures], check_exact=True)
    assert (rows.version == 2).all() and (rows.device == "cpu").all()
    [parent] = whole.parents("flooding-table")
    assert set(rows.commit.fillna("")) == {parent.data.tags.get("mlflow.source.git.commit", "")}
    children = {run.info.run_name: run for run in whole.children(parent)}
    assert [run.info.status for run in children.values()] == ["FINISHED"] * 6
    best = rows[(rows.scored_epoch == "best") & (rows.flood_level == 0)]
    logged = children["gaussian, label noise 0.1, seed 6"].data.metrics["best/without_flooding"]
    assert logged == best.test_accuracy_noisy.item()
    kept = whole.client.download_artifacts(parent.info.run_id, TRIALS_FILE)
    assert Path(kept).read_bytes() == (whole.path / TRIALS_FILE).read_bytes()


def test_the_fair_search_has_a_file_and_a_column_of_its_own(whole, folder):
    """Start 0 is the trial's level 0; the others are level 0 from weights of their own."""
    shutil.copy(whole.path / TRIALS_FILE, folder.path)
    output = folder.succeed(SCRIPT, *SMALL, "--trials", 2, "--search", "starts")
    assert "4 trials of 3 starts, 0 trained before" in output
    assert "| best of 3 starts | fair gain |" in output
    assert_same_files(folder, whole, [TRIALS_FILE])
    levels, starts = read_csv(folder.path / TRIALS_FILE), read_csv(folder.path / STARTS_FILE)
    same = [name for name in COLUMNS if name not in ORIGIN]
    level_0 = levels[(levels.flood_level == 0) & (levels.seed < 7)].reset_index(drop=True)
    start_0 = starts[starts.start == 0].reset_index(drop=True)
    pd.testing.assert_frame_equal(start_0[same], level_0[same], check_exact=True)
    assert not starts.flood_level.any()
    assert starts[starts.scored_epoch == "last"].val_loss_noisy.nunique() == 4 * 3
    again = folder.succeed(SCRIPT, *SMALL, "--trials", 2)  # when the levels come last, too
    assert "4 trained before" in again and "| best of 3 starts |" in again


def test_the_weights_of_a_start_are_drawn_by_the_documented_rule():
    seed = int(np.random.SeedSequence((5, 2)).generate_state(1)[0])
    assert [start_generator(5, start).initial_seed() for start in (0, 2)] == [5, seed]


def test_what_stops_a_table_costs_no_finished_trial(whole, folder, monkeypatch):
    """Nor does another job in the same folder, while the first is at it; nor store and picture."""

    def train(network, data, models, training, *rest):
        trainings.append(training)
        if len(trainings) == 3:
            assert trained(folder) == 2
            said = folder.refuse(SCRIPT, *SMALL)
            assert said == "--output-dir .: another table is made there"
            training = replace(training, optimizer="sgd", learning_rate=1e30)
        return score_last_and_best(network, data, models, training, *rest)

    def away(*_):
        raise OSError("the store is away")

    trainings = []
    monkeypatch.setattr(run_table_synth, "score_last_and_best", train)
    result = folder.run(SCRIPT, *SMALL)
    assert result.status == 1 and "with learning rate 1e+30" in one_line(result.errors)
    assert trained(folder) == 2 and not (folder.path / "table_synth.md").exists()
    monkeypatch.setattr("tracking.TableLog._finish", away)
    monkeypatch.setattr("plot.draw_table", lambda *_: 1 / 0)
    result = folder.run(SCRIPT, *SMALL)
    assert "6 trials of 3 levels, 2 trained before" in result.output and len(trainings) == 3 + 4
    assert result.status == 1 and "Saved: " in result.output
    store, picture = result.errors.splitlines()
    assert store.endswith("mlflow.db: the store is away") and picture.endswith("division by zero")
    assert_same_files(folder, whole, (TRIALS_FILE, *PRINTED[:2]))


def test_side_by_side_equals_one_after_the_other(whole, folder, monkeypatch):
    """Also when it goes on after a signal; what a worker raises is one line."""
    with monkeypatch.context() as patch:
        patch.setattr("results.add_trials", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        stopped = folder.run(SCRIPT, *SMALL, "--workers", 2)
    assert (stopped.status, stopped.errors) == (128 + signal.SIGTERM, "\nstopped by SIGTERM\n")
    folder.succeed(SCRIPT, *SMALL, "--workers", 2)
    assert_same_files(folder, whole, [TRIALS_FILE, *PRINTED])
    flags = ("--optimizer", "sgd", "--learning-rate", 1e30, "--output-dir", "diverged")
    result = folder.run(SCRIPT, *SMALL, *flags, "--workers", 2)
    line = one_line(result.errors)
    assert line.startswith("run_table_synth.py: error: ") and "in epoch 1" in line
    assert result.status == 1 and not list(folder.path.glob("diverged/*.csv"))
    parents = folder.parents("flooding-table")
    assert [run.info.status for run in parents] == ["FINISHED", "FAILED"]


def test_other_trials_are_added_and_none_is_lost(whole, folder):
    shutil.copy(whole.path / TRIALS_FILE, folder.path)
    other = ("--dataset", "spiral", "--label-noise", 0, 0.2, "--trials", 1, "--spiral-noise", 0, 1)
    output = folder.succeed(SCRIPT, *SMALL, *other)
    assert "4 trials of 3 levels, 0 trained" in output
    assert "| spiral, τ = 1 | 20% |" in output and "gaussian" not in output
    lines, before = ((one.path / TRIALS_FILE).read_text().splitlines() for one in (folder, whole))
    assert [line for line in lines if not line.startswith("spiral")] == before
    assert len(lines) == len(before) + 4 * 2 * 3


def test_a_file_may_have_the_trials_of_other_files(whole, folder):
    """Those of two machines that share a trial, one after the other; the rest is trained."""
    raw = read_csv(whole.path / TRIALS_FILE)
    other = raw[raw.seed == 6].assign(torch="another", commit="0123456")
    unasked = raw[raw.seed == 7].assign(seed=99, commit="0123456")
    both = pd.concat([unasked, raw[raw.seed < 7], other])
    both.to_csv(folder.path / TRIALS_FILE, index=False)
    output = folder.succeed(SCRIPT, *SMALL)
    assert "6 trials of 3 levels, 4 trained before" in output
    together, figures = read_csv(folder.path / TRIALS_FILE), COLUMNS[: -len(ORIGIN)]
    assert together[together.seed != 99][figures].equals(raw[figures])
    assert set(together[together.seed == 99].commit) == {"0123456"}
    assert_same_files(folder, whole)
    rows = raw.sort_values("seed", ascending=False, kind="stable")  # in any order
    rows.to_csv(folder.path / TRIALS_FILE, index=False)
    assert "6 trained before" in folder.succeed(SCRIPT, *SMALL)
    assert_same_files(folder, whole, [TRIALS_FILE, *PRINTED])


def test_files_that_do_not_fit_are_refused(whole, folder, monkeypatch):
    monkeypatch.setattr(run_table_synth, "score_last_and_best", None)
    raw, text = read_csv(whole.path / TRIALS_FILE), (whole.path / TRIALS_FILE).read_text()
    cut = "has not each flood level and start asked for, once"
    for spoiled, said in (
        (raw.drop(columns="val_loss_noisy"), "cannot be read as raw figures"),
        (raw.replace({"test_loss_noisy": {raw.test_loss_noisy[0]: "x"}}), "cannot be read as"),
        (text + text, "cannot be read as raw figures"),  # with its titles once more
        (text[:-150], "is cut short, figures are missing"),
        (raw.iloc[:0], "is cut short, figures are missing"),
        (raw.assign(version=1), "version is 1, and 2 is asked for"),
        (raw.assign(flood_on="example"), "flood_on is example, and batch is asked for"),
        (raw.iloc[:-1], cut),
        (raw.replace({"flood_level": {0.3: 0.31}}), cut),
        (pd.concat([raw, raw.assign(test_loss_noisy=9.0)]), cut),
    ):
        spoiled = spoiled if isinstance(spoiled, str) else spoiled.to_csv(index=False)
        (folder.path / TRIALS_FILE).write_text(spoiled)
        line = folder.refuse(SCRIPT, *SMALL)
        assert line.startswith(f"{TRIALS_FILE}: ") and said in line
    (folder.path / TRIALS_FILE).write_text(text)
    assert "epochs is 12, and 13 is" in folder.refuse(SCRIPT, *SMALL, "--epochs", 13)
    assert (folder.path / TRIALS_FILE).read_text() == text and not folder.parents("flooding-table")
