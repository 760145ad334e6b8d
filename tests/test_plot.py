"""The pictures, by what is drawn in them: curves, frames, names, figures; nothing overlaps."""

from __future__ import annotations

import itertools
import resource
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.text import Text

from datasets import DataSettings, make_dataset
from plot import STOPPING_COLORS, colors, draw_demo, draw_table, png_files
from results import compare, write_files
from settings import SCORES, STOPPINGS, ModelSettings, TrainSettings
from train import METRICS, Boundary

PARAMETERS = {
    **vars(DataSettings(dataset="sinusoid2d", label_noise=0.1)),
    **vars(ModelSettings(hidden_layers=4, hidden_units=500, batch_norm=True)),
    **vars(TrainSettings(optimizer="sgd", batch_size=200, epochs=40)),
    "select_on": "clean",
}
WITHOUT_COLOR, WITH_COLOR = "#D55E00", "#0072B2"


def made_history(levels=(0.0, 0.2, 0.3), epochs=range(41), trials=1, best=0.2):
    """Curves that fall to a value of their own; validation likes the level `best` most.

    In training mode the loss falls below the level after epoch 6.
    """
    keys = itertools.product(range(4, 4 + trials), levels, epochs)
    history = pd.DataFrame(keys, columns=["seed", "flood_level", "epoch"])
    level, epoch = history.flood_level, history.epoch
    for number, name in enumerate(METRICS):
        curve = 0.05 + 0.02 * number + level + 0.03 * (history.seed - 4) + 0.5 / (1 + epoch)
        history[name] = curve if "loss" in name else 0.9 - 0.1 * curve - 0.2 * (level != best)
    history["train_batch_loss"] = (level + 0.065 - 0.01 * epoch).where(epoch > 0)
    return history


def picture(name, history=None, boundary=None, **parameters):
    history = made_history() if history is None else history
    return draw_demo(history, {**PARAMETERS, **parameters}, boundary)[f"synth_{name}.png"]


def texts(figure):
    found = [text for axes in [figure, *figure.axes] for text in axes.texts]
    titles = [axes.title for axes in figure.axes] + [figure._suptitle] * bool(figure._suptitle)
    return [text for text in found + titles if text.get_text()]


def said(figure):
    return [text.get_text() for text in texts(figure)]


def assert_nothing_overlaps(figure):
    """No two texts or legends meet, and none leaves the picture."""
    FigureCanvasAgg(figure).draw()
    boxes = []
    for thing in dict.fromkeys([*texts(figure), *figure.legends]):
        kind = Text if isinstance(thing, Text) else type(thing)
        boxes.append(kind.get_window_extent(thing).padded(-1))  # an annotation without its arrow
    for box in boxes:
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)


def curves(figure):
    return {line.get_label(): line for line in figure.axes[0].lines if line.get_label()[0] != "_"}


@pytest.mark.parametrize(("score", "name"), [("loss", "loss"), ("accuracy", "acc")])
def test_curves_are_the_history(score, name):
    history = made_history()
    figure = picture(name, history)
    drawn = curves(figure)
    sides = {"without flooding": (0.0, WITHOUT_COLOR), "with flooding": (0.2, WITH_COLOR)}
    assert set(drawn) == {f"{split}, {side}" for split in ("train", "test") for side in sides}
    for split, labels, style in (("train", "noisy", "--"), ("test", "clean", "-")):
        for side, (level, color) in sides.items():
            line, rows = drawn[f"{split}, {side}"], history[history.flood_level == level]
            np.testing.assert_array_equal(line.get_xdata(), rows.epoch)
            np.testing.assert_allclose(line.get_ydata(), rows[f"{split}_{score}_{labels}"])
            assert (to_hex(line.get_color()).upper(), line.get_linestyle()) == (color, style)
            end = line.get_ydata()[-1]
            shown = f"{end:.2f}" if score == "loss" else f"{100 * end:.1f}%"
            assert f"{shown}  {split}, {side}" in said(figure)
    assert f"{score.capitalize()} without and with flooding" in said(figure)
    assert ("flood level b = 0.2" in said(figure)) == (score == "loss")
    dotted = [line for line in figure.axes[0].lines if line.get_linestyle() == ":"]
    assert [set(line.get_ydata()) for line in dotted] == [{0.2}] * (score == "loss")
    [legend] = figure.legends
    names = [text.get_text() for text in legend.texts]
    assert names == ["train, noisy labels", "test, clean labels"]
    assert_nothing_overlaps(figure)
    assert not figure.axes[0].collections  # one trial has no band


