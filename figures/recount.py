"""The statistics behind RESULTS.md, as pandas tables; `claims.py` says them in words.

Raw figures are what `run_table_synth.py` writes, a row a scored epoch and model. A *way* is a way
to choose one model of each trial; what one way gains over another is a series with a value a
trial. Accuracies and losses of ways are those on noisy labels.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.special
import scipy.stats

sys.path.insert(0, str(Path(__file__).parent.parent))
from results import (
    COLUMNS,
    DATA,
    HISTORY_FILE,
    LEAST_TRIALS,
    SETTINGS_FILE,
    SHARED,
    TRIAL,
    TrialsError,
    adjust_p,
    choose_models,
    compare,
    paired_gain,
    read_csv,
    read_trials,
)

FIGURES = Path(__file__).parent
KEY = [*TRIAL, "scored_epoch"]  # what tells a trial's choices apart
SETTING = [*DATA, "scored_epoch"]
ACCURACY, LOSS = "test_accuracy_noisy", "test_loss_noisy"
TIES = {"highest": "highest b", "lower loss": "lower validation loss", "lowest": "lowest b"}

# The paper's rows of the two Gaussians as a public course project quotes them, bongseokkim/flooding
# on GitHub, 2022: last epoch, noisy test labels; fractions and nats, by label noise.
QUOTED = pd.DataFrame(
    {
        "without": {0.01: 0.9052, 0.05: 0.8479, 0.1: 0.7844},
        "with": {0.01: 0.9213, 0.05: 0.8803, 0.1: 0.8359},
        "b": {0.01: 0.17, 0.05: 0.22, 0.1: 0.32},
    }
)
CANDIDATE = ["hidden_layers", "batch_norm", "train_samples", "batch_size"]
RELEASED = (4, True, 200, 200)
CANDIDATES = [
    (*network, *sizes)
    for network in ((4, True), (5, True), (5, False))
    for sizes in ((200, 200), (200, 100), (100, 100))
]
FIRST_TRIALS, LAST_TRIALS, LEAD = 3, 10, 4  # of the rule that chooses the network

FILES = {
    "levels": "table_synth_trials.csv",
    "starts": "table_synth_starts.csv",
    "more_starts": "starts_*/table_synth_starts.csv",
    "candidates": "candidates/*/table_synth_trials.csv",
    "methods": "flood_on_*/table_synth_trials.csv",
    "ours": HISTORY_FILE,
}


@dataclass(frozen=True)
class Raw:
    """What is there of the raw figures; an empty table is a file that is not.

    `levels` and `starts` are the table's and the fair search's, `more_starts` those of a search
    with more of them in a few settings, `candidates` those of all networks that were tried,
    `methods` those with other losses flooded, by `flood_on`; `ours` and `authors` the demo's last
    epoch, a row a seed and level. `ways` and `table` are made of levels and starts.
    """

    levels: pd.DataFrame
    starts: pd.DataFrame
    more_starts: pd.DataFrame
    candidates: pd.DataFrame
    methods: dict[str, pd.DataFrame]
    ours: pd.DataFrame
    authors: pd.DataFrame
    ways: dict[str, pd.DataFrame]
    table: pd.DataFrame

    def over(self, way: str, other: str, column: str = ACCURACY) -> pd.DataFrame:
        """Return `summarize` of what a way gains over another."""
        return summarize(self.gain(way, other, column))

    def gain(self, way: str, other: str, column: str = ACCURACY) -> pd.Series:
        """Return what a way gains over another, a value a trial and scored epoch."""
        return gain(self.ways[way], self.ways[other], column)


def read_raw(folder: Path) -> Raw:
    """Read all raw figures that a folder has; those of table and demo, if they have two trials.

    Raises TrialsError for a file that is cut short within a trial or trained with something else.
    """
    tables = [name for name in FILES if name != "ours"]
    read = {name: read_all(sorted(folder.glob(FILES[name]))) for name in tables}
    read["ours"] = read_demo(folder)
    for name in ("levels", "ours"):
        if read[name].seed.nunique() == 1:  # without an interval, or another trial to choose by
            read[name] = read[name][:0]
    levels, starts, methods = read["levels"], read["starts"], read["methods"]
    check_trained_alike(levels, starts, read["more_starts"], methods)
    authors = json.loads((FIGURES / "authors_demo.json").read_text())["runs"]
    return Raw(
        levels, starts, read["more_starts"], read["candidates"],
        methods=dict(iter(methods.groupby("flood_on"))) if len(methods) else {},
        ours=read["ours"],
        authors=pd.DataFrame(authors),
        ways=list_ways(levels, starts) if len(levels) else {},
        table=compare(levels, starts) if len(levels) else levels,
    )  # fmt: skip


def read_all(paths: list[Path]) -> pd.DataFrame:
    """Put a table's files together."""
    files = [read_trials(path) for path in paths]
    return pd.concat(files, ignore_index=True) if files else pd.DataFrame(columns=COLUMNS)


