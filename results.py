"""What scores say: chosen flood levels, a demo's outcome, the paper's table; and their files."""

import math
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import pandas as pd
import scipy  # its `stats` takes a second, and is loaded where it is first used

from datasets import Data, best_possible_accuracy, name_of
from settings import SCORED_EPOCHS, SCORES, SPLITS, Model, Training

DATA = [field.name for field in fields(Data)]
TRIAL = [*DATA, "seed"]  # what tells the trials of a table apart
SHARED = [*(field.name for part in (Model, Training) for field in fields(part)), "version"]
MODEL = ["scored_epoch", "start", "flood_level"]  # what tells the rows of a trial apart
FIGURES = ["epoch", *(f"{split}_{score}" for split in SPLITS[1:] for score in SCORES)]
ORIGIN = ["commit", "torch", "device"]  # where a trial was trained
COLUMNS = [*TRIAL, *SHARED, *MODEL, *FIGURES, *ORIGIN]
SIGNIFICANCE = 0.05  # of the adjusted p-value that sets a gain in bold
SETTINGS_FILE, HISTORY_FILE, BOUNDARY_FILE = "demo.json", "history.csv", "boundary.npz"  # a demo's
LEAST_TRIALS = 10  # with fewer a gain has its interval, and no p-value
Files = Mapping[str, bytes | str | pd.DataFrame]  # contents by name


def choose_models(
    scores: pd.DataFrame, labels: str, by: Sequence[str] = (), ties: str = "highest"
) -> pd.DataFrame:
    """Return the row of the chosen model for each of the groups that the columns `by` make.

    Chosen is the best accuracy on the "noisy" or "clean" validation `labels`. Ties go to the
    "highest" flood level [released code], the "lowest", or the "lower loss" on the same labels
    (then the lower level, then the lower start).
    """
    among_equals = {
        "highest": {"flood_level": False},
        "lowest": {"flood_level": True},
        "lower loss": {f"val_loss_{labels}": True, "flood_level": True, "start": True},
    }
    rising = {f"val_accuracy_{labels}": False, **among_equals[ties]}
    best_first = scores.sort_values([*rising], ascending=[*rising.values()], kind="stable")
    return best_first.drop_duplicates(list(by)) if by else best_first.head(1)


@dataclass(frozen=True)
class Outcome:
    """What a demo comes to: `history` has a row a `seed`, `flood_level`, `epoch`; `chosen` is the
    level of best mean last-epoch validation accuracy; `compared`, shown beside no flooding, is that
    or, if it is 0, the best of the others; `summary` is the printed table.
    """

    history: pd.DataFrame
    parameters: Mapping[str, object]
    chosen: float
    compared: float
    summary: str


def conclude(history: pd.DataFrame, parameters: Mapping[str, object]) -> Outcome:
    """Choose a demo's level, on the validation labels that its `select_on` names; sum it up."""
    labels = str(parameters["select_on"])
    last = history[history.epoch == history.epoch.max()]
    means = last.groupby("flood_level").mean().round(9).reset_index()  # equal ones are equal
    chosen = choose_models(means, labels).flood_level.item()
    flooded = choose_models(means[means.flood_level > 0], labels).flood_level
    compared = flooded.item() if len(flooded) else chosen
    return Outcome(history, parameters, chosen, compared, _summarize(last, labels))


def _summarize(last: pd.DataFrame, labels: str) -> str:
    """Return a row a flood level as text; of several trials, how many of them choose the level."""
    trials = last.seed.nunique()
    chosen = choose_models(last, labels, ["seed"]).flood_level.value_counts()
    spread = f", mean ± standard deviation of {trials} trials" if trials > 1 else ""
    columns = {
        "train, noisy": "train_accuracy_noisy", f"val, {labels}": f"val_accuracy_{labels}",
        "test, clean": "test_accuracy_clean", "test loss, clean": "test_loss_clean",
    }  # fmt: skip
    lines = ["flood level" + "".join(f"{title:>{len(title) + 3}}" for title in columns)]
    for level, rows in last.groupby("flood_level"):
        line = f"{f'{level:g}' if level else 'no flooding':11}"
        for title, name in columns.items():
            line += f"{mean_and_spread(rows[name]):>{len(title) + 3}}"
        if level in chosen:
            line += "  <- chosen" + (f" by {chosen[level]}" if trials > 1 else "")
        lines.append(line)
    about = f"Last epoch, accuracies in %, each against noisy or clean labels{spread}:"
    return "\n".join([about, "", *lines])


