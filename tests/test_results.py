"""What the scores say: the chosen level, the statistics, the printed table, the README's."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import PROJECT

from datasets import DataSettings
from results import CELL, choose_flood_levels, compare, markdown, read_cells
from run_table_synth import TableSettings


def made_cells(figures, seed=0, stopping="last epoch", dataset="spiral", **setting):
    """Rows of one cell from (flood level, val accuracy, val loss, test accuracy, clean)."""
    names = ("flood_level", "val_accuracy_noisy", "val_loss_noisy")
    rows = pd.DataFrame(figures, columns=[*names, "test_accuracy_noisy", "test_accuracy_clean"])
    setting = {"label_noise": 0.05, "test_samples": 100, **setting}
    data = DataSettings(dataset=dataset, **setting)
    return rows.assign(**vars(data), stopping=stopping, seed=seed)


def table_of(without, flooded, **setting):
    """A table whose trials have these test accuracies without and with flooding."""
    return compare(
        pd.concat(
            made_cells([(0, 0.5, 1, a, 1.0), (0.25, 0.6, 1, b, 0.5)], seed, **setting)
            for seed, (a, b) in enumerate(zip(without, flooded))
        )
    )


def test_choice_is_by_accuracy_then_loss_then_the_lower_level():
    rows = made_cells([(0, 0.8, 1, 0, 0), (0.1, 0.9, 0.3, 0, 0), (0.2, 0.9, 0.2, 0, 0)])
    assert choose_flood_levels(rows, "noisy").flood_level.item() == 0.2
    rows.val_loss_noisy = 0.5
    assert choose_flood_levels(rows[::-1], "noisy").flood_level.item() == 0.1
    rows.val_accuracy_noisy = 0.9
    assert choose_flood_levels(rows[::-1], "noisy").flood_level.item() == 0
    clean = rows.assign(val_accuracy_clean=[0.8, 0.7, 0.8], val_loss_clean=[0.2, 0.0, 0.1])
    assert choose_flood_levels(clean, "clean").flood_level.item() == 0.2
    two = pd.concat([rows, rows.assign(seed=1, val_accuracy_noisy=[0.1, 0.2, 0.3])])
    chosen = choose_flood_levels(two, "noisy", ["seed"]).sort_values("seed")
    assert list(chosen.flood_level) == [0, 0.2]


def test_other_rules_for_ties_do_not_look_at_the_loss():
    rows = made_cells([(0.1, 0.9, 0.3, 0, 0), (0.2, 0.9, 0.2, 0, 0), (0.3, 0.9, 0.4, 0, 0)])
    for frame in (rows, rows[::-1]):
        for ties, level in (("lowest", 0.1), ("lower loss", 0.2), ("highest", 0.3)):
            assert choose_flood_levels(frame, "noisy", ties=ties).flood_level.item() == level
    cells = pd.concat([made_cells([(0, 0.9, 0.5, 0.7, 1)]), rows])
    assert list(compare(cells, "lowest").flood_level_mean) == [0, 0]
    assert list(compare(cells, "highest").flood_level_mean) == [0.3, 0.3]


def test_the_table_is_chosen_by_noisy_validation_labels():
    cells = made_cells([(0, 0.6, 1, 0.7, 0.7), (0.1, 0.9, 1, 0.8, 0.9), (0.2, 0.8, 1, 0.9, 0.8)])
    cells = cells.assign(val_accuracy_clean=[0.6, 0.8, 0.9], val_loss_clean=[1, 1, 0])
    table = compare(cells)
    assert list(table.labels) == ["noisy", "clean"] and set(table.flood_level_mean) == {0.1}
    assert list(table.with_flooding_mean) == [0.8, 0.9]


def test_the_table_of_known_figures():
    # Differences 0.10, 0.11, 0.12: t = 0.11 / (0.01 / sqrt(3)) = 19, p = 0.0027.
    table = table_of([0.80, 0.80, 0.80], [0.90, 0.91, 0.92])
    assert table.p_value[0] == pytest.approx(0.00274, abs=1e-5)
    assert table.p_adjusted[0] == table.p_value[0]  # of one row
    assert (table.trials[0], table.flood_level_mean[0], table.p_value[1]) == (3, 0.25, 0)
    lines = markdown(table).splitlines()
    assert lines[0].startswith("Test accuracy in %, mean (standard deviation) over 3 trials.")
    assert "| spiral | 5% | 95.0 | 80.0 (0.0) | **91.0 (1.0)** | 0.25 (0.00) |" in lines
    assert "| spiral | 5% | 100.0 | **100.0 (0.0)** | 50.0 (0.0) | 0.25 (0.00) |" in lines
    assert "**" not in markdown(table_of([0.80, 0.90, 0.80], [0.82, 0.83, 0.84])).split("Clean")[0]


def test_p_values_without_a_spread():
    one = table_of([0.8], [0.9])
    assert one[["p_value", "p_adjusted"]].isna().all(axis=None)
    assert "over 1 trial." in markdown(one) and "| 80.0 (-) | 90.0 (-) |" in markdown(one)
    assert table_of([0.8, 0.9], [0.8, 0.9]).p_value[0] == 1


@pytest.mark.parametrize(("noise", "noisy", "clean"), [(0, "95.0", "100.0"), (1, "unknown", None)])
def test_the_best_possible_accuracy_is_left_out_where_it_is_not_known(noise, noisy, clean):
    """The arms of the spiral overlap with noise, and there is no formula."""
    table = table_of([0.8, 0.8], [0.9, 0.91], spiral_noise=float(noise))
    assert table.best_possible.isna().all() == bool(noise)
    of_noisy, of_clean = markdown(table).split("Clean test labels")
    assert f"| spiral | 5% | {noisy} | " in of_noisy
    assert f"| spiral | 5% | {clean or noisy} | " in of_clean and "nan" not in of_clean


def test_adjusted_p_values():
    """Benjamini and Hochberg by hand, over the rows of one kind of labels; NaN is no row."""
    spread, tables = [0.0, 0.01, 0.02, 0.05], []
    for k, gain in enumerate((0.01, 0.03, 0.06)):
        figures = [[(0, 0.5, 1, 0.8, 1), (0.2, 0.6, 1, 0.8 + gain + s, 1)] for s in spread]
        cells = [made_cells(rows, seed) for seed, rows in enumerate(figures)]
        tables.append(pd.concat(cells).assign(label_noise=(k + 1) / 100))
    single = made_cells([(0, 0.5, 1, 0.8, 1)], label_noise=0.5)
    table = compare(pd.concat([*tables, single])).query("labels == 'noisy'")
    assert table.p_adjusted.isna().tolist() == [False, False, False, True]
    p = np.sort(table.p_value[:3])[::-1]
    expected = np.minimum.accumulate(p * 3 / np.array([3, 2, 1]))
    np.testing.assert_allclose(np.sort(table.p_adjusted[:3])[::-1], expected)


@pytest.fixture(scope="module")
def published():
    """The published cells of the trials that are whole, read as a job would read them."""
    paper = TableSettings()
    levels = paper.flood_levels()
    cells = read_cells([PROJECT / "figures" / "table_synth_cells.csv"], paper.shared(), levels)
    settings = cells[CELL[:-1]].drop_duplicates()
    whole = cells.groupby("seed").filter(lambda rows: len(rows) == len(settings) * 2 * len(levels))
    assert len(settings) == 9 and sorted(whole.seed.unique()) == [*range(whole.seed.nunique())]
    return whole


def rows_of(text):
    return [line for line in text.splitlines() if re.match(r"\| \w+ \| \d+% ", line)]


def test_the_published_table_is_made_from_the_published_cells(published):
    table = compare(published)
    figures = PROJECT / "figures"
    assert (figures / "table_synth.md").read_text() == markdown(table)
    pd.testing.assert_frame_equal(pd.read_csv(figures / "table_synth.csv"), table)
    readme = (PROJECT / "README.md").read_text()
    [section] = re.findall(r"^## The paper's synthetic table\n(.*?)^## ", readme, re.M | re.S)
    expected = rows_of(markdown(table).split("Clean test labels")[0])
    assert len(expected) == 9 and rows_of(section) == expected


def test_the_readme_compares_batch_and_example_as_the_claims_print_it():
    command = [sys.executable, PROJECT / "figures" / "claims.py"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    readme = (PROJECT / "README.md").read_text()
    [section] = re.findall(r"^## The batch's mean, or .*?\n(.*?)^## ", readme, re.M | re.S)
    assert len(rows_of(printed)) == 9 and rows_of(section) == rows_of(printed)
