"""How close training and evaluation come to what the machine multiplies.

Measures in turn, several rounds, and takes medians: (a) float32 matrix products of about the
network's sizes, the limit; (b) an epoch of the default demo; (c) training steps of the paper's
network for K models at once; (d) the same on all cores with one thread a process; (e) the epoch
of (b) as a plain loop over models with DataLoader; (f) what logging the whole demo to MLflow
takes when nothing runs beside it, which is the most that it can add.
"""

from __future__ import annotations

import functools
import itertools
import math
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parent.parent))
from arguments import Parser
from process import prepare_process

from datasets import Dataset, Split, make_dataset
from models import MLP, StackedMLP
from settings import SPLITS, DataSettings, ModelSettings, TrainSettings
from train import METRICS, Evaluation, _train_epochs, train

DEMO_MODEL = ModelSettings(hidden_layers=4, hidden_units=500, batch_norm=True)
DEMO_TRAINING = TrainSettings("sgd", 0.01, batch_size=200, epochs=10**6, momentum=0.9)
DEMO_EPOCHS = 200
DEMO_LEVELS = (0.0, 0.26, 0.27, 0.28)
PAPER_MODEL = ModelSettings(hidden_layers=5, hidden_units=500, batch_norm=False)
PAPER_TRAINING = TrainSettings("adam", 0.001, batch_size=100, epochs=10**6)
MODELS_AT_ONCE = (1, 8, 17, 26, 51)
MODELS_PER_PROCESS = (8, 17, 26)
BYTES_PER_MODEL = 24e6  # of the paper's network: weights, gradients, two moments, activations
LIMIT_SECONDS = 0.2  # a shape of (a), each round


@dataclass(frozen=True)
class Case:
    """Something to time: a call, and the floating-point operations in it."""

    name: str
    call: Callable[[], object]
    operations: float


def multiplications(settings: ModelSettings, inputs: int = 2, classes: int = 2) -> int:
    """Multiply-adds of one example's forward pass."""
    widths = [inputs] + [settings.hidden_units] * settings.hidden_layers + [classes]
    return sum(before * after for before, after in itertools.pairwise(widths))


def step_operations(settings: ModelSettings, models: int, examples: int) -> float:
    """Forward pass, gradient of the weights, and gradient of all but the first layer's inputs."""
    first = 2 * settings.hidden_units
    return 2 * models * examples * (3 * multiplications(settings) - first)


def limit_cases(device: torch.device) -> list[Case]:
    cases = []
    for models, rows in ((1, 500), (1, 4000), (4, 500), (4, 1000), (8, 250), (8, 500)):
        left = torch.randn(models, rows, 500, device=device)
        right = torch.randn(models, 500, 500, device=device)
        product = torch.empty(models, rows, 500, device=device)
        if models == 1:
            call = functools.partial(torch.mm, left[0], right[0], out=product[0])
        else:
            call = functools.partial(torch.bmm, left, right, out=product)
        cases.append(Case(f"(a) {models} x {rows}x500x500", call, 2 * models * rows * 500**2))
    return cases


def demo_case(data: Dataset, device: torch.device) -> Case:
    generator = torch.Generator().manual_seed(0)
    network = MLP(2, DEMO_MODEL, generator)
    epochs = train(network, data, DEMO_LEVELS, DEMO_TRAINING, device, generator)
    next(epochs)
    return Case("(b) demo, one epoch", lambda: next(epochs), demo_operations(data))


def demo_operations(data: Dataset) -> float:
    examples = sum(len(getattr(data, name).labels) for name in SPLITS)
    evaluation = 2 * len(DEMO_LEVELS) * examples * multiplications(DEMO_MODEL)
    return evaluation + step_operations(DEMO_MODEL, len(DEMO_LEVELS), len(data.train.labels))


def step_case(models: int, device: torch.device, name: str) -> Case:
    """One training step of 100 examples: an epoch of a data set of that size."""
    data = make_dataset(DataSettings("sinusoid2d", 0.1), seed=0)
    generator = torch.Generator().manual_seed(0)
    stack = StackedMLP(MLP(2, PAPER_MODEL, generator), models, device)
    levels = torch.linspace(0.1, 0.5, models, device=device)
    epochs = _train_epochs(stack, data.train, levels, PAPER_TRAINING, generator)
    next(epochs)
    return Case(name, lambda: next(epochs), step_operations(PAPER_MODEL, models, 100))


