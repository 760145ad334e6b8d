"""Reproduce the paper's synthetic table: flooding without (A) and with (B) early stopping.

Two Gaussians, sinusoid and spiral at three strengths of label noise, flood levels 0 to 0.50,
ten trials: 4 590 trainings. A cell, one trial of one setting with all its flood levels, is
trained once and kept in MLflow, so a stopped table goes on where it was. To train cells side by
side: `torchrun --nproc-per-node 4 run_table_synth.py`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arguments import (
    DATASETS,
    Parser,
    add_shared_flags,
    check_output_dir,
    exit_on_signals,
    fill_defaults,
    resolve_device,
    settings_from,
)

if TYPE_CHECKING:
    from datasets import DataSettings
    from train import LevelScores

# The paper's synthetic experiments, section 4.1; that its network has no batch norm is assumed.
DEFAULTS = {
    "hidden_layers": 5,
    "batch_norm": False,
    "optimizer": "adam",
    "batch_size": 100,
    "epochs": 500,
}
PAPER_DATASETS = ("gaussian", "sinusoid2d", "spiral")
PAPER_LABEL_NOISE = (0.01, 0.05, 0.1)
PAPER_GRID = {"trials": 10, "flood_step": 0.01}
QUICK_GRID = {"trials": 2, "flood_step": 0.1}
# With `shared` below, what makes two tables the same.
TABLE_FLAGS = (
    "dataset",
    "label_noise",
    "spiral_noise",
    "train_samples",
    "val_samples",
    "test_samples",
    "trials",
    "seed",
)
SIGNIFICANCE = 0.01  # of the paired t-test that sets a score in bold


def parse_arguments() -> tuple[Parser, argparse.Namespace]:
    parser = Parser(" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument(
        "--dataset", choices=DATASETS, nargs="+", default=list(PAPER_DATASETS), metavar="D",
        help=f"data sets, of {', '.join(DATASETS)}",
    )  # fmt: skip
    parser.add_argument(
        "--label-noise", type=float, nargs="+", default=list(PAPER_LABEL_NOISE),
        metavar="FRACTION", help="fractions of each split's labels that are flipped, in [0, 1)",
    )  # fmt: skip
    parser.add_argument(
        "--trials", type=int, metavar="N", default=argparse.SUPPRESS,
        help="trials of a setting; trial t draws data and weights from seed + t (default: 10)",
    )  # fmt: skip
    parser.add_argument(
        "--flood-max", type=float, default=0.5, metavar="B", help="highest flood level, in nats"
    )
    parser.add_argument(
        "--flood-step", type=float, metavar="B", default=argparse.SUPPRESS,
        help="step of the flood levels, which start at 0 (default: 0.01)",
    )  # fmt: skip
    parser.add_argument(
        "--quick", action="store_true",
        help=f"show the shape of the result in minutes: {QUICK_GRID['trials']} trials and flood "
        f"levels {QUICK_GRID['flood_step']} apart, unless said otherwise",
    )  # fmt: skip
    add_shared_flags(parser, DEFAULTS)
    arguments = parser.parse_args()
    for name, value in (QUICK_GRID if arguments.quick else PAPER_GRID).items():
        vars(arguments).setdefault(name, value)
    with parser.value_errors():
        fill_defaults(arguments)
        if arguments.trials < 1:
            raise ValueError(f"trials {arguments.trials}: at least 1")
        if not 0 < arguments.flood_max < 100:
            raise ValueError(f"flood_max {arguments.flood_max}: a number of nats in (0, 100)")
        if not 0.0001 <= arguments.flood_step <= arguments.flood_max:
            raise ValueError(f"flood_step {arguments.flood_step}: from 0.0001 to --flood-max")
        check_output_dir(arguments.output_dir)
    arguments.dataset = list(dict.fromkeys(arguments.dataset))
    arguments.label_noise = sorted(set(arguments.label_noise))
    return parser, arguments


@dataclass(frozen=True)
class Cell:
    """One trial of one setting, with all its flood levels."""

    data: DataSettings
    seed: int  # of the trial: its data, initial weights and mini-batches

    @property
    def name(self) -> str:
        """The cell's name in MLflow and on the progress bar."""
        return f"{self.data.dataset}, label noise {self.data.label_noise:g}, seed {self.seed}"

    def parameters(self, shared: dict[str, object]) -> dict[str, object]:
        """All that makes this cell what it is; `shared` is the same for a table's cells."""
        return {**asdict(self.data), "seed": self.seed, **shared}


