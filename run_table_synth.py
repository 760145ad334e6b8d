"""Reproduce the paper's synthetic table: flooding without (A) and with (B) early stopping.

Two Gaussians, sinusoid and spiral at three strengths of label noise, flood levels 0 to 0.50,
ten trials: 4 590 trainings. A cell, one trial of one setting with all its flood levels, is
trained once and kept in MLflow, so a stopped table goes on where it was. Cells are shared out
among the processes that torchrun starts, on one machine or several.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from arguments import DATASETS, Parser, add_shared_flags, fill_defaults, settings_from
from settings import (
    FIGURES_VERSION,
    DataSettings,
    ModelSettings,
    SettingError,
    TrainSettings,
    check,
)

if TYPE_CHECKING:
    import pandas as pd

# The paper's synthetic experiments, section 4.1; that its network has no batch norm is assumed.
DEFAULTS = {
    "hidden_layers": 5,
    "batch_norm": False,
    "optimizer": "adam",
    "batch_size": 100,
    "epochs": 500,
}
PAPER_GRID = {
    "dataset": ["gaussian", "sinusoid2d", "spiral"],
    "label_noise": [0.01, 0.05, 0.1],
    "trials": 10,
    "flood_step": 0.01,
}
QUICK_GRID = {"trials": 2, "flood_step": 0.1}
IDENTITY = (*(field.name for field in fields(DataSettings)), "seed")  # of a cell
PATIENCE_SECONDS = 300.0  # how long a store may be away before the table gives up


def parse_arguments() -> tuple[Parser, argparse.Namespace]:
    parser = Parser(" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument(
        "--dataset", choices=DATASETS, nargs="+", default=argparse.SUPPRESS, metavar="D",
        help=f"data sets, of {', '.join(DATASETS)} (default: gaussian sinusoid2d spiral)",
    )  # fmt: skip
    parser.add_argument(
        "--label-noise", type=float, nargs="+", default=argparse.SUPPRESS, metavar="FRACTION",
        help="fractions of each split's labels that are flipped, in [0, 1) "
        "(default: 0.01 0.05 0.1)",
    )  # fmt: skip
    parser.add_argument(
        "--trials", type=int, metavar="N", default=argparse.SUPPRESS,
        help="trials of a setting; trial t draws data and weights from seed + t (default: 10)",
    )  # fmt: skip
    parser.add_argument(
        "--flood-max", type=float, default=0.5, metavar="B",
        help="highest flood level, in nats; where the steps do not meet it, the last one below",
    )  # fmt: skip
    parser.add_argument(
        "--flood-step", type=float, metavar="B", default=argparse.SUPPRESS,
        help="step of the flood levels, which start at 0 (default: 0.01)",
    )  # fmt: skip
    parser.add_argument(
        "--quick", action="store_true",
        help=f"show the shape of the result sooner: {QUICK_GRID['trials']} trials and flood "
        f"levels {QUICK_GRID['flood_step']} apart, unless said otherwise",
    )  # fmt: skip
    parser.add_argument(
        "--cells", type=Path, nargs="+", metavar="FILE", default=argparse.SUPPRESS,
        help="raw figures (table_synth_cells.csv) of cells that are trained already: they are "
        "logged, not trained again",
    )  # fmt: skip
    add_shared_flags(parser, DEFAULTS)
    arguments = parser.parse_args()
    grid = {**PAPER_GRID, **(QUICK_GRID if arguments.quick else {})}
    for name, value in {**grid, "cells": []}.items():
        vars(arguments).setdefault(name, value)
    highest, step = arguments.flood_max, arguments.flood_step
    with parser.setting_errors():
        fill_defaults(arguments)
        check(0 < highest < 100, "flood_max", highest, "a number of nats in (0, 100)")
        check(0.0001 <= step <= highest, "flood_step", step, "from 0.0001 to --flood-max")
    arguments.dataset = list(dict.fromkeys(arguments.dataset))
    arguments.label_noise = sorted(set(arguments.label_noise))
    return parser, arguments


def flood_grid(highest: float, step: float) -> list[float]:
    """Return the levels 0, step, 2 step, ... that are not above the highest."""
    steps = int(highest / step + 1e-9)  # 0.5 / 0.1 may come out a bit below 5
    return [round(level * step, 10) for level in range(steps + 1)]


@dataclass(frozen=True)
class Cell:
    """One trial of one setting, with all its flood levels."""

    data: DataSettings
    seed: int  # of the trial: its data, initial weights and mini-batches

    @property
    def name(self) -> str:
        """The cell's name in MLflow and on the progress bar."""
        return f"{self.data.dataset}, label noise {self.data.label_noise:g}, seed {self.seed}"

    def parameters(self, shared: Mapping[str, object]) -> dict[str, object]:
        """All that the cell is trained with; `shared` is the same for a table's cells."""
        return {**asdict(self.data), "seed": self.seed, **shared}


