"""What the scores say: the chosen level, a demo's outcome, the statistics, the printed table."""

import itertools

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from datasets import Data
from results import choose_models, compare, conclude, markdown, number, paired_gain


def scores_of(figures, seed=0, scored_epoch="last", **setting) -> pd.DataFrame:
    """Rows of one trial from (flood level, val accuracy, val loss, test accuracy, clean, start)."""
    names = ["flood_level", "val_accuracy_noisy", "val_loss_noisy", "test_accuracy_noisy"]
    rows = [(*figure, 0)[:6] for figure in figures]
    rows = pd.DataFrame(rows, columns=[*names, "test_accuracy_clean", "start"])
    data = Data(**{"dataset": "spiral", "label_noise": 0.05, "test_samples": 100, **setting})
    return rows.assign(**vars(data.filled()), scored_epoch=scored_epoch, seed=seed)


def trials_of(without, flooded, **setting) -> pd.DataFrame:
    """Trials that have these test accuracies without and with flooding."""
    trials = [
        scores_of([(0, 0.5, 1, a, 1.0), (0.25, 0.6, 1, b, 0.5)], seed, scored_epoch, **setting)
        for scored_epoch in ("last", "best")
        for seed, (a, b) in enumerate(zip(without, flooded))
    ]
    return pd.concat(trials, ignore_index=True)


def test_the_highest_level_of_equals_is_chosen_and_other_rules_can_be_asked_for():
    rows = [(0, 0.8, 1, 0.7, 0.7), (0.1, 0.9, 0.3, 0, 0), (0.2, 0.9, 0.2, 0, 0)]
    rows = scores_of([*rows, (0.3, 0.9, 0.4, 0.8, 0.9)])
    rows["val_accuracy_clean"] = [0.8, 0.7, 0.8, 0.1]
    for frame in (rows, rows[::-1]):
        for ties, level in (("lowest", 0.1), ("lower loss", 0.2), ("highest", 0.3)):
            assert choose_models(frame, "noisy", ties=ties).flood_level.item() == level
        assert choose_models(frame, "clean").flood_level.item() == 0.2
    two = pd.concat([rows, rows.assign(seed=1, val_accuracy_noisy=[0.4, 0.2, 0.3, 0.1])])
    assert list(choose_models(two, "noisy", ["seed"]).sort_values("seed").flood_level) == [0.3, 0]
    table = compare(rows)  # both kinds of test labels by the noisy ones of validation
    assert list(table.labels) == ["noisy", "clean"] and set(table.flood_level_mean) == {0.3}
    assert list(table.with_flooding_mean) == [0.8, 0.9]


