"""Write RESULTS.md, and print its sentences, from the raw figures.

    python figures/claims.py [FOLDER]

FOLDER has the raw figures and gets RESULTS.md; without it they are those of this folder, and
RESULTS.md is the repository's. A section whose raw figures are not there says so in one line.
"""

import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import recount
import sections
from recount import FIGURES, KEY, QUOTED, Raw, gain, summarize
from sections import (
    Section,
    average,
    by_setting,
    counted,
    interval,
    mean_and_level,
    mean_of,
    of_both,
    shown,
    shown_bold,
    verdict,
)

from results import TrialsError, markdown, mean_and_spread, number, table_rows, write_files
from settings import exit_on

INTRODUCTION = """\
# Results

`.venv/bin/python figures/claims.py` wrote this file from the raw figures in `figures/`.

A *setting* is a data set with its label noise; a *trial* is a draw of data, flipped labels and
initial weights; b is the flood level, in nats. *A* is the network after the last epoch, *B* that of
the epoch of best validation accuracy (early stopping). Accuracies and losses are on noisy test
labels unless said otherwise, gains of accuracy in points. Square brackets are 95% intervals of the
mean over trials, by Student's t. p-values are adjusted (Benjamini-Hochberg) over as many
comparisons as is said; of fewer than ten trials there are intervals and no p-values. *Significant*
is an adjusted p below 5%, or, of fewer than ten trials, an interval that leaves 0 out. Sentences
count the settings without spiral noise (τ = 0); those with τ = 1 are rows of their own."""
RULE = """\
Accuracy without → with flooding in % (b), mean over the trials of A on the two Gaussians. *Quoted*
are the paper's rows as a public course project quotes them (bongseokkim/flooding on GitHub, 2022):
second-hand, without deviations; no other row was found. The distance is the sum over the nine
figures of (ours − quoted)² / (2 s² / 10), with s the deviation over trials of that figure, pooled
over all candidates. The rule was fixed before these trainings, with a few trials of six of the nine
by other code known (the winner was not among them): three trials of each of nine candidates, then
ten of the two nearest; the smaller distance wins, and a difference below 4 goes to the
released network with the released sizes, 200 examples in one batch. The right network's distance
would be 19.5 on average with three trials, and 9 with ten. Since these rows choose the network,
that the table agrees with them is no evidence for it. A candidate is trained by `run_table_synth.py
--dataset gaussian --flood-step 0.02` with `--hidden-layers`, `--no-batch-norm`, `--train-samples`,
`--val-samples`, `--batch-size` and `--trials` as the row says, into a folder of
`figures/candidates`."""
VERSION_1 = """\
Version 1 of these figures (five plain hidden layers; Gaussians and spiral with 200 examples;
batches of 100; in this repository's history) missed the quoted rows: on the Gaussians with 10%
noise it had 81.7 with b = 0.46 where 83.59 with 0.32 is quoted."""
SPIRAL = """\
Without spiral noise (τ = 0, as in the authors' launcher) the spiral's inputs are the same in every
trial, and its validation inputs are its training inputs, which are 1% of the test inputs, too;
labels are flipped anew. The fair search with τ = 1 was added when all other figures were known, and
its p-values are adjusted with theirs: before it there were 18 comparisons."""
NETWORKS = {
    (4, True): "4 hidden layers with batch norm (released)",
    (5, True): "5 hidden layers with batch norm",
    (5, False): "5 plain hidden layers",
}
METHODS = {"example": "the mean of |l − b| + b over each example's loss l (iFlood, ICLR 2022)"}
DEMO = {
    "training accuracy, noisy labels": "train_accuracy_noisy",
    "validation accuracy, clean labels": "val_accuracy_clean",
    "test accuracy, clean labels": "test_accuracy_clean",
    "test accuracy, noisy labels": "test_accuracy_noisy",
    "training loss, noisy labels": "train_loss_noisy",
    "test loss, clean labels": "test_loss_clean",
    "test loss, noisy labels": "test_loss_noisy",
}


def network(raw: Raw) -> Section:
    """Which of nine candidates is nearest to the rows that are quoted from the paper."""
    figures = recount.candidate_figures(raw.candidates)
    terms, groups = recount.distances(figures), figures.groupby(recount.CANDIDATE)
    means, trials = groups.mean(), groups.size()
    total = terms.sum(axis=1, min_count=1).sort_values()
    lines = [{"network": "quoted", "trials": "-", **triples(QUOTED.unstack(), 2), "distance": "-"}]
    split = []
    for one in total.index:
        name, distance = describe(one), number(total[one])
        line = {"network": name, "trials": str(trials[one])}
        lines.append({**line, **triples(means.loc[one]), "distance": distance})
        each = {f"{what}, {100 * p:g}%": number(x) for (what, p), x in terms.loc[one].items()}
        split.append({"network": name, **each})
    known = len(total) and total.notna().all()
    terms_of = ["The nine terms of each distance:", table_rows(split)] if known else []
    said = rule(figures, total) + by_other_ties(raw.candidates)
    return said, [RULE, table_rows(lines), *terms_of]


