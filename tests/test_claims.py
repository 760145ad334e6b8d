"""The statistics of RESULTS.md, computed a second time; file and README are as they are printed."""

import json
import math
import re
import sys
from itertools import combinations, product
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from conftest import PROJECT

from results import COLUMNS, compare, conclude, number, read_csv

sys.path.insert(0, str(PROJECT / "figures"))
import claims
import recount
import sections
from recount import ACCURACY, CANDIDATE, CANDIDATES, FIGURES, KEY, QUOTED

SHARED = {"dataset": "gaussian", "spiral_noise": 0.0, "hidden_layers": 4, "batch_norm": True}
SHARED |= {"batch_size": 200, "train_samples": 200, "val_samples": 200, "test_samples": 20_000}
LEVELS, STARTS = [(0, 0.0), (0, 0.1), (0, 0.2)], [(0, 0.0), (1, 0.0), (2, 0.0)]  # (start, level)


def made(val, test, models=LEVELS, noise=0.05, **columns) -> pd.DataFrame:
    """Raw figures of both epochs from accuracies on validation and test set, [trials, models]."""
    rows = pd.DataFrame(np.tile(models, (len(val), 1)), columns=["start", "flood_level"])
    rows["seed"] = np.repeat(range(len(val)), len(models))
    rows["val_accuracy_noisy"], rows[ACCURACY] = np.ravel(val), np.ravel(test)
    rows = pd.concat([rows.assign(scored_epoch=epoch) for epoch in ("last", "best")])
    rows = rows.assign(**{**SHARED, "label_noise": noise, **columns}).reindex(columns=COLUMNS)
    return rows.fillna(0.5).reset_index(drop=True)


def random_trials(seed: int, models=LEVELS, **columns) -> tuple:
    """Ten trials, and their accuracies on validation and test set."""
    generator = np.random.default_rng(seed)
    val, test = generator.choice([0.7, 0.8, 0.9], (10, 3)), generator.random((10, 3))
    return made(val, test, models, **columns), val, test


def test_gains_and_the_sign_flip_test():
    assert recount.sign_flip([1, 2, 3]) == 2 / 8 and recount.sign_flip([0.1, -0.1]) == 1
    trials = pd.concat(random_trials(k, noise=p)[0] for k, p in enumerate((0.01, 0.05, 0.1)))
    ways, table = recount.list_ways(trials, trials[:0]), compare(trials).query("labels == 'noisy'")
    gains = recount.gain(ways["highest"], ways["without"])
    summary = recount.summarize(gains)
    for setting, group in gains.groupby(recount.SETTING):
        expected = scipy.stats.permutation_test([group], np.sum, permutation_type="samples")
        assert summary.flip[setting] == pytest.approx(expected.pvalue)
    adjusted = scipy.stats.false_discovery_control(summary.flip)
    expected = np.transpose([table.gain_mean, table.gain_p_adjusted, adjusted])
    np.testing.assert_allclose(summary[["mean", "p_adjusted", "flip_adjusted"]], expected)
    bold = sections.shown_bold(summary.assign(p_adjusted=[0.049, 0.05, *[np.nan] * 4]))
    assert [text.startswith("**+") or text.startswith("**-") for text in bold] == [1, *[0] * 5]
    of_nine = gains[gains.index.get_level_values("seed") < 9]
    nine = recount.summarize(of_nine)
    assert nine[["p", "flip", "p_adjusted", "flip_adjusted"]].isna().all(axis=None)
    means = 100 * of_nine.xs("last", level="scored_epoch").unstack("seed").mean()
    low, high = scipy.stats.ttest_1samp(means, 0).confidence_interval()
    sure = (nine.xs("last", level="scored_epoch").low > 0).sum()
    said = f"in A {means.mean():+.1f} [{low:+.1f}, {high:+.1f}] points on average (3 of 3 settings "
    said += f"ahead, {sure} significantly; 0 significantly behind); in B"
    assert claims.verdict(of_nine).startswith(said) and "adjusted" not in claims.verdict(of_nine)
    assert "0 of 3 settings ahead" in claims.verdict(0 * gains + 1e-16)
    few = gains[gains.index.get_level_values("seed") < 3].reset_index().assign(spiral_noise=1.0)
    mixed = pd.concat([gains, few.set_index(KEY)[ACCURACY]])  # a spiral that is not counted
    assert claims.verdict(mixed) == claims.verdict(gains)
    assert claims.verdict(gains).endswith("; p adjusted over 6 comparisons")