def plain_case(data: Dataset, device: torch.device) -> Case:
    """The epoch of (b) as one would write it: loops over models and DataLoaders, batches of 200."""
    models, optimizers = [], []
    for _ in DEMO_LEVELS:
        widths = [2] + [DEMO_MODEL.hidden_units] * DEMO_MODEL.hidden_layers
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU()]
        models.append(nn.Sequential(*layers, nn.Linear(widths[-1], 2)).to(device))
        optimizers.append(torch.optim.SGD(models[-1].parameters(), lr=0.01, momentum=0.9))

    def loader(split: Split, **options: object) -> DataLoader:
        tensors = map(torch.from_numpy, (split.inputs, split.labels, split.clean_labels))
        return DataLoader(TensorDataset(*tensors), **options)

    train_loader = loader(data.train, batch_size=DEMO_TRAINING.batch_size, shuffle=True)
    loaders = [loader(getattr(data, name), batch_size=DEMO_TRAINING.batch_size) for name in SPLITS]
    cross_entropy = nn.functional.cross_entropy

    def epoch() -> None:
        for model, optimizer, level in zip(models, optimizers, DEMO_LEVELS):
            model.train()
            for inputs, labels, _ in train_loader:
                loss = cross_entropy(model(inputs.to(device)), labels.to(device))
                optimizer.zero_grad()
                ((loss - level).abs() + level).backward()
                optimizer.step()
            model.eval()
            with torch.no_grad():
                for split_loader in loaders:
                    losses, correct = [0.0, 0.0], [0, 0]
                    for inputs, *targets in split_loader:
                        logits = model(inputs.to(device))
                        predicted = logits.argmax(dim=1)
                        for i, labels in enumerate(targets):
                            labels = labels.to(device)
                            losses[i] += cross_entropy(logits, labels, reduction="sum").item()
                            correct[i] += (predicted == labels).sum().item()

    return Case("(e) the same epoch, plain loop", epoch, demo_operations(data))


def log_case(data: Dataset, device: torch.device) -> Case:
    """All that a demo of 200 epochs logs, into a new SQLite store, until it is written."""
    from store import Store

    from tracking import DEMO_EXPERIMENT, DemoLog

    settings = DataSettings("sinusoid2d", 0.1)
    metrics = {name: np.full(len(DEMO_LEVELS), 0.5) for name in METRICS}
    folder = tempfile.TemporaryDirectory()
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder.name}/mlflow.db"
    opened = Store(DEMO_EXPERIMENT, lambda experiment: {}, patience=60.0)

    def log() -> None:
        demo = DemoLog(opened, {"optimizer": "sgd"}, DEMO_LEVELS, device)
        demo.start_trial(settings, 0, data)
        for epoch in range(DEMO_EPOCHS + 1):
            demo.evaluation(Evaluation(slice(None), epoch, metrics, ()))
        demo.result("", 0.26, dict.fromkeys(DEMO_LEVELS, "#000000"), (), None)
        opened.flush()

    log.folder = folder  # is removed with the case
    return Case("(f) logging of the whole demo", log, math.nan)


def work_for(connection, models: int) -> None:
    """A process of (d): time as many steps as it is told, when it is told."""
    prepare_process("cpu")
    torch.set_num_threads(1)
    case = step_case(models, torch.device("cpu"), "")
    case.call()
    connection.send(None)
    while steps := connection.recv():
        for _ in range(steps):
            case.call()
        connection.send(None)