def rule(figures: pd.DataFrame, total: pd.Series) -> list[str]:
    """What the rule chooses among the candidates' `recount.distances`, and from what."""
    state, candidates = recount.choose_network(figures)
    if state == "first":
        lacking = f"{len(candidates)} of 9 candidates lack some of three trials"
        return [f"No network is chosen yet: {lacking}."]
    nearest = recount.first_distances(figures).nsmallest(3).items()
    nearest = ", ".join(f"{describe(one)} ({distance:.1f})" for one, distance in nearest)
    after_first = f"After three trials of each the three nearest were: {nearest}."
    if state == "last":
        named = " and of ".join(map(describe, candidates))
        return [f"No network is chosen yet: not all ten trials are there of {named}.", after_first]
    chosen, other = (total[one] for one in candidates)
    sentence = (
        f"Of nine candidates the rule takes {describe(candidates[0])}: its distance to the quoted "
        f"figures is {chosen:.1f} over ten trials, that of the other finalist "
        f"({describe(candidates[1])}) {other:.1f}"
    )
    sentence += "; a difference below 4 goes to the released one." if chosen > other else "."
    trials = figures.groupby(recount.CANDIDATE).size()
    beyond = [
        f"Beyond the rule {describe(one)} has {trials[one]} trials, too: its distance is {x:.1f}."
        for one, x in total.items()
        if one not in candidates and trials[one] >= recount.LAST_TRIALS
    ]
    return [sentence, after_first, *beyond]


def by_other_ties(candidates: pd.DataFrame) -> list[str]:
    """What the rule takes if others are chosen of the levels that tie, if it chooses at all."""
    texts, taken = [], None
    for ties, name in recount.TIES.items():
        figures = recount.candidate_figures(candidates, ties)
        state, order = recount.choose_network(figures)
        if state != "chosen":
            return []
        taken = taken or order[0]  # with the first rule, the table's
        total = recount.distances(figures).sum(axis=1)
        text = f"the {name}: {describe(order[0])} ({total[order[0]]:.1f}"
        if order[0] != taken:
            text += f"; {describe(taken)}: {total[taken]:.1f}"
            if taken not in order:
                text += ", but not among the two nearest after three trials"
            if order[0] == recount.RELEASED and total[order[0]] - total[taken] < recount.LEAD:
                text += ", and a difference below 4 goes to the released one"
        texts.append(f"{text})")
    rest = "; ".join(texts)
    return [f"What the rule takes hangs on which of the levels that tie is taken; {rest}."]


def describe(candidate: tuple) -> str:
    """Return a candidate in words."""
    layers, batch_norm, samples, batch_size = candidate
    return f"{NETWORKS[layers, batch_norm]}, {samples} examples, batches of {batch_size}"


def triples(figures: pd.Series, digits: int = 1) -> dict[str, str]:
    """Return accuracy without and with flooding and b as texts, by label noise."""
    texts = {}
    for p in QUOTED.index:
        without, flooded, b = (figures[name, p] for name in QUOTED)
        accuracies = f"{number(100 * without, digits)} → {number(100 * flooded, digits)}"
        texts[f"{100 * p:g}%"] = f"{accuracies} ({number(b, 2)})"
    return texts


def table(raw: Raw) -> Section:
    """The paper's synthetic table."""
    gains = raw.over("highest", "without")
    sentences = [f"Flooding gains over no flooding {verdict(raw.gain('highest', 'without'))}."]
    last = raw.table.query("labels == 'noisy' and scored_epoch == 'last' and dataset == 'gaussian'")
    last = last.set_index("label_noise").reindex(QUOTED.index)
    columns = ["without_flooding_mean", "with_flooding_mean", "flood_level_mean"]
    ours = triples(last[columns].set_axis([*QUOTED], axis=1).unstack())
    quoted = triples(QUOTED.unstack(), 2)
    sentences.append(
        f"On the Gaussians with {', '.join(ours)} label noise A has, without → with flooding (b), "
        f"{', '.join(ours.values())}; quoted from the paper, second-hand, is "
        f"{', '.join(quoted.values())}."
    )
    sentences += with_spiral_noise(gains, "no flooding")
    beside = [{"": "ours", **ours}, {"": "quoted", **quoted}]
    how = "The rows of the two Gaussians, A, beside the quoted ones (see the first section):"
    of_trials = markdown(raw.table).strip().split("\n\n")
    return sentences, [*of_trials, SPIRAL, how, table_rows(beside), VERSION_1]


