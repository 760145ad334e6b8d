"""Reproduce the paper's synthetic table, without (A) and with (B) early stopping.

Two Gaussians, sinusoid and spiral at three strengths of label noise, flood levels 0 to 0.50,
ten trials: 4 590 trainings. A cell, one trial of one setting with all its flood levels, is
trained once: `table_synth_cells.csv` has every finished one, so a stopped table goes on where it
was. With `--ray` cells are trained side by side, on one machine or several.
"""

from __future__ import annotations

import importlib.util
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Annotated

import tyro

import settings
from datasets import Cell, DatasetName, DataSettings
from settings import Count, ModelSettings, SettingError, TrainSettings, ending_on, flag

CELLS_FILE = "table_synth_cells.csv"
CORES_A_CELL = 4  # with Ray, at most: what more cores add to a training of this size is little


@dataclass(frozen=True, kw_only=True)
class TableSettings(settings.RunSettings, TrainSettings, ModelSettings, DataSettings):
    """All of a table. The defaults are the paper's, section 4.1; no batch norm is assumed."""

    dataset: tuple[DatasetName, ...] = ("gaussian", "sinusoid2d", "spiral")
    """data sets"""
    label_noise: Annotated[tuple[float, ...], flag("FRACTION [FRACTION ...]")] = (0.01, 0.05, 0.1)
    """fractions of each split's labels that are flipped, in [0, 1)"""
    hidden_layers: Count = 5
    batch_norm: bool = False
    optimizer: settings.OptimizerName = "adam"
    batch_size: Count = 100
    epochs: Count = 500
    trials: Annotated[int | None, flag("N", "(default: 10, with --quick 2)")] = None
    """trials of a setting; trial t draws data and weights from seed + t"""
    flood_max: Annotated[float, flag("B")] = 0.5
    """highest flood level, in nats; where the steps do not meet it, the last one below"""
    flood_step: Annotated[float | None, flag("B", "(default: 0.01, with --quick 0.1)")] = None
    """step of the flood levels, which start at 0"""
    quick: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """show the shape of the result sooner: fewer trials and flood levels"""
    cells: Annotated[tuple[Path, ...], flag("FILE [FILE ...]", "(default: none)")] = ()
    """raw figures (table_synth_cells.csv) of cells that are trained already, to be added"""
    ray: Annotated[str | None, flag("local|ADDRESS", "(default: one after the other)")] = None
    """train cells side by side, with Ray on this machine or on the cluster at this address"""

    def __post_init__(self) -> None:
        for part in (ModelSettings, TrainSettings):
            part.__post_init__(self)
        trials, step = (2, 0.1) if self.quick else (10, 0.01)
        settings.fill(self, trials=trials, flood_step=step)
        settings.check_counts(self, "trials")
        for name in ("dataset", "label_noise"):
            settings.check(len(getattr(self, name)) > 0, name, "", "at least one")
        highest, step = self.flood_max, self.flood_step
        settings.check(0 < highest < 100, "flood_max", highest, "a number of nats in (0, 100)")
        settings.check(0.0001 <= step <= highest, "flood_step", step, "from 0.0001 to --flood-max")
        there = self.ray is None or importlib.util.find_spec("ray")
        settings.check(there, "ray", self.ray, "only with Ray: pip install ray")
        for cell in self.grid():
            self.check_batches(cell.train_samples, self.batch_norm)
        settings.RunSettings.__post_init__(self)  # last: it makes the folder

    def flood_levels(self) -> list[float]:
        """Return the levels 0, step, 2 step, ... that are not above the highest."""
        steps = int(self.flood_max / self.flood_step + 1e-9)  # 0.5 / 0.1 may be a bit below 5
        return [round(level * self.flood_step, 10) for level in range(steps + 1)]

    def shared(self) -> dict[str, object]:
        """Return what all cells of the table are trained with, by its names."""
        names = [field.name for part in (ModelSettings, TrainSettings) for field in fields(part)]
        shared = {name: getattr(self, name) for name in names}
        return {**shared, "version": settings.FIGURES_VERSION}

    def grid(self) -> list[Cell]:
        """Return the cells, trials outermost: a table that is stopped has all settings."""
        data = {field.name: getattr(self, field.name) for field in fields(DataSettings)}
        return [
            Cell(**{**data, "dataset": dataset, "label_noise": noise, "seed": seed})
            for seed in range(self.seed, self.seed + self.trials)
            for dataset in dict.fromkeys(self.dataset)
            for noise in sorted(set(self.label_noise))
        ]


if __name__ == "__main__":  # before the heavy imports: --help and Ctrl-C are answered at once
    settings.exit_on_signals()
    TABLE = settings.parse_flags(TableSettings, __doc__)

import pandas as pd
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

