"""The pictures, by what is drawn in them: curves, frames, names, figures; nothing overlaps."""

import io
import itertools
from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
import pytest
import scipy.stats
from matplotlib.colors import to_hex
from matplotlib.text import Text
from PIL import Image

import plot
from datasets import Data, make_dataset
from results import compare, conclude
from settings import SCORED_EPOCHS, SCORES, SPLITS, Model, Training, flat

PARAMETERS = {
    **flat(Data(dataset="sinusoid2d", label_noise=0.1).filled()), **flat(Model()),
    **flat(Training(optimizer="sgd", batch_size=100, epochs=40).filled()),
    "select_on": "clean", "seed": 4,
}  # fmt: skip
SIDES = {"without flooding": (0.0, "#d55e00"), "with flooding": (0.2, "#0072b2")}
METRICS = [f"{split}_{score}" for split in SPLITS for score in SCORES]
equal = np.testing.assert_allclose


def made_outcome(levels=(0.0, 0.2, 0.3), epochs=41, trials=1, best=0.2, leap=0.0, **parameters):
    """Curves that fall to a value of their own; validation likes the level `best` most.

    The first trial has flooded steps from epoch 7 on, the next one from epoch 8 on, and so on.
    """
    keys = itertools.product(range(4, 4 + trials), levels, range(epochs))
    history = pd.DataFrame(keys, columns=["seed", "flood_level", "epoch"])
    level, epoch, trial = history.flood_level, history.epoch, history.seed - 4
    for number, name in enumerate(METRICS):
        curve = 0.05 + 0.02 * number + level + 0.03 * trial**2 + 0.5 / (1 + epoch)
        history[name] = curve if "loss" in name else 0.9 - 0.1 * curve - 0.2 * (level != best)
    history.loc[epoch == 0, [name for name in METRICS if "accuracy" in name]] = 0.4
    history["train_flooded_fraction_so_far"] = (epoch - 6 - trial).clip(lower=0) * level
    history["train_loss_noisy"] += leap * ((epoch == 30) & (level == 0))
    return conclude(history, {**PARAMETERS, "trials": trials, **parameters})


def texts(figure):
    found = [text for holder in [figure, *figure.subfigs, *figure.axes] for text in holder.texts]
    found += [text for axes in figure.axes for text in (axes.title, axes.xaxis.label)]
    return [text for text in found if text.get_text()]


def said(figure):
    return [text.get_text().replace("\n", " ") for text in texts(figure)]


@plot.in_style
def assert_nothing_overlaps(figure, drawn=False):
    """No two texts or legends meet, none leaves the picture; one `drawn` has found its layout."""
    place = figure.axes[0].get_position()
    figure.draw_without_rendering()
    figure.draw_without_rendering()
    equal(place, figure.axes[0].get_position(), atol=0.012 if drawn else 1)
    boxes = []
    for thing in [*texts(figure), *figure.subfigs[0].legends]:
        kind = Text if isinstance(thing, Text) else type(thing)
        boxes.append(kind.get_window_extent(thing).padded(-1))  # an annotation without its arrow
    for box in boxes:
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def assert_is_band(band, low, high, color):
    assert {*band.get_paths()[0].vertices[:, 1].round(9)} == {*low.round(9), *high.round(9)}
    assert to_hex(band.get_facecolor()[0]) == color


@pytest.mark.parametrize(
    ("score", "name", "height", "words"),
    [
        ("loss", "loss", 0.2, "flood level b = 0.2"),
        ("accuracy", "acc", 0.9, "90.0%  no flipped label learned"),
    ],
)
def test_curves_and_bands_are_mean_and_deviation_of_the_history(score, name, height, words):
    outcome = made_outcome(trials=3)
    figure = plot.draw_demo(outcome, None)[f"synth_{name}.png"]
    [axes] = figure.axes
    drawn, (low, high) = iter(axes.lines), axes.get_ylim()
    curves = itertools.product(SIDES, (("train", "noisy", "--"), ("test", "clean", "-")))
    for (side, (split, labels, style)), band in zip(curves, axes.collections, strict=True):
        level, color = SIDES[side]
        trials = outcome.history[outcome.history.flood_level == level].groupby("epoch")
        mean, std = (trials[f"{split}_{score}_{labels}"].agg(how) for how in ("mean", "std"))
        line, key = next(drawn), next(drawn)
        equal(line.get_xydata(), np.stack([mean.index, mean], axis=1))
        assert (to_hex(line.get_color()), line.get_linestyle()) == (color, style)
        assert (key.get_label(), key.get_linestyle()) == (f"{split}, {labels} labels", style)
        assert_is_band(band, mean - std, mean + std, color)
        shown = f"{mean.iloc[-1]:.2f}" if score == "loss" else f"{100 * mean.iloc[-1]:.1f}%"
        assert f"{shown}  {split}, {side}" in said(figure)
        assert low < (mean - std)[2:].min() and mean[2:].max() < high
    assert next(drawn).get_ydata() == [height, height] and words in said(figure)
    assert f"{score.capitalize()} without and with flooding" in said(figure)
    assert any("3 trials, seeds 4 to 6" in text for text in said(figure))
    assert score == "loss" or (low > 0.4 and 1 < high < 1.01)  # without the first climb
    assert_nothing_overlaps(figure)


