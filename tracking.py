"""What MLflow keeps of the experiments, and how it is read back.

A run of the demo is one flood level of one trial, a run of the table one cell. Runs stand side
by side, tied together by tags, so that the chart view compares them at once.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import secrets
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from urllib.parse import quote

import mlflow
import numpy as np
import pandas as pd
import torch
from mlflow.entities import DatasetInput, InputTag

from datasets import Dataset
from settings import SPLITS, DataSettings
from store import Run, Store, TrackingError, reading_client, reason, tracking_uri
from train import METRICS, Boundary, Evaluation

DEMO_EXPERIMENT, TABLE_EXPERIMENT = "flooding-synth", "flooding-table"
# The first line is what the folded description shows. The UI opens at its page for language
# models: the link goes to the charts.
DEMO_DESCRIPTION = """\
[**Show the charts**]({charts}) of training with and without flooding, or \
[**means over the trials**]({means}) by flood level.

By `run_demo_synth.py`. Each run is one flood level b of one trial; the tag `demo` ties the runs of
one demo together, and the chosen level is marked in its name. `train/loss_noisy` goes to zero
without flooding and floats around b with it; `test/loss_clean` and `test/accuracy_clean` show what
that does on the true labels. `_noisy` is against the labels as they are given, a part of them
flipped, `_clean` against the true ones.
"""
TABLE_DESCRIPTION = """\
[**Show the charts**]({means}) of the paper's synthetic table: scores against the flood level, \
means over the trials, a curve a data set and label noise.

By `run_table_synth.py`. Each run is a cell: one trial of one setting. Its curves go over the flood
levels, not over time: step k is the k-th level, 0, 0.01, 0.02, ... by default. `last_epoch` is
without, `early` with early stopping. A run named `table` has the finished table as its artifacts.
"""
MEANS = "means"  # the key of the saved view that shows them
DEMO_NOTE = "The whole demo, of which this run is one flood level of one trial:"
CELL_FILE = "cell.csv"
BOUNDARY_FILE = "boundary.npz"  # what `synth_boundary.png` is drawn from


def metric_name(name: str) -> str:
    """Return a metric's name in MLflow, where what is before the slash makes a section."""
    return name.replace("_", "/", 1)


def experiment_tags(description: str, group_by: str) -> Callable[[str], dict[str, str]]:
    """Return what makes an experiment's tags from its id: its description, and a saved view.

    The view, which MLflow's own "share" button makes too, has the means over all runs that have
    the parameter `group_by` in common; an address cannot say that.
    """

    def tags(experiment_id: str) -> dict[str, str]:
        keys = [{"mode": "param", "groupByData": group_by}]
        state = {"groupBy": {"aggregateFunction": "average", "groupByKeys": keys}}
        now = int(time.time() * 1000)
        view = {"name": f"means by {group_by}", "createdAt": now, "updatedAt": now}
        charts, means = (_page(experiment_id, more) for more in ("", f"viewStateShareKey={MEANS}"))
        return {
            "mlflow.note.content": description.format(charts=charts, means=means),
            "mlflow.experimentKind": "custom_model_development",
            f"mlflow.sharedViewState.{MEANS}": json.dumps({**view, "state": json.dumps(state)}),
        }

    return tags


def _page(experiment_id: str, more: str) -> str:
    """The charts of an experiment, on whatever server shows it."""
    charts = "workflowType=machine_learning&compareRunsMode=CHART"
    return f"#/experiments/{experiment_id}/runs?{charts}{'&' * bool(more)}{more}"


def how_to_look(store: Store, more: str) -> list[str]:
    """Return the lines that tell how to see an experiment's charts in a browser.

    `more` narrows them down, as a part of the address.
    """
    uri = tracking_uri()
    if uri.startswith("http"):
        shown = re.sub(r"//\S*@", "//", uri).rstrip("/")
        return [f"Charts: {shown}/{_page(store.experiment_id, more)}"]
    if uri.startswith("sqlite:///"):
        path = Path(uri.removeprefix("sqlite:///")).absolute()
        shown = shlex.quote(f"sqlite:///{path}")
    else:
        shown = '"$MLFLOW_TRACKING_URI"'  # may have a password
    command = f"{shlex.quote(sys.executable)} -m mlflow ui --workers 1 --backend-store-uri {shown}"
    return [
        f"Charts: {command}",
        f"and open http://127.0.0.1:5000/{_page(store.experiment_id, more)}",
    ]


def _level_name(level: float) -> str:
    return f"b = {level:g}" if level else "no flooding"


def environment_tags(device: torch.device) -> dict[str, str]:
    """Return what the run ran on: versions, device and, in a git checkout, the commit."""
    on_gpu = device.type == "cuda"
    tags = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mlflow.source.name": Path(sys.argv[0]).name,
        "device": f"cuda ({torch.cuda.get_device_name(device)})" if on_gpu else device.type,
    }
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
        )
    except OSError:  # git is not installed
        return tags
    if commit.returncode == 0:
        tags["mlflow.source.git.commit"] = commit.stdout.strip()
    return tags


