"""How close training and evaluation come to what the machine multiplies.

Measures in turn, several rounds, and takes medians: (a) float32 matrix products of about the
network's sizes by every library at hand, of which the fastest is the limit; (b) an epoch of the
default demo; (c) training steps of the table's network for K models at once; (d) the epoch of (b)
by the plain loop of `reference.py`.
"""

import functools
import itertools
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parent.parent))
import reference
import settings
from datasets import Dataset, make_dataset
from models import MLP, prefers_convolution
from run_demo_synth import Demo
from run_table_synth import Table
from settings import SPLITS, Model
from train import make_optimizer, prepare_process, split_models, train, train_epochs

STACKS = (1, 4, 26, 51)
SHAPES = ((1, 4000), (4, 500), (4, 1500), (26, 200))  # K and rows of the products of (a)
LIMIT_SECONDS = 0.2  # a shape of (a), each round; twice that for each of the other cases
ENDLESS = 10**6  # epochs, more than are measured
# NumPy's products in a process of their own, so that variables for another OpenBLAS can be unset.
NUMPY = """
import statistics, time, numpy
left, right = numpy.ones((4000, 500), "f"), numpy.ones((500, 500), "f")
out = left @ right
seconds = []
for _ in range(60):
    start = time.perf_counter()
    numpy.matmul(left, right, out=out)
    seconds.append(time.perf_counter() - start)
print(statistics.median(seconds))
"""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What to measure on, and how long."""

    device: Literal["cpu", "cuda"] = "cpu"
    """device to time"""
    rounds: settings.Count = 5
    """rounds to take medians over"""

    def __post_init__(self) -> None:
        settings.check_counts(self, "rounds")


@dataclass(frozen=True)
class Case:
    """Something to time: a call, and the floating-point operations in it."""

    name: str
    call: Callable[[], object]
    operations: float


def multiplications(model: Model, inputs: int = 2, classes: int = 2) -> int:
    """Multiply-adds of one example's forward pass."""
    widths = [inputs] + [model.hidden_units] * model.hidden_layers + [classes]
    return sum(before * after for before, after in itertools.pairwise(widths))


def step_operations(model: Model, models: int, examples: int) -> float:
    """Forward pass, gradient of the weights, and gradient of all but the first layer's inputs."""
    first = 2 * model.hidden_units
    return 2 * models * examples * (3 * multiplications(model) - first)


def demo_operations(demo: Demo, data: Dataset) -> float:
    """One epoch: a step of all training examples, and an evaluation of the three splits."""
    models = len(demo.flood_levels)
    examples = sum(len(getattr(data, name).inputs) for name in SPLITS)
    evaluation = 2 * models * examples * multiplications(demo.model)
    return evaluation + step_operations(demo.model, models, len(data.train.inputs))


def limit_cases(device: torch.device) -> list[Case]:
    """Bare products by PyTorch's `mm` and `bmm`, and on a CPU by oneDNN."""
    cases = []
    for models, rows in SHAPES:
        left = torch.randn(models, rows, 500, device=device)
        right = torch.randn(models, 500, 500, device=device)
        product = torch.empty(models, rows, 500, device=device)
        calls = {"bmm": functools.partial(torch.bmm, left, right, out=product)}
        if models == 1:
            calls = {"mm": functools.partial(torch.mm, left[0], right[0], out=product[0])}
        if device.type == "cpu" and torch.backends.mkldnn.is_available():
            image = torch.randn(1, rows, 1, models * 500).permute(0, 3, 1, 2)
            kernels, fixed = right.view(-1, 500, 1, 1), ((0, 0), (1, 1), (1, 1), models)
            convolution = torch.ops.aten.mkldnn_convolution
            calls["oneDNN"] = functools.partial(convolution, image, kernels, None, *fixed)
        for name, call in calls.items():
            operations = 2 * models * rows * 500**2
            cases.append(Case(f"(a) {name}, {models} x {rows}x500x500", call, operations))
    return cases


def numpy_rate() -> float:
    """Return the GFLOP/s of NumPy's products, by the OpenBLAS that it brings."""
    chosen = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")  # they may hold a newer OpenBLAS back
    environment = {name: value for name, value in os.environ.items() if name not in chosen}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    command = [sys.executable, "-c", NUMPY]
    seconds = float(subprocess.check_output(command, env=environment, text=True))
    return 2 * 4000 * 500**2 / seconds / 1e9


def demo_case(demo: Demo, data: Dataset, device: torch.device) -> Case:
    generator = torch.Generator().manual_seed(0)
    network = MLP(2, demo.model, [generator])
    models = pd.DataFrame({"start": 0, "flood_level": demo.flood_levels})
    [(models, live)] = split_models(network, models, device)
    epochs = train(live, data, models, demo.training, generator)
    next(epochs)
    return Case("(b) demo, one epoch", lambda: next(epochs), demo_operations(demo, data))