def main() -> None:
    parser, arguments = parse_arguments()
    with parser.setting_errors():
        model_settings = settings_from(ModelSettings, arguments)
        train_settings = settings_from(TrainSettings, arguments)
        # Trials outermost: a table that is stopped early has all settings, over fewer trials.
        cells = []
        for seed in range(arguments.seed, arguments.seed + arguments.trials):
            for dataset in arguments.dataset:
                for label_noise in arguments.label_noise:
                    setting = {"dataset": dataset, "label_noise": label_noise}
                    settings = settings_from(DataSettings, arguments, **setting)
                    train_settings.check_batches(settings.train_samples, model_settings.batch_norm)
                    cells.append(Cell(settings, seed))
    levels = flood_grid(arguments.flood_max, arguments.flood_step)
    shared = {**asdict(model_settings), **asdict(train_settings), "version": FIGURES_VERSION}
    del shared["eval_every"]  # the validation split is evaluated every epoch

    # Heavy imports, only now: --help and wrong flags are answered at once.
    import torch

    import plot
    import tracking
    from datasets import make_dataset
    from models import MLP
    from process import Ranks, exit_on_signals, prepare_process
    from progress import progress_bar
    from results import CellsError, read_cells
    from store import Store, TrackingError
    from train import DivergenceError, count_epochs, train_with_early_stopping

    exit_on_signals()
    with parser.setting_errors():
        device = prepare_process(arguments.device)
    try:
        given = {
            Cell(DataSettings(*identity[:-1]), identity[-1]): rows
            for identity, rows in read_cells(arguments.cells, IDENTITY, shared, levels)
        }
        tags = tracking.experiment_tags(tracking.TABLE_DESCRIPTION, group_by="setting")
        store = Store(tracking.TABLE_EXPERIMENT, tags, PATIENCE_SECONDS)
        log = tracking.TableLog(store, levels, device)
        done = {cell for cell in cells if cell in given or log.finished(cell.parameters(shared))}
    except (CellsError, SettingError) as error:
        parser.error(f"--cells {error}")
    except TrackingError as error:
        parser.error(str(error))
    ranks = Ranks()
    first = ranks.rank == 0
    if first:
        print(
            f"{len(cells)} cells of {len(levels)} flood levels, {len(done)} of them trained "
            f"before; on {device.type}, side by side: {ranks.world_size}",
            flush=True,
        )

    epochs = count_epochs(levels, arguments.epochs, device)
    try:
        with store, progress_bar(len(cells) - len(done), "cell", 1, show=first) as bar:
            # The other processes are taken to be as far as this one.
            on_epoch = functools.partial(bar.update, ranks.world_size / epochs)
            for number in ranks.share(len(cells), store.flush):
                cell = cells[number]
                parameters = cell.parameters(shared)
                if log.finished(parameters):
                    continue
                bar.set_description_str(f"{cell.name}: ", refresh=False)
                data = make_dataset(cell.data, cell.seed)
                datasets = tracking.dataset_inputs(cell.data, cell.seed, data)
                run = log.start(cell.name, parameters, datasets)
                rows = given.get(cell)
                if rows is None:
                    generator = torch.Generator().manual_seed(cell.seed)
                    network = MLP(data.train.inputs.shape[1], model_settings, generator)
                    rows = train_with_early_stopping(
                        network, data, levels, train_settings, device, generator, on_epoch
                    )
                log.finish(run, parameters, rows)
                store.check()
            if not first:
                return
            table = log.load([cell.parameters(shared) for cell in cells])
            paths = save_table(table, arguments.output_dir)
            log.table(f"table of {len(cells)} cells", paths)
    except (DivergenceError, TrackingError) as error:
        sys.exit(f"{parser.prog}: error: {error}")
    finally:
        if (unlogged := log.unlogged()) is not None:
            path = arguments.output_dir / f"table_synth_cells_{os.getpid()}.csv"
            with plot.in_place(path) as temporary:
                unlogged.to_csv(temporary, index=False)
            print(f"cells that MLflow has not got, for --cells: {path}", file=sys.stderr)

    print("Saved:", *paths)
    for line in tracking.how_to_look(store, f"viewStateShareKey={tracking.MEANS}"):
        print(line)


def save_table(cells: pd.DataFrame, directory: Path) -> list[Path]:
    """Print the table, save it as Markdown, CSV, picture and raw figures; return the paths."""
    import plot
    from results import compare, markdown

    table = compare(cells)
    text = markdown(table)
    print(f"\n{text}")
    paths = [directory / f"table_synth{ending}" for ending in (".md", ".csv", "_cells.csv")]
    with plot.in_place(paths[0]) as path:
        path.write_text(text)
    for frame, path in zip((table, cells), paths[1:]):
        with plot.in_place(path) as temporary:
            frame.to_csv(temporary, index=False)
    return [*paths, *plot.save({"table_synth.png": plot.draw_table(cells, table)}, directory)]


if __name__ == "__main__":
    main()