def history_of(clean, noisy, seeds=1) -> pd.DataFrame:
    """A demo's history of two epochs; in the last levels 0, 0.1, ... have these val accuracies."""
    rows = [
        {"seed": seed, "flood_level": level / 10, "epoch": epoch, "val_accuracy_clean": a,
         "val_accuracy_noisy": b, "val_loss_clean": level, "train_accuracy_noisy": 1 / 3,
         "test_accuracy_clean": 0.8 + seed / 50, "test_loss_clean": 0.5, "train_batch_loss": np.nan}
        for seed in range(seeds) for level, (a, b) in enumerate(zip(clean, noisy))
        for epoch, a, b in ((0, 1 - a, 1 - b), (3, a, b))
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_a_demos_level_is_chosen_on_the_labels_asked_for():
    history = history_of(clean=[0.9, 0.8, 0.9, 0.7], noisy=[0.9, 0.6, 0.7, 0.7])
    outcome = conclude(history, {"select_on": "clean"})
    assert (outcome.chosen, outcome.compared) == (0.2, 0.2)
    [marked] = [line for line in outcome.summary.splitlines() if "<-" in line]
    assert marked.split() == ["0.2", "33.3", "90.0", "80.0", "0.500", "<-", "chosen"]
    noisy = conclude(history, {"select_on": "noisy"})
    assert (noisy.chosen, noisy.compared) == (0, 0.3)  # no flooding, and the best of the others
    alone = conclude(history[history.flood_level == 0], {"select_on": "noisy"})
    assert (alone.chosen, alone.compared) == (0, 0)
    thirds = history.assign(flood_level=history.flood_level / 3)
    assert conclude(thirds, {"select_on": "clean"}).chosen == history.flood_level.unique()[2] / 3


def test_of_several_trials_the_mean_chooses_and_each_says_what_it_chose():
    history = history_of([0.8, 0.7], [0, 0], seeds=3)
    one = (history.seed == 1) & (history.epoch == 3) & (history.flood_level == 0)
    history.loc[one, "val_accuracy_clean"] = 0.6
    outcome = conclude(history, {"select_on": "clean"})
    lines = outcome.summary.splitlines()
    assert outcome.chosen == 0 and "mean ± standard deviation of 3 trials" in lines[0]
    assert "73.3 ± 11.5" in lines[-2] and "82.0 ± 2.0" in lines[-2]
    assert lines[-2].endswith("<- chosen by 2") and lines[-1].endswith("<- chosen by 1")
    # Equal means tie, though summed in another order 0.8, 0.8 and 0.88 have another last bit.
    history = history.sort_values("flood_level", kind="stable")
    last = history.epoch == 3
    history.loc[last, "val_accuracy_clean"] = [0.8, 0.8, 0.88, 0.88, 0.8, 0.8]
    assert conclude(history, {"select_on": "clean"}).chosen == 0.1


def test_the_table_of_known_figures():
    """Gains 0.10, 0.11, 0.12: their mean's error is 0.01 / sqrt(3), t of 2 degrees 4.303."""
    table = compare(trials_of([0.80, 0.80, 0.80], [0.90, 0.91, 0.92]))
    assert list(table.scored_epoch) == ["last", "best"] * 2
    assert list(table.best_possible) == [0.95, 0.95, 1, 1]
    assert table.gain_low[0] == pytest.approx(0.11 - 4.3027 * 0.01 / 3**0.5, abs=1e-5)
    assert table[["gain_p", "fair_gain_mean"]].isna().all(axis=None)  # too few trials, no search
    lines = markdown(table).splitlines()
    assert "over 3 trials" in lines[0] and "p:" not in lines[0]
    row = "| spiral | 5% | 95.0 | 80.0 (0.0) | 91.0 (1.0) | 0.25 (0.00) | +11.0 [+8.5, +13.5] |"
    assert lines.count(row) == 2  # A and B
    clean = "100.0 (0.0) | 50.0 (0.0) | 0.25 (0.00) | -50.0 [-50.0, -50.0] |"
    assert sum(line.endswith(clean) for line in lines) == 2
    assert number(0.14500000000000002, 2) == number(0.145, 2) == "0.14"  # however it was summed
    one = markdown(compare(trials_of([0.8], [0.9])))
    assert "| 80.0 | 90.0 | 0.25 | +10.0 |" in one and "nan" not in one


def test_p_values_of_ten_trials_are_adjusted_over_all_rows_of_the_same_labels():
    spread = np.random.default_rng(0).normal(size=10) / 50
    gains = {0.01: 0.005, 0.05: 0.03, 0.1: 0.05}  # by label noise
    trials = [trials_of([0.8] * 10, 0.8 + gains[p] + spread, label_noise=p) for p in gains]
    trials = pd.concat(trials, ignore_index=True)
    flooded_best = (trials.scored_epoch == "best") & (trials.flood_level > 0)
    trials.loc[flooded_best, "test_accuracy_noisy"] += 0.001
    every = compare(trials)
    table = every[every.labels == "noisy"]
    p = [scipy.stats.ttest_1samp(gain + spread, 0).pvalue for gain in gains.values()]
    np.testing.assert_allclose(table.gain_p[table.scored_epoch == "last"], p)
    falling = np.sort(table.gain_p)[::-1]  # Benjamini and Hochberg by hand: six comparisons
    expected = np.minimum.accumulate(falling * 6 / np.array([6, 5, 4, 3, 2, 1]))
    np.testing.assert_allclose(np.sort(table.gain_p_adjusted)[::-1], expected)
    text = markdown(every)
    assert "over 6 gains; bold" in text and text.count("**+") == sum(expected < 0.05) == 4
    equal = [paired_gain("", pd.Series([gain] * 10))["_p"] for gain in (0.0, 0.1)]
    assert equal == [1, 0]


def test_the_fair_gain_is_over_the_best_start_of_the_same_trial():
    flooded, best = [0.9] * 10, [0.8 + seed / 100 for seed in range(10)]
    starts = []
    for scored_epoch, (seed, a) in itertools.product(("last", "best"), enumerate(best)):
        figures = [(0.5, 1, 0.7), (0.6, 3, 0), (0.6, 2, a), (0.6, 2, 0)]  # the third is chosen
        figures = [(0, *figure, 1, start) for start, figure in enumerate(figures)]
        starts.append(scores_of(figures, seed, scored_epoch))
    trials = pd.concat(trials_of([0.7] * 10, flooded, spiral_noise=tau) for tau in (0, 1.0))
    table = compare(trials.sample(frac=1, random_state=0), pd.concat(starts)[::-1])
    first = table.query("labels == 'noisy' and spiral_noise == 0 and scored_epoch == 'last'")
    gains = np.array(flooded) - best
    expected = {"starts": 4, "best_start_mean": np.mean(best), "fair_gain_mean": gains.mean()}
    expected["fair_gain_p"] = scipy.stats.ttest_1samp(gains, 0).pvalue
    assert first[[*expected]].iloc[0].to_dict() == pytest.approx(expected)
    # The spiral with noise is a setting of its own, which has no starts, and no known optimum.
    other = table[table.spiral_noise == 1]
    assert len(other) == 4 and other.fair_gain_mean.isna().all() and other.trials.eq(10).all()
    starts = pd.concat(starts)  # of a search that is not over yet nothing is said
    some = compare(trials, starts[starts.seed < 4])
    assert some[["best_start_mean", "fair_gain_mean"]].isna().all(axis=None)
    text = markdown(table)
    for said in ("over 4 gains and over 2 fair gains", "| best of 4 starts | fair gain |",
                 "| spiral, τ = 1 | 5% | unknown |", "| - | - |"):  # fmt: skip
        assert said in text