def main() -> None:
    parser, arguments = parse_arguments()
    exit_on_signals()

    # Heavy imports, only now: --help and most wrong flags are answered at once.
    import torch

    from datasets import DataSettings, make_dataset
    from models import MLP, ModelSettings
    from train import (
        DivergenceError,
        TrainSettings,
        count_epochs,
        prepare_process,
        train_early_stopping,
    )

    prepare_process()
    cells = []
    with parser.value_errors():
        device = resolve_device(arguments.device, arguments.tf32)
        model_settings = settings_from(ModelSettings, arguments)
        train_settings = settings_from(TrainSettings, arguments)
        # Trials outermost: a table that is stopped early has all settings, over fewer trials.
        for trial in range(arguments.trials):
            for dataset in arguments.dataset:
                for label_noise in arguments.label_noise:
                    flags = {**vars(arguments), "dataset": dataset, "label_noise": label_noise}
                    data_settings = settings_from(DataSettings, argparse.Namespace(**flags))
                    train_settings.check_batches(
                        data_settings.train_samples, model_settings.batch_norm
                    )
                    cells.append(Cell(data_settings, arguments.seed + trial))
    levels = round(arguments.flood_max / arguments.flood_step) + 1
    flood_levels = [round(level * arguments.flood_step, 10) for level in range(levels)]
    shared = {
        **asdict(model_settings),
        **asdict(train_settings),
        "flood_max": flood_levels[-1],
        "flood_step": arguments.flood_step,
    }
    del shared["eval_every"]  # the validation split is evaluated every epoch
    if arguments.tf32:
        shared["tf32"] = True

    from tracking import TABLE_EXPERIMENT, Store, TableTracker, TrackingError, ui_command

    rank, world_size = start_ranks()
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    try:
        if rank == 0:
            tracker = TableTracker(Store(TABLE_EXPERIMENT), device)
            table_id = tracker.find_or_create_table(
                f"{len(cells)} cells of {levels} flood levels",
                {**shared, **{name: vars(arguments)[name] for name in TABLE_FLAGS}},
            )
            finished = tracker.finished_cells()
            todo = [cell for cell in cells if tracker.key(cell.parameters(shared)) not in finished]
            print(
                f"{len(cells)} cells of {levels} flood levels, {len(cells) - len(todo)} of them "
                f"trained before; on {device.type}, side by side: {world_size}",
                flush=True,
            )
            broadcast((table_id, todo))
        else:
            table_id, todo = broadcast(None)
            tracker = TableTracker(Store(TABLE_EXPERIMENT), device)
    except TrackingError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")  # also from a rank other than 0

    mine = todo[rank::world_size]
    try:
        with tracker.table(table_id) if rank == 0 else nullcontext():
            with CellBar(len(mine), rank, world_size) as bar:
                for cell in mine:
                    bar.start(cell.name, count_epochs(flood_levels, arguments.epochs, device))
                    with tracker.cell(table_id, cell.name, cell.parameters(shared)) as run_id:
                        data = make_dataset(cell.data, cell.seed)
                        generator = torch.Generator().manual_seed(cell.seed)
                        input_dim = data.train.inputs.shape[1]
                        network = MLP(input_dim, model_settings, generator=generator)
                        last, best = train_early_stopping(
                            network,
                            data,
                            flood_levels,
                            train_settings,
                            device,
                            generator,
                            bar.epoch,
                        )
                        tracker.log_cell(run_id, last, best)
                    bar.end()
                wait_for_ranks()
            if rank == 0:
                finished = tracker.finished_cells()
                settings: dict[tuple[str, float], list[tuple[LevelScores, LevelScores]]] = {}
                for cell in cells:
                    trial = tracker.load_cell(finished[tracker.key(cell.parameters(shared))])
                    settings.setdefault((cell.data.dataset, cell.data.label_noise), []).append(
                        trial
                    )
                arguments.output_dir.mkdir(parents=True, exist_ok=True)
                paths = save_table(settings, arguments.output_dir)
                for path in paths:
                    tracker.log_artifact(table_id, path)
    except DivergenceError as error:
        sys.exit(f"{parser.prog}: error: {error}")
    if rank == 0:
        print("\nSaved:", *paths)
        print(f"Runs: {ui_command()}")


@dataclass(frozen=True)
class Row:
    """A setting's test accuracies without and with flooding, and the chosen levels, [trials]."""

    dataset: str
    label_noise: float
    stopping: str  # A: last epoch; B: epoch of best validation accuracy
    labels: str  # the test labels scored against: noisy or clean
    without_flooding: np.ndarray
    with_flooding: np.ndarray
    flood_levels: np.ndarray

    @property
    def p_value(self) -> float:
        """Of a paired t-test over the trials; 1 where there are too few to tell."""
        from scipy.stats import ttest_rel

        differences = self.with_flooding - self.without_flooding
        if len(differences) < 2 or np.ptp(differences) == 0:
            return 1.0
        return float(ttest_rel(self.with_flooding, self.without_flooding).pvalue)


def table_rows(
    settings: Mapping[tuple[str, float], Sequence[tuple[LevelScores, LevelScores]]],
) -> list[Row]:
    """Choose each trial's level by noisy validation accuracy and collect the test accuracies."""
    rows = []
    for (dataset, label_noise), trials in settings.items():
        for labels, score in (("noisy", "test_accuracy"), ("clean", "test_accuracy_clean")):
            for side, stopping in enumerate("AB"):
                scores = [trial[side] for trial in trials]
                chosen = [score_set.choose() for score_set in scores]
                rows.append(
                    Row(
                        dataset,
                        label_noise,
                        stopping,
                        labels,
                        np.array([s.scores[score][0] for s in scores]),
                        np.array([s.scores[score][c] for s, c in zip(scores, chosen)]),
                        np.array([s.flood_levels[c] for s, c in zip(scores, chosen)]),
                    )
                )
    return rows


