"""Draw what flooding does: train and test curves without flooding and with the chosen level.

`python plot.py --run-id ID` draws the two pictures of a demo again from what MLflow has.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from train import History, LevelScores

WITHOUT_COLOR = "#D55E00"  # vermillion and blue of the Okabe-Ito colour-blind-safe palette
WITH_COLOR = "#0072B2"
NEUTRAL_COLOR = "#555555"
TRAIN_STYLE = (0, (4, 2))  # dashed
TEST_STYLE = "solid"


def draw_demo(
    history: History, parameters: Mapping[str, object], directory: Path
) -> tuple[Path, Path]:
    """Save `synth_loss.png` and `synth_acc.png` into the folder and return their paths.

    Training curves are against the noisy labels that were trained on, test curves against the
    clean ones. [released code] `parameters` are the demo's settings, as values or as strings.
    """
    chosen, compared = history.choose(str(parameters["select_on"]))
    loss = _draw(
        history, chosen, compared, parameters, "loss", "cross-entropy loss (nats)", "{:.2f}".format
    )
    accuracy = _draw(history, chosen, compared, parameters, "accuracy", "accuracy", "{:.1%}".format)
    paths = directory / "synth_loss.png", directory / "synth_acc.png"
    for figure, path in zip((loss, accuracy), paths):
        save(figure, path)
    return paths


def describe(parameters: Mapping[str, object]) -> str:
    """Return the setting of a demo in words; two halves, split by a newline."""
    noise = float(parameters["label_noise"])
    data = f"{parameters['dataset']}, {100 * noise:.3g}% of the labels flipped"
    if parameters["dataset"] == "spiral":
        data += f", spiral noise {float(parameters['spiral_noise']):g}"
    momentum = float(parameters["momentum"])
    batch_norm = str(parameters["batch_norm"]) == "True"
    return (
        f"{data}, {parameters['train_samples']} training examples; "
        f"MLP {parameters['hidden_layers']} × {parameters['hidden_units']}"
        f"{' with batch norm' if batch_norm else ''}\n"
        f"{str(parameters['optimizer']).upper().replace('ADAM', 'Adam')}, "
        f"learning rate {float(parameters['learning_rate']):g}"
        f"{f', momentum {momentum:g}' if momentum else ''}, "
        f"batches of {min(int(parameters['batch_size']), int(parameters['train_samples']))}, "
        f"{parameters['epochs']} epochs; seed {parameters['seed']}"
    )


def save(figure: Figure, path: Path) -> None:
    """Save a figure as PNG; the file is moved into place when it is whole."""
    with _in_place(path) as temporary:
        figure.savefig(temporary, dpi=150)


def write_text(text: str, path: Path) -> None:
    """Write a text file; it is moved into place when it is whole."""
    with _in_place(path) as temporary:
        temporary.write_text(text)


@contextlib.contextmanager
def _in_place(path: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        yield temporary
        temporary.replace(path)


def _draw(
    history: History,
    chosen: int,
    compared: int,
    parameters: Mapping[str, object],
    score: str,
    label: str,
    number: Callable[[float], str],
) -> Figure:
    figure = Figure(figsize=(9, 5.2))
    axes = figure.subplots()
    figure.subplots_adjust(left=0.1, right=0.72, top=0.83, bottom=0.11)
    level = history.flood_levels[compared]
    sides = [(0, "without flooding", WITHOUT_COLOR)]
    if compared:
        sides.append((compared, "with flooding", WITH_COLOR))
    ends = []
    for model, side, color in sides:
        for split, style in (("train", TRAIN_STYLE), ("test", TEST_STYLE)):
            metric = f"{split}_{score}" + ("_clean" if split == "test" else "")
            curve = history.metrics[metric][:, model]
            axes.plot(history.epochs, curve, color=color, linestyle=style, linewidth=1.8)
            ends.append((curve[-1], f"{number(curve[-1])}  {split}, {side}", color))
    if score == "loss" and compared:
        axes.axhline(level, color=NEUTRAL_COLOR, linestyle=":", linewidth=1.4, zorder=1)
        ends.append((level, f"flood level b = {level:g}", NEUTRAL_COLOR))
    axes.set_xlim(0, history.epochs[-1])
    if score == "loss":
        axes.set_ylim(bottom=0)
    else:
        # From the worst that comes after the first epochs' climb.
        late = history.epochs >= history.epochs[-1] / 20
        worst = min(line.get_ydata()[late].min() for line in axes.get_lines())
        axes.set_ylim(worst - 0.05 * (1 - worst) - 0.005, 1.005)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("epoch")
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    _label_ends(axes, ends)

    title = f"{score.capitalize()} without and with flooding"
    if compared and not chosen:
        title += " (validation chose no flooding)"
    figure.text(0.1, 0.945, title, fontsize=14, fontweight="bold")
    figure.text(0.1, 0.855, describe(parameters), fontsize=9, color=NEUTRAL_COLOR)
    handles = [
        Line2D([], [], color=NEUTRAL_COLOR, linestyle=TRAIN_STYLE),
        Line2D([], [], color=NEUTRAL_COLOR, linestyle=TEST_STYLE),
    ]
    figure.legend(
        handles,
        ["train, noisy labels", "test, clean labels"],
        loc="upper right",
        bbox_to_anchor=(0.995, 0.99),
        frameon=False,
        fontsize=9,
    )
    return figure


def _label_ends(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Write each curve's name and end value to the right of it, pushed apart where they meet."""
    low, high = axes.get_ylim()
    gap = 0.055 * (high - low)
    ends = sorted(ends)
    heights = np.array([value for value, _, _ in ends])
    for _ in range(200):
        for lower in range(len(heights) - 1):
            overlap = gap - (heights[lower + 1] - heights[lower])
            if overlap > 0:
                heights[lower] -= overlap / 2
                heights[lower + 1] += overlap / 2
        heights += max(0, low - heights[0])  # keep all of them inside the axes' height
        heights -= max(0, heights[-1] - high)
    for height, (value, text, color) in zip(heights, ends):
        axes.annotate(
            text,
            xy=(1, value),
            xytext=(1.035, height),
            xycoords=axes.get_yaxis_transform(),
            textcoords=axes.get_yaxis_transform(),
            color=color,
            fontsize=9,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkB": 0},
        )