def read_demo(folder: Path) -> pd.DataFrame:
    """Read the last epoch of a demo that is trained as the authors'; no rows where none is."""
    if not (folder / HISTORY_FILE).exists():
        return pd.DataFrame(columns=["seed"])
    try:
        trained, asked = (json.loads((of / SETTINGS_FILE).read_text()) for of in (folder, FIGURES))
        differ = [name for name in (*DATA, *SHARED[:-1]) if trained[name] != asked[name]]
        history = read_csv(folder / HISTORY_FILE)
    except (ValueError, KeyError) as error:  # pandas' and JSON's own errors are ValueErrors
        raise TrialsError(f"{folder}: cannot be read as a demo ({error})") from error
    if differ or not {0.0, 0.26} <= {*trained["flood_levels"]}:
        name = differ[0] if differ else "flood_levels"
        reason = f"{name} is {trained[name]}, and the authors' demo has {asked[name]}"
        raise TrialsError(f"{folder / SETTINGS_FILE}: {reason}")
    last = history[history.epoch == trained["epochs"]]
    rows = trained["trials"] * len(trained["flood_levels"])
    if len(last) != rows or last.isna().any(axis=None):
        raise TrialsError(f"{folder / HISTORY_FILE}: is cut short, figures are missing")
    return last


def check_trained_alike(*files: pd.DataFrame) -> None:
    """Raise TrialsError unless all are of one network and training, but for what is flooded."""
    for name in SHARED:
        values = {value for rows in files for value in rows[name].unique()}
        if len(values) > 1 and name != "flood_on":
            raise TrialsError(f"table, starts and methods cannot be compared: {name} is {values}")