def with_spiral_noise(gains: pd.DataFrame, over: str) -> list[str]:
    """Say what flooding gains over something on the spiral with τ = 1, if that is known."""
    spread = gains[gains.index.get_level_values("spiral_noise") == 1]
    noise = ", ".join(f"{100 * p:g}%" for p in spread.index.unique("label_noise"))

    def say(epoch: str) -> str:
        return ", ".join(shown(spread.xs(epoch, level="scored_epoch"), p="p_adjusted"))

    beginning = f"On the spiral with τ = 1 and {noise} label noise flooding gains over {over}"
    return [f"{beginning}, in points, {of_both(say)}."] if len(spread) else []


def fair_search(raw: Raw) -> Section:
    """What as many trainings without flooding gain, chosen by the same rule."""
    ways, starts = raw.ways, raw.starts.start.nunique()
    fair, choice = raw.gain("highest", "best start"), raw.gain("best start", "without")
    sentences = [
        f"Over the best of {starts} trainings without flooding, chosen by the same validation "
        f"accuracy, flooding gains {verdict(fair)}.",
        f"The best of {starts} trainings without flooding gains over a single one "
        f"{verdict(choice)}.",
    ]
    others = fair[fair.index.get_level_values("dataset") != "spiral"]
    sentences.append(
        f"Without the spiral the gain over the best of {starts} trainings is "
        f"{of_both(lambda epoch: average(counted(others, epoch)))}."
    )

    def say(way: str) -> str:
        last, best = (
            counted(ways[one], epoch) for one, epoch in (("highest", "last"), (way, "best"))
        )
        gains = gain(last, best).dropna()
        means = gains.groupby(["dataset", "label_noise"]).mean().round(9)
        return f"by {average(gains)} (behind in {(means < 0).sum()} of {len(means)} settings)"

    sentences.append(
        f"Flooding alone (A with it) is ahead of early stopping alone (B without it) "
        f"{say('without')}, and of the best of {starts} trainings with early stopping "
        f"{say('best start')}."
    )
    fair_gains = summarize(fair)
    sentences += with_spiral_noise(fair_gains, f"the best of {starts} trainings without it")
    how = (
        f"With flooding the table has the best of as many trainings as there are levels; here the "
        f"side without flooding has the best of {starts}, too: each start has weights of its own, "
        f"all else is the trial's. Ties go to the lower validation loss, with flooding to the "
        f"highest b. Below are accuracies in % without flooding → with it (mean chosen b), its "
        f"*gain* in points, the best start's accuracy, and the *fair gain* of flooding over it; a "
        f"gain is bold where its adjusted p is below 5%."
    )
    columns = {
        "without → with (b)": mean_of(ways["without"]) + " → " + mean_and_level(ways["highest"]),
        "gain": shown_bold(raw.over("highest", "without")),
        f"best of {starts}": mean_of(ways["best start"]),
        "fair gain": shown_bold(fair_gains),
    }
    return sentences, [how, by_setting(columns)]


def methods(raw: Raw) -> Section:
    """Flooding the batch's mean, and other losses."""
    sentences, paragraphs = [], []
    for name, rows in raw.methods.items():
        levels = rows.flood_level.unique()
        same = raw.levels[raw.levels.flood_level.isin(levels)].merge(rows[KEY].drop_duplicates())
        starts = raw.starts[raw.starts.start < len(levels)]
        of_batch, of_other = recount.list_ways(same, starts), recount.list_ways(rows, starts)
        batch, other = of_batch["highest"], of_other["highest"]
        by_trial = gain(other, batch)
        gains = summarize(by_trial)
        sentences.append(
            f"The change of accuracy from `--flood-on batch` to `{name}` is {verdict(by_trial)}."
        )
        top, top_untied, top_of_batch = (
            counted(way, "last").flood_level == levels.max()
            for way in (other, of_other["lowest"], batch)
        )
        sentences.append(
            f"In A {sum(top)} of {len(top)} trials choose the highest level, b = "
            f"{levels.max():g}, with `{name}` ({sum(top) - sum(top_untied)} of them as the highest "
            f"of levels that tie), and {sum(top_of_batch)} with `batch`"
            + (": a higher one may do better." if sum(top) else ".")
        )
        paragraphs.append(
            f"`--flood-on {name}`, {METHODS[name]}, beside the paper's |J − b| + b of the batch's "
            f"mean J (`batch`), on the same trials with the same {len(levels)} levels from "
            f"{levels.min():g} to {levels.max():g} (at b = 0 they differ by rounding alone, which "
            f"the epochs amplify): accuracy (mean chosen b), and the best of the first "
            f"{len(levels)} starts without flooding. p is of a t-test, {sections.adjusted(gains)}."
        )
        columns = {"without": mean_of(of_batch["without"])}
        if "best start" in of_batch:
            columns["best start"] = mean_of(of_batch["best start"])
        for title, way in (("batch", batch), (name, other)):
            columns[title] = mean_and_level(way)
        columns[f"{name} over batch"] = shown(gains, p="p_adjusted")
        paragraphs.append(by_setting(columns))
    return sentences, paragraphs