def dataset_inputs(settings: DataSettings, seed: int, data: Dataset) -> list[DatasetInput]:
    """Return what MLflow shows of a data set: of each split its name, size and digest."""
    inputs = []
    for name in SPLITS:
        split = getattr(data, name)
        digest = hashlib.sha256()
        for array in asdict(split).values():
            digest.update(array.tobytes())
        samples, features = split.inputs.shape
        columns = [
            *({"type": "float", "name": f"x{i + 1}", "required": True} for i in range(features)),
            *({"type": "long", "name": n, "required": True} for n in ("label", "clean_label")),
        ]
        dataset = mlflow.entities.Dataset(
            name=f"{settings.dataset}, label noise {settings.label_noise:g}",
            digest=digest.hexdigest()[:8],
            source_type="code",
            source=json.dumps({"make_dataset": asdict(settings), "seed": seed}),
            schema=json.dumps({"mlflow_colspec": columns}),
            profile=json.dumps({"num_rows": samples, "num_elements": samples * features}),
        )
        context = {"train": "train", "val": "validation", "test": "test"}[name]
        inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", context)]))
    return inputs


class DemoLog:
    """One demo in MLflow: a run a flood level of each trial."""

    def __init__(
        self,
        store: Store,
        parameters: Mapping[str, object],
        flood_levels: Sequence[float],
        device: torch.device,
    ) -> None:
        self._store, self._parameters, self._levels = store, parameters, flood_levels
        demo = secrets.token_hex(4)
        self._tags = {"demo": demo, **environment_tags(device)}
        self._query = f"tags.demo = '{demo}'"
        self._runs: list[dict[float, Run]] = []  # of each trial, by flood level

    def start_trial(self, settings: DataSettings, seed: int, data: Dataset) -> None:
        """Start a trial's runs."""
        datasets, runs = dataset_inputs(settings, seed, data), {}
        for level in self._levels:
            parameters = {**self._parameters, "seed": seed, "flood_level": level}
            runs[level] = self._store.start(_level_name(level), parameters, self._tags, datasets)
        self._runs.append(runs)

    def evaluation(self, evaluation: Evaluation) -> None:
        """Log an evaluation of the trial that was started last."""
        for model, level in enumerate(self._levels[evaluation.models]):
            metrics = {metric_name(k): values[model] for k, values in evaluation.metrics.items()}
            self._store.log_metrics(self._runs[-1][level], metrics, evaluation.epoch)

    def result(
        self,
        summary: str,
        chosen: float,
        colors: Mapping[float, str],
        pictures: Sequence[Path],
        boundary: Boundary | None,
    ) -> None:
        """Mark the chosen level, describe and colour the runs, and end them.

        The pictures hang on every run of the first trial; what the boundary is drawn from, with
        the first of them.
        """
        for runs in self._runs:
            for level, run in runs.items():
                tags = {
                    "mlflow.runColor": colors[level],
                    "mlflow.note.content": f"{DEMO_NOTE}\n```\n{summary}\n```\n",
                    "chosen": "yes" if level == chosen else "no",
                }
                if level == chosen:
                    tags["mlflow.runName"] = f"{_level_name(level)} (chosen)"
                self._store.set_tags(run, tags)
        for run in self._runs[0].values():
            for path in pictures:
                self._store.log_file(run, path)
        if boundary:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / BOUNDARY_FILE
                np.savez_compressed(path, **vars(boundary))
                self._store.log_file(next(iter(self._runs[0].values())), path)
        for runs in self._runs:
            for run in runs.values():
                self._store.end(run)

    def how_to_look(self) -> list[str]:
        """Return the lines that tell how to see this demo's runs in a browser.

        Several trials are shown as means, over all demos: the charts hold ten runs at first.
        """
        one = f"searchFilter={quote(self._query)}"
        more = one if len(self._runs) == 1 else f"viewStateShareKey={MEANS}"
        return how_to_look(self._store, more)