class Processes:
    """(d): the steps of (c) in one-thread processes, one a core, all at once."""

    def __init__(self, models: int, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for _ in range(count):
            pipe, theirs = context.Pipe()
            process = context.Process(target=work_for, args=(theirs, models), daemon=True)
            process.start()
            self.pipes.append(pipe)
            self.processes.append(process)
        self.answers()

    def answers(self) -> None:
        for pipe in self.pipes:
            pipe.recv()

    def run(self, steps: int) -> None:
        for pipe in self.pipes:
            pipe.send(steps)
        self.answers()

    def stop(self) -> None:
        for pipe, process in zip(self.pipes, self.processes):
            pipe.send(0)
            process.join()


def timed(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the seconds of a call, averaged over `repeats` calls in a row."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def main() -> None:
    parser = Parser(" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="device to time")
    parser.add_argument("--rounds", type=int, default=5, help="rounds to take medians over")
    arguments = parser.parse_args()
    from tqdm import tqdm

    with parser.setting_errors():
        device = prepare_process(arguments.device)
    cores = torch.get_num_threads()
    if device.type == "cpu":
        memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        memory = torch.cuda.mem_get_info()[0]

    data = make_dataset(DataSettings("sinusoid2d", 0.1), seed=0)
    limits = limit_cases(device)
    cases = [demo_case(data, device)]
    cases += [
        step_case(models, device, f"(c) training step, K = {models}")
        for models in MODELS_AT_ONCE
        if models * BYTES_PER_MODEL < memory / 2
    ]
    cases += [plain_case(data, device), log_case(data, device)]
    seconds: dict[str, list[float]] = {}
    operations = {case.name: case.operations for case in (*limits, *cases)}
    per_process = MODELS_PER_PROCESS if device.type == "cpu" else ()
    total = arguments.rounds * (len(limits) + len(cases) + len(per_process))
    with tqdm(total=total, disable=None, leave=False, unit="case") as bar:

        def record(name: str, value: float) -> None:
            seconds.setdefault(name, []).append(value)
            bar.update()

        repeats = {}
        for case in (*limits, *cases):  # warm up, and see how often fits in the time
            case.call()
            once = timed(case.call, device, 2)
            wanted = LIMIT_SECONDS if case in limits else 2 * LIMIT_SECONDS
            repeats[case.name] = max(1, round(wanted / once))
        groups = {}
        for models in per_process:
            name = f"(d) {cores} processes, K = {models} each"
            operations[name] = cores * step_operations(PAPER_MODEL, models, 100)
            groups[name] = Processes(models, cores)
            once = timed(lambda p=groups[name]: p.run(1), device, 2)
            repeats[name] = max(2, round(2 * LIMIT_SECONDS / once))
        for _ in range(arguments.rounds):
            for case in (*limits, *cases):
                record(case.name, timed(case.call, device, repeats[case.name]))
            for name, processes in groups.items():
                steps = repeats[name]
                record(name, timed(lambda p=processes, s=steps: p.run(s), device, 1) / steps)
        for processes in groups.values():
            processes.stop()

    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rates = {name: operations[name] / medians[name] / 1e9 for name in medians}
    limit = max(rates[case.name] for case in limits)
    machine = platform.processor() or platform.machine()
    if device.type == "cuda":
        machine = torch.cuda.get_device_name()
    print(f"{machine}, {cores} threads, torch {torch.__version__}, {arguments.rounds} rounds\n")
    print(f"{'':36}{'ms':>10}{'GFLOP/s':>10}{'of (a)':>8}")
    for name in medians:
        rate = rates[name]
        products = "" if math.isnan(rate) else f"{rate:10.0f}{rate / limit:8.2f}"
        print(f"{name:36}{1000 * medians[name]:10.2f}{products}")
    speedup = medians["(e) the same epoch, plain loop"] / medians["(b) demo, one epoch"]
    demo_seconds = DEMO_EPOCHS * operations["(b) demo, one epoch"] / limit / 1e9
    print(f"\n(b) is {speedup:.1f} times as fast as (e)")
    share = medians["(f) logging of the whole demo"] / medians["(b) demo, one epoch"] / DEMO_EPOCHS
    print(f"(f) is {100 * share:.1f}% of {DEMO_EPOCHS} times (b)")
    print(f"the limit (a), {limit:.0f} GFLOP/s, would take {demo_seconds:.1f} s for the whole demo")


if __name__ == "__main__":
    main()
