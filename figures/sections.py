"""How RESULTS.md says figures, and its sections of statistics: what a sceptic asks of the table.

A section is a function of the raw figures that returns its sentences, which the README may quote,
and its paragraphs: how to read a table, and the table.
"""

import math
from collections.abc import Callable, Mapping

import pandas as pd
import recount
from recount import ACCURACY, KEY, LOSS, SETTING, TIES, Raw, gain, summarize

import results
from datasets import name_of
from results import SIGNIFICANCE, number, paired_gain, table_rows
from settings import SCORED_EPOCHS

LETTERS = dict(zip(SCORED_EPOCHS, "AB"))
Section = tuple[list[str], list[str]]


def interval(row: Mapping[str, float], scale: float = 100, digits: int = 1, p: str = "") -> str:
    """Return a difference with its interval and, under the name `p`, an adjusted p-value."""
    figures = (scale * row[name] for name in ("mean", "low", "high"))
    return results.interval(*figures, row[p] if p else math.nan, digits)


def shown(summary: pd.DataFrame, scale: float = 100, digits: int = 1, p: str = "") -> pd.Series:
    """Return the rows of `summarize` as texts."""
    return summary.apply(interval, axis=1, args=(scale, digits, p))


def shown_bold(summary: pd.DataFrame) -> pd.Series:
    """Return the rows of `summarize` as texts, bold where the adjusted p is significant."""
    texts = shown(summary)
    return texts.mask(summary.p_adjusted < SIGNIFICANCE, "**" + texts + "**")


def shown_flip(summary: pd.DataFrame) -> pd.Series:
    """Return the adjusted p of the sign-flip test as texts."""
    return summary.flip_adjusted.map(lambda p: number(p, 3))


def mean_of(rows: pd.DataFrame, column: str = ACCURACY) -> pd.Series:
    """Return a column's mean over the trials of each setting, accuracies in %, as texts."""
    scale, digits = (100, 1) if column == ACCURACY else (1, 2)
    means = scale * rows.groupby(SETTING, sort=False)[column].mean()
    return means.map(lambda mean: number(mean, digits))


def mean_and_level(way: pd.DataFrame) -> pd.Series:
    """Return a way's mean accuracy in % and, in brackets, its mean flood level, as texts."""
    return mean_of(way) + " (" + mean_of(way, "flood_level") + ")"


def by_setting(columns: Mapping[str, pd.Series]) -> str:
    """Return a table with a line a setting, and each column for A and for B."""
    texts = {
        f"{letter}: {title}": column.xs(epoch, level="scored_epoch")
        for epoch, letter in LETTERS.items()
        for title, column in columns.items()
    }
    order = next(iter(texts.values())).index
    table = pd.DataFrame({title: column.reindex(order) for title, column in texts.items()})
    table = table.fillna("-")
    lines = []
    for index, row in table[(table != "-").any(axis=1)].iterrows():
        data = pd.Series(index, order.names)
        name = name_of(data.dataset, data.spiral_noise)
        name += f", {100 * data.label_noise:g}%" if "label_noise" in data else ""
        lines.append({"setting": name, **row})
    return table_rows(lines)


def counted(values: pd.DataFrame | pd.Series, epoch: str) -> pd.DataFrame | pd.Series:
    """Return what sentences count: the rows of one scored epoch without spiral noise."""
    return values.xs((epoch, 0.0), level=("scored_epoch", "spiral_noise"))


def of_both(say: Callable[[str], str], between: str = "; ") -> str:
    """Say something of A and of B."""
    return between.join(f"in {letter} {say(epoch)}" for epoch, letter in LETTERS.items())


def size(summary: pd.DataFrame, epoch: str) -> str:
    """Say how large a gain is in points: on average over the settings (from where to where)."""
    mean = 100 * counted(summary, epoch)["mean"]
    middle, low, high = (number(value, 1, True) for value in (mean.mean(), mean.min(), mean.max()))
    return f"{middle} ({low} to {high})"


def adjusted(summary: pd.DataFrame) -> str:
    """Say over how many comparisons the p-values of `summarize` are adjusted."""
    if summary.p.count():
        return f"adjusted over {summary.p.count()} comparisons"
    return "left out with fewer than ten trials"


def is_tested(summary: pd.DataFrame) -> bool:
    """Say whether all that sentences count has ten trials, and so a p-value."""
    return bool(summary.xs(0.0, level="spiral_noise").p.notna().all())


def average(gains: pd.Series) -> str:
    """Say how large a gain is over all settings, with the interval of the trials' own averages."""
    mean, low, high, _ = paired_gain("", 100 * gains.groupby("seed").mean()).values()
    return f"{results.interval(mean, low, high, math.nan)} points on average"


