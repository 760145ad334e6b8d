"""Draw a demo's pictures again, all but the moving one, from the files that it saved.

As a module it draws what flooding does: a demo's curves and boundaries, and the paper's table.
"""

import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

# A notebook's own backend, where that is not installed, would forbid to import matplotlib.
os.environ["MPLBACKEND"] = "agg"

import matplotlib
import numpy as np
import pandas as pd
import scipy
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image

import results
import settings
from datasets import DATASETS, name_of
from results import Outcome
from train import Boundary

WITHOUT_COLOR, WITH_COLOR = "#D55E00", "#0072B2"  # of the Okabe-Ito colour-blind-safe palette
GRAY = "#555555"
SUBTABLES = {"last": ("A, last epoch", "#0072B2"), "best": ("B, best epoch", "#E69F00")}
CLASS_MAP = LinearSegmentedColormap.from_list("classes", ["#ffffff", "#9a9a9a"])
DASHES = (0, (4, 2))
MODES = """Flooded is the loss in training mode, where batch norm uses the mini-batch's own
statistics. The curves show evaluation mode, in which they may part above the level."""
Marks = list[tuple[float, str, str]]  # height, text, colour
LEFT = {"x": 0.01, "ha": "left"}  # where titles stand
SMALL = {"fontsize": 8.5, "fontweight": "normal", "color": GRAY}
STYLE = {
    "figure.constrained_layout.use": True, "figure.constrained_layout.h_pad": 0.07,
    "figure.titlesize": 14, "figure.titleweight": "bold", "axes.titleweight": "bold",
    "font.size": 9, "lines.linewidth": 1.8, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.grid.axis": "y", "grid.color": "#dddddd", "grid.linewidth": 0.6,
}  # fmt: skip
# From an empty file matplotlib takes its own defaults: nothing of the user's matplotlibrc is left.
in_style = matplotlib.rc_context(STYLE, fname=os.devnull)


@in_style
def draw_demo(outcome: Outcome, boundary: Boundary | None) -> dict[str, Figure]:
    """Return a demo's pictures by their file names.

    Training curves are against the noisy labels that were trained on, test curves against the
    clean ones. [released code] `boundary` has the first trial's networks of 0 and `compared`.
    """
    pictures = {"synth_loss.png": _draw_curves(outcome, "loss")}
    pictures["synth_acc.png"] = _draw_curves(outcome, "accuracy")
    if boundary:
        pictures["synth_boundary.png"] = _draw_boundary(outcome, boundary)
    return pictures


@in_style
def png(figure: Figure, dpi: int = 150) -> bytes:
    """Return what is to be written of a picture."""
    figure.draw_without_rendering()  # titles within titles are laid out in two passes
    figure.savefig(content := io.BytesIO(), format="png", dpi=dpi)
    return content.getvalue()


def describe(parameters: Mapping[str, object]) -> str:
    """Return a demo's setting in words, on two lines; `parameters` are what it used, typed."""
    used = SimpleNamespace(**parameters)
    several = f"{used.trials} trials, seeds {used.seed} to {used.seed + used.trials - 1}"
    lines = [
        used.dataset, f"{100 * used.label_noise:.3g}% of the labels flipped",
        f"spiral noise {used.spiral_noise:g}" if used.dataset == "spiral" else "",
        f"{used.train_samples} training examples",
        f"MLP {used.hidden_layers} × {used.hidden_units}", "batch norm" if used.batch_norm else "",
    ], [
        {"sgd": "SGD", "adam": "Adam"}[used.optimizer], f"learning rate {used.learning_rate:g}",
        f"momentum {used.momentum:g}" if used.momentum else "",
        f"weight decay {used.weight_decay:g}" if used.weight_decay else "",
        "each example's loss flooded" if used.flood_on == "example" else "",
        f"batches of {used.batch_size}", f"{used.epochs} epoch{'s' if used.epochs > 1 else ''}",
        several if used.trials > 1 else f"seed {used.seed}",
    ]  # fmt: skip
    return "\n".join(", ".join(filter(None, line)) for line in lines)


def _sides(compared: float) -> list[tuple[float, str, str]]:
    """The flood levels that a demo's pictures show, with their names and colours."""
    sides = [(0.0, "without flooding", WITHOUT_COLOR), (compared, "with flooding", WITH_COLOR)]
    return sides if compared else sides[:1]


def _page(title: str, description: str, size: tuple[float, float]) -> tuple[Figure, SubFigure]:
    """Return a figure under its title, and the page below the description, to be drawn on."""
    figure = Figure(figsize=size)
    figure.suptitle(title, **LEFT)
    page = figure.subfigures()
    page.suptitle(description, **LEFT | SMALL)
    return figure, page