def demo(raw: Raw) -> Section:
    """The demo beside the authors' own."""
    lines, test = [], []
    for title, metric in DEMO.items():
        scale, digits = (1, 3) if "loss" in metric else (100, 1)
        line = {"last epoch": title}
        for level, theirs in raw.authors.groupby("flood_level"):
            side = f"b = {level:g}" if level else "no flooding"
            ours = raw.ours[raw.ours.flood_level == level]
            texts = [mean_and_spread(rows[metric]) for rows in (ours, theirs)]
            texts.append(interval(recount.welch(ours[metric], theirs[metric]), scale, digits))
            whose = (f"{side}: {whose}" for whose in ("ours", "authors'", "difference"))
            line |= dict(zip(whose, texts))
            if metric == "test_accuracy_clean":
                beside = "(authors' {}%, difference {} points)".format(*texts[1:])
                test.append(f"{texts[0]}% with {side} {beside}")
        lines.append(line)
    ours, theirs = (rows.seed.nunique() for rows in (raw.ours, raw.authors))
    sentence = f"The demo's accuracy on clean test labels is {' and '.join(test)}."
    how = (
        f"Last epoch, mean ± standard deviation over {ours} seeds of ours and {theirs} of the "
        f"authors' code (takashiishida/flooding at b65dc56, PyTorch 2.13.0, run by this project; "
        f"`figures/authors_demo.json`), accuracies in %, losses in nats. Difference: ours less the "
        f"authors' with its 95% interval by Welch's t; no random stream is shared, so seeds are no "
        f"pairs. Of {2 * len(DEMO)} such intervals one may well miss 0 where nothing differs."
    )
    return [sentence], [how, table_rows(lines)]


SECTIONS: dict[str, tuple[Callable[[Raw], Section], tuple[str, ...]]] = {
    "Which network": (network, ("candidates",)),
    "The table": (table, ("levels",)),
    "The fair search": (fair_search, ("levels", "starts")),
    "The batch's mean, or another loss": (methods, ("levels", "methods")),
    "Gains by two tests": (sections.two_tests, ("levels",)),
    "b chosen on the other trials": (sections.other_trials, ("levels",)),
    "Three rules for ties": (sections.three_rules, ("levels",)),
    "Fewer flood levels": (sections.fewer_levels, ("levels", "candidates")),
    "More or fewer trainings to choose from": (sections.more_trainings, ("levels", "starts")),
    "Dependence on the label noise": (sections.label_noise, ("levels",)),
    "Calibration": (sections.calibration, ("levels",)),
    "Accuracy and loss": (sections.accuracy_and_loss, ("levels",)),
    "b fixed in advance": (sections.fixed_levels, ("levels",)),
    "The demo beside the authors' own": (demo, ("ours",)),
}


def make_sections(raw: Raw) -> dict[str, Section]:
    """Return what each section says, by its title.

    One that lacks raw figures says which, or is left out if an earlier one lacks the same.
    """
    made, absent = {}, []
    for title, (section, needed) in SECTIONS.items():
        missing = [recount.FILES[name] for name in needed if not len(getattr(raw, name))]
        if not missing:
            made[title] = section(raw)
        elif missing not in absent:
            made[title] = ([], [f"Not here yet: it needs {' and '.join(missing)}."])
            absent.append(missing)
    return made


def sentences(made: dict[str, Section]) -> list[str]:
    """Return the sentences with figures that the README may quote, in these very words."""
    return [sentence for said, _ in made.values() for sentence in said]


def write(made: dict[str, Section]) -> str:
    """Return RESULTS.md; the README may quote its tables, too."""
    parts = [INTRODUCTION]
    for title, (said, paragraphs) in made.items():
        parts.append(f"## {title}")
        for text in (*said, *paragraphs):
            wide = text.startswith("|")
            parts.append(text if wide else textwrap.fill(text, 100, break_on_hyphens=False))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FIGURES
    with exit_on(TrialsError, OSError, status=2):
        next(folder.iterdir(), None)  # OSError where there is no folder: it is not made
        made = make_sections(recount.read_raw(folder))
        target = folder if len(sys.argv) > 1 else FIGURES.parent
        paths = write_files({"RESULTS.md": write(made)}, target)
    print(*paths, *(f"- {sentence}" for sentence in sentences(made)), sep="\n")


if __name__ == "__main__":
    main()