def verdict(gains: pd.Series) -> str:
    """Say of A and B how large a gain is, in how many settings it is positive or significant."""
    summary = summarize(gains)
    tested = is_tested(summary)

    def say(epoch: str) -> str:
        rows = counted(summary, epoch).round(9)  # a tie is no lead
        sure = rows[rows.p_adjusted < SIGNIFICANCE if tested else rows.low * rows.high > 0]["mean"]
        ahead, surely, behind = ((some > 0).sum() for some in (rows["mean"], sure, -sure))
        return (
            f"{average(counted(gains, epoch))} ({ahead} of {len(rows)} settings ahead, "
            f"{surely} significantly; {behind} significantly behind)"
        )

    return of_both(say) + (f"; p {adjusted(summary)}" if tested else "")


def two_tests(raw: Raw) -> Section:
    """The gains of the table, by a t-test and a sign-flip test."""
    sides = {"gain": "without", "fair gain": "best start"}
    sides = {title: raw.over("highest", way) for title, way in sides.items() if way in raw.ways}
    tested = [f"{adjusted(gains)} ({title})" for title, gains in sides.items() if gains.p.any()]
    how = (
        "The gain of flooding over no flooding, and over the best start without it, with the p of "
        "a paired t-test and that of an exact sign-flip test, which does not take the gains as "
        "normally distributed: the share of all ways to set the signs of the trials' gains whose "
        f"sum is as far from 0 as the one that was seen, with ten trials at least 0.002. The p are "
        f"{' and '.join(tested) or 'left out with fewer than ten trials'}."
    )
    columns = {}
    for title, gains in sides.items():
        columns[title] = shown(gains, p="p_adjusted")
        columns[f"{title}, sign-flip p"] = shown_flip(gains)
    return [], [how, by_setting(columns)]


def other_trials(raw: Raw) -> Section:
    """What is left of the gain where a trial has no part in the choice of its b."""
    ways = raw.ways
    gains, own = raw.over("other trials", "without"), raw.over("highest", "without")

    def say(epoch: str) -> str:
        return f"{size(gains, epoch)} where each trial's own choice has {size(own, epoch)}"

    sentence = (
        f"If only the other trials choose b, the gain of flooding in points, on average (and from "
        f"setting to setting), is {of_both(say)}."
    )
    how = (
        "The level of best mean validation accuracy over the other trials, the highest of those "
        "that tie, and its gain over no flooding in the trial that had no part in the choice, "
        "beside the gain of each trial's own choice. The folds overlap, so there is no p, and the "
        "interval is somewhat too narrow."
    )
    columns = {"b": mean_of(ways["other trials"], "flood_level"), "gain": shown(gains)}
    return [sentence], [how, by_setting({**columns, "own choice": shown(own)})]


def three_rules(raw: Raw) -> Section:
    """Whether it matters which of the levels that tie is taken."""
    sides = {"gain": "without", "fair gain": "best start"}
    lines, significant = [], []
    for ties, name in TIES.items():
        line = {"ties go to": f"the {name}"}
        for title, side in sides.items():
            if side not in raw.ways:
                continue
            gains = raw.over(ties, side)
            sure = gains.query("spiral_noise == 0 and p_adjusted < @SIGNIFICANCE and mean > 0")
            for epoch, letter in LETTERS.items():
                count = (sure.index.get_level_values("scored_epoch") == epoch).sum()
                tested = f", {count} significant" if is_tested(gains) else ""
                line[f"{letter}: {title}"] = f"{size(gains, epoch)}{tested}"
            line[f"comparisons of {title}"] = str(gains.p.count())
            if side == "without" and is_tested(gains):
                significant.append({*sure.index})
        lines.append(line)
    shares = recount.share_of_ties(raw.levels)
    decided = of_both(lambda epoch: f"in {100 * counted(shares, epoch).mean():.0f}%", ", ")
    sentence = f"Several levels share the best validation accuracy {decided} of the choices"
    if any(significant):
        sentence += (
            f"; of the {len(significant[0])} significant gains of flooding over no flooding "
            f"{len(set.intersection(*significant))} are significant under all three rules for ties"
        )
    how = (
        "Gains in points under each rule, on average over the settings (from where to where), and "
        "how many are significant and positive, by t-tests adjusted over as many comparisons as "
        "stand there; the fair gain is that over the best start without flooding."
    )
    return [f"{sentence}."], [how, table_rows(lines)]