import plot
import results
from datasets import make_dataset
from models import MLP
from tracking import TableLog, TrackingError
from train import DivergenceError, count_epochs, prepare_process, train_with_early_stopping, where

TrainedCell = tuple[Cell, pd.DataFrame, tuple[float, float]]  # its rows; from when to when


def main(table: TableSettings) -> None:
    settings.exit_on_signals()
    began, directory = time.time(), table.output_dir
    levels, shared, grid = table.flood_levels(), table.shared(), table.grid()
    lock = FileLock(directory / "table_synth.lock", blocking=False)  # until the process ends
    with ending_on(SettingError, results.CellsError, TrackingError, status=2):
        if table.ray:
            start_ray(table.ray)
        else:
            prepare_process(table.device)
        try:
            lock.acquire()
        except Timeout as error:
            raise SettingError("output_dir", directory, "another table is made there") from error
        state = directory.glob(CELLS_FILE)  # if it is there
        cells = results.read_cells([*state, *table.cells], shared, levels)
        log = TableLog(shared, levels)
    trained = set(cells[results.CELL].itertuples(index=False, name=None))
    missing = [cell for cell in grid if astuple(cell) not in trained]
    known = len(grid) - len(missing)
    print(f"{len(grid)} cells of {len(levels)} flood levels, {known} trained before", flush=True)
    with (
        ending_on(SettingError, status=2),
        ending_on(DivergenceError),
        settings.progress_bar(len(missing), "cell", digits=1) as bar,
    ):
        for cell, rows, times in train_cells(table, missing, bar):
            cells = results.add_cells(cells, rows.assign(commit=log.commit))
            results.write_files({CELLS_FILE: results.csv(cells)}, directory)
            log.cell(cell, rows, times)

    asked = results.select_cells(cells, grid)
    compared = results.compare(asked)
    text = results.markdown(compared)
    print(f"\n{text}")
    files = plot.png_files({"table_synth.png": plot.draw_table(asked, compared)})
    files |= {"table_synth.md": text.encode(), "table_synth.csv": results.csv(compared)}
    files[CELLS_FILE] = results.csv(cells)
    print("Saved:", *results.write_files(files, directory), flush=True)
    log.table(f"table of {len(grid)} cells", files, began)
    print(log.how_to_look(means=True))
    with ending_on(TrackingError):
        log.finish()


def train_cells(table: TableSettings, cells: Sequence[Cell], bar: tqdm) -> Iterator[TrainedCell]:
    """Train cells one after the other in this process, or side by side with Ray, in any order."""
    if not table.ray:
        for cell in cells:
            bar.set_postfix_str(str(cell), refresh=False)
            yield train_cell(table, cell, bar.update)
        return
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int(table.device != "cpu" and any("GPU" in node for node in nodes))
    cores = min([CORES_A_CELL, *(node["CPU"] for node in nodes if "CPU" in node)])
    remote = ray.remote(train_cell).options(num_cpus=cores, num_gpus=gpus, max_retries=-1)
    waiting = [remote.remote(table, cell) for cell in cells]
    while waiting:
        [done], waiting = ray.wait(waiting)
        try:
            yield ray.get(done)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        bar.update()


def train_cell(
    table: TableSettings, cell: Cell, on_progress: Callable[[float], object] = lambda share: None
) -> TrainedCell:
    """Train a cell in this process, one of Ray's or the only one."""
    started, levels = time.time(), table.flood_levels()
    device = prepare_process(table.device)
    data = make_dataset(cell, cell.seed)
    generator = torch.Generator().manual_seed(cell.seed)
    network = MLP(data.train.inputs.shape[1], table, generator)
    share = 1 / count_epochs(levels, table.epochs, device)
    rows = train_with_early_stopping(
        network, data, levels, table, device, generator, lambda: on_progress(share)
    )
    rows = rows.assign(**asdict(cell), **table.shared(), **where(device))
    return cell, rows, (started, time.time())


def start_ray(address: str) -> None:
    """Join Ray, and send it this code; SettingError if there is no Ray at that address."""
    import ray

    unneeded = [".git", ".venv", "figures", "tests", "mlruns", "mlartifacts", "*.db"]
    code = {"working_dir": str(Path(__file__).parent), "excludes": unneeded}
    try:
        host, _, port = address.removeprefix("ray://").rpartition(":")
        if port.isdecimal():  # where nothing answers, Ray would ask for twelve minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        ray.init(address, runtime_env=code, log_to_driver=False, logging_level="ERROR")
    except (OSError, OverflowError, ValueError, RuntimeError) as error:
        raise SettingError("ray", address, f"local, or a running cluster's ({error})") from error
    settings.exit_on_signals()  # Ray has set handlers of its own


if __name__ == "__main__":
    main(TABLE)