def test_bands_are_a_standard_deviation_each_way():
    history = made_history(trials=3)
    figure = picture("loss", history)
    line = curves(figure)["test, with flooding"]
    trials = history[history.flood_level == 0.2].groupby("epoch").test_loss_clean
    mean, deviation = trials.mean(), trials.std()
    np.testing.assert_allclose(line.get_ydata(), mean)
    assert len(figure.axes[0].collections) == 4
    corners = figure.axes[0].collections[3].get_paths()[0].vertices[:, 1]
    assert set(corners.round(9)) == {*(mean - deviation).round(9), *(mean + deviation).round(9)}
    assert any("3 trials, seeds 4 to 6" in text for text in said(figure))
    assert_nothing_overlaps(figure)


@pytest.mark.parametrize("epochs", [range(41), range(0, 41, 5)])
def test_the_picture_says_which_loss_is_flooded(epochs):
    """At 0.2 + 0.065 - 0.01 epoch the loss in training mode is below 0.2 from epoch 7 on."""
    history = made_history(epochs=epochs, trials=2)
    first = min(epoch for epoch in epochs if epoch >= 7)
    then = history[(history.flood_level == 0.2) & (history.epoch == first)]
    figure = picture("loss", history)
    [text] = [text.replace("\n", " ") for text in said(figure) if "training mode" in text]
    assert f"falls below b in epoch {first}, when the loss in evaluation mode" in text
    assert f"is still {then.train_loss_noisy.mean():.2f}." in text
    assert_nothing_overlaps(figure)
    history["train_batch_loss"] += 1
    silent = [picture("acc"), picture("loss", batch_norm=False)]
    silent += [picture("loss", history), picture("loss", made_history((0.0,)))]
    assert not any("training mode" in text for other in silent for text in said(other))


@pytest.mark.parametrize(
    ("levels", "title", "count"),
    [
        ((0.0, 0.2), " without and with flooding (validation chose no flooding)", 4),
        ((0.0,), " without flooding", 2),
    ],
)
def test_no_flooding_chosen(levels, title, count):
    history = made_history(levels, range(2), best=0.0)
    for name, score in (("loss", "Loss"), ("acc", "Accuracy")):
        figure = picture(name, history, epochs=1, batch_size=10)
        assert score + title in said(figure) and len(curves(figure)) == count
        FigureCanvasAgg(figure).draw()
        assert all(float(tick).is_integer() for tick in figure.axes[0].get_xticks())
        assert any("batches of 10, 1 epoch; seed 4" in text for text in said(figure))
        assert_nothing_overlaps(figure)


def test_a_leap_of_the_loss_does_not_squeeze_the_curves():
    history = made_history()
    history.loc[(history.epoch == 30) & (history.flood_level == 0), "train_loss_noisy"] = 25.0
    figure = picture("loss", history)
    assert figure.axes[0].get_ylim()[1] < 3 and "▲ up to 25.00" in said(figure)
    assert_nothing_overlaps(figure)


def test_accuracies_stay_within_their_frame():
    figure = picture("acc")
    low, high = figure.axes[0].get_ylim()
    late = [line.get_ydata()[2:] for line in curves(figure).values()]
    assert low < np.min(late) and np.max(late) < high and 1 < high < 1.01


def test_curves_that_end_together_are_told_apart():
    history = made_history()
    history[list(METRICS)] = [0.7 if "loss" in name else 1.0 for name in METRICS]
    for figure in draw_demo(history, PARAMETERS, None).values():
        assert_nothing_overlaps(figure)


def made_boundary():
    """Two networks: one went round the flipped points, one did not."""
    data = make_dataset(DataSettings(dataset="sinusoid2d", label_noise=0.1), seed=0).train
    axis = np.linspace(-3, 3, 50)
    probability = np.stack([np.add.outer(axis, sign * axis) / 12 + 0.5 for sign in (1, -1)])
    predictions = np.stack([data.labels, data.clean_labels])
    return Boundary(axis, probability, predictions, data.inputs, data.labels, data.clean_labels)