STOPPING_COLORS = {"A": "#0072B2", "B": "#E69F00"}  # blue and orange of the same palette
STOPPING_NAMES = {"A": "A: last epoch", "B": "B: early stopping"}


def draw_table(
    settings: Mapping[tuple[str, float], Sequence[tuple[LevelScores, LevelScores]]], path: Path
) -> None:
    """Save a panel a setting: noisy-label test accuracy against the flood level, A and B.

    `settings` maps (data set, label noise) to the scores of its trials, A and B each.
    """
    datasets = list(dict.fromkeys(dataset for dataset, _ in settings))
    noises = sorted({noise for _, noise in settings})
    size = 1 + 3.6 * len(noises), 1.3 + 2.7 * len(datasets)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(datasets), len(noises), squeeze=False, sharex=True)
    for row, dataset in zip(panels, datasets):
        for axes, noise in zip(row, noises):
            trials = settings[dataset, noise]
            for side, (stopping, color) in enumerate(STOPPING_COLORS.items()):
                _draw_levels(axes, [trial[side] for trial in trials], color, stopping)
            axes.set_title(f"{dataset}, {100 * noise:g}% label noise", fontsize=10)
            axes.spines[["top", "right"]].set_visible(False)
            axes.yaxis.set_major_formatter(PercentFormatter(1))
            axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        row[0].set_ylabel("test accuracy")
    for axes in panels[-1]:
        axes.set_xlabel("flood level b (nats)")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    count = len(next(iter(settings.values())))
    figure.suptitle(
        f"Accuracy on noisy test labels against the flood level\n"
        f"mean and standard deviation of {count} trial{'s' * (count > 1)}",
        fontsize=11,
    )
    save(figure, path)


def _draw_levels(axes: Axes, scores: list[LevelScores], color: str, stopping: str) -> None:
    levels = scores[0].flood_levels
    accuracy = np.array([trial.scores["test_accuracy"] for trial in scores])  # [trials, K]
    chosen = [trial.choose() for trial in scores]
    name = STOPPING_NAMES[stopping]
    mean = accuracy.mean(axis=0)
    axes.plot(levels, mean, color=color, linewidth=1.6, label=name)
    if len(scores) > 1:
        deviation = accuracy.std(axis=0, ddof=1)
        axes.fill_between(
            levels, mean - deviation, mean + deviation, color=color, alpha=0.15, linewidth=0
        )
    axes.axhline(
        mean[0], color=color, linestyle=":", linewidth=1.2, label=f"{stopping}: without flooding"
    )
    axes.plot(
        levels[chosen].mean(),
        accuracy[np.arange(len(scores)), chosen].mean(),
        marker="D",
        color=color,
        markeredgecolor="black",
        markersize=7,
        linestyle="none",
        label=f"{stopping}: mean chosen b and its accuracy",
    )


def main() -> None:
    from arguments import Parser, check_output_dir

    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("--run-id", required=True, metavar="ID", help="the demo's run in MLflow")
    parser.add_argument(
        "--output-dir", type=Path, default=Path("."), metavar="DIR",
        help="folder for the pictures",
    )  # fmt: skip
    arguments = parser.parse_args()
    with parser.value_errors():
        check_output_dir(arguments.output_dir)

    from tracking import TrackingError, load_demo

    try:
        parameters, history = load_demo(arguments.run_id)
    except TrackingError as error:
        parser.error(str(error))
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    for path in draw_demo(history, parameters, arguments.output_dir):
        print(path)


if __name__ == "__main__":
    main()