def test_each_way_of_choosing():
    trials, val, test = random_trials(1, val_loss_noisy=[0.5, 0.1, 0.4] * 20)
    starts, start_val, start_test = random_trials(5, STARTS, val_loss_noisy=[0.3, 0.2, 0.2] * 20)
    ways = recount.list_ways(trials, starts)
    for trial in range(10):
        others = np.delete(val, trial, axis=0).mean(axis=0).round(9)
        tied = np.flatnonzero(val[trial] == max(val[trial]))
        level = {"highest": max(tied), "lowest": min(tied), "validation loss": 1, "entropy": 2}
        level["top level"] = 2
        level["other trials"] = max(np.flatnonzero(others == max(others)))
        expected = {way: test[trial][k] for way, k in level.items()}
        best = max(range(3), key=lambda k: (start_val[trial][k], k > 0, -k))
        for way, accuracy in {**expected, "best start": start_test[trial][best]}.items():
            assert [*ways[way].xs(trial, level="seed")[ACCURACY]] == [accuracy] * 2, way
    share = np.mean([(v == max(v)).sum() > 1 for v in val])
    assert [*recount.share_of_ties(trials)] == pytest.approx([share, share])


def test_the_best_of_some_starts_is_the_mean_over_all_ways_to_draw_them():
    models = [(start, 0.0) for start in range(6)]
    generator = np.random.default_rng(2)
    val, test = generator.choice([0.7, 0.8], (4, 6)), generator.random((4, 6))
    loss = generator.choice([0.1, 0.2], (4, 6))
    starts = made(val, test, models, val_loss_noisy=np.tile(loss.ravel(), 2))
    for count in (1, 2, 5, 6):
        expected = [
            np.mean([
                test[trial][max(drawn, key=lambda k: (val[trial][k], -loss[trial][k], -k))]
                for drawn in combinations(range(6), count)
            ])
            for trial in range(4)
        ]  # fmt: skip
        found = recount.expected_best(starts, count).xs("best", level="scored_epoch")
        assert [*found.sort_index(level="seed")] == pytest.approx(expected)


def test_fewer_levels_are_every_fifth():
    generator = np.random.default_rng(3)
    val, test = generator.choice([0.7, 0.8, 0.9], (10, 11)), generator.random((10, 11))
    trials = made(val, test, [(0, round(0.05 * k, 2)) for k in range(11)])
    other = trials.assign(hidden_layers=5, **{ACCURACY: 0})  # another candidate
    raw = SimpleNamespace(candidates=pd.concat([trials, other]), levels=trials[:22])
    (sentence,), (_, table) = sections.fewer_levels(raw)
    assert "from 3 levels 0.25 apart, and not from 11 levels 0.05 apart" in sentence
    highest = [max(np.flatnonzero(v == max(v))) for v in val]
    coarse = [5 * max(np.flatnonzero(v[::5] == max(v[::5]))) for v in val]
    change = 100 * np.mean([t[few] - t[many] for t, few, many in zip(test, coarse, highest)])
    assert f"{change:+.1f} [" in table and abs(change) > 1


def test_the_entropy_rule():
    noise = pd.Series([0.01, 0.05, 0.1])
    np.testing.assert_allclose(recount.entropy(noise), scipy.stats.entropy([noise, 1 - noise]))
    for levels, nearest in ((51, [0.06, 0.2, 0.33]), (11, [0.05, 0.2, 0.35])):  # from 0 to 0.5
        rows = product(np.linspace(0, 0.5, levels).round(2), noise)
        rows = pd.DataFrame(rows, columns=["flood_level", "label_noise"])
        assert [*recount.entropy_rule(rows).unique()] == nearest
    assert [*recount.entropy_rule(rows, digits=3).unique()] == [0.05, 0.2, 0.3]  # of 0.325083