def test_with_batch_norm_the_loss_says_which_loss_is_flooded():
    for other in {}, {"batch_norm": False}, {"levels": (0.0,)}:
        for name, figure in plot.draw_demo(made_outcome(**other), None).items():
            wanted = name == "synth_loss.png" and not other
            assert any(plot.MODES.replace("\n", " ") in text for text in said(figure)) == wanted


@pytest.mark.parametrize(
    ("levels", "title"),
    [((0.0, 0.2), "and with flooding (validation chose no flooding)"), ((0.0,), "flooding")],
)
def test_no_flooding_chosen_and_no_label_flipped(levels, title):
    outcome = made_outcome(levels, epochs=2, best=0.0, label_noise=0.0)
    for score, figure in zip(("Loss", "Accuracy"), plot.draw_demo(outcome, None).values()):
        assert f"{score} without {title}" in said(figure)
        assert sum("train, " in text for text in said(figure)) == len(levels)
        assert not any("flipped label" in text for text in said(figure))
        assert_nothing_overlaps(figure)
        assert all(float(tick).is_integer() for tick in figure.axes[0].get_xticks())


def test_a_leap_and_curves_that_end_together_leave_the_picture_legible():
    figure = plot.draw_demo(made_outcome(leap=25.0), None)["synth_loss.png"]
    assert figure.axes[0].get_ylim()[1] < 3 and "▲ up to 25.07" in said(figure)
    history = made_outcome().history
    history[METRICS] = [0.2 if "loss" in name else 0.9 for name in METRICS]
    outcome = conclude(history, {**PARAMETERS, "trials": 1})
    for figure in plot.draw_demo(outcome, None).values():
        assert_nothing_overlaps(figure)


def test_the_setting_in_words():
    """That of the defaults is in the demo's tests."""
    other = {"dataset": "spiral", "spiral_noise": 0.5, "label_noise": 0.015, "batch_norm": False}
    other |= {"optimizer": "adam", "momentum": 0.0, "weight_decay": 0.001, "flood_on": "example"}
    assert plot.describe({**PARAMETERS, **other, "epochs": 1, "trials": 3}) == (
        "spiral, 1.5% of the labels flipped, spiral noise 0.5, 100 training examples, MLP 4 × 500\n"
        "Adam, learning rate 0.01, weight decay 0.001, each example's loss flooded, batches of "
        "100, 1 epoch, 3 trials, seeds 4 to 6"
    )


def made_boundary(label_noise=0.1):
    """Two networks: one went round all flipped points, the other round the first three."""
    data = make_dataset(Data(dataset="sinusoid2d", label_noise=label_noise), seed=0).train
    axis = np.linspace(-3, 3, 50)
    probability = np.stack([np.add.outer(axis, sign * axis) / 12 + 0.5 for sign in (1, -1)])
    noisy, clean = data.noisy_labels, data.clean_labels
    three = np.where(np.cumsum(noisy != clean) <= 3, noisy, clean)
    three[np.flatnonzero(noisy == clean)[0]] ^= 1  # an error of another kind
    return SimpleNamespace(
        axis=axis, probability=probability, predictions=np.stack([noisy, three]),
        inputs=data.inputs, noisy_labels=noisy, clean_labels=clean,
    )  # fmt: skip