def test_boundaries():
    boundary = made_boundary()
    figure = picture("boundary", boundary=boundary)
    flipped = boundary.labels != boundary.clean_labels
    assert flipped.sum() == 10
    titles = [
        "without flooding:\nlearned 10 of 10 flipped labels",
        "with flooding, b = 0.2:\nlearned 0 of 10 flipped labels",
    ]
    assert [axes.get_title() for axes in figure.axes] == titles
    for number, (axes, color) in enumerate(zip(figure.axes, (WITHOUT_COLOR, WITH_COLOR))):
        assert to_hex(axes.title.get_color()).upper() == color and axes.get_aspect() == 1
        mesh, truth, learned, zeros, ones, marked = axes.collections
        np.testing.assert_array_equal(mesh.get_array(), boundary.probability[number])
        assert mesh.cmap(0.0) > mesh.cmap(1.0)  # class 1 is the darker
        assert to_hex(learned.get_edgecolor()[0]).upper() == color
        assert to_hex(truth.get_edgecolor()[0]) == "#000000"
        x1, x2 = np.concatenate([path.vertices for path in truth.get_paths()]).T
        assert np.abs(1.5 * x1 + np.sin(1.5 * x2)).max() < 0.02 and np.ptp(x2) == 6
        vertices = np.concatenate([path.vertices for path in learned.get_paths()])
        assert np.abs(vertices[:, 1] + vertices[:, 0] * (1 - 2 * number)).max() < 0.2
        for points, label, face in ((zeros, 0, "#ffffff"), (ones, 1, "#000000")):
            of_class = boundary.inputs[boundary.labels == label]
            np.testing.assert_array_equal(points.get_offsets(), of_class)
            assert to_hex(points.get_facecolor()[0]) == face
        np.testing.assert_array_equal(marked.get_offsets(), boundary.inputs[flipped])
    [legend] = figure.legends
    assert "label flipped" in [text.get_text() for text in legend.texts]
    assert_nothing_overlaps(figure)


def test_boundaries_without_flipped_labels():
    boundary = made_boundary()
    boundary = replace(boundary, labels=boundary.clean_labels)
    titles = [axes.get_title() for axes in picture("boundary", boundary=boundary).axes]
    assert titles == ["without flooding", "with flooding, b = 0.2"]


def made_cells():
    """Three trials of two settings; accuracy peaks at 0.2 and breaks down above 0.4."""
    keys = itertools.product(("sinusoid2d", "spiral"), range(3), STOPPINGS, np.arange(6) / 10)
    cells = pd.DataFrame(keys, columns=["dataset", "seed", "stopping", "flood_level"])
    for name, value in vars(DataSettings(dataset="spiral", label_noise=0.1)).items():
        cells[name] = cells.get(name, value)
    level = cells.flood_level
    accuracy = 0.8 + level / 2 - (level > 0.2) * (level - 0.2) / 2 - 0.5 * (level > 0.4)
    accuracy += 0.01 * cells.seed + 0.02 * (cells.stopping == "early")
    for split, score in itertools.product(("val", "test"), SCORES):
        cells[f"{split}_{score}"] = 0.5 if "loss" in score else accuracy
    cells["val_accuracy_noisy"] -= 0.1 * abs(level - 0.2)
    cells["test_accuracy_clean"] += 0.05
    return cells


def test_the_tables_picture():
    cells = made_cells()
    figure = draw_table(cells, compare(cells))
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["sinusoid2d, 10% label noise", "spiral, 10% label noise"]
    for axes in figure.axes:
        lines = {line.get_label(): line for line in axes.lines}
        for stopping, band in zip(STOPPINGS, axes.collections):
            curve = lines[stopping]
            assert curve.get_color() == STOPPING_COLORS[stopping]
            more = 0.01 + 0.02 * (stopping == "early")
            np.testing.assert_allclose(curve.get_xdata(), [0, 0.1, 0.2, 0.3, 0.4, 0.5])
            expected = np.array([0.8, 0.85, 0.9, 0.9, 0.9, 0.4]) + more
            np.testing.assert_allclose(curve.get_ydata(), expected)
            corners = {*(expected - 0.01).round(9), *(expected + 0.01).round(9)}
            assert set(band.get_paths()[0].vertices[:, 1].round(9)) == corners
            without = lines[f"{stopping}: without flooding"].get_ydata()
            np.testing.assert_allclose(without, 0.8 + more)
            chosen = lines[f"{stopping}: mean chosen b and its accuracy"]
            np.testing.assert_allclose(chosen.get_xydata(), [[0.2, 0.9 + more]])
        low, high = axes.get_ylim()
        assert 0.7 < low < 0.8 and 0.93 < high <= 1  # the breakdown does not squeeze the rest
    assert "3 trials a setting" in figure._suptitle.get_text()
    assert_nothing_overlaps(figure)


def test_levels_have_the_colors_of_the_pictures():
    assert colors([0.0, 0.2, 0.3], 0.2) == {0.0: WITHOUT_COLOR, 0.2: WITH_COLOR, 0.3: "#999999"}
    assert colors([0.0, 0.2], 0.0) == {0.0: WITHOUT_COLOR, 0.2: "#999999"}


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    files = png_files({"picture.png": picture("loss")})
    [path] = write_files(files, tmp_path / "new")
    old = path.read_bytes()
    assert path == tmp_path / "new" / "picture.png" and old.startswith(b"\x89PNG")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # as on a full disk
        with pytest.raises(OSError):
            write_files({"picture.png": b"new" * 100}, path.parent)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == old and list(path.parent.iterdir()) == [path]