def test_change_with_noise_calibration_and_welchs_interval():
    by_noise = {0.01: [[0.9], [0.8], [1.0]], 0.1: [[0.7], [0.5], [0.9]]}
    rows = pd.concat(made([[0]] * 3, test, LEVELS[:1], p) for p, test in by_noise.items())
    change = recount.from_low_to_high_noise(rows.set_index(KEY)[ACCURACY])
    assert sorted(change.round(9)) == [-0.3, -0.3, -0.2, -0.2, -0.1, -0.1]
    rows["test_loss_noisy"] = np.tile([0.70, 0.69, 0.1], 4)
    excess = [0.70 + 0.9 * math.log(0.9) + 0.1 * math.log(0.1), 0.69 - 0.5004024235, 0.1]
    figures = recount.calibration(rows.set_index(KEY)).iloc[0]
    assert [*figures] == [3, 1, pytest.approx(np.mean(excess))]
    a, b = pd.Series([0.1, 0.4, 0.3]), pd.Series([0.5, 0.9, 0.2, 0.6])
    va, vb, mean = a.var() / 3, b.var() / 4, a.mean() - b.mean()
    margin = scipy.stats.t.ppf(0.975, (va + vb) ** 2 / (va**2 / 2 + vb**2 / 3)) * math.sqrt(va + vb)
    assert [*recount.welch(a, b).values()] == pytest.approx([mean, mean - margin, mean + margin])


def candidate_figures(shifts, trials) -> pd.DataFrame:
    """The nine figures of each candidate's trials, around `shift` beside the quoted ones."""
    rows = {
        (*one, k): QUOTED.unstack() + shift + 0.01 * (k - (count - 1) / 2)
        for one, shift, count in zip(CANDIDATES, shifts, trials)
        for k in range(count)
    }
    return pd.DataFrame(rows).T.rename_axis([*CANDIDATE, "seed"]).sort_index()


def test_the_distance():
    figures = candidate_figures([0.01 * k for k in range(9)], [3] * 8 + [2])
    distances = recount.distances(figures)
    for (name, p), column in figures.items():
        by = [rows.to_numpy() for _, rows in column.groupby(CANDIDATE)]
        variance = sum(((one - one.mean()) ** 2).sum() for one in by) / (26 - 9)
        expected = [(one.mean() - QUOTED.loc[p, name]) ** 2 / (2 * variance / 10) for one in by]
        np.testing.assert_allclose(distances[name, p], expected)
    val, test = [[0.5, 0.6, 0.6]] * 2, [[0.90, 0.91, 0.92], [0.80, 0.81, 0.82]]
    three = [made(val, test, noise=p).query("seed == 0 or label_noise < 0.1") for p in QUOTED.index]
    raw = pd.concat(three, ignore_index=True)
    raw.loc[raw.scored_epoch == "best", ACCURACY] = 0
    [row] = recount.candidate_figures(raw).to_numpy().tolist()  # a trial that has all nine
    assert row == [0.90] * 3 + [0.92] * 3 + [0.2] * 3
    [row] = recount.candidate_figures(raw, "lowest").to_numpy().tolist()
    assert row == [0.90] * 3 + [0.91] * 3 + [0.1] * 3


def test_the_rule_that_chooses_the_network():
    for shifts, trials, state, expected in (
        ((0.011, 0.03, 0.01), [3, 3, 3, 2, 3, 0, 3, 3, 3], "first", [3, 5]),
        ((0.0, 0.03, 0.02), [10, *[3] * 8], "last", [2, 1]),  # the first three trials decide
        ((0.011, 0.05, 0.01), [10, 3, 10, *[3] * 6], "chosen", [0, 2]),  # apart by less than 4
        ((0.03, 0.05, 0.01), [10, 3, 10, *[3] * 6], "chosen", [2, 0]),
        ((0.08, 0.011, 0.01), [3, 10, 10, *[3] * 6], "chosen", [2, 1]),
    ):
        figures = candidate_figures([*shifts, *[0.06] * 6], trials)
        assert recount.choose_network(figures) == (state, [CANDIDATES[k] for k in expected])
    figures = candidate_figures([0.03, 0.11, 0.01, *[0.06] * 6], [10, 10, 10, *[3] * 6])
    chosen, first, beyond = claims.rule(figures, total := recount.distances(figures).sum(axis=1))
    names = [claims.describe(CANDIDATES[k]) for k in (2, 0, 1)]
    assert f"takes {names[0]}: " in chosen and f"{total[CANDIDATES[0]]:.1f}." in chosen
    assert 0 < first.index(names[1]) < first.index(names[0]) and names[2] not in first
    assert beyond.startswith(f"Beyond the rule {names[2]} has 10 trials")
    assert beyond.endswith(f" {total[CANDIDATES[1]]:.1f}.")


