"""Draw what flooding does: a demo's curves and boundaries, the paper's table.

`python plot.py --run-id ID` draws the pictures of a demo again from what MLflow has.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from datasets import DATASETS
from results import compared_level, write_files
from settings import STOPPINGS, OutputSettings, ending_on, flag, parse_flags

if TYPE_CHECKING:
    from train import Boundary

WITHOUT_COLOR = "#D55E00"  # vermillion and blue of the Okabe-Ito colour-blind-safe palette
WITH_COLOR = "#0072B2"
STOPPING_COLORS = dict(zip(STOPPINGS, ("#0072B2", "#E69F00")))  # blue and orange
NEUTRAL_COLOR = "#555555"
OTHER_COLOR = "#999999"  # of flood levels that no picture shows
TRAIN_STYLE = (0, (4, 2))  # dashed
CLASS_MAP = LinearSegmentedColormap.from_list("classes", ["#ffffff", "#9a9a9a"])


def colors(flood_levels: Sequence[float], compared: float) -> dict[float, str]:
    """Return the colour of each flood level, that of the pictures where they show it."""
    shown = {level: color for level, _, color in _sides(compared)}
    return {level: shown.get(level, OTHER_COLOR) for level in flood_levels}


def draw_demo(
    history: pd.DataFrame, parameters: Mapping[str, object], boundary: Boundary | None
) -> dict[str, Figure]:
    """Return a demo's pictures by their file names.

    `history` has a row a `seed`, `flood_level` and `epoch`, with the METRICS of `train`. Training
    curves are against the noisy labels that were trained on, test curves against the clean ones.
    [released code] `parameters` are the demo's settings, as values or strings, of any trial.
    """
    parameters = {**parameters, "seed": history.seed.min(), "trials": history.seed.nunique()}
    chosen, compared = compared_level(history, str(parameters["select_on"]))
    pictures = {
        "synth_loss.png": _draw_curves(history, chosen, compared, parameters, "loss"),
        "synth_acc.png": _draw_curves(history, chosen, compared, parameters, "accuracy"),
    }
    if boundary:
        pictures["synth_boundary.png"] = _draw_boundary(boundary, compared, parameters)
    return pictures


def describe(parameters: Mapping[str, object]) -> str:
    """Return the setting of a demo in words; two halves, split by a newline."""
    given = {name: str(value) for name, value in parameters.items()}
    samples, batch, first, trials = (
        int(given[name]) for name in ("train_samples", "batch_size", "seed", "trials")
    )
    spiral = f", spiral noise {float(given['spiral_noise']):g}" * (given["dataset"] == "spiral")
    momentum = float(given["momentum"])
    seeds = f"{trials} trials, seeds {first} to {first + trials - 1}"
    return (
        f"{given['dataset']}, {100 * float(given['label_noise']):.3g}% of the labels flipped"
        f"{spiral}, {_count(samples, 'training example')}; MLP {given['hidden_layers']} × "
        f"{given['hidden_units']}{' with batch norm' * (given['batch_norm'] == 'True')}\n"
        f"{given['optimizer'].upper().replace('ADAM', 'Adam')}, learning rate "
        f"{float(given['learning_rate']):g}{f', momentum {momentum:g}' if momentum else ''}, "
        f"batches of {min(batch, samples)}, {_count(given['epochs'], 'epoch')}; "
        f"{seeds if trials > 1 else f'seed {first}'}"
    )


def _count(number: object, what: str) -> str:
    return f"{number} {what}{'s' * (int(number) != 1)}"


def png_files(figures: Mapping[str, Figure]) -> dict[str, bytes]:
    """Return what is to be written of pictures, by their file names."""
    files = {}
    for name, figure in figures.items():
        figure.savefig(content := io.BytesIO(), format="png", dpi=150)
        files[name] = content.getvalue()
    return files


def _sides(compared: float) -> list[tuple[float, str, str]]:
    """The flood levels that a picture shows, with their names and colours."""
    sides = [(0.0, "without flooding", WITHOUT_COLOR), (compared, "with flooding", WITH_COLOR)]
    return sides if compared else sides[:1]


def _draw_curves(
    history: pd.DataFrame, chosen: float, compared: float, given: Mapping[str, object], score: str
) -> Figure:
    figure = Figure(figsize=(9, 5.2))
    axes = figure.subplots()
    figure.subplots_adjust(left=0.1, right=0.72, top=0.83, bottom=0.17)
    digits, ends, bands = ".2f" if score == "loss" else ".1%", [], []
    for level, side, color in _sides(compared):
        trials = history[history.flood_level == level].groupby("epoch")
        for split, labels, style in (("train", "noisy", TRAIN_STYLE), ("test", "clean", "solid")):
            curve = trials[f"{split}_{score}_{labels}"].agg(["mean", "std"])
            mean, deviation = curve["mean"], curve["std"].fillna(0)
            name = f"{split}, {side}"
            axes.plot(mean.index, mean, color=color, linestyle=style, linewidth=1.8, label=name)
            low, high = mean - deviation, mean + deviation
            bands.append(pd.DataFrame({"low": low, "high": high}))
            if deviation.any():
                axes.fill_between(mean.index, low, high, color=color, alpha=0.15, linewidth=0)
            ends.append((mean.iloc[-1], f"{mean.iloc[-1]:{digits}}  {name}", color))
    if score == "loss" and compared:
        axes.axhline(compared, color=NEUTRAL_COLOR, linestyle=":", linewidth=1.4, zorder=1)
        ends.append((compared, f"flood level b = {compared:g}", NEUTRAL_COLOR))
    epochs = history.epoch.max()
    ylabel = "cross-entropy loss (nats)" if score == "loss" else "accuracy"
    axes.set(xlim=(0, epochs), xlabel="epoch", ylabel=ylabel)
    _limit(axes, score, pd.concat(bands), epochs)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    _label_ends(axes, ends)

    title = f"{score.capitalize()} without{' and with' if compared else ''} flooding"
    title += " (validation chose no flooding)" if compared and not chosen else ""
    _write_title(figure, title, given)
    with_norm = str(given["batch_norm"]) == "True" and given["flood_on"] == "batch"
    if score == "loss" and compared and with_norm:
        _explain_modes(figure, history[history.flood_level == compared], compared)
    figure.legend(
        [Line2D([], [], color=NEUTRAL_COLOR, linestyle=style) for style in (TRAIN_STYLE, "solid")],
        ["train, noisy labels", "test, clean labels"],
        loc="lower right", bbox_to_anchor=(0.995, 0.0), frameon=False, fontsize=9,
    )  # fmt: skip
    return figure


def _explain_modes(figure: Figure, history: pd.DataFrame, level: float) -> None:
    """Say why the curves part above the level: with batch norm, what is flooded is another loss."""
    means = history.groupby("epoch")[["train_batch_loss", "train_loss_noisy"]].mean()
    below = means.index[means.train_batch_loss < level]
    if len(below):
        evaluated = means.train_loss_noisy[below[0]]
        figure.text(
            0.1, 0.015, f"Flooded is the loss in training mode, where batch norm uses the "
            f"mini-batch's statistics. It falls below b\nin epoch {below[0]}, when the loss in "
            f"evaluation mode, which the curves show, is still {evaluated:.2f}.",
            fontsize=8, color=NEUTRAL_COLOR,
        )  # fmt: skip


def _limit(axes: Axes, score: str, bands: pd.DataFrame, epochs: int) -> None:
    """Frame the curves: all but the first epochs' climb, and all but a rare leap of the loss."""
    late = bands[bands.index >= epochs / 20]
    if score == "accuracy":
        worst = max(0.0, late.low.min())
        axes.set_ylim(worst - 0.05 * (1 - worst) - 0.005, 1.005)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        return
    highest, usual = bands.high.max(), late.high.quantile(0.95)
    axes.set_ylim(0, 1.05 * min(highest, 2.5 * usual))
    if highest > 2.5 * usual:
        axes.text(0.01, 0.985, f"▲ up to {highest:.2f}", transform=axes.transAxes, fontsize=8,
                  color=NEUTRAL_COLOR, va="top")  # fmt: skip


