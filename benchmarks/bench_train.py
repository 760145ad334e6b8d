"""How close training and evaluation come to what the machine multiplies.

Measures in turn, several rounds, and takes medians: (a) float32 matrix products of about the
network's sizes, the limit; (b) an epoch of the default demo; (c) training steps of the paper's
network for K models at once; (d) the epoch of (b) as a plain loop over models with DataLoader.
"""

from __future__ import annotations

import functools
import itertools
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parent.parent))
import settings
from datasets import Dataset, Split, make_dataset
from models import MLP, StackedMLP
from run_demo_synth import DemoSettings
from run_table_synth import TableSettings
from settings import SPLITS, ModelSettings
from train import prepare_process, train, train_epochs

MODELS_AT_ONCE = (1, 8, 26, 51)
LIMIT_SECONDS = 0.2  # a shape of (a), each round; twice that for each of the other cases
ENDLESS = 10**6  # epochs, more than are measured


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings:
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


def multiplications(shape: ModelSettings, inputs: int = 2, classes: int = 2) -> int:
    """Multiply-adds of one example's forward pass."""
    widths = [inputs] + [shape.hidden_units] * shape.hidden_layers + [classes]
    return sum(before * after for before, after in itertools.pairwise(widths))


def step_operations(shape: ModelSettings, models: int, examples: int) -> float:
    """Forward pass, gradient of the weights, and gradient of all but the first layer's inputs."""
    first = 2 * shape.hidden_units
    return 2 * models * examples * (3 * multiplications(shape) - first)


def demo_operations(demo: DemoSettings, data: Dataset) -> float:
    """One epoch: a step of all training examples, and an evaluation of the three splits."""
    models = len(demo.flood_levels)
    examples = sum(len(getattr(data, name).labels) for name in SPLITS)
    evaluation = 2 * models * examples * multiplications(demo)
    return evaluation + step_operations(demo, models, len(data.train.labels))


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


def demo_case(demo: DemoSettings, data: Dataset, device: torch.device) -> Case:
    generator = torch.Generator().manual_seed(0)
    network = MLP(2, demo, generator)
    epochs = train(network, data, demo.flood_levels, demo, device, generator)
    next(epochs)
    return Case("(b) demo, one epoch", lambda: next(epochs), demo_operations(demo, data))


def step_case(table: TableSettings, split: Split, models: int, device: torch.device) -> Case:
    """One training step of 100 examples: an epoch of a split of that size."""
    generator = torch.Generator().manual_seed(0)
    stack = StackedMLP(MLP(2, table, generator), models, device)
    levels = torch.linspace(0.1, 0.5, models, device=device)
    epochs = train_epochs(stack, split, levels, table, generator)
    next(epochs)
    operations = step_operations(table, models, len(split.labels))
    return Case(f"(c) training step, K = {models}", lambda: next(epochs), operations)


def plain_case(demo: DemoSettings, data: Dataset, device: torch.device) -> Case:
    """The epoch of (b) as one would write it: loops over models and over DataLoaders."""
    generator = torch.Generator().manual_seed(0)
    models = [MLP(2, demo, generator).to(device) for _ in demo.flood_levels]
    options = {"lr": demo.learning_rate, "momentum": demo.momentum}
    optimizers = [torch.optim.SGD(model.parameters(), **options) for model in models]
    cross_entropy = nn.functional.cross_entropy

    def loader(split: Split, shuffle: bool) -> DataLoader:
        tensors = map(torch.from_numpy, (split.inputs, split.labels, split.clean_labels))
        return DataLoader(TensorDataset(*tensors), batch_size=demo.batch_size, shuffle=shuffle)

    train_loader = loader(data.train, shuffle=True)
    loaders = [loader(getattr(data, name), shuffle=False) for name in SPLITS]

    def epoch() -> None:
        for model, optimizer, level in zip(models, optimizers, demo.flood_levels):
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


def main(benchmark: BenchmarkSettings) -> None:
    with settings.ending_on(settings.SettingError, status=2):
        device = prepare_process(benchmark.device)
    demo, table = DemoSettings(epochs=ENDLESS), TableSettings(epochs=ENDLESS)
    data = make_dataset(demo, seed=0)
    limits = limit_cases(device)
    training = [step_case(table, data.train, models, device) for models in MODELS_AT_ONCE]
    demos = [demo_case(demo, data, device), plain_case(demo, data, device)]
    cases = [*limits, demos[0], *training, demos[1]]

    repeats, seconds = {}, {case.name: [] for case in cases}
    with settings.progress_bar(benchmark.rounds * len(cases), "case") as bar:
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
    limit = max(rates[case.name] for case in limits)
    on_gpu = device.type == "cuda"
    machine = torch.cuda.get_device_name() if on_gpu else platform.processor()
    print(
        f"{machine or platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, {benchmark.rounds} rounds\n\n"
        f"{'':36}{'ms':>10}{'GFLOP/s':>10}{'of (a)':>8}"
    )
    for name, rate in rates.items():
        print(f"{name:36}{1000 * medians[name]:10.2f}{rate:10.0f}{rate / limit:8.2f}")
    epoch, plain = (medians[case.name] for case in demos)
    epochs = DemoSettings().epochs
    demo_seconds = epochs * demos[0].operations / limit / 1e9
    print(
        f"\n(b) is {plain / epoch:.1f} times as fast as (d)\nthe limit (a), {limit:.0f} GFLOP/s, "
        f"would take {demo_seconds:.1f} s for the whole demo, {epochs} times (b)"
    )


if __name__ == "__main__":
    main(settings.parse_flags(BenchmarkSettings, __doc__))