def test_what_other_ties_would_choose(monkeypatch):
    """Other figures for each rule: one is taken by the first, another by the rest."""
    # Of ten trials the first three are lower, by 0.035 on average.
    near = {"highest": (0.011, 0.03, 0.12), "lowest": (0.03, 0.01, 0.12)}
    by = {
        ties: candidate_figures([*shifts, *[0.07] * 6], [10, 10, 10, *[3] * 6])
        for ties, shifts in (near | {"lower loss": (0.11, 0.01, 0.05)}).items()
    }
    monkeypatch.setattr(recount, "candidate_figures", lambda _, ties: by[ties])
    [said] = claims.by_other_ties(None)
    first, second = (claims.describe(CANDIDATES[k]) for k in (0, 1))
    assert f"the highest b: {first} (" in said and f"the lowest b: {second} (" in said
    of_loss = recount.distances(by["lower loss"]).sum(axis=1)
    a, b = (f"{of_loss[CANDIDATES[k]]:.1f}" for k in (0, 1))
    assert f"loss: {second} ({b}; {first}: {a}, but not among the two nearest after three" in said
    assert said.count("but not among") == 1
    by["lowest"] = by["lowest"].iloc[:5]
    assert not claims.by_other_ties(None)


def test_all_sections_on_made_up_figures(tmp_path, monkeypatch, capsys):
    levels = pd.concat(random_trials(k, noise=p)[0] for k, p in enumerate((0.01, 0.1)))
    starts = pd.concat(random_trials(9, STARTS, noise=p)[0] for p in (0.01, 0.1))
    spiral, searched = (
        rows.assign(dataset="spiral", spiral_noise=1.0)
        for rows in (levels, starts[starts.label_noise == 0.1])
    )
    name, fair_name = "table_synth_trials.csv", "table_synth_starts.csv"
    files = {name: pd.concat([levels, spiral]), fair_name: pd.concat([starts, searched])}
    methods = levels[(levels.seed < 3) & (levels.label_noise < 0.1)]
    files |= {f"candidates/a/{name}": levels, f"flood_on_example/{name}": methods}
    val, test = np.random.default_rng(4).random((2, 10, 5))
    more = made(val, test, [(start, 0.0) for start in range(5)], noise=0.1)
    files[f"starts_5/{fair_name}"] = more
    files["history.csv"] = recount.read_raw(FIGURES).authors.assign(epoch=200)
    of_demo = json.loads((FIGURES / "demo.json").read_text()) | {"flood_levels": [0, 0.26]}
    (tmp_path / "demo.json").write_text(json.dumps(of_demo))
    for path, rows in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        rows.assign(flood_on="example").to_csv(tmp_path / path, index=False)
    monkeypatch.setattr(sys, "argv", ["claims.py", str(tmp_path)])
    claims.main()
    written, printed = (tmp_path / "RESULTS.md").read_text(), capsys.readouterr().out
    assert "nan" not in written and "Not here yet" not in written
    sentences = [line.removeprefix("- ") for line in printed.splitlines()[1:]]
    assert len(sentences) == 23 and all(one in " ".join(written.split()) for one in sentences)
    on_spiral = [one for one in sentences if one.startswith("On the spiral with τ = 1 and ")]
    assert "1 and 1%, 10% label noise flooding gains over no flooding, in points" in on_spiral[0]
    assert "1 and 10% label noise flooding gains over the best of 3 trainings" in on_spiral[1]
    raw = recount.read_raw(tmp_path)
    key = {"dataset": "gaussian", "label_noise": 0.1, "scored_epoch": "best"}
    flooded = raw.ways["highest"].xs((*key.values(),), level=[*key])[ACCURACY].mean()
    change = number(100 * (flooded - test[range(10), val.argmax(axis=1)].mean()), sign=True)
    [said] = [one for one in sentences if one.startswith("On gaussian, 10% label noise, ")]
    assert "with 3 levels gains over the best of 5 trainings" in said and f"B {change} [" in said
    fair = raw.gain("highest", "best start")
    [said] = [one for one in sentences if one.startswith("Chosen from 2, 3 equally spaced flood")]
    for letter, epoch in (("A", "last"), ("B", "best")):
        mean = number(100 * sections.counted(fair, epoch).mean(), sign=True)
        assert re.search(rf"in {letter} \S+, {re.escape(mean)}[;.]", said)
        few = levels[levels.flood_level != 0.1].query("scored_epoch == @epoch")
        few = few.sort_values(["val_accuracy_noisy", "flood_level"]).drop_duplicates(
            KEY, keep="last"
        )
        two = recount.expected_best(starts, 2).xs(epoch, level="scored_epoch")
        mean = number(100 * (few[ACCURACY].mean() - two.mean()), sign=True)
        assert f"in {letter} {mean}, " in said
    gains = raw.over("highest", "best start").xs(1.0, level="spiral_noise")
    a, b = (number(100 * mean, sign=True) for mean in gains["mean"])
    assert f"in A {a} [" in on_spiral[1] and f"; in B {b} [" in on_spiral[1]
    assert "87.2 ± 2.3% with no flooding (authors' 87.2 ± 2.3%, difference +0.0 [" in printed