def mean_and_spread(scores: pd.Series) -> str:
    """Return mean ± standard deviation of a score as text, accuracies in %; of one no deviation."""
    scale, digits = (1, 3) if "loss" in scores.name else (100, 1)
    mean, deviation = (number(scale * x, digits) for x in (scores.mean(), scores.std()))
    return mean if deviation == "-" else f"{mean} ± {deviation}"


def compare(trials: pd.DataFrame, starts: pd.DataFrame | None = None) -> pd.DataFrame:
    """Return the paper's table: a row a setting, scored epoch and kind of test labels.

    `trials` are the table's raw figures, `starts` those of the fair search, see `read_trials`. Each
    trial chooses its flood level, and its start, by noisy validation accuracy; of equals the
    highest level, and the start of lower validation loss. Accuracies are fractions; `best_possible`
    is the Bayes classifier's. `gain` is that of flooding over no flooding, `fair_gain` that over
    the best start without flooding, see `paired_gain`; `p_adjusted` is after Benjamini and Hochberg
    over the rows with the same labels. NaN is what is not known.
    """
    key = [*TRIAL, "scored_epoch"]
    without = trials[trials.flood_level == 0].set_index(key)
    starts = trials.iloc[:0] if starts is None else starts
    flooded = choose_models(trials, "noisy", key).set_index(key).loc[without.index]
    best_start = choose_models(starts, "noisy", key, "lower loss").set_index(key)
    sides = {"without_flooding": without, "with_flooding": flooded}
    sides["best_start"] = best_start.reindex(without.index)
    rows = []
    for labels in ("noisy", "clean"):
        accuracy = f"test_accuracy_{labels}"
        figures = pd.DataFrame({side: chosen[accuracy] for side, chosen in sides.items()})
        figures["flood_level"] = flooded.flood_level
        for (*values, epoch), group in figures.groupby([*DATA, "scored_epoch"], sort=False):
            data = Data(**dict(zip(DATA, values)))
            row = {**vars(data), "scored_epoch": epoch, "labels": labels, "trials": len(group)}
            flipped = data.label_noise if labels == "noisy" else 0.0
            row["best_possible"] = best_possible_accuracy(data, flipped)
            if group.best_start.isna().any():  # a mean over other trials is no comparison
                group = group.assign(best_start=math.nan)
            for name in figures:
                row |= {f"{name}_mean": group[name].mean(), f"{name}_std": group[name].std()}
            row |= paired_gain("gain", group.with_flooding - group.without_flooding)
            row |= paired_gain("fair_gain", group.with_flooding - group.best_start)
            rows.append(row)
    table = pd.DataFrame(rows).assign(starts=starts.start.nunique())
    for name in ("gain", "fair_gain"):
        table[f"{name}_p_adjusted"] = table.groupby("labels")[f"{name}_p"].transform(adjust_p)
    return table


def adjust_p(p: pd.Series) -> pd.Series:
    """Return p-values after Benjamini and Hochberg, over as many as are known."""
    known = p.dropna()
    return pd.Series(scipy.stats.false_discovery_control(known), known.index).reindex(p.index)