def fewer_levels(raw: Raw) -> Section:
    """Whether a grid of fewer flood levels chooses worse."""
    fine = raw.candidates.merge(raw.levels[recount.CANDIDATE].drop_duplicates())
    if fine.empty:
        return [], ["Not here yet: no candidate has the table's network."]
    grid = sorted(fine.flood_level.unique())
    coarse = fine[fine.flood_level.isin(grid[::5])]
    chosen = [results.choose_models(rows, "noisy", KEY).set_index(KEY) for rows in (coarse, fine)]
    gains = summarize(gain(*chosen))
    few = f"{len(grid[::5])} levels {5 * grid[1]:g} apart"
    many = f"{len(grid)} levels {grid[1]:g} apart"
    sentence = (
        f"On the Gaussians a b chosen from {few}, and not from {many}, changes the accuracy, in "
        f"points, {of_both(lambda epoch: f'by {size(gains, epoch)}')}."
    )
    how = (
        f"What a coarser grid costs: the trials that the table's network has in the first section, "
        f"which have {many}, chosen from all of these and from every fifth."
    )
    columns = {"b of all": mean_of(chosen[1], "flood_level"), "change by fewer": shown(gains)}
    return [sentence], [how, by_setting(columns)]


def more_trainings(raw: Raw) -> Section:
    """How the fair gain depends on how many levels, and starts, there are to choose from."""
    grid = sorted(raw.levels.flood_level.unique())
    single = recount.expected_best(raw.starts, 1)
    fair_gains, lines = {}, []
    for step in range(len(grid) - 1, 0, -1):
        if (len(grid) - 1) % step:
            continue
        levels = grid[::step]
        few = raw.levels[raw.levels.flood_level.isin(levels)]
        flooded = results.choose_models(few, "noisy", KEY).set_index(KEY)[ACCURACY]
        best = recount.expected_best(raw.starts, len(levels))
        gains = {"levels over one start": flooded - single, "starts over one": best - single}
        gains["fair gain"] = fair_gains[len(levels)] = flooded - best
        line = {"trainings": str(len(levels))}
        for epoch, letter in LETTERS.items():
            for title, values in gains.items():
                text = average(counted(values.dropna(), epoch))
                line[f"{letter}: {title}"] = text.removesuffix(" points on average")
        lines.append(line)

    def say(epoch: str) -> str:
        means = (100 * counted(gains, epoch).mean() for gains in fair_gains.values())
        return ", ".join(number(mean, sign=True) for mean in means)

    counts = ", ".join(map(str, fair_gains))
    sentence = (
        f"Chosen from {counts} equally spaced flood levels from 0 to {grid[-1]:g}, flooding gains "
        f"over what is expected of the best of as many trainings without it, in points on average, "
        f"{of_both(say)}."
    )
    how = (
        "The more trainings there are to choose from, the better is the chosen one. Below are "
        "gains in points, on average over the settings: of so many flood levels over a single "
        "start without flooding; of the best of so many starts over a single one; and of the first "
        "over the second. Fewer starts than all are drawn at random from those that a trial has: "
        "what is expected of them is a mean over all ways to draw, so that its intervals are "
        "narrower than those of one such search. The last line is the fair search. More starts are "
        "of the same command with `--flood-step 0.01`, in a folder like `figures/starts_51`."
    )
    return [sentence, *over_more_starts(raw)], [how, table_rows(lines)]


def over_more_starts(raw: Raw) -> list[str]:
    """Say what flooding gains over the best of more starts, in the settings that have them."""
    sentences = []
    for setting, starts in raw.more_starts.groupby(recount.DATA):
        best = results.choose_models(starts, "noisy", KEY, "lower loss").set_index(KEY)
        gains = gain(raw.ways["highest"], best).dropna()
        if gains.empty:
            raise results.TrialsError(f"more starts of {setting}: the table has no such trial")
        summary = summarize(gains)

        def say(epoch: str, summary: pd.DataFrame = summary) -> str:
            return ", ".join(shown(summary.xs(epoch, level="scored_epoch"), p="p_adjusted"))

        data = pd.Series(setting, recount.DATA)
        name = f"{name_of(data.dataset, data.spiral_noise)}, {100 * data.label_noise:g}%"
        sentences.append(
            f"On {name} label noise, flooding with {raw.levels.flood_level.nunique()} levels gains "
            f"over the best of {starts.start.nunique()} trainings without it, in points, "
            f"{of_both(say)}; p {adjusted(summary)}."
        )
    return sentences


def label_noise(raw: Raw) -> Section:
    """What more label noise changes."""
    chosen, without = raw.ways["highest"], raw.ways["without"]
    gains = summarize(recount.from_low_to_high_noise(gain(chosen, without)))
    levels = summarize(recount.from_low_to_high_noise(chosen.flood_level))
    low, high = (f"{100 * end(raw.levels.label_noise):g}%" for end in (min, max))

    def say(epoch: str) -> str:
        rows = shown(counted(gains, epoch)).items()
        return ", ".join(f"by {text} ({index[0]})" for index, text in rows)

    sentence = (
        f"From {low} to {high} label noise the gain of flooding changes, in points, {of_both(say)}."
    )
    how = f"How gain and chosen b change from {low} to {high} label noise, each seed beside itself:"
    return [sentence], [how, by_setting({"gain": shown(gains), "b": shown(levels, 1, 2)})]


