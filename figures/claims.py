"""Print the figures of the README's sentences about the table, from its raw figures.

    python figures/claims.py [CELLS.csv [EXAMPLE_CELLS.csv]]

The second file has the cells that were trained with `--flood-on example`, to compare with.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pandas as pd
from scipy.stats import false_discovery_control

sys.path.insert(0, str(Path(__file__).parent.parent))
from results import (
    SETTING,
    SIGNIFICANCE,
    TRIAL,
    choose_flood_levels,
    compare,
    mean_and_deviation,
    paired_p,
    table_rows,
)
from settings import STOPPINGS

RULES = {"lower loss": "lower validation loss", "lowest": "lowest b", "highest": "highest b"}
LETTERS = dict(zip(STOPPINGS, "AB"))


def wide(
    values: pd.Series, digits: int, percent: bool = False, signs: bool = False, mean: bool = True
) -> str:
    """Show a figure a setting: a line a stopping and data set, its three strengths of noise."""
    values = 100 * values if percent else values
    lines = []
    for stopping, letter in LETTERS.items():
        of_stopping = values.xs(stopping, level="stopping")
        for dataset, of_dataset in of_stopping.groupby(level="dataset"):
            figures = ", ".join(f"{round(value, digits) + 0:.{digits}f}" for value in of_dataset)
            lines.append(f"  {letter} {dataset:11} {figures}")
        positive = f", positive in {(of_stopping > 0).sum()} of {len(of_stopping)}" * signs
        if mean:
            lines.append(f"  {letter} mean {of_stopping.mean():.{digits}f}{positive}")
    return "\n".join(lines)


def by_rule(cells: pd.DataFrame) -> None:
    """The table under three rules for ties of validation accuracy."""
    better = []
    for name, rule in RULES.items():
        table = compare(cells, name).query("labels == 'noisy'").set_index(SETTING)
        gain = table.with_flooding_mean - table.without_flooding_mean
        print(f"\nTies go to the {rule}. Gain in points on noisy test labels:")
        print(wide(gain, 1, percent=True, signs=True))
        print("Adjusted p:")
        print(wide(table.p_adjusted, 3, mean=False))
        rows = table[(table.p_adjusted < SIGNIFICANCE) & (gain > 0)]
        names = [f"{LETTERS[s]} {dataset} {noise:g}" for dataset, noise, s in rows.index]
        print(f"Significantly better: {len(rows)}: {', '.join(sorted(names))}")
        better.append(set(names))
        print("Mean chosen b:")
        print(wide(table.flood_level_mean, 2))
    print(f"\nSignificantly better under all rules: {', '.join(sorted(set.intersection(*better)))}")


def ties(cells: pd.DataFrame) -> None:
    """How often the rule for ties decides."""
    best = cells.groupby(TRIAL).val_accuracy_noisy.transform("max")
    tied = cells[cells.val_accuracy_noisy == best].groupby(TRIAL).size() > 1
    print("\nShare of the choices that a tie decides:")
    print(wide(tied.groupby(SETTING).mean(), 2))


def means(chosen: pd.DataFrame, name: str) -> pd.Series:
    """Mean over the trials, a setting."""
    return chosen.groupby(SETTING)[name].mean()


def choosing(cells: pd.DataFrame) -> None:
    """What the advice on choosing b says."""
    noisy = choose_flood_levels(cells, "noisy", TRIAL)
    none = cells[cells.flood_level == 0]
    six = cells[(10 * cells.flood_level).round(6) % 1 == 0]
    coarse = choose_flood_levels(six, "noisy", TRIAL)
    of_all = cells.groupby([*SETTING, "flood_level"], as_index=False).mean(numeric_only=True)
    one = choose_flood_levels(of_all, "noisy", SETTING)
    print("\nOne b for all trials, by their mean validation accuracy: gain in points:")
    print(wide(means(one, "test_accuracy_noisy") - means(none, "test_accuracy_noisy"), 1, True))
    print("\nSix levels for all, change of noisy test accuracy in points:")
    print(wide(means(coarse, "test_accuracy_noisy") - means(noisy, "test_accuracy_noisy"), 1, True))
    clean = choose_flood_levels(cells, "clean", TRIAL)
    print("\nChosen by clean validation labels, change of clean test accuracy in points:")
    print(wide(means(clean, "test_accuracy_clean") - means(noisy, "test_accuracy_clean"), 1, True))
    for loss in ("test_loss_clean", "test_loss_noisy"):
        print(f"\n{loss}, without flooding, then with it, then its fall:")
        without, flooded = means(none, loss), means(noisy, loss)
        print(wide(without, 2), wide(flooded, 2), wide(without - flooded, 2, signs=True), sep="\n")
    print("\nNoisy test accuracy in % without flooding, and then at the highest b:")
    for rows in (none, cells[cells.flood_level == cells.flood_level.max()]):
        print(wide(means(rows, "test_accuracy_noisy"), 1, True))
    edge = noisy.assign(edge=noisy.flood_level >= 0.9 * cells.flood_level.max())
    print("\nShare of the trials that choose a b in the highest tenth of the grid:")
    print(wide(means(edge, "edge"), 2))
    table = means(noisy, "test_accuracy_noisy").xs("last epoch", level="stopping")
    early = means(none, "test_accuracy_noisy").xs("early", level="stopping")
    entropy = [-(p * math.log(p) + (1 - p) * math.log(1 - p)) for p in cells.label_noise.unique()]
    print(f"\nEntropy of the noise in nats: {', '.join(f'{nats:.2f}' for nats in entropy)}")
    print(f"\nEarly stopping alone is ahead of flooding alone in {(early > table).sum()} settings")


def example(cells: pd.DataFrame, other: pd.DataFrame) -> None:
    """Flooding on the mini-batch's mean and on each example's loss: same trials, same levels."""
    levels = sorted(other.flood_level.unique())
    same = cells.merge(other[[*TRIAL, "flood_level"]])
    sides = {
        "without": same[same.flood_level == 0],
        "batch": choose_flood_levels(same, "noisy", TRIAL),
        "example": choose_flood_levels(other, "noisy", TRIAL),
    }
    accuracy = pd.DataFrame(
        {side: rows.set_index(TRIAL).test_accuracy_noisy for side, rows in sides.items()}
    )
    p = accuracy.groupby(SETTING).apply(lambda trials: paired_p(trials.example, trials.batch))
    p[:] = false_discovery_control(p)
    print(
        f"\nFlooded: the mini-batch's mean loss, or each example's. {other.seed.nunique()} trials, "
        f"levels {', '.join(f'{level:g}' for level in levels)}.\nTest accuracy on noisy labels in "
        f"%, chosen b, and p of a paired t-test of example and batch, adjusted for {len(p)} rows:\n"
    )
    b = {side: means(sides[side], "flood_level") for side in ("batch", "example")}
    header, lines = ["data set", "label noise"], []
    for letter in LETTERS.values():
        header += [f"{letter}: {name}" for name in ("without", "batch, b", "example, b", "p")]
    for (dataset, noise), trials in accuracy.groupby(SETTING[:2]):
        line = [dataset, f"{100 * noise:g}%"]
        for stopping in STOPPINGS:
            of_stopping, setting = trials.xs(stopping, level="stopping"), (dataset, noise, stopping)
            for side, values in of_stopping.items():
                chosen = f", {b[side][setting]:.2f}" if side in b else ""
                shown = mean_and_deviation(100 * values.mean(), 100 * values.std(), 1)
                line.append(shown + chosen)
            line.append(f"{p[setting]:.3f}")
        lines.append(line)
    print(table_rows(header, lines))
    example_gains(accuracy, same, other)


def example_gains(accuracy: pd.DataFrame, same: pd.DataFrame, other: pd.DataFrame) -> None:
    """What each of the two gains, and how far they stand apart at level 0 and at the highest."""
    mean = accuracy.groupby(SETTING).mean()
    zero = means(other[other.flood_level == 0], "test_accuracy_noisy")
    for what, gain in {
        "batch - its level 0": mean.batch - mean.without,
        "example - its level 0": mean.example - zero,
        "example - batch": mean.example - mean.batch,
        "level 0 of the example's file - that of the batch's": zero - mean.without,
    }.items():
        print(f"\n{what}, in points:")
        print(wide(gain, 1, percent=True, signs=True))
    print("\nNoisy test accuracy in % at the highest b, batch and then example:")
    for rows in (same, other):
        highest = rows[rows.flood_level == other.flood_level.max()]
        print(wide(means(highest, "test_accuracy_noisy"), 1, True))


def main() -> None:
    folder, name = Path(__file__).parent, "table_synth_cells.csv"
    paths = [Path(path) for path in sys.argv[1:]] or [
        folder / name, folder / "flood_on_example" / name
    ]  # fmt: skip
    cells = pd.read_csv(paths[0], engine="pyarrow")
    trials = sorted(cells.groupby(SETTING).seed.nunique().unique())
    noises = sorted(cells.label_noise.unique())
    print(
        f"{paths[0].name}: {' or '.join(map(str, trials))} trials a setting. "
        f"Three figures in a row are of label noise {', '.join(map(str, noises))}."
    )
    by_rule(cells)
    ties(cells)
    choosing(cells)
    if len(paths) > 1:
        example(cells, pd.read_csv(paths[1], engine="pyarrow"))


if __name__ == "__main__":
    main()
