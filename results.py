"""What the experiments' scores say: the chosen flood levels, their means, the paper's table.

Functions over pandas tables with a row a flood level, and the files that they are kept in; no
MLflow, no torch.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import astuple, fields
from pathlib import Path

import numpy as np
import pandas as pd
import scipy  # its `stats` takes a second, and is loaded where it is first used

from datasets import Cell, DataSettings, best_possible_accuracy
from settings import SCORES, SPLITS, STOPPINGS

CELL = [field.name for field in fields(Cell)]  # what tells cells of the table apart
TRIAL = [*CELL, "stopping"]  # of which a flood level is chosen
ORIGIN = ["commit", "torch", "device"]  # where one was trained
EARLIER = {"flood_on": "batch"}  # settings of the cells whose files do not say them
FIGURES = ["epoch", *(f"{split}_{score}" for split in SPLITS[1:] for score in SCORES)]
SETTING = ["dataset", "label_noise", "stopping"]  # a row of the paper's sub-tables A and B
SIGNIFICANCE = 0.05  # of the adjusted p-value that sets a score in bold


def choose_flood_levels(
    scores: pd.DataFrame, labels: str, by: Sequence[str] = (), ties: str = "lower loss"
) -> pd.DataFrame:
    """Return the row of the chosen flood level for each of the groups that the columns `by` make.

    Chosen is the best accuracy on the "noisy" or "clean" validation `labels`. Among equals it is
    the "lower loss" on them, then the lower level; or with other `ties` the "lowest" or the
    "highest" level. 0, no flooding, is a level like any other.
    """
    order = {f"val_accuracy_{labels}": False}
    if ties == "lower loss":
        order[f"val_loss_{labels}"] = True
    order["flood_level"] = ties != "highest"
    best_first = scores.sort_values([*order], ascending=[*order.values()], kind="stable")
    return best_first.drop_duplicates(list(by)) if by else best_first.head(1)


def compared_level(history: pd.DataFrame, labels: str) -> tuple[float, float]:
    """Return the chosen flood level, and the one that the pictures compare with no flooding.

    Chosen by the last epoch's validation accuracy, its mean over the trials. Where that is no
    flooding, the best of the other levels is compared, if there are any.
    """
    last = history[history.epoch == history.epoch.max()]
    means = last.groupby("flood_level", as_index=False).mean()
    chosen = choose_flood_levels(means, labels).flood_level.item()
    flooded = choose_flood_levels(means[means.flood_level > 0], labels).flood_level
    return chosen, flooded.item() if len(flooded) else chosen


def summarize(history: pd.DataFrame, labels: str) -> str:
    """Return a demo's result as text: a row a flood level with last-epoch scores.

    `history` has a row a `seed`, `flood_level` and `epoch`. One trial shows its figures and its
    chosen level, several their mean, standard deviation, and how many trials chose the level.
    """
    last = history[history.epoch == history.epoch.max()]
    trials = last.seed.nunique()
    chosen = choose_flood_levels(last, labels, ["seed"]).flood_level.value_counts()
    of_trials = f", mean ± standard deviation of {trials} trials" if trials > 1 else ""
    columns = {
        "train, noisy": "train_accuracy_noisy", "val, clean": "val_accuracy_clean",
        "test, clean": "test_accuracy_clean", "test loss, clean": "test_loss_clean",
    }  # fmt: skip
    lines = [
        f"Last epoch, accuracies in %, each against noisy or clean labels{of_trials}:\n",
        f"flood level{''.join(f'{title:>{len(title) + 3}}' for title in columns)}",
    ]
    for level, rows in last.groupby("flood_level"):
        line = f"{f'{level:g}' if level else 'no flooding':11}"
        for title, name in columns.items():
            digits, scale = (3, 1) if "loss" in name else (1, 100)
            text = f"{scale * rows[name].mean():.{digits}f}"
            if trials > 1:
                text += f" ± {scale * rows[name].std():.{digits}f}"
            line += f"{text:>{len(title) + 3}}"
        if level in chosen:
            line += "  <- chosen" + (f" by {chosen[level]}" if trials > 1 else "")
        lines.append(line)
    return "\n".join(lines)


def compare(cells: pd.DataFrame, ties: str = "lower loss") -> pd.DataFrame:
    """Return the paper's table: a row a setting and kind of test labels, figures over the trials.

    `cells` are the table's raw figures, see `read_cells`. Each trial chooses its flood level by
    noisy validation accuracy, see `choose_flood_levels`. Accuracies are fractions;
    `best_possible` is the Bayes classifier's, NaN where it is not known. `p_value` is a paired
    t-test's over the trials, NaN where there is one, and `p_adjusted` the same after Benjamini
    and Hochberg over all rows with the same labels.
    """
    chosen = choose_flood_levels(cells, "noisy", TRIAL, ties)
    pairs = cells[cells.flood_level == 0].merge(chosen, on=TRIAL, suffixes=("_without", "_with"))
    rows = []
    for labels in ("noisy", "clean"):
        for setting, trials in pairs.groupby(SETTING, sort=False):
            figures = {
                "without_flooding": trials[f"test_accuracy_{labels}_without"],
                "with_flooding": trials[f"test_accuracy_{labels}_with"],
                "flood_level": trials["flood_level_with"],
            }
            row = {**dict(zip(SETTING, setting)), "labels": labels, "trials": len(trials)}
            data = DataSettings(**trials[CELL[:-1]].iloc[0])
            noise = data.label_noise if labels == "noisy" else 0.0
            row["best_possible"] = best_possible_accuracy(data, noise)
            for name, values in figures.items():
                row |= {f"{name}_mean": values.mean(), f"{name}_std": values.std()}
            row["p_value"] = paired_p(figures["with_flooding"], figures["without_flooding"])
            rows.append(row)
    table = pd.DataFrame(rows).assign(p_adjusted=math.nan)
    for _, known in table.p_value.dropna().groupby(table.labels):
        table.loc[known.index, "p_adjusted"] = scipy.stats.false_discovery_control(known)
    return table


def paired_p(after: pd.Series, before: pd.Series) -> float:
    """Two-sided p of a paired t-test: 0 for a constant difference, 1 for none, NaN for one pair."""
    differences = (after - before).to_numpy()
    if len(differences) < 2:
        return math.nan
    if np.ptp(differences) < 1e-12:
        return float(abs(differences[0]) < 1e-12)
    return float(scipy.stats.ttest_rel(after, before).pvalue)


def markdown(table: pd.DataFrame) -> str:
    """Return what `compare` returned as Markdown, accuracies in %, A and B side by side."""
    trials = sorted(table.trials.unique())
    counts = " or ".join(map(str, trials)) + (" trial" if trials == [1] else " trials")
    text = (
        f"Test accuracy in %, mean (standard deviation) over {counts}. A: last epoch. B: early "
        f"stopping, the epoch of best validation accuracy. b: the flood level that each trial "
        f"chose by noisy validation accuracy. Best possible: the Bayes classifier of the clean "
        f"labels. Bold: better by a paired t-test at {100 * SIGNIFICANCE:g}%, adjusted for the "
        f"rows (Benjamini-Hochberg).\n"
    )
    titles = {"noisy": "Noisy test labels, as in the paper", "clean": "Clean test labels"}
    for labels, of_labels in table.groupby("labels", sort=False):
        header = ["data set", "label noise", "best possible"]
        for letter in "AB":
            header += [f"{letter}: {name}" for name in ("without flooding", "with flooding", "b")]
        lines = []
        for (dataset, noise), pair in of_labels.groupby(SETTING[:2], sort=False):
            best = pair.best_possible.iloc[0]
            best = "unknown" if math.isnan(best) else f"{100 * best:.1f}"
            line = [dataset, f"{100 * noise:g}%", best]
            for _, row in pair.iterrows():
                sides = [
                    mean_and_deviation(100 * row[f"{side}_mean"], 100 * row[f"{side}_std"], 1)
                    for side in ("without_flooding", "with_flooding")
                ]
                if row.p_adjusted < SIGNIFICANCE:
                    better = int(row.with_flooding_mean > row.without_flooding_mean)
                    sides[better] = f"**{sides[better]}**"
                b = mean_and_deviation(row.flood_level_mean, row.flood_level_std, 2)
                line += [*sides, b]
            lines.append(line)
        text += f"\n{titles[labels]}:\n\n{table_rows(header, lines)}\n"
    return text


def table_rows(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def mean_and_deviation(mean: float, deviation: float, digits: int) -> str:
    """Return a mean (standard deviation), which a single trial has not."""
    return f"{mean:.{digits}f} ({'-' if math.isnan(deviation) else f'{deviation:.{digits}f}'})"


class CellsError(Exception):
    """A file of cells cannot be used; says which and why."""


def read_cells(
    paths: Sequence[Path], shared: Mapping[str, object], flood_levels: Sequence[float]
) -> pd.DataFrame:
    """Read a table's raw figures back: all cells of all files, each once, in the order of CELL.

    A cell has a row a stopping and flood level. `shared` are the settings that all cells must
    have been trained with. ORIGIN is empty where an earlier version did not write it. Raises
    CellsError where a file is not there, lacks a column or a figure, was trained with other
    settings or flood levels, or a cell is there twice, with other figures.
    """
    columns = [*CELL, *shared, "stopping", "flood_level", *FIGURES]
    grid = sorted((stopping, level) for stopping in STOPPINGS for level in flood_levels)
    files = []
    for path in paths:
        try:
            cells = pd.read_csv(path, engine="pyarrow")  # every bit of a float, in all versions
        except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
            raise CellsError(f"{path}: cannot be read ({error})") from error
        cells = cells.assign(**{name: EARLIER[name] for name in EARLIER if name not in cells})
        if missing := [name for name in columns if name not in cells]:
            raise CellsError(f"{path}: has no column {missing[0]}")
        whole = path.read_bytes().endswith(b"\n")
        if len(cells) == 0 or cells[columns].isna().any(axis=None) or not whole:
            raise CellsError(f"{path}: is cut short, figures are missing")
        for name, value in shared.items():
            if (other := cells[name][cells[name] != value]).size:
                raise CellsError(f"{path}: {name} is {other.iloc[0]}, and {value} is asked for")
        for key, rows in cells.groupby(CELL):
            if sorted(set(zip(rows.stopping, rows.flood_level))) != grid:
                raise CellsError(f"{path}: is cut short or has other flood levels: {_name(key)}")
        files.append(cells.reindex(columns=[*columns, *ORIGIN]))
    if not files:
        return pd.DataFrame(columns=[*columns, *ORIGIN])
    cells, where = add_cells(*files).drop_duplicates(columns), " ".join(map(str, paths))
    for key, rows in cells.groupby(CELL):
        if len(rows) > len(grid):
            raise CellsError(f"{where}: a cell is there twice, with other figures: {_name(key)}")
    return cells


def _name(key: Sequence[object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in zip(CELL, key))


def add_cells(*cells: pd.DataFrame) -> pd.DataFrame:
    """Put raw figures together, in the order of seed and CELL, with the first ones' columns."""
    together = pd.concat([some for some in cells if len(some)])
    together = together.sort_values(["seed", *CELL], kind="stable", ignore_index=True)
    return together[cells[0].columns]


def select_cells(cells: pd.DataFrame, wanted: Sequence[Cell]) -> pd.DataFrame:
    """Return the rows of those cells that are wanted."""
    found = pd.MultiIndex.from_frame(cells[CELL]).isin([astuple(cell) for cell in wanted])
    return cells[found].reset_index(drop=True)


def csv(frame: pd.DataFrame) -> bytes:
    """Return what is to be written of a table as CSV."""
    return frame.to_csv(index=False).encode()


def write_files(files: Mapping[str, bytes], directory: Path) -> list[Path]:
    """Write files into a folder, made if need be; they are moved into place when all are whole."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        return [(Path(folder) / name).replace(directory / name) for name in files]