def calibration(raw: Raw) -> Section:
    """How many trainings lose to a coin, and what being too sure costs."""
    ways = {"without": raw.ways["without"], "with": raw.ways["highest"], "all levels": raw.levels}
    figures = {way: recount.calibration(rows) for way, rows in ways.items()}

    def say(epoch: str) -> str:
        above = {way: counted(figures[way], epoch).above.sum() for way in ways}
        models = counted(figures["without"], epoch).models.sum()
        counts = f"{above['without']} of {models} trainings without flooding"
        return f"in {counts} and {above['with']} with it"

    sentence = f"The test loss is above ln 2, a coin's, {of_both(say)}."
    how = (
        "How many trainings have a test loss above ln 2, and the *excess*, by how many nats the "
        "loss is above the entropy of the accuracy: that is the loss of a classifier that gives "
        "each of its answers its accuracy as probability, and what is above it is the price of "
        "being surer, or less sure, than it is right. *With* is the chosen b, *all levels* every "
        "training of the table."
    )
    columns = {
        f"{way}, above ln 2": rows.above.astype(str) + " of " + rows.models.astype(str)
        for way, rows in figures.items()
    }
    for way in ("without", "with"):
        columns[f"{way}, excess"] = figures[way].excess.map(lambda nats: number(nats, 2, True))
    return [sentence], [how, by_setting(columns)]


def accuracy_and_loss(raw: Raw) -> Section:
    """Where validation accuracy and validation loss choose different b."""
    accuracy, loss = raw.ways["highest"], raw.ways["validation loss"]
    level, points, nats = (
        raw.over("validation loss", "highest", column) for column in ("flood_level", ACCURACY, LOSS)
    )

    def say(epoch: str) -> str:
        rows = counted(level, epoch)
        lower, higher = (rows.high < 0).sum(), (rows.low > 0).sum()
        return f"lower in {lower} and higher in {higher} of {len(rows)} settings"

    sentence = (
        f"Chosen by validation loss instead of validation accuracy b is, where the interval of the "
        f"change leaves 0 out, {of_both(say)}."
    )
    how = (
        "b of best validation accuracy (ties to the highest), b of lowest validation loss, and how "
        "the second choice changes b, test accuracy (points) and test loss (nats)."
    )
    columns = {"b by accuracy": mean_of(accuracy, "flood_level")}
    columns |= {"b by loss": mean_of(loss, "flood_level"), "change of b": shown(level, 1, 2)}
    columns |= {"change of accuracy": shown(points), "change of loss": shown(nats, 1, 2)}
    return [sentence], [how, by_setting(columns)]


def fixed_levels(raw: Raw) -> Section:
    """What b fixed in advance gains or costs: the entropy of the noise, or the highest level."""
    ways, top = raw.ways, raw.levels.flood_level.max()
    gains, chosen = raw.over("entropy", "without"), raw.over("entropy", "highest")
    at_top = raw.over("top level", "without")
    sentences = [
        f"With b fixed in advance at the level nearest to the entropy of the label noise, flooding "
        f"gains over no flooding {verdict(raw.gain('entropy', 'without'))}.",
        f"The change from each trial's own choice of b to this one is "
        f"{verdict(raw.gain('entropy', 'highest'))}.",
        f"The change from no flooding to the highest level, b = {top:g}, is "
        f"{verdict(raw.gain('top level', 'without'))}.",
    ]
    noise = raw.levels.label_noise
    between = noise[recount.entropy_rule(raw.levels) != recount.entropy_rule(raw.levels, digits=3)]
    if len(between):
        where = ", ".join(f"{100 * p:g}% ({recount.entropy(p):.4f})" for p in between.unique())
        sentences.append(
            f"At {where} the entropy is midway between two levels; with the lower of them there, "
            f"flooding gains over no flooding, in all settings, "
            f"{verdict(raw.gain('entropy or lower', 'without'))}."
        )
    how = (
        "b = −p ln p − (1 − p) ln(1 − p) for a share p of flipped labels, known and fixed in "
        "advance, rounded to the grid of levels, the same in all trials: what it gains over no "
        f"flooding, and over b chosen by validation accuracy; and what the highest level gains "
        f"over no flooding. p is of a t-test, {adjusted(gains)}."
    )
    columns = {"b": mean_of(ways["entropy"], "flood_level")}
    columns["over no flooding"] = shown(gains, p="p_adjusted")
    columns["over chosen b"] = shown(chosen, p="p_adjusted")
    columns[f"b = {top:g}"] = shown(at_top, p="p_adjusted")
    return sentences, [how, by_setting(columns)]
