"""What the experiments' scores say: the chosen flood levels, their means, the paper's table.

Pure functions over pandas tables with a row a flood level; no MLflow, no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from datasets import bayes_accuracy
from settings import SCORES, SPLITS, STOPPINGS, DataSettings

SETTING = ["dataset", "label_noise", "stopping"]  # a row of the paper's sub-tables A and B
SIGNIFICANCE = 0.05  # of the adjusted p-value that sets a score in bold


def choose_flood_levels(scores: pd.DataFrame, labels: str, by: Sequence[str] = ()) -> pd.DataFrame:
    """Return the row of the chosen flood level for each of the groups that the columns `by` make.

    Chosen is the best accuracy on the "noisy" or "clean" validation `labels`; among equals the
    lower validation loss, then the lower level. 0, no flooding, is a level like any other.
    """
    order = [f"val_accuracy_{labels}", f"val_loss_{labels}", "flood_level"]
    best_first = scores.sort_values(order, ascending=[False, True, True], kind="stable")
    return best_first.drop_duplicates(list(by)) if by else best_first.head(1)


def summarize(history: pd.DataFrame, labels: str) -> str:
    """Return a demo's result as text: a row a flood level, last-epoch scores on clean labels.

    `history` has a row a `seed`, `flood_level` and `epoch`. One trial shows its figures and its
    chosen level, several their mean, standard deviation, and how many trials chose the level.
    """
    last = history[history.epoch == history.epoch.max()]
    trials = last.seed.nunique()
    chosen = choose_flood_levels(last, labels, ["seed"]).flood_level.value_counts()
    of_trials = f", mean ± standard deviation of {trials} trials" if trials > 1 else ""
    width = 8 if trials == 1 else 13
    lines = [
        f"Last epoch, clean labels, accuracies in %{of_trials}:",
        "",
        f"flood level{''.join(f'{name:>{width}}' for name in SPLITS)}{'test loss':>{width + 4}}",
    ]
    for level, rows in last.groupby("flood_level"):
        line = f"{f'{level:g}' if level else 'no flooding':11}"
        for name in (*(f"{name}_accuracy_clean" for name in SPLITS), "test_loss_clean"):
            digits, scale = (3, 1) if "loss" in name else (1, 100)
            text = f"{scale * rows[name].mean():.{digits}f}"
            if trials > 1:
                text += f" ± {scale * rows[name].std():.{digits}f}"
            line += f"{text:>{width + 4 if 'loss' in name else width}}"
        if level in chosen:
            line += "  <- chosen" + (f" by {chosen[level]}" if trials > 1 else "")
        lines.append(line)
    return "\n".join(lines)


def compare(cells: pd.DataFrame) -> pd.DataFrame:
    """Return the paper's table: a row a setting and kind of test labels, figures over the trials.

    `cells` are the table's raw figures, see `read_cells`. Each trial chooses its flood level by
    noisy validation accuracy. Accuracies are fractions; `best_possible` is the Bayes
    classifier's. `p_value` is a paired t-test's over the trials, NaN where there is one, and
    `p_adjusted` the same after Benjamini and Hochberg over all rows with the same labels.
    """
    from scipy.stats import false_discovery_control  # a second to import, for the table alone

    trial = [*SETTING, "spiral_noise", "test_samples", "seed"]
    chosen = choose_flood_levels(cells, "noisy", trial)
    pairs = cells[cells.flood_level == 0].merge(chosen, on=trial, suffixes=("_without", "_with"))
    tables = []
    for labels in ("noisy", "clean"):
        rows = []
        for setting, trials in pairs.groupby(SETTING, sort=False):
            figures = {
                "without_flooding": trials[f"test_accuracy_{labels}_without"],
                "with_flooding": trials[f"test_accuracy_{labels}_with"],
                "flood_level": trials["flood_level_with"],
            }
            row = {**dict(zip(SETTING, setting)), "labels": labels, "trials": len(trials)}
            row["best_possible"] = _best_possible(trials.iloc[0], labels)
            for name, values in figures.items():
                row |= {f"{name}_mean": values.mean(), f"{name}_std": values.std()}
            row["p_value"] = _paired_p(figures["with_flooding"], figures["without_flooding"])
            rows.append(row)
        table = pd.DataFrame(rows)
        known = table.p_value.notna()
        table["p_adjusted"] = math.nan
        table.loc[known, "p_adjusted"] = false_discovery_control(table.p_value[known])
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def _best_possible(cell: pd.Series, labels: str) -> float:
    return bayes_accuracy(
        DataSettings(
            cell.dataset,
            cell.label_noise if labels == "noisy" else 0.0,
            cell.spiral_noise,
            test_samples=int(cell.test_samples),
        )
    )


def _paired_p(after: pd.Series, before: pd.Series) -> float:
    """Two-sided p of a paired t-test: 0 for a constant difference, 1 for none, NaN for one pair."""
    from scipy.stats import ttest_rel

    differences = (after - before).to_numpy()
    if len(differences) < 2:
        return math.nan
    if np.ptp(differences) < 1e-12:
        return float(abs(differences[0]) < 1e-12)
    return float(ttest_rel(after, before).pvalue)


def markdown(table: pd.DataFrame) -> str:
    """Return what `compare` returned as Markdown, accuracies in %, A and B side by side."""
    trials = sorted(table.trials.unique())
    counts = " or ".join(map(str, trials)) + (" trial" if trials == [1] else " trials")
    text = (
        f"Test accuracy in %, mean (standard deviation) over {counts}. "
        f"A: last epoch. B: early stopping, the epoch of best validation accuracy. b: the flood "
        f"level that each trial chose by noisy validation accuracy. Best possible: the Bayes "
        f"classifier of the clean labels. Bold: better by a paired t-test at "
        f"{100 * SIGNIFICANCE:g}%, adjusted for the rows (Benjamini-Hochberg).\n"
    )
    titles = {"noisy": "Noisy test labels, as in the paper", "clean": "Clean test labels"}
    for labels, of_labels in table.groupby("labels", sort=False):
        header = ["data set", "label noise", "best possible"]
        for letter in "AB":
            header += [f"{letter}: {name}" for name in ("without flooding", "with flooding", "b")]
        lines = [header, ["---"] * len(header)]
        for (dataset, noise), pair in of_labels.groupby(SETTING[:2], sort=False):
            best = pair.best_possible.iloc[0]
            best = "unknown" if math.isnan(best) else f"{100 * best:.1f}"
            line = [dataset, f"{100 * noise:g}%", best]
            for row in pair.itertuples():
                without = mean_and_deviation(
                    100 * row.without_flooding_mean, 100 * row.without_flooding_std, 1
                )
                flooded = mean_and_deviation(
                    100 * row.with_flooding_mean, 100 * row.with_flooding_std, 1
                )
                if row.p_adjusted < SIGNIFICANCE:
                    if row.with_flooding_mean > row.without_flooding_mean:
                        flooded = f"**{flooded}**"
                    else:
                        without = f"**{without}**"
                level = mean_and_deviation(row.flood_level_mean, row.flood_level_std, 2)
                line += [without, flooded, level]
            lines.append(line)
        rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        text += f"\n{titles[labels]}:\n\n{rows}\n"
    return text


def mean_and_deviation(mean: float, deviation: float, digits: int) -> str:
    """Return "mean (standard deviation)"; a single trial, NaN, has no deviation."""
    shown = "-" if math.isnan(deviation) else f"{deviation:.{digits}f}"
    return f"{mean:.{digits}f} ({shown})"


class CellsError(ValueError):
    """A file of cells cannot be used; says which and why."""


def read_cells(
    paths: Sequence[Path],
    identity: Sequence[str],
    shared: Mapping[str, object],
    flood_levels: Sequence[float],
) -> Iterator[tuple[tuple, pd.DataFrame]]:
    """Read a table's raw figures back: yields each cell's identity and its rows.

    A cell is what the columns `identity` tell apart; it has a row a stopping and flood level.
    `shared` are the settings that all cells must have been trained with.

    Raises:
        CellsError: a file is not there, lacks a column or a figure, was trained with other
            settings or flood levels, or there is a cell twice.
    """
    scores = [f"{split}_{score}" for split in SPLITS[1:] for score in SCORES]
    grid = sorted((stopping, level) for stopping in STOPPINGS for level in flood_levels)
    seen = {}
    for path in paths:
        try:
            cells = pd.read_csv(path, engine="pyarrow")  # every bit of a float, in all versions
        except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
            reason = " ".join(str(error).split())
            raise CellsError(f"{path}: cannot be read ({reason})") from error
        wanted = [*identity, *shared, "stopping", "flood_level", "epoch", *scores]
        if missing := [name for name in wanted if name not in cells]:
            raise CellsError(f"{path}: has no column {missing[0]}")
        if len(cells) == 0 or cells[wanted].isna().any(axis=None):
            raise CellsError(f"{path}: is cut short, figures are missing")
        for name, value in shared.items():
            if (other := cells[name][cells[name] != value]).size:
                raise CellsError(f"{path}: {name} is {other.iloc[0]}, and {value} is asked for")
        for key, rows in cells[wanted].groupby([*identity], sort=False):
            cell = ", ".join(f"{name} {value}" for name, value in zip(identity, key))
            found = list(zip(rows.stopping, rows.flood_level))
            if key in seen or len(set(found)) < len(found):
                raise CellsError(
                    f"{path}: there is a cell twice, also in {seen.get(key, path)}: {cell}"
                )
            if sorted(found) != grid:
                raise CellsError(f"{path}: is cut short or has other flood levels: {cell}")
            seen[key] = path
            yield key, rows[[name for name in wanted if name not in (*identity, *shared)]]