def test_boundaries():
    boundary = made_boundary()
    figure = plot.draw_demo(made_outcome(trials=2), boundary)["synth_boundary.png"]
    flipped = boundary.inputs[boundary.noisy_labels != boundary.clean_labels]
    for number, (axes, (side, (level, color))) in enumerate(zip(figure.axes, SIDES.items())):
        count = (10, 3)[number]
        name = f"{side}, b = 0.2" if level else side
        assert axes.get_title() == f"{name}\nlearned {count} of 10 flipped labels"
        assert to_hex(axes.title.get_color()) == color and axes.get_aspect() == 1
        mesh, truth, network, zeros, ones, unlearned, learned = axes.collections
        equal(mesh.get_array(), boundary.probability[number])
        assert mesh.cmap(0.0) > mesh.cmap(1.0)  # class 1 is the darker
        x1, x2 = np.concatenate([path.vertices for path in truth.get_paths()]).T
        assert np.abs(1.5 * x1 + np.sin(1.5 * x2)).max() < 0.02 and np.ptp(x2) == 6
        vertices = np.concatenate([path.vertices for path in network.get_paths()])
        assert np.abs(vertices[:, 1] + vertices[:, 0] * (1 - 2 * number)).max() < 0.2
        equal(zeros.get_offsets(), boundary.inputs[boundary.noisy_labels == 0])
        equal(ones.get_offsets(), boundary.inputs[boundary.noisy_labels == 1])
        equal(learned.get_offsets(), flipped[:count])
        equal(unlearned.get_offsets(), flipped[count:])
        faces = [to_hex(points.get_facecolor()[0]) for points in (zeros, ones)]
        edges = [to_hex(drawn.get_edgecolor()[0]) for drawn in (truth, network, learned)]
        assert (faces, edges) == (["#ffffff", "#000000"], ["#000000", color, color])
        assert to_hex(unlearned.get_edgecolor()) != color
    assert any(text.endswith("seed 4") for text in said(figure))  # it is one trial's
    plot.png(figure)
    assert_nothing_overlaps(figure, drawn=True)


def test_boundaries_over_time(monkeypatch):
    """A frame an epoch, with the first trial's losses then; the last one for two seconds more."""
    seen, png = [], plot.png

    def note(figure, **options):
        content = png(figure, **options)
        assert_nothing_overlaps(figure, drawn=True)
        seen.append((said(figure), [axes.collections[0].get_array() for axes in figure.axes]))
        return content

    monkeypatch.setattr(plot, "png", note)
    outcome, boundaries = made_outcome(trials=2), ((2, made_boundary(0.0)), (9, made_boundary()))
    image = Image.open(io.BytesIO(plot.draw_moving_boundary(outcome, boundaries)))
    assert (image.format, image.n_frames, image.size[0], image.info["loop"]) == ("GIF", 2, 800, 0)
    image.seek(1)
    assert image.info["duration"] == 2000
    for (epoch, counts), (words, shades) in zip(((2, (0, 0)), (9, (10, 3))), seen, strict=True):
        assert f"Epoch {epoch}: what the network has learned" in words
        now = outcome.history.query("seed == 4 and epoch == @epoch").set_index("flood_level")
        for (side, (level, _)), count, shade in zip(SIDES.items(), counts, shades):
            title = f"{side}, b = 0.2" if level else side
            title += f" loss: train {now.train_loss_noisy[level]:.2f}, "
            title += f"test {now.test_loss_clean[level]:.2f}"
            title += f" learned {count} of 10 flipped labels" if count else ""
            assert title in words and {*shade.flat} == {0.0, 1.0}


def made_trials():
    """Raw figures of four trials of four settings, and of five starts of two of them."""
    settings = itertools.product((0.0, 1.0), (0.05, 0.1))
    keys = itertools.product(settings, range(4), SCORED_EPOCHS, np.arange(6) / 10, range(5))
    rows = pd.DataFrame(keys, columns=["setting", "seed", "scored_epoch", "flood_level", "start"])
    level, start, best = rows.flood_level, rows.start, rows.scored_epoch == "best"
    rows["spiral_noise"], rows["label_noise"] = zip(*rows.setting)
    rows["dataset"] = "spiral"
    collapse = 120 * (level == 0.5) * (rows.spiral_noise == 0)
    rows["gain"] = (40 * level - collapse) * (1 + 0.1 * rows.seed) / (1 + best)
    rows["gain"] *= 0.6 + 4 * rows.label_noise
    names = [f"{split}_{score}" for split in ("val", "test") for score in SCORES]
    for name, value in {**PARAMETERS, **dict.fromkeys(names, 0.5)}.items():
        rows[name] = rows.get(name, value)
    rows["val_accuracy_noisy"] = 0.9 - abs(level - 0.2 - 0.1 * (rows.seed == 3)) - abs(start - 3)
    rows["test_accuracy_noisy"] = 0.5 + rows.seed / 30 + rows.gain / 100 + 0.01 * start * (1 + best)
    return rows[start == 0], rows[(level == 0) & (rows.spiral_noise == 0)]