def step_case(table: Table, data: Dataset, models: int, device: torch.device) -> Case:
    """One training step: an epoch of a split that is one batch."""
    generator = torch.Generator().manual_seed(0)
    network = MLP(2, table.model, [generator]).select([0] * models).to(device)
    levels = torch.linspace(0.1, 0.5, models).tolist()
    epochs = train_epochs(network, data.train, levels, table.training, generator)
    next(epochs)
    operations = step_operations(table.model, models, len(data.train.inputs))
    return Case(f"(c) training step, K = {models}", lambda: next(epochs), operations)


def plain_case(demo: Demo, data: Dataset, device: torch.device) -> Case:
    """The epoch of (b) as one would write it: loops over models and over DataLoaders.

    It scores the noisy labels only, which takes it as many products as both.
    """
    model = demo.model
    shape = model.hidden_layers, model.hidden_units, model.batch_norm
    networks = [reference.make_network(2, *shape).to(device) for _ in demo.flood_levels]
    optimizers = [make_optimizer(network, demo.training) for network in networks]

    def batches(name: str, shuffle: bool = False) -> Iterator[tuple]:
        split, size = getattr(data, name), demo.training.batch_size
        tensors = map(torch.from_numpy, (split.inputs, split.noisy_labels))
        for batch in DataLoader(TensorDataset(*tensors), batch_size=size, shuffle=shuffle):
            yield tuple(tensor.to(device) for tensor in batch)

    def epoch() -> None:
        for network, optimizer, b in zip(networks, optimizers, demo.flood_levels):
            reference.train_epoch(network, batches("train", shuffle=True), b, optimizer)
            for name in SPLITS:
                for batch in batches(name):
                    reference.evaluate(network, *batch)

    return Case("(d) the same epoch, plain loop", epoch, demo_operations(demo, data))


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


def main(benchmark: Benchmark) -> None:
    with settings.exit_on(settings.SettingError, status=2):
        device = prepare_process(benchmark.device)
    demo, table = (
        replace(script.filled(), training=replace(script.filled().training, epochs=ENDLESS))
        for script in (Demo(), Table())
    )
    data = make_dataset(demo.data, seed=0)
    limits = limit_cases(device)
    training = [step_case(table, data, models, device) for models in STACKS]
    demos = [demo_case(demo, data, device), plain_case(demo, data, device)]
    cases = [*limits, demos[0], *training, demos[1]]

    repeats, seconds = {}, {case.name: [] for case in cases}
    with settings.ProgressBar(benchmark.rounds * len(cases), "case") as bar:
        for case in cases:  # warm up, and see how often fits in the time
            case.call()
            wanted = LIMIT_SECONDS if case in limits else 2 * LIMIT_SECONDS
            repeats[case.name] = max(1, round(wanted / timed(case.call, device, 2)))
        for _ in range(benchmark.rounds):
            for case in cases:
                seconds[case.name].append(timed(case.call, device, repeats[case.name]))
                bar.update()

    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rates = {case.name: case.operations / medians[case.name] / 1e9 for case in cases}
    if device.type == "cpu":
        rates = {"(a) NumPy, 1 x 4000x500x500": numpy_rate(), **rates}
    best = max((name for name in rates if name.startswith("(a)")), key=rates.get)
    report(device, benchmark.rounds, medians, rates, best)
    epoch, plain = (medians[case.name] for case in demos)
    at_limit = demos[0].operations / rates[best] / 1e9
    print(
        f"\nthe limit is {rates[best]:.0f} GFLOP/s, by {best.removeprefix('(a) ')}\n"
        f"(b) takes {epoch / at_limit:.2f} times as long as at the limit\n"
        f"(b) is {plain / epoch:.1f} times as fast as (d)"
    )


def report(
    device: torch.device, rounds: int, medians: dict[str, float], rates: dict[str, float], best: str
) -> None:
    """Print the rates, and how near each comes to the best of (a)."""
    on_gpu = device.type == "cuda"
    machine = torch.cuda.get_device_name() if on_gpu else platform.processor()
    libraries = {False: "bmm", True: "oneDNN"}
    training = libraries[prefers_convolution(device)]
    with torch.no_grad():
        evaluation = libraries[prefers_convolution(device)]
    print(
        f"{machine or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, {rounds} rounds; "
        f"training by {training}, evaluation by {evaluation}\n\n"
        f"{'':36}{'ms':>10}{'GFLOP/s':>10}{'of (a)':>8}"
    )
    for name, rate in rates.items():
        shown = f"{1000 * medians[name]:10.2f}" if name in medians else f"{'':10}"
        print(f"{name:36}{shown}{rate:10.0f}{rate / rates[best]:8.2f}")


if __name__ == "__main__":
    main(settings.parse_flags(Benchmark, __doc__))