def test_files_that_are_cut_short_or_of_another_demo_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["claims.py", str(tmp_path)])
    for name in ("demo.json", "history.csv", "table_synth_trials.csv", "table_synth_starts.csv"):
        (tmp_path / name).write_bytes((FIGURES / name).read_bytes())
    settings = json.loads((FIGURES / "demo.json").read_text())
    for name, text, said in (
        ("table_synth_trials.csv", None, "has not each flood level and start asked for"),
        ("table_synth_starts.csv", "", "cannot be read as raw figures"),
        ("history.csv", None, "is cut short"),
        ("demo.json", json.dumps(settings | {"epochs": 3}), "epochs is 3, and the authors'"),
    ):
        whole = (tmp_path / name).read_text()
        cut = "".join(whole.splitlines(keepends=True)[:-5])
        (tmp_path / name).write_text(cut if text is None else text)
        with pytest.raises(SystemExit, match="2"):
            claims.main()
        assert f"{name}: " in (errors := capsys.readouterr().err) and said in errors
        (tmp_path / name).write_text(whole)
    assert not (tmp_path / "RESULTS.md").exists()


def test_results_and_readme_are_what_the_command_prints():
    """Between its marks README has sentences and rows of tables of RESULTS.md, in these words."""
    written = claims.write(claims.make_sections(recount.read_raw(FIGURES)))
    assert (PROJECT / "RESULTS.md").read_text() == written
    readme = (PROJECT / "README.md").read_text()
    marked = re.findall("<!-- claims -->(.*?)<!-- end of claims -->", readme, re.S)
    assert marked and len(marked) == readme.count("<!-- claims -->")
    left = " ".join(" ".join(marked).split())
    rows = re.findall(r"^\|.*", written, re.M)
    for text in sorted([*written.split("\n\n"), *rows], key=len, reverse=True):
        left = left.replace(" ".join(text.split()), "")
    assert set(left) <= set("-* "), left
    parameters = json.loads((FIGURES / "demo.json").read_text())
    outcome = conclude(read_csv(FIGURES / "history.csv"), parameters)
    assert outcome.summary.endswith("<- chosen by 8") and outcome.chosen == 0.28
    assert "eight of the ten chose 0.28" in " ".join(readme.split())
    for path in re.findall(r"\]\(([^)#:]+)\)", readme):
        assert (PROJECT / path).exists(), path