def test_the_tables_picture():
    trials, starts = made_trials()
    figure = plot.draw_table(trials, compare(trials, starts))
    for axes, (key, setting) in zip(figure.axes, trials.groupby("setting"), strict=True):
        name = "spiral, τ = 1" if key[0] else "spiral"
        assert axes.get_title() == f"{name}, {100 * key[1]:g}% label noise"
        lines, drawn = {line.get_label(): line for line in axes.lines}, iter(axes.collections)
        for letter, which, color in (("A", "last", "#0072b2"), ("B", "best", "#e69f00")):
            scored = setting[setting.scored_epoch == which]
            gains = scored.groupby("flood_level").gain
            mean, half = gains.mean(), scipy.stats.t.ppf(0.975, 3) * gains.std() / 2
            curve = lines[f"{letter}, {which} epoch: one b in all trials"]
            equal(curve.get_xydata(), np.stack([mean.index, mean], axis=1), atol=1e-9)
            assert_is_band(next(drawn), mean - half, mean + half, color)
            own = scored[np.isclose(scored.flood_level, 0.2 + 0.1 * (scored.seed == 3))].gain
            chosen = lines[f"{letter}, {which} epoch: in each trial the b chosen by validation"]
            half = scipy.stats.t.ppf(0.975, 3) * own.std() / 2
            equal(chosen.get_xydata(), [[0.225, own.mean()]])
            ends = [[0.225, own.mean() + side * half] for side in (-1, 1)]
            equal(next(drawn).get_segments()[0], ends)
            assert to_hex(curve.get_color()) == to_hex(chosen.get_color()) == color
            best = lines.get(f"{letter}, {which} epoch: best of 5 starts, no flooding")
            assert (best is None) == (key[0] == 1)
            if best:
                equal(best.get_ydata(), 3 if letter == "A" else 6)
                assert to_hex(best.get_color()) == color
        (low, high), data = axes.get_ylim(), axes.dataLim
        assert low < data.y0 + 1e-9 and data.y1 < high < data.y1 + 14 and axes.get_xlim()[0] == 0
        marks = [text.get_text() for text in axes.texts]
        collapse = marks == [f"collapse (log scale, to −{-low:.0f})"]
        assert collapse == (low < -high) == (key[0] == 0)
        assert axes.yaxis.get_transform().linthresh == high  # even below, down to minus that
        assert [0, 0] in [[*line.get_ydata()] for line in axes.lines]
    assert any("mean and 95% interval of 4 trials" in text for text in said(figure))
    [legend] = figure.subfigs[0].legends
    colors = [("A", "#0072b2")] * 3 + [("B", "#e69f00")] * 3
    entries = zip(legend.texts, legend.legend_handles)
    assert colors == [(text.get_text()[0], to_hex(line.get_color())) for text, line in entries]
    assert [line.get_linestyle() for line in legend.legend_handles] == ["--", "None", "-"] * 2
    assert_nothing_overlaps(figure)
    one = trials[trials.seed == 0]
    low, high = plot.draw_table(one, compare(one)).axes[0].get_ylim()
    assert low < -100 and 16 < high < 25


def test_nothing_that_the_user_has_set_reaches_the_pictures():
    """As by a matplotlibrc."""
    trials, _ = made_trials()
    trials = trials[(trials.spiral_noise == 0) & (trials.label_noise == 0.1)]
    odd = {"text.usetex": True, "font.size": 30, "savefig.bbox": "tight", "lines.marker": "o"}
    odd |= {"font.family": "monospace", "axes.xmargin": 0.5, "axes.unicode_minus": False}
    drawn = []
    for settings in ({}, odd):
        with matplotlib.rc_context(settings):
            moving = plot.draw_moving_boundary(made_outcome(), [(2, made_boundary())])
            drawn.append([plot.png(plot.draw_table(trials, compare(trials))), moving])
    assert drawn[0] == drawn[1]