def load_demo(
    run_id: str,
) -> tuple[pd.DataFrame, dict[str, str], Boundary | None]:
    """Read a demo back: its history, its parameters and what its boundary is drawn from.

    `run_id` is any of the demo's runs. The history has a row a `seed`, `flood_level` and `epoch`;
    of a demo that was stopped it has the epochs that all of its models were evaluated in.

    Raises:
        TrackingError: there is no such run, or it is no demo with an evaluation of all models.
    """
    try:
        client = reading_client()
        run = client.get_run(run_id)
        demo = run.data.tags.get("demo")
        if demo is None:
            raise TrackingError(
                f"no demo, or one that an earlier version logged: '{run.info.run_name}'"
            )
        runs = client.search_runs(
            [run.info.experiment_id], f"tags.demo = '{demo}'", max_results=50_000
        )
        history, boundary = [], None
        for run in runs:
            curves = {
                name: {
                    point.step: point.value
                    for point in client.get_metric_history(run.info.run_id, metric_name(name))
                }
                for name in METRICS
            }
            curve = pd.DataFrame(curves).rename_axis("epoch").reset_index().dropna()
            parameters = run.data.params
            curve.insert(0, "seed", int(parameters["seed"]))
            curve.insert(1, "flood_level", float(parameters["flood_level"]))
            history.append(curve)
            if any(file.path == BOUNDARY_FILE for file in client.list_artifacts(run.info.run_id)):
                with tempfile.TemporaryDirectory() as folder:
                    path = client.download_artifacts(run.info.run_id, BOUNDARY_FILE, folder)
                    boundary = Boundary(**np.load(path))
    except TrackingError:
        raise
    except Exception as error:  # of whatever the store is made of
        raise TrackingError(f"it cannot be read: {reason(error)}") from error
    history = pd.concat(history).sort_values(["seed", "flood_level", "epoch"])
    # A demo that was stopped has not got equally far with all its levels.
    models = history.groupby(["seed", "flood_level"]).ngroups
    history = history[history.groupby("epoch").epoch.transform("size") == models]
    if models < len(runs) or history.empty:
        raise TrackingError("a demo that was stopped before its first evaluation")
    first = min(int(run.data.params["seed"]) for run in runs)
    return history, {**parameters, "seed": str(first)}, boundary


class TableLog:
    """The table's cells in MLflow.

    A cell is known by its parameters and flood levels: one that is FINISHED in the store is not
    trained again, whichever table it was trained for.
    """

    def __init__(self, store: Store, flood_levels: Sequence[float], device: torch.device) -> None:
        self._store, self._levels = store, list(flood_levels)
        self._tags = environment_tags(device)
        self._cells: list[tuple[Run, pd.DataFrame]] = []

    def _key(self, parameters: Mapping[str, object]) -> str:
        text = json.dumps([self._levels, {k: str(v) for k, v in sorted(parameters.items())}])
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def _find(self, parameters: Mapping[str, object], status: str) -> list[mlflow.entities.Run]:
        return self._store.ask(f"tags.cell_key = '{self._key(parameters)}' and status = '{status}'")

    def finished(self, parameters: Mapping[str, object]) -> bool:
        """Whether the store has this cell, as far as it answers."""
        return bool(self._find(parameters, "FINISHED"))

    def start(
        self, name: str, parameters: Mapping[str, object], datasets: Sequence[DatasetInput]
    ) -> Run:
        """Start the run of a cell; one that was left RUNNING when it was killed ends KILLED."""
        for left in self._find(parameters, "RUNNING"):
            self._store.write(self._store.client.set_terminated, left.info.run_id, "KILLED")
        setting = f"{parameters['dataset']}, noise {parameters['label_noise']:g}"
        tags = {**self._tags, "cell_key": self._key(parameters)}
        return self._store.start(name, {**parameters, "setting": setting}, tags, datasets)

    def finish(self, run: Run, parameters: Mapping[str, object], rows: pd.DataFrame) -> None:
        """Log a cell's scores, a row a stopping and flood level, as curves and as `cell.csv`."""
        for stopping, of_stopping in rows.groupby("stopping", sort=False):
            figures = of_stopping.drop(columns=["stopping", "flood_level"])
            for step, row in enumerate(figures.to_dict("records")):
                section = stopping.replace(" ", "_")
                metrics = {f"{section}/{name}": value for name, value in row.items()}
                self._store.log_metrics(run, metrics, step)
        cell = pd.DataFrame({**parameters, **rows.to_dict("series")})
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / CELL_FILE
            cell.to_csv(path, index=False)
            self._store.log_file(run, path)
        self._store.end(run)
        self._cells.append((run, cell))

    def unlogged(self) -> pd.DataFrame | None:
        """Return the finished cells that the store has not got, if there are any."""
        cells = [cell for run, cell in self._cells if not run.ended]
        return pd.concat(cells) if cells else None

    def load(self, cells: Sequence[Mapping[str, object]]) -> pd.DataFrame:
        """Read the cells with these parameters back.

        Raises:
            TrackingError: the store does not answer, or has not got one of them.
        """
        loaded = []
        try:
            runs = self._store.search("tags.cell_key != '' and status = 'FINISHED'")
            runs = {run.data.tags["cell_key"]: run.info.run_id for run in runs}
            for parameters in cells:
                run_id = runs[self._key(parameters)]
                with tempfile.TemporaryDirectory() as folder:
                    path = self._store.client.download_artifacts(run_id, CELL_FILE, folder)
                    loaded.append(pd.read_csv(path, engine="pyarrow"))
        except KeyError as error:
            raise TrackingError(f"the store has lost a cell: {parameters}") from error
        except Exception as error:  # of whatever the store is made of
            raise TrackingError(f"the cells cannot be read back: {reason(error)}") from error
        return pd.concat(loaded, ignore_index=True)

    def table(self, name: str, paths: Sequence[Path]) -> None:
        """Keep a finished table's files in a run of their own."""
        run = self._store.start(name, {}, self._tags)
        for path in paths:
            self._store.log_file(run, path)
        self._store.end(run)