def _write_title(figure: Figure, title: str, parameters: Mapping[str, object]) -> None:
    figure.text(0.1, 0.945, title, fontsize=14, fontweight="bold")
    figure.text(0.1, 0.855, describe(parameters), fontsize=9, color=NEUTRAL_COLOR)


def _label_ends(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Write each curve's name and end value to the right of it, pushed apart where they meet."""
    (low, high), ends = axes.get_ylim(), sorted(ends)
    heights = np.array([value for value, _, _ in ends])
    for _ in range(200):
        for lower in range(len(heights) - 1):
            overlap = 0.055 * (high - low) - (heights[lower + 1] - heights[lower])
            if overlap > 0:
                heights[lower : lower + 2] += -overlap / 2, overlap / 2
        heights += max(0, low - heights[0])  # keep all of them inside the axes' height
        heights -= max(0, heights[-1] - high)
    beside = axes.get_yaxis_transform()
    for height, (value, text, color) in zip(heights, ends):
        line = {"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkB": 0}
        axes.annotate(
            text, xy=(1, value), xytext=(1.035, height), xycoords=beside, textcoords=beside,
            color=color, fontsize=9, va="center", annotation_clip=False, arrowprops=line,
        )  # fmt: skip


def _draw_boundary(boundary: Boundary, compared: float, parameters: Mapping[str, object]) -> Figure:
    sides = _sides(compared)
    figure = Figure(figsize=(9, 5.9 if len(sides) > 1 else 8.2))
    panels = figure.subplots(1, len(sides), squeeze=False)[0]
    figure.subplots_adjust(left=0.06, right=0.98, top=0.76, bottom=0.14, wspace=0.12)
    axis, inputs, labels = boundary.axis, boundary.inputs, boundary.labels
    flipped = labels != boundary.clean_labels
    plane = np.stack([x.ravel() for x in np.meshgrid(axis, axis)], axis=1)
    true_boundary = DATASETS[str(parameters["dataset"])].boundary
    dashed = {"linestyles": [TRAIN_STYLE], "linewidths": 1.2}
    networks = zip(panels, sides, boundary.probability, boundary.predictions)
    for axes, (level, side, color), probability, predictions in networks:
        axes.pcolormesh(axis, axis, probability, cmap=CLASS_MAP, vmin=0, vmax=1, rasterized=True)
        if true_boundary:
            truth = true_boundary(plane).reshape(probability.shape)
            axes.contour(axis, axis, truth, [0], colors="black", **dashed)
        axes.contour(axis, axis, probability, [0.5], colors=color, linewidths=2)
        for label, face in ((0, "white"), (1, "black")):
            dot = {"facecolor": face, "edgecolor": "black", "linewidth": 0.8}
            axes.scatter(*inputs[labels == label].T, s=20, zorder=3, **dot)
        circle = {"facecolor": "none", "edgecolor": color, "linewidth": 2}
        axes.scatter(*inputs[flipped].T, s=120, zorder=4, **circle)
        name = f"{side}, b = {level:g}" if level else side
        if flipped.any():
            learned = (predictions == labels)[flipped].sum()
            name += f":\nlearned {learned} of {_count(flipped.sum(), 'flipped label')}"
        axes.set_title(name, color=color, fontsize=11, fontweight="bold")
        axes.set(aspect="equal", xticks=[], yticks=[])
    _write_title(figure, "What the network learned", {**parameters, "trials": 1})

    point = {"linestyle": "none", "marker": "o", "markeredgecolor": "black"}
    circle = {**point, "markersize": 11, "markeredgecolor": NEUTRAL_COLOR, "markeredgewidth": 2}
    handles = {
        "trained as class 1": Line2D([], [], color="black", **point),
        "trained as class 0": Line2D([], [], markerfacecolor="white", **point),
        "label flipped": Line2D([], [], markerfacecolor="none", **circle),
        "true boundary": Line2D([], [], color="black", linestyle=TRAIN_STYLE, linewidth=1.2),
        "network's boundary": Line2D([], [], color=NEUTRAL_COLOR, linewidth=2),
        "probability of class 1": Line2D([], [], color="#9a9a9a", linewidth=8),
    }
    if not true_boundary:
        del handles["true boundary"]
    figure.legend(handles.values(), handles, loc="lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def draw_table(cells: pd.DataFrame, table: pd.DataFrame) -> Figure:
    """Return a panel a setting: noisy-label test accuracy against the flood level, by stopping.

    `cells` are the raw figures, see `results.read_cells`; `table` is `results.compare` of them.
    """
    table = table.query("labels == 'noisy'")
    datasets, noises = table.dataset.unique(), sorted(table.label_noise.unique())
    size = max(8, 1 + 3.6 * len(noises)), 1.5 + 2.7 * len(datasets)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(datasets), len(noises), squeeze=False, sharex=True)
    for row, dataset in zip(panels, datasets):
        for axes, noise in zip(row, noises):
            setting = "dataset == @dataset and label_noise == @noise"
            _draw_levels(axes, cells.query(setting), table.query(setting))
            axes.set_title(f"{dataset}, {100 * noise:g}% label noise", fontsize=10)
            axes.spines[["top", "right"]].set_visible(False)
            axes.yaxis.set_major_formatter(PercentFormatter(1))
            axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        row[0].set_ylabel("test accuracy")
    for axes in panels[-1]:
        axes.set_xlabel("flood level b (nats)")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    trials = " or ".join(str(count) for count in sorted(table.trials.unique()))
    figure.suptitle(
        f"Accuracy on noisy test labels against the flood level\n"
        f"mean and standard deviation, {trials} trial{'s' * (trials != '1')} a setting; "
        f"curves leave the frame where flooding breaks down", fontsize=11,
    )  # fmt: skip
    return figure


def _draw_levels(axes: Axes, cells: pd.DataFrame, table: pd.DataFrame) -> None:
    lows, highs = [], []
    for setting in table.itertuples():
        color = STOPPING_COLORS[setting.stopping]
        of_level = cells[cells.stopping == setting.stopping].groupby("flood_level")
        curve = of_level.test_accuracy_noisy.agg(["mean", "std"])
        mean, deviation = curve["mean"], curve["std"].fillna(0)
        high = (mean + deviation).clip(upper=1)
        axes.plot(mean.index, mean, color=color, linewidth=1.6, label=setting.stopping)
        axes.fill_between(mean.index, mean - deviation, high, color=color, alpha=0.15, linewidth=0)
        without, flooded = setting.without_flooding_mean, setting.with_flooding_mean
        label = f"{setting.stopping}: without flooding"
        axes.axhline(without, color=color, linestyle=":", linewidth=1.2, label=label)
        axes.plot(
            setting.flood_level_mean, flooded, marker="D", color=color, markeredgecolor="black",
            markersize=7, linestyle="none",
            label=f"{setting.stopping}: mean chosen b and its accuracy",
        )  # fmt: skip
        shown = (mean - deviation)[mean.index <= setting.flood_level_mean]
        lows += [without, flooded, shown.median()]
        highs.append(high.max())
    low, high = min(lows), max(highs)
    margin = max(0.15 * (high - low), 0.002)
    axes.set_ylim(low - 2 * margin, min(high + margin, 1 + margin / 2))


@dataclass(frozen=True, kw_only=True)
class PlotSettings(OutputSettings):
    """Which demo to draw again, and where to."""

    run_id: Annotated[str, flag("ID")]
    """a run of the demo in MLflow: the Run ID on its page"""


def main(flags: PlotSettings) -> None:
    from tracking import TrackingError, load_demo

    with ending_on(TrackingError, status=2):
        history, parameters, boundary = load_demo(flags.run_id)
    files = png_files(draw_demo(history, parameters, boundary))
    print(*write_files(files, flags.output_dir), sep="\n")


if __name__ == "__main__":
    main(parse_flags(PlotSettings, __doc__))