def list_ways(levels: pd.DataFrame, starts: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the chosen rows of each way, indexed by KEY, all in one order.

    - without: no flooding, the trial's own network
    - highest, lower loss, lowest: best validation accuracy, by the three rules for ties
    - validation loss: lowest validation loss
    - other trials: see `choose_on_other_trials`
    - entropy, entropy or lower: see `entropy_rule`, with distances of 9 and of 3 digits
    - top level: the highest level of all
    - best start: the best network without flooding, ties to the lower validation loss
    """
    chosen = {"without": levels[levels.flood_level == 0]}
    chosen |= {ties: choose_models(levels, "noisy", KEY, ties) for ties in TIES}
    by_loss = levels.sort_values(["val_loss_noisy", "flood_level"], kind="stable")
    chosen["validation loss"] = by_loss.drop_duplicates(KEY)
    chosen["other trials"] = choose_on_other_trials(levels)
    chosen["entropy"] = levels[levels.flood_level == entropy_rule(levels)]
    chosen["entropy or lower"] = levels[levels.flood_level == entropy_rule(levels, digits=3)]
    chosen["top level"] = levels[levels.flood_level == levels.flood_level.max()]
    if len(starts):
        chosen["best start"] = choose_models(starts, "noisy", KEY, "lower loss")
    indexed = {way: rows.set_index(KEY) for way, rows in chosen.items()}
    return {way: rows.reindex(indexed["without"].index) for way, rows in indexed.items()}


def expected_best(starts: pd.DataFrame, count: int) -> pd.Series:
    """Return each trial's expected accuracy of the best of so many of its starts, drawn at random.

    Best is chosen as everywhere. Of m starts, the one that is r-th best, from 0, is the best of
    those that are drawn with the probability C(m - 1 - r, count - 1) / C(m, count).
    """
    order = {"val_accuracy_noisy": False, "val_loss_noisy": True, "start": True}
    best_first = starts.sort_values([*order], ascending=[*order.values()], kind="stable")
    trials = best_first.groupby(KEY, sort=False)
    size, rank = trials.start.transform("size"), trials.cumcount()
    if (size < count).any():
        raise TrialsError(f"the best of {count} starts is asked for, and a trial has {min(size)}")
    comb = scipy.special.comb
    weight = comb(size - 1 - rank, count - 1) / comb(size, count)
    return best_first.assign(part=weight * best_first[ACCURACY]).groupby(KEY).part.sum()


def choose_on_other_trials(levels: pd.DataFrame) -> pd.DataFrame:
    """Return each trial's row at the level that the setting's other trials choose.

    That is the level of their best mean noisy validation accuracy, and the highest of those that
    tie: the trial whose test accuracy is counted has no part in it.
    """
    rows = []
    for seed, trial in levels.groupby("seed"):
        others = levels[levels.seed != seed].groupby([*SETTING, "flood_level"], as_index=False)
        means = others.val_accuracy_noisy.mean().round(9)  # sums in another order tie all the same
        chosen = choose_models(means, "noisy", SETTING)[[*SETTING, "flood_level"]]
        rows.append(trial.merge(chosen))
    return pd.concat(rows)


def entropy(share: pd.Series) -> pd.Series:
    """Return -p ln p - (1 - p) ln(1 - p), in nats.

    It is the mean cross-entropy of a classifier that is right with frequency p and says so: it
    gives each of its answers the probability p.
    """
    return scipy.special.entr(share) + scipy.special.entr(1 - share)


def entropy_rule(levels: pd.DataFrame, digits: int = 9) -> pd.Series:
    """Return, for each row, the level that is nearest to the entropy of its label noise.

    Distances are compared after rounding to so many digits; of equals it is the lower level.
    """
    grid, noise = np.sort(levels.flood_level.unique()), levels.label_noise.unique()
    nearest = {p: grid[abs(grid - entropy(p)).round(digits).argmin()] for p in noise}
    return levels.label_noise.map(nearest)


def gain(way: pd.DataFrame, other: pd.DataFrame, column: str = ACCURACY) -> pd.Series:
    """Return what a way gains over another, a value a trial and scored epoch."""
    return way[column] - other[column]


def summarize(gains: pd.Series) -> pd.DataFrame:
    """Return a row a setting and scored epoch: the trials' mean gain, with interval and tests.

    Columns: trials, mean, low and high (95 %, Student's t), p (t-test), flip (sign-flip test), both
    NaN for fewer than LEAST_TRIALS trials, and p_adjusted and flip_adjusted, after Benjamini and
    Hochberg over all rows that have a p.
    """
    gains, rows = gains.dropna(), {}
    names = [name for name in SETTING if name in gains.index.names]
    for setting, group in gains.groupby(names, sort=False):
        row = {name[2:]: value for name, value in paired_gain("g", group).items()}
        flip = sign_flip(group) if len(group) >= LEAST_TRIALS else math.nan
        rows[setting] = {"trials": len(group), **row, "flip": flip}
    table = pd.DataFrame.from_dict(rows, orient="index")
    for name in ("p", "flip"):
        table[f"{name}_adjusted"] = adjust_p(table[name])
    return table.set_index(pd.MultiIndex.from_tuples(table.index, names=names))


def sign_flip(differences: pd.Series) -> float:
    """Return the two-sided p of an exact sign-flip test of paired differences.

    If flooding did nothing, each difference could as well have had the other sign: p is the share
    of all 2^n ways to set the signs whose sum is at least as far from 0 as the one that was seen.
    """
    sums = np.zeros(1)
    for difference in differences:
        sums = np.concatenate([sums + difference, sums - difference])
    return float(np.mean(abs(sums) >= abs(sum(differences)) - 1e-12))


def share_of_ties(levels: pd.DataFrame) -> pd.Series:
    """Return the share of the trials in which levels share the best validation accuracy."""
    best = levels.groupby(KEY).val_accuracy_noisy.transform("max")
    tied = levels[levels.val_accuracy_noisy == best].groupby(KEY, sort=False).size() > 1
    return tied.groupby(SETTING, sort=False).mean()


def from_low_to_high_noise(values: pd.Series) -> pd.Series:
    """Return the change of each seed's value from the lowest to the highest label noise."""
    wide = values.unstack("label_noise")
    return (wide[wide.columns.max()] - wide[wide.columns.min()]).dropna()


def calibration(rows: pd.DataFrame) -> pd.DataFrame:
    """Return, a setting: models, those with a test loss above ln 2, and the mean excess in nats.

    ln 2 is the loss of a coin. The excess is that of the test loss over the `entropy` of the test
    accuracy: what the network pays for being surer, or less sure, than it is right.
    """
    figures = rows.reset_index()
    figures["above"] = figures[LOSS] > math.log(2)
    figures["excess"] = figures[LOSS] - entropy(figures[ACCURACY])
    columns = {"models": ("above", "size"), "above": ("above", "sum"), "excess": ("excess", "mean")}
    return figures.groupby(SETTING, sort=False).agg(**columns)


def candidate_figures(candidates: pd.DataFrame, ties: str = "highest") -> pd.DataFrame:
    """Return the nine figures of each candidate's trials that have all of them, by rule for ties.

    A row has CANDIDATE and seed, a column the figure and the label noise: accuracy at the last
    epoch without and with flooding, b. Fractions and nats.
    """
    last = candidates[(candidates.scored_epoch == "last") & (candidates.dataset == "gaussian")]
    trial = [*CANDIDATE, "seed", "label_noise"]
    without = last[last.flood_level == 0].set_index(trial)[ACCURACY]
    chosen = choose_models(last, "noisy", trial, ties).set_index(trial)
    figures = pd.DataFrame({"without": without, "with": chosen[ACCURACY], "b": chosen.flood_level})
    wide = figures.unstack("label_noise").reindex(columns=QUOTED.unstack().index)
    return wide.dropna().sort_index()


def distances(figures: pd.DataFrame) -> pd.DataFrame:
    """Return a candidate's nine terms of its distance to the quoted figures; their sum is it.

    A term is (mean - quoted)^2 / (2 s^2 / 10), with s the deviation over trials of that figure,
    pooled over all candidates: NaN while none has two trials.
    """
    groups = figures.groupby(CANDIDATE)
    within = figures - groups.transform("mean")
    variance = (within**2).sum() / (len(figures) - groups.ngroups or math.nan)
    return (groups.mean() - QUOTED.unstack()) ** 2 / (2 * variance / LAST_TRIALS)


def first_distances(figures: pd.DataFrame) -> pd.Series:
    """Return each candidate's distance by the first trials alone."""
    return distances(figures.groupby(CANDIDATE).head(FIRST_TRIALS)).sum(axis=1)


def choose_network(figures: pd.DataFrame) -> tuple[str, list[tuple]]:
    """Apply the rule; return the state ("first", "last", "chosen") and the candidates it means.

    - first: those of the nine that lack some of their first three trials
    - last: those of the two nearest, by the first three trials of all, that lack some of ten
    - chosen: the nearer of these two, and then the other. Of two whose distances differ by less
      than 4 the released network with the released sizes comes first if it is one of them.
    """
    trials = figures.groupby(CANDIDATE).size().reindex(CANDIDATES, fill_value=0)
    if missing := [one for one in CANDIDATES if trials[one] < FIRST_TRIALS]:
        return "first", missing
    nearest = [*first_distances(figures).nsmallest(2).index]
    if missing := [one for one in nearest if trials[one] < LAST_TRIALS]:
        return "last", missing
    total = distances(figures).sum(axis=1)[nearest].sort_values()
    order = [*total.index]
    if order[1] == RELEASED and total.iloc[1] - total.iloc[0] < LEAD:
        order.reverse()
    return "chosen", order


def welch(ours: pd.Series, theirs: pd.Series) -> dict[str, float]:
    """Return the difference of two means with its 95 % interval by Welch's t.

    It takes neither the two deviations as equal nor the seeds as pairs, which they are not: no
    random stream is shared.
    """
    interval = scipy.stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
    return {"mean": ours.mean() - theirs.mean(), "low": interval.low, "high": interval.high}