def paired_gain(name: str, gains: pd.Series) -> dict[str, float]:
    """Return the mean of the trials' gains, its 95 % interval and the p of a paired t-test.

    They are `name`_mean, _low, _high and _p, by Student's t; NaN the interval of one trial, the p
    of fewer than LEAST_TRIALS, and all of no trial. Equal gains have p 0, or 1 if they are none.
    """
    gains, p = gains.dropna(), math.nan
    mean, margin = gains.mean(), gains.sem() * scipy.stats.t.ppf(0.975, len(gains) - 1)
    if len(gains) >= LEAST_TRIALS:
        equal = gains.max() - gains.min() < 1e-12
        p = float(abs(mean) < 1e-12) if equal else scipy.stats.ttest_1samp(gains, 0).pvalue
    figures = {"mean": mean, "low": mean - margin, "high": mean + margin, "p": p}
    return {f"{name}_{figure}": value for figure, value in figures.items()}


def markdown(table: pd.DataFrame) -> str:
    """Return what `compare` returned as Markdown, accuracies and gains in %."""
    trials = " or ".join(map(str, sorted(table.trials.unique())))
    starts, known = table.starts.max(), table[table.labels == "noisy"].count()
    text = (
        f"Test accuracy in %, mean (standard deviation) over {trials} trials, on noisy labels, "
        f"which the quoted rows of the paper fit, and on clean ones. A: last epoch. B: early "
        f"stopping, the epoch of best validation accuracy. b: the flood level that each trial "
        f"chose by noisy validation accuracy, the highest of equals. Best possible: the Bayes "
        f"classifier of the clean labels. Gain: over no flooding, paired, with its 95% interval."
    )
    if starts:
        text += f" Best of {starts} starts: trainings without flooding from weights of their own, "
        text += "chosen alike, of equals that of lower validation loss. Fair gain: over that."
    if known.gain_p:
        text += f" p: of a t-test, adjusted (Benjamini-Hochberg) over {known.gain_p} gains"
        text += f" and over {known.fair_gain_p} fair gains" if known.fair_gain_p else ""
        text += f"; bold: below {SIGNIFICANCE:g}."
    for labels in ("noisy", "clean"):
        for letter, scored_epoch in zip("AB", SCORED_EPOCHS):
            shown = table[(table.labels == labels) & (table.scored_epoch == scored_epoch)]
            lines = [_shown(row, starts) for _, row in shown.iterrows()]
            text += f"\n\n{letter}, {labels} test labels:\n\n{table_rows(lines)}"
    return text + "\n"


def _shown(row: pd.Series, starts: int) -> dict[str, str]:
    """Return a row of `compare` as texts, by their titles."""
    shown = {
        "data set": name_of(row.dataset, row.spiral_noise),
        "label noise": f"{100 * row.label_noise:g}%",
        "best possible": number(100 * row.best_possible).replace("-", "unknown"),
        "without flooding": mean_and_deviation(row, "without_flooding"),
        "with flooding": mean_and_deviation(row, "with_flooding"),
        "b": mean_and_deviation(row, "flood_level", scale=1, digits=2),
        "gain": gain_and_interval(row, "gain"),
    }
    if starts:
        shown[f"best of {starts} starts"] = mean_and_deviation(row, "best_start")
        shown["fair gain"] = gain_and_interval(row, "fair_gain")
    return shown


def mean_and_deviation(row: pd.Series, name: str, scale: float = 100, digits: int = 1) -> str:
    """Return a mean (standard deviation) of `compare` as text; - is what is not known."""
    mean, deviation = (number(scale * row[f"{name}_{of}"], digits) for of in ("mean", "std"))
    return mean if deviation == "-" else f"{mean} ({deviation})"


def gain_and_interval(row: pd.Series, name: str) -> str:
    """Return a gain of `compare` in points, with interval and adjusted p as far as it has them."""
    figures = (100 * row[f"{name}_{figure}"] for figure in ("mean", "low", "high"))
    text = interval(*figures, p := row[f"{name}_p_adjusted"])
    return f"**{text}**" if p < SIGNIFICANCE else text


def interval(mean: float, low: float, high: float, p: float, digits: int = 1) -> str:
    """Return a difference with its interval and adjusted p as text, as far as they are known."""
    text, low, high = (number(figure, digits, sign=True) for figure in (mean, low, high))
    text += "" if low == "-" else f" [{low}, {high}]"
    return text + ("" if math.isnan(p) else f", p {p:.3f}" if p >= 0.001 else ", p < 0.001")


