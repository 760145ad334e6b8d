"""The pictures, by what is drawn in them: curves, frames, names, figures; nothing overlaps."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.text import Text

import plot
from datasets import make_dataset
from plot import STOPPING_COLORS, WITH_COLOR, WITHOUT_COLOR, draw_demo, draw_table
from results import compare
from settings import SCORES, STOPPINGS, DataSettings, ModelSettings, TrainSettings
from train import METRICS, Boundary

PARAMETERS = {
    **vars(DataSettings("sinusoid2d", 0.1)),
    **vars(ModelSettings(hidden_layers=4, hidden_units=500, batch_norm=True)),
    **vars(TrainSettings("sgd", 0.01, batch_size=200, epochs=40, momentum=0.9)),
    **{"seed": 0, "trials": 1, "select_on": "clean"},
}


def made_history(levels=(0.0, 0.2, 0.3), epochs=40, trials=1, best=0.2):
    """Curves that fall to a value of their own; validation likes the level `best` most."""
    rows = []
    for seed, level, epoch in itertools.product(range(trials), levels, range(epochs + 1)):
        row = {"seed": seed, "flood_level": level, "epoch": epoch}
        for number, name in enumerate(METRICS):
            end = 0.05 + 0.02 * number + level + 0.03 * seed
            row[name] = end + 0.5 / (1 + epoch)
            if "accuracy" in name:
                row[name] = 0.9 - 0.1 * row[name] - 0.2 * (level != best)
        rows.append(row)
    return pd.DataFrame(rows)


def texts(figure):
    found = [*figure.texts, *([figure._suptitle] if figure._suptitle else [])]
    for axes in figure.axes:
        found += [*axes.texts, axes.title]
    return [text for text in found if text.get_text()]


def assert_nothing_overlaps(figure):
    """No two texts or legends meet, and none leaves the picture."""
    FigureCanvasAgg(figure).draw()
    things = dict.fromkeys([*texts(figure), *figure.legends])
    boxes = [
        (
            Text.get_window_extent(thing) if isinstance(thing, Text) else thing.get_window_extent()
        ).padded(-1)
        for thing in things
    ]  # an annotation's own extent has its arrow in it
    for box in boxes:
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)


def curves(figure):
    return {line.get_label(): line for line in figure.axes[0].lines if line.get_label()[0] != "_"}


@pytest.mark.parametrize(("score", "name"), [("loss", "synth_loss"), ("accuracy", "synth_acc")])
def test_curves_are_the_history(score, name):
    history = made_history()
    figure = draw_demo(history, PARAMETERS, None)[f"{name}.png"]
    drawn = curves(figure)
    sides = {"without flooding": (0.0, WITHOUT_COLOR), "with flooding": (0.2, WITH_COLOR)}
    assert set(drawn) == {f"{split}, {side}" for split in ("train", "test") for side in sides}
    said = [text.get_text() for text in texts(figure)]
    for split, labels, style in (("train", "noisy", "--"), ("test", "clean", "-")):
        for side, (level, color) in sides.items():
            line, rows = drawn[f"{split}, {side}"], history[history.flood_level == level]
            np.testing.assert_array_equal(line.get_xdata(), rows.epoch)
            np.testing.assert_allclose(line.get_ydata(), rows[f"{split}_{score}_{labels}"])
            assert (to_hex(line.get_color()).upper(), line.get_linestyle()) == (color, style)
            end = line.get_ydata()[-1]
            shown = f"{end:.2f}" if score == "loss" else f"{100 * end:.1f}%"
            assert f"{shown}  {split}, {side}" in said
    assert f"{score.capitalize()} without and with flooding" in said
    assert ("flood level b = 0.2" in said) == (score == "loss")
    if score == "loss":
        [level] = [line for line in figure.axes[0].lines if line.get_linestyle() == ":"]
        assert set(level.get_ydata()) == {0.2}
    [legend] = figure.legends
    assert [text.get_text() for text in legend.texts] == [
        "train, noisy labels",
        "test, clean labels",
    ]
    assert_nothing_overlaps(figure)
    assert not figure.axes[0].collections  # one trial has no band


def test_bands_are_a_standard_deviation_each_way():
    history = made_history(trials=3)
    figure = draw_demo(history, {**PARAMETERS, "trials": 3}, None)["synth_loss.png"]
    line = curves(figure)["test, with flooding"]
    trials = history[history.flood_level == 0.2].groupby("epoch").test_loss_clean
    np.testing.assert_allclose(line.get_ydata(), trials.mean())
    assert len(figure.axes[0].collections) == 4
    corners = figure.axes[0].collections[3].get_paths()[0].vertices
    assert {round(y, 9) for y in (trials.mean() + trials.std())} <= {
        round(y, 9) for y in corners[:, 1]
    }
    assert any("3 trials, seeds 0 to 2" in text.get_text() for text in texts(figure))
    assert_nothing_overlaps(figure)


@pytest.mark.parametrize(
    ("levels", "best", "title", "compared"),
    [
        ((0.0, 0.2), 0.0, " without and with flooding (validation chose no flooding)", 0.2),
        ((0.0,), 0.0, " without flooding", None),
    ],
)
def test_no_flooding_chosen(levels, best, title, compared):
    parameters = {**PARAMETERS, "epochs": 1, "batch_size": 10}
    for name, figure in draw_demo(made_history(levels, 1, best=best), parameters, None).items():
        said = [text.get_text() for text in texts(figure)]
        assert {"synth_loss.png": "Loss", "synth_acc.png": "Accuracy"}[name] + title in said
        assert len(curves(figure)) == (4 if compared else 2)
        FigureCanvasAgg(figure).draw()
        assert all(float(tick).is_integer() for tick in figure.axes[0].get_xticks())
        assert any("batches of 10, 1 epoch; seed 0" in text for text in said)
        assert_nothing_overlaps(figure)


def test_a_leap_of_the_loss_does_not_squeeze_the_curves():
    history = made_history()
    history.loc[(history.epoch == 30) & (history.flood_level == 0), "train_loss_noisy"] = 25.0
    figure = draw_demo(history, PARAMETERS, None)["synth_loss.png"]
    assert figure.axes[0].get_ylim()[1] < 3
    assert "▲ up to 25.00" in [text.get_text() for text in texts(figure)]
    assert_nothing_overlaps(figure)


def test_accuracies_stay_within_their_frame():
    figure = draw_demo(made_history(), PARAMETERS, None)["synth_acc.png"]
    low, high = figure.axes[0].get_ylim()
    late = [line.get_ydata()[2:] for line in curves(figure).values()]
    assert low < np.min(late) and np.max(late) < high and 1 < high < 1.01


def test_curves_that_end_together_are_told_apart():
    history = made_history()
    for name in METRICS:
        history[name] = 0.7 if "loss" in name else 1.0
    for figure in draw_demo(history, PARAMETERS, None).values():
        assert_nothing_overlaps(figure)


def made_boundary():
    """Two networks: one went round the flipped points, one did not."""
    data = make_dataset(DataSettings("sinusoid2d", 0.1, train_samples=100), seed=0).train
    axis = np.linspace(-3, 3, 50)
    probability = np.stack([np.add.outer(axis, sign * axis) / 12 + 0.5 for sign in (1, -1)])
    predictions = np.stack([data.labels, data.clean_labels])
    return Boundary(axis, probability, predictions, data.inputs, data.labels, data.clean_labels)


def test_boundaries():
    boundary = made_boundary()
    figure = draw_demo(made_history(), PARAMETERS, boundary)["synth_boundary.png"]
    flipped = boundary.labels != boundary.clean_labels
    assert flipped.sum() == 10
    for number, (axes, color, title) in enumerate(
        zip(
            figure.axes,
            (WITHOUT_COLOR, WITH_COLOR),
            (
                "without flooding:\nlearned 10 of 10 flipped labels",
                "with flooding, b = 0.2:\nlearned 0 of 10 flipped labels",
            ),
        )
    ):
        assert axes.get_title() == title and axes.get_aspect() == 1
        assert to_hex(axes.title.get_color()).upper() == color
        mesh, truth, learned, zeros, ones, marked = axes.collections
        np.testing.assert_array_equal(mesh.get_array(), boundary.probability[number])
        assert to_hex(learned.get_edgecolor()[0]).upper() == color
        assert to_hex(truth.get_edgecolor()[0]) == "#000000"
        vertices = np.concatenate([path.vertices for path in learned.get_paths()])
        assert np.abs(vertices[:, 1] + vertices[:, 0] * (1 - 2 * number)).max() < 0.2
        for points, of_class in ((zeros, boundary.labels == 0), (ones, boundary.labels == 1)):
            np.testing.assert_array_equal(points.get_offsets(), boundary.inputs[of_class])
        np.testing.assert_array_equal(marked.get_offsets(), boundary.inputs[flipped])
    assert len(figure.axes) == 2
    [legend] = figure.legends
    assert "label flipped" in [text.get_text() for text in legend.texts]
    assert_nothing_overlaps(figure)


def test_boundaries_without_flipped_labels():
    boundary = made_boundary()
    boundary = replace(boundary, labels=boundary.clean_labels)
    figure = draw_demo(made_history(), PARAMETERS, boundary)["synth_boundary.png"]
    assert [axes.get_title() for axes in figure.axes] == [
        "without flooding",
        "with flooding, b = 0.2",
    ]


def test_the_true_boundary_is_drawn_where_the_clean_labels_change():
    boundary = made_boundary()
    figure = draw_demo(made_history(), PARAMETERS, boundary)["synth_boundary.png"]
    truth = figure.axes[0].collections[1]
    vertices = np.concatenate([path.vertices for path in truth.get_paths()])
    vertices = vertices[np.linalg.norm(vertices, axis=1) < 2]  # where the examples are
    clean = make_dataset(DataSettings("sinusoid2d", 0.0, train_samples=20_000), seed=1).train
    distances = np.linalg.norm(vertices[:, None] - clean.inputs[None, :, :], axis=-1)
    near = np.sort(np.argsort(distances, axis=1)[:, :20], axis=1)
    assert np.mean([0 < clean.labels[points].mean() < 1 for points in near]) > 0.8


def made_cells():
    """Three trials of two settings; accuracy peaks at 0.2 and breaks down above 0.4."""
    rows = []
    for dataset, seed, stopping, step in itertools.product(
        ("sinusoid2d", "spiral"), range(3), STOPPINGS, range(6)
    ):
        level = step / 10
        accuracy = 0.8 + level / 2 - (level > 0.2) * (level - 0.2) / 2 - 0.5 * (level > 0.4)
        accuracy += 0.01 * seed + 0.02 * (stopping == "early")
        setting = DataSettings(dataset, 0.1, test_samples=100)
        row = {**vars(setting), "seed": seed, "stopping": stopping, "flood_level": level}
        names = [f"{split}_{score}" for split in ("val", "test") for score in SCORES]
        row |= {name: 0.5 if "loss" in name else accuracy for name in names}
        rows.append({**row, "val_accuracy_noisy": accuracy - 0.1 * abs(level - 0.2)})
    return pd.DataFrame(rows)


def test_the_tables_picture():
    cells = made_cells()
    figure = draw_table(cells, compare(cells))
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["sinusoid2d, 10% label noise", "spiral, 10% label noise"]
    for axes in figure.axes:
        lines = {line.get_label(): line for line in axes.lines}
        for stopping in STOPPINGS:
            curve = lines[stopping]
            assert curve.get_color() == STOPPING_COLORS[stopping]
            more = 0.01 + 0.02 * (stopping == "early")
            np.testing.assert_allclose(curve.get_xdata(), [0, 0.1, 0.2, 0.3, 0.4, 0.5])
            expected = np.array([0.8, 0.85, 0.9, 0.9, 0.9, 0.4]) + more
            np.testing.assert_allclose(curve.get_ydata(), expected)
            without = lines[f"{stopping}: without flooding"].get_ydata()
            np.testing.assert_allclose(without, 0.8 + more)
            chosen = lines[f"{stopping}: mean chosen b and its accuracy"]
            np.testing.assert_allclose(chosen.get_xydata(), [[0.2, 0.9 + more]])
        low, high = axes.get_ylim()
        assert 0.7 < low < 0.8 and 0.93 < high <= 1  # the breakdown does not squeeze the rest
    assert "3 trials a setting" in figure._suptitle.get_text()
    assert_nothing_overlaps(figure)


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "picture.png"
    path.write_text("old")
    with pytest.raises(RuntimeError), plot.in_place(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