def _draw_curves(outcome: Outcome, score: str) -> Figure:
    history, compared, used = outcome.history, outcome.compared, outcome.parameters
    title = f"{score.capitalize()} without{' and with' if compared else ''} flooding"
    title += " (validation chose no flooding)" if compared and not outcome.chosen else ""
    figure, page = _page(title, describe(used), (7.8, 5))
    axes, digits = page.subplots(), ".2f" if score == "loss" else ".1%"
    ends, bands = [], []
    for level, side, color in _sides(compared):
        trials = history[history.flood_level == level].groupby("epoch")
        for split, labels, line in (("train", "noisy", DASHES), ("test", "clean", "solid")):
            curve = trials[f"{split}_{score}_{labels}"].agg(["mean", "std"])
            mean, deviation = curve["mean"], curve["std"].fillna(0)
            bands.append(pd.DataFrame({"low": mean - deviation, "high": mean + deviation}))
            axes.plot(mean.index, mean, color=color, linestyle=line)
            axes.fill_between(mean.index, *bands[-1].to_numpy().T, color=color, alpha=0.15, lw=0)
            axes.plot([], [], color=GRAY, linestyle=line, label=f"{split}, {labels} labels")
            ends.append((mean.iloc[-1], f"{mean.iloc[-1]:{digits}}  {split}, {side}", color))
    frame = _frame_loss if score == "loss" else _frame_accuracy
    marks = frame(axes, pd.concat(bands), outcome)
    for height, _, color in marks:
        axes.axhline(height, color=color, linestyle=":", zorder=1.6)  # above the grid
    if score == "loss" and compared and used["batch_norm"]:
        page.supxlabel(MODES, **LEFT | SMALL)
    axes.set(xlim=(0, mean.index[-1]), xlabel="epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _label_ends(axes, ends + marks)
    _explain_marks(page, "outside lower right")
    return figure


def _frame_loss(axes: Axes, bands: pd.DataFrame, outcome: Outcome) -> Marks:
    """Put all in the frame but the first epochs' climb and a rare leap; return the level's mark."""
    late = bands[bands.index >= bands.index.max() / 20]
    highest, level = bands.high.max(), outcome.compared
    top = max(min(highest, 2.5 * late.high.quantile(0.95)), level)
    axes.set(ylim=(0, 1.05 * top), ylabel="cross-entropy loss (nats)")
    leap = f"▲ up to {highest:.2f}" if highest > top else ""
    axes.annotate(leap, (0.01, 0.985), xycoords="axes fraction", va="top")
    return [(level, f"flood level b = {level:g}", GRAY)] if level else []


def _frame_accuracy(axes: Axes, bands: pd.DataFrame, outcome: Outcome) -> Marks:
    """Put all in the frame but the first epochs' climb; return the mark of no flipped label."""
    late = bands[bands.index >= bands.index.max() / 20]
    used = outcome.parameters
    flipped = int(used["label_noise"] * used["train_samples"])
    height = 1 - flipped / used["train_samples"]
    lowest = min(late.low.min(), height)
    axes.set(ylim=(1.05 * max(lowest, 0.0) - 0.055, 1.005), ylabel="accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    return [(height, f"{height:.1%}  no flipped label learned", GRAY)] if flipped else []


def _label_ends(axes: Axes, ends: Marks) -> None:
    """Write each curve's name and end value to the right of it, pushed apart where they meet."""
    (low, high), ends = axes.get_ylim(), sorted(ends)
    steps = 0.055 * (high - low) * np.arange(len(ends))
    nearest = scipy.optimize.isotonic_regression([value for value, _, _ in ends] - steps).x
    heights = np.clip(nearest, low, high - steps[-1]) + steps  # inside the axes' height
    beside = axes.get_yaxis_transform()
    for height, (value, text, color) in zip(heights, ends):
        line = {"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkB": 0}
        axes.annotate(text, (1, value), (1.035, height), beside, beside, line, color=color,
                      va="center", annotation_clip=False)  # fmt: skip


def _draw_boundary(outcome: Outcome, boundary: Boundary, epoch: int | None = None) -> Figure:
    """Draw how the networks divide the plane: at their end, or flat and with losses, in between."""
    axis, labels, used = boundary.axis, boundary.noisy_labels, outcome.parameters
    title = f"Epoch {epoch}: what the network has learned" if epoch else "What the network learned"
    figure, page = _page(title, describe({**used, "trials": 1}), (8, 5.8))
    history = outcome.history.set_index(["seed", "epoch", "flood_level"])
    plane = np.stack([x.ravel() for x in np.meshgrid(axis, axis)], axis=1)
    truth = DATASETS[used["dataset"]].boundary(plane).reshape(boundary.probability[0].shape)
    flipped = labels != boundary.clean_labels
    sides, dashed = _sides(outcome.compared), {"linestyles": [DASHES], "linewidths": 1.2}
    for number, (level, name, color) in enumerate(sides):
        axes = page.add_subplot(1, len(sides), number + 1, aspect="equal", xticks=[], yticks=[])
        axes.spines[:].set_visible(True)
        probability, right = boundary.probability[number], boundary.predictions[number] == labels
        lines = [f"{name}, b = {level:g}" if level else name]
        shade, meaning = probability, "probability of class 1"
        if epoch:
            shade, meaning = np.round(probability), "predicted as class 1"
            now = history.loc[used["seed"], epoch, level]
            lines.append(f"loss: train {now.train_loss_noisy:.2f}, test {now.test_loss_clean:.2f}")
        if flipped.any():
            lines.append(f"learned {sum(flipped & right)} of {sum(flipped)} flipped labels")
        axes.set_title("\n".join(lines), color=color)
        axes.pcolormesh(axis, axis, shade, cmap=CLASS_MAP, vmin=0, vmax=1, rasterized=True)
        axes.plot([], [], color=CLASS_MAP(1.0), linewidth=8, label=meaning)
        axes.contour(axis, axis, truth, [0], colors="black", **dashed)
        axes.plot([], [], color="black", linestyle=DASHES, label="true boundary")
        if probability.min() < 0.5 < probability.max():
            axes.contour(axis, axis, probability, [0.5], colors=color, linewidths=2)
        axes.plot([], [], color=color, label=f"network's boundary {name}")
        for label, marked, face, edge, size, width in (
            ("trained as class 0", labels == 0, "white", "black", 20, 0.8),
            ("trained as class 1", labels == 1, "black", "black", 20, 0.8),
            ("flipped label, not learned", flipped & ~right, "none", GRAY, 110, 1),
            (f"flipped label, learned {name}", flipped & right, "none", color, 110, 2),
        ):
            dots = {"label": label, "edgecolor": edge, "linewidth": width, "zorder": 3}
            axes.scatter(*boundary.inputs[marked].T, size, face, **dots)
    _explain_marks(page, ncols=3)
    return figure


def _explain_marks(page: SubFigure, place: str = "outside lower center", ncols: int = 1) -> None:
    """Put a legend below a page: each thing that is drawn there once, in the alphabet's order."""
    named = [zip(*axes.get_legend_handles_labels()[::-1]) for axes in page.axes]
    entries = {label: handle for panel in named for label, handle in panel}
    labels, handles = zip(*sorted(entries.items()))
    page.legend(handles, labels, loc=place, ncols=ncols)


@in_style
def draw_moving_boundary(outcome: Outcome, boundaries: Iterable[tuple[int, Boundary]]) -> bytes:
    """Return a GIF of how the first trial's networks learn, a frame an epoch.

    `boundaries` are as in `draw_demo`, after epochs > 0 that `outcome.history` has.
    """
    shots = (png(_draw_boundary(outcome, of, epoch), dpi=100) for epoch, of in boundaries)
    frames = [Image.open(io.BytesIO(shot)).convert("RGB").quantize(64, dither=0) for shot in shots]
    milliseconds = [160] * (len(frames) - 1) + [2000]
    options = {"append_images": frames[1:], "duration": milliseconds, "loop": 0}
    frames[0].save(content := io.BytesIO(), "GIF", save_all=True, **options)
    return content.getvalue()


@in_style
def draw_table(trials: pd.DataFrame, table: pd.DataFrame) -> Figure:
    """Return a panel a setting: what each flood level gains in accuracy on noisy test labels.

    `trials` are the raw figures, see `results.read_trials`; `table` is `results.compare` of them.
    """
    datasets = list(dict.fromkeys(zip(trials.dataset, trials.spiral_noise)))
    noises, counts = sorted(trials.label_noise.unique()), sorted(table.trials.unique())
    description = (
        f"accuracy on noisy test labels, in points, minus that of the same trial without flooding; "
        f"mean and 95% interval of {' or '.join(map(str, counts))} trials"
    )
    size = max(8, 1 + 3.6 * len(noises)), 1.8 + 2.6 * len(datasets)
    figure, page = _page("What flooding gains", description, size)
    panels = page.subplots(len(datasets), len(noises), squeeze=False, sharex=True, sharey="row")
    keys = ["dataset", "spiral_noise", "label_noise", "scored_epoch"]
    compared = table[table.labels == "noisy"].set_index(keys)
    for (dataset, tau, noise, epoch), scored in trials.groupby(keys, sort=False):
        axes = panels[datasets.index((dataset, tau)), noises.index(noise)]
        _draw_gains(axes, scored, compared.loc[dataset, tau, noise, epoch], *SUBTABLES[epoch])
        axes.set_title(f"{name_of(dataset, tau)}, {100 * noise:g}% label noise", fontsize=10)
        axes.set(xlabel="flood level b (nats)", ylabel="gain (points)")
        axes.label_outer()
    axes.set_xlim(0, 1.01 * trials.flood_level.max())
    for row in panels:
        _scale(row)
    _explain_marks(page, ncols=2)
    return figure


def _draw_gains(axes: Axes, scored: pd.DataFrame, row: pd.Series, name: str, color: str) -> None:
    """Draw what flooding gains in one setting at one scored epoch, and what other starts do."""
    accuracy = scored.set_index(["seed", "flood_level"]).test_accuracy_noisy.unstack()
    gains = 100 * accuracy.sub(accuracy[0.0], axis=0)
    mean, low, high, _ = np.array([[*results.paired_gain("", gains[b]).values()] for b in gains]).T
    axes.plot(gains.columns, mean, color=color, label=f"{name}: one b in all trials")
    axes.fill_between(gains.columns, low, high, color=color, alpha=0.18, linewidth=0)
    mean, low, high = 100 * row[["gain_mean", "gain_low", "gain_high"]].astype(float)
    axes.vlines(row.flood_level_mean, low, high, color=color)
    label = f"{name}: in each trial the b chosen by validation"
    axes.plot(row.flood_level_mean, mean, "D", color=color, mec="black", label=label, zorder=3)
    if np.isfinite(row.best_start_mean):
        gain = 100 * (row.best_start_mean - row.without_flooding_mean)
        label = f"{name}: best of {row.starts} starts, no flooding"
        axes.axhline(gain, color=color, linestyle="--", linewidth=1.4, label=label)


def _scale(row: Sequence[Axes]) -> None:
    """Give a row one scale; what is lost beyond its highest gain, a collapse, is logarithmic."""
    low, high = row[0].get_ylim()
    linear, log = MaxNLocator(5).tick_values(-high, high), np.array([-5, -10, -20, -40])
    ticks = [*linear[linear > -high], *log[log < -1.3 * high]]
    for axes in row:
        axes.axhline(0, color="black", linewidth=1, zorder=1.6)
        axes.set_yscale("symlog", linthresh=high, linscale=2)
        axes.set(ylim=(low, high), yticks=[tick for tick in ticks if low <= tick <= high])
        axes.yaxis.set_major_formatter("{x:g}")
        if low < -high:
            axes.axhspan(low, -high, color="#eeeeee", zorder=0)
            text = f"collapse (log scale, to −{-low:.0f})"
            axes.annotate(text, (0.02, 0.03), xycoords="axes fraction", **SMALL)


@dataclass(frozen=True, kw_only=True)
class PlotSettings:
    output_dir: Annotated[Path, settings.flag("DIR")] = Path(".")
    """folder with the files of a demo, where the pictures are saved, too"""


def read_demo(folder: Path) -> tuple[Outcome, Boundary | None]:
    """Read what a demo saved; SettingError where it is not there or spoiled."""
    try:
        parameters = json.loads((folder / results.SETTINGS_FILE).read_text())
        history = results.read_csv(folder / results.HISTORY_FILE)
        epochs = 1 + math.ceil(parameters["epochs"] / parameters["eval_every"])  # with the first
        rows = parameters["trials"] * len(parameters["flood_levels"]) * epochs
        if len(history) != rows or history.iloc[-1].isna().any():
            raise ValueError(f"{results.HISTORY_FILE} is cut short")
        outcome = results.conclude(history, parameters)
        file = folder / results.BOUNDARY_FILE  # may be left by another demo
        if not file.exists() or not DATASETS[parameters["dataset"]].boundary:
            return outcome, None
        with np.load(file) as arrays:
            return outcome, Boundary(**arrays)
    except Exception as error:  # of whatever is spoiled
        allowed = f"a folder with the files of a demo ({type(error).__name__}: {error})"
        raise settings.SettingError("output_dir", folder, allowed) from error


def main(flags: PlotSettings) -> None:
    with settings.exit_on(settings.SettingError, OSError, status=2):
        figures = draw_demo(*read_demo(flags.output_dir))
        pictures = {name: png(figure) for name, figure in figures.items()}
        print("Pictures:", *results.write_files(pictures, flags.output_dir), flush=True)


if __name__ == "__main__":
    main(settings.parse_flags(PlotSettings, __doc__))