def number(value: float, digits: int = 1, sign: bool = False) -> str:
    """Return a number as text, without a minus before zero; - is what is not known."""
    rounded = round(round(float(value), 9), digits) + 0.0  # 0.145 is one number, however summed
    return "-" if math.isnan(rounded) else f"{rounded:{'+' * sign}.{digits}f}"


def table_rows(lines: Sequence[Mapping[str, str]]) -> str:
    """Return a table in Markdown; each line has its texts by the titles of the columns."""
    rows = [[*lines[0]], ["---"] * len(lines[0]), *(line.values() for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


class TrialsError(Exception):
    """A file of raw figures cannot be used; says which and why."""


def read_csv(path: Path) -> pd.DataFrame:
    """Read a table back, every bit of its floats, which pandas below 3 may round."""
    frame = pd.read_csv(path, dtype=dict.fromkeys(ORIGIN, str))
    floats = frame.select_dtypes("float").columns
    frame[floats] = pd.read_csv(path, usecols=floats, dtype=str).astype(float)
    return frame


def read_trials(
    path: Path, shared: Mapping[str, object] = {}, models: Collection[tuple[int, float]] = ()
) -> pd.DataFrame:
    """Read a table's raw figures, each trial once; none where the file is not there.

    `shared` is what all must have been trained with, `models` the (start, flood level) of each, a
    row a scored epoch; none said are those that any trial has. Raises TrialsError for a file that
    cannot be read, is cut short or was trained with something else, and for a trial with other
    models, or twice there, different.
    """
    if not path.exists():
        return pd.DataFrame(columns=COLUMNS)
    try:
        trials = read_csv(path)[COLUMNS].fillna({"commit": ""})
        trials = trials.astype(dict.fromkeys(FIGURES[1:], float))
    except (OSError, ValueError, KeyError) as error:  # pandas' own errors are ValueErrors
        raise TrialsError(f"{path}: cannot be read as raw figures ({error})") from error
    if trials.empty or trials.isna().any(axis=None):
        raise TrialsError(f"{path}: is cut short, figures are missing")
    for name, value in shared.items():
        if len(other := trials[name][trials[name] != value]):
            raise TrialsError(f"{path}: {name} is {other.iloc[0]}, and {value} is asked for")
    trials = add_trials(trials.drop_duplicates([name for name in COLUMNS if name not in ORIGIN]))
    models = models or {*trials[MODEL[1:]].itertuples(index=False, name=None)}
    wanted = sorted((epoch, *model) for epoch in SCORED_EPOCHS for model in models)
    for values, rows in trials.groupby(TRIAL):
        if sorted(rows[MODEL].itertuples(index=False, name=None)) != wanted:
            trial = ", ".join(f"{name} {value}" for name, value in zip(TRIAL, values))
            reason = "has not each flood level and start asked for, once: take another output_dir"
            raise TrialsError(f"{path}: {trial}: {reason}")
    return trials


def add_trials(*trials: pd.DataFrame) -> pd.DataFrame:
    """Put raw figures together, in the order of seed, data set, spiral noise and label noise."""
    order = ["seed", "dataset", "spiral_noise", "label_noise"]
    together = pd.concat([some[COLUMNS] for some in trials if len(some)])
    return together.sort_values(order, kind="stable", ignore_index=True)


def write_files(files: Files, directory: Path) -> list[Path]:
    """Write files into a folder, made if need be; they are moved into place when all are whole."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory) as folder:
            for name, content in files.items():
                if isinstance(content, pd.DataFrame):
                    content = content.to_csv(index=False)
                content = content.encode() if isinstance(content, str) else content
                (Path(folder) / name).write_bytes(content)
            return [(Path(folder) / name).replace(directory / name) for name in files]
    except OSError as error:  # of a full disk it does not say which
        raise OSError(f"{directory}: {error}") from error