def markdown_table(rows: Sequence[Row], labels: str) -> str:
    """Return the paper's table against "noisy" or "clean" test labels, accuracies in %."""
    lines = [
        "| data set | label noise | A: without flooding | A: with flooding | A: b "
        "| B: without flooding | B: with flooding | B: b |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    shown = [row for row in rows if row.labels == labels]
    for a, b in zip(shown[::2], shown[1::2]):
        cells = [a.dataset, f"{100 * a.label_noise:g}%"]
        for row in (a, b):
            without = mean_and_deviation(100 * row.without_flooding, 1)
            flooded = mean_and_deviation(100 * row.with_flooding, 1)
            if row.p_value < SIGNIFICANCE:
                if row.with_flooding.mean() > row.without_flooding.mean():
                    flooded = f"**{flooded}**"
                else:
                    without = f"**{without}**"
            cells += [without, flooded, mean_and_deviation(row.flood_levels, 2)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def mean_and_deviation(values: np.ndarray, digits: int) -> str:
    """Return "mean (standard deviation)" over the trials; a single trial has no deviation."""
    deviation = f"{values.std(ddof=1):.{digits}f}" if len(values) > 1 else "-"
    return f"{values.mean():.{digits}f} ({deviation})"


def save_table(
    settings: Mapping[tuple[str, float], Sequence[tuple[LevelScores, LevelScores]]],
    directory: Path,
) -> list[Path]:
    """Print the table, save it as Markdown, CSV and picture, and return the three paths."""
    from plot import draw_table, write_text

    rows = table_rows(settings)
    trials = len(rows[0].flood_levels)
    markdown = (
        f"Test accuracy in %, mean (standard deviation) over {trials} trial{'s' * (trials > 1)}. "
        f"A: last epoch, without early stopping. B: with early stopping. b: the flood level chosen "
        f"by noisy validation accuracy. Bold: better by a paired t-test at "
        f"{100 * SIGNIFICANCE:g}%.\n\n"
        f"Noisy test labels, as in the paper:\n\n{markdown_table(rows, 'noisy')}\n"
        f"Clean test labels:\n\n{markdown_table(rows, 'clean')}"
    )
    print(f"\n{markdown}", end="")
    lines = [
        "dataset,label_noise,stopping,labels,trials,without_flooding_mean,without_flooding_std,"
        "with_flooding_mean,with_flooding_std,flood_level_mean,flood_level_std,p_value"
    ]
    for row in rows:
        figures = [row.dataset, row.label_noise, row.stopping, row.labels, trials]
        for values in (row.without_flooding, row.with_flooding, row.flood_levels):
            figures += [f"{values.mean():.6f}", f"{values.std(ddof=1):.6f}" if trials > 1 else ""]
        lines.append(",".join(str(figure) for figure in [*figures, f"{row.p_value:.6f}"]))
    paths = [directory / f"table_synth.{ending}" for ending in ("md", "csv", "png")]
    write_text(markdown, paths[0])
    write_text("\n".join(lines) + "\n", paths[1])
    draw_table(settings, paths[2])
    return paths


def start_ranks() -> tuple[int, int]:
    """Join the other processes if torchrun started this one; return rank and world size."""
    import torch.distributed as dist

    if "RANK" not in os.environ:
        return 0, 1
    # Rank 0 waits for the others as long as their last cells take.
    dist.init_process_group("gloo", timeout=timedelta(days=30))
    return dist.get_rank(), dist.get_world_size()


def broadcast(value: object) -> Any:
    """Return rank 0's value on every rank."""
    import torch.distributed as dist

    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def wait_for_ranks() -> None:
    """Wait until every rank is here, open to signals: torchrun ends the rest when one fails."""
    import torch.distributed as dist

    if dist.is_initialized():
        barrier = dist.barrier(async_op=True)
        while not barrier.is_completed():
            time.sleep(0.1)
        barrier.wait()


class CellBar:
    """A progress bar over this process's cells and one over a cell's epochs; rank 0 alone shows."""

    def __init__(self, cells: int, rank: int, world_size: int) -> None:
        from tqdm import tqdm

        disable = None if rank == 0 else True  # None: where output is no terminal
        label = "cells" if world_size == 1 else f"cells of process 1 of {world_size}"
        self._cells = tqdm(total=cells, desc=label, unit="cell", disable=disable, leave=False)
        self._epochs = tqdm(total=1, unit="epoch", disable=disable, leave=False, position=1)

    def __enter__(self) -> CellBar:
        return self

    def __exit__(self, *exception) -> None:
        self._epochs.close()
        self._cells.close()

    def start(self, name: str, epochs: int) -> None:
        self._epochs.set_description(name, refresh=False)
        self._epochs.reset(epochs)

    def epoch(self) -> None:
        self._epochs.update()

    def end(self) -> None:
        self._cells.update()


if __name__ == "__main__":
    main()
