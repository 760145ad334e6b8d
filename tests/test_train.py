"""Training many models at once against straightforward loops over one model at a time."""

from __future__ import annotations

import copy
import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import train
from datasets import DataSettings, make_dataset
from flooding import flood
from models import MLP, StackedMLP, folded_logits, with_constant
from settings import SPLITS, ModelSettings, SettingError, TrainSettings
from train import METRICS, DivergenceError, count_epochs, train_epochs, train_with_early_stopping

CPU = torch.device("cpu")
LEVELS = [0.0, 0.3, 0.6]


def training(optimizer="sgd", **changes):
    """30 examples a batch of 8 leave a last one of 6."""
    rate = {"sgd": 0.05, "adam": 0.005}[optimizer]
    options = {"learning_rate": rate, "batch_size": 8, "epochs": 4, "weight_decay": 1e-3}
    return TrainSettings(optimizer=optimizer, **{**options, **changes})


def small_data():
    sizes = {"train_samples": 30, "val_samples": 20, "test_samples": 50}
    return make_dataset(DataSettings(dataset="sinusoid2d", label_noise=0.1, **sizes), seed=3)


def network_and_generator(batch_norm, seed=5):
    generator = torch.Generator().manual_seed(seed)
    units = 16 if batch_norm else 13  # a multiple of what widths are padded to, and none
    shape = ModelSettings(hidden_layers=2, hidden_units=units, batch_norm=batch_norm)
    network = MLP(2, shape, generator)
    for norm in network.norms:
        norm.running_var.fill_(0.01)  # small, so that batch norm's epsilon is seen
    return network, generator


def plain_scores(model, data):
    """The scores of all splits by their names."""
    scores = {}
    for name in SPLITS:
        split = getattr(data, name)
        with torch.no_grad():
            logits = model.eval()(torch.from_numpy(split.inputs))
        for kind, labels in (("noisy", split.labels), ("clean", split.clean_labels)):
            labels = torch.from_numpy(labels)
            scores[f"{name}_loss_{kind}"] = nn.functional.cross_entropy(logits, labels).item()
            correct = (logits.argmax(1) == labels).sum().item()
            scores[f"{name}_accuracy_{kind}"] = correct / len(labels)
    return scores


def plain_loop(network, data, level, settings, generator):
    """One model of PyTorch's layers with PyTorch's defaults; yields its METRICS every epoch."""
    first, second, last = copy.deepcopy(network.linears)
    norms = [nn.BatchNorm1d(first.out_features) for _ in network.norms]
    for norm, start in zip(norms, network.norms):
        norm.load_state_dict(start.state_dict())
    model = nn.Sequential(first, *norms[:1], nn.ReLU(), second, *norms[1:], nn.ReLU(), last)
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[settings.optimizer]
    options = {"momentum": settings.momentum} if settings.optimizer == "sgd" else {}
    options |= {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    optimizer = kind(model.parameters(), **options)
    inputs, labels = map(torch.from_numpy, (data.train.inputs, data.train.labels))
    below = []  # of all losses until now
    first = {"train_batch_loss": math.nan, "train_flooded_fraction_so_far": 0.0}
    yield {**plain_scores(model, data), **first}
    for _ in range(settings.epochs):
        batches = torch.randperm(len(labels), generator=generator).split(settings.batch_size)
        batch_losses = []
        for batch in batches:
            logits = model.train()(inputs[batch])
            losses = nn.functional.cross_entropy(logits, labels[batch], reduction="none")
            batch_losses.append(losses.mean().item())
            if settings.flood_on == "batch":
                losses = losses.mean().unsqueeze(0)
            below += (losses < level).tolist()
            if level > 0:
                losses = (losses - level).abs() + level
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()
        now = {
            "train_batch_loss": np.mean(batch_losses),
            "train_flooded_fraction_so_far": np.mean(below),
        }
        yield {**plain_scores(model, data), **now}


def train_all(network, data, levels, settings, generator, **options):
    """The metrics by flood level and epoch."""
    evaluations = train.train(network, data, levels, settings, CPU, generator, **options)
    return pd.concat([now.metrics for now in evaluations]).set_index(["flood_level", "epoch"])


def assert_equal(found, expected, tolerance):
    assert found == pytest.approx(expected, abs=tolerance, nan_ok=True)
    for name in expected:
        if "accuracy" in name:
            assert found[name] == expected[name]  # a count of examples


@pytest.mark.parametrize("flood_on", ["batch", "example"])
@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_models_at_once_equal_models_one_by_one(optimizer, batch_norm, flood_on, monkeypatch):
    monkeypatch.setattr("train.EVALUATION_ROWS", {"cpu": 21})  # chunks of 7 examples
    settings, data = training(optimizer, flood_on=flood_on, epochs=8), small_data()
    network, generator = network_and_generator(batch_norm)
    start = generator.get_state()
    metrics = train_all(network, data, LEVELS, settings, generator)
    assert set(metrics) == set(METRICS)
    for level in LEVELS:
        generator.set_state(start)
        loop = list(plain_loop(network, data, level, settings, generator))
        assert list(metrics.loc[level].index) == list(range(9))
        for found, expected in zip(metrics.loc[level].to_dict("records"), loop):
            assert_equal(found, expected, 5e-5)
    shares = metrics.train_flooded_fraction_so_far.loc[0.6]
    assert 0 < shares.iloc[-1] < 1 and shares.nunique() > 3
    assert not metrics.train_flooded_fraction_so_far.loc[0.0].any()


def test_by_default_the_mean_of_a_mini_batch_is_flooded_to_the_last_bit():
    settings, data, levels = training(), small_data(), torch.tensor(LEVELS)
    network, generator = network_and_generator(batch_norm=True)
    start = generator.get_state()
    ours, theirs = (StackedMLP(network, len(LEVELS), CPU) for _ in range(2))
    for _ in train_epochs(ours, data.train, levels, settings, generator):
        pass
    generator.set_state(start)
    inputs, labels = map(torch.from_numpy, (data.train.inputs, data.train.labels))
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, "fused": True}
    optimizer = torch.optim.SGD(theirs.parameters.values(), **options)
    for _ in range(settings.epochs):
        for batch in torch.randperm(30, generator=generator).split(8):
            optimizer.zero_grad()
            flood(theirs.losses(inputs[batch], labels[batch]), levels).sum().backward()
            optimizer.step()
    for name, value in theirs.parameters.items():
        assert torch.equal(ours.parameters[name], value)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_training_loss_floats_at_the_level(optimizer):
    network, generator = network_and_generator(batch_norm=False)
    settings = training(optimizer, batch_size=30, epochs=300)
    metrics = train_all(network, small_data(), [0.0, 0.5], settings, generator, eval_every=300)
    last = metrics.loc[0.5, 300]
    assert last.train_loss_noisy == pytest.approx(0.5, abs=0.02)
    assert 0.1 < last.train_flooded_fraction_so_far < 0.9
    assert metrics.loc[0.0, 300].train_loss_noisy < 0.3


@pytest.mark.parametrize("batch_norm", [True, False])
def test_initial_weights_are_pytorchs(batch_norm):
    network, _ = network_and_generator(batch_norm, seed=5)
    units = network.linears[0].out_features
    with torch.random.fork_rng():
        torch.manual_seed(5)
        for ours, inputs, outputs in zip(network.linears, (2, units, units), (units, units, 2)):
            theirs = nn.Linear(inputs, outputs, bias=outputs == 2 or not batch_norm)
            torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_a_loss_at_the_level_is_not_below_it():
    network, generator = network_and_generator(batch_norm=False)
    for parameter in network.linears[-1].parameters():
        torch.nn.init.zeros_(parameter)  # its loss is log 2, to the last bit
    data, settings = small_data(), training(learning_rate=1e-12, batch_size=30, epochs=1)
    inputs, labels = map(torch.from_numpy, (data.train.inputs, data.train.labels))
    order = torch.randperm(30, generator=torch.Generator().set_state(generator.get_state()))
    equal = StackedMLP(network, 4, CPU).losses(inputs[order], labels[order])[0]
    levels = [0.0, 0.1, equal.item(), 50.0]
    metrics = train_all(network, data, levels, settings, generator)
    assert list(metrics.xs(1, level="epoch").train_flooded_fraction_so_far) == [0, 0, 0, 1]


def test_same_seed_same_bits_and_sparse_evaluation_changes_nothing():
    found, ticks = [], []
    for eval_every in (1, 1, 3):
        network, generator = network_and_generator(batch_norm=True)
        options = {"eval_every": eval_every, "on_epoch": lambda: ticks.append(1)}
        settings = training(epochs=5)
        found.append(train_all(network, small_data(), LEVELS, settings, generator, **options))
    first, second, sparse = found
    pd.testing.assert_frame_equal(first, second, check_exact=True)
    evaluated = first[first.index.isin([0, 3, 5], level="epoch")]
    pd.testing.assert_frame_equal(evaluated, sparse, check_exact=True)
    assert len(ticks) == 3 * count_epochs(LEVELS, 5, CPU) == 15


def test_groups_of_models_train_like_one_group(monkeypatch):
    data, settings = small_data(), training("adam")
    network, generator = network_and_generator(batch_norm=True)
    start = generator.get_state()
    together = train_all(network, data, LEVELS, settings, generator)
    monkeypatch.setattr("train.MODELS_AT_ONCE", {"cpu": 2})
    generator.set_state(start)
    ticks = []
    options = {"splits": ("val",), "on_epoch": lambda: ticks.append(1)}
    metrics = train_all(network, data, LEVELS, settings, generator, **options)
    groups = [0.0], [0.3, 0.6]
    order = [(level, epoch) for group in groups for epoch in range(5) for level in group]
    assert list(metrics.index) == order
    assert set(metrics) == {name for name in METRICS if name.startswith("val_")} | set(METRICS[-2:])
    expected = together.loc[metrics.index, metrics.columns]
    np.testing.assert_allclose(metrics, expected, atol=1e-5)
    assert len(ticks) == count_epochs(LEVELS, settings.epochs, CPU) == 8


@pytest.mark.parametrize("eval_every", [1, 100])
def test_divergence_names_level_epoch_and_learning_rate(eval_every):
    network, generator = network_and_generator(batch_norm=False)
    settings = training(learning_rate=1e30)
    with pytest.raises(DivergenceError, match=r"flood level 0\.5: .* epoch 1.*rate 1e\+30"):
        train_all(network, small_data(), [0.5], settings, generator, eval_every=eval_every)


def test_a_split_whose_loss_is_not_finite_is_a_divergence():
    data = small_data()
    data.test.inputs[3] = np.inf
    network, generator = network_and_generator(batch_norm=False)
    with pytest.raises(DivergenceError, match="test_loss_noisy is nan in epoch 0"):
        train_all(network, data, [0.5], training(), generator)
    with pytest.raises(DivergenceError, match="test_loss_noisy is nan"):
        train_with_early_stopping(network, data, [0.5], training(), CPU, generator)


@pytest.mark.parametrize(
    ("level", "batch_size", "named"),
    [
        *((level, 8, "flood_levels") for level in (-0.1, math.nan, math.inf)),
        *((0.5, size, "batch_size") for size in (1, 29)),  # batch norm needs two examples
    ],
)
def test_what_cannot_be_trained_is_refused(level, batch_size, named):
    network, generator = network_and_generator(batch_norm=True)
    with pytest.raises(SettingError, match=named):
        train_all(network, small_data(), [0.0, level], training(batch_size=batch_size), generator)


def test_training_leaves_global_randomness_and_the_network_alone():
    before = torch.get_rng_state()
    network, generator = network_and_generator(batch_norm=True)
    weights = copy.deepcopy(network.state_dict())
    train_all(network, small_data(), LEVELS, training("adam"), generator)
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in network.state_dict().items():
        assert torch.equal(value, weights[name])


@pytest.mark.parametrize(("batch_norm", "rate"), [(True, 0.01), (False, 0.01), (False, 1e-12)])
def test_early_stopping_equals_a_plain_loop(batch_norm, rate, monkeypatch):
    """At the lowest rate all epochs are equally good: chosen is the first, and not epoch 0."""
    monkeypatch.setattr("train.MODELS_AT_ONCE", {"cpu": 2})
    settings, data = training("adam", learning_rate=rate, epochs=12), small_data()
    network, generator = network_and_generator(batch_norm)
    start = generator.get_state()
    table = train_with_early_stopping(network, data, LEVELS, settings, CPU, generator)
    assert list(table.stopping) == ["last epoch"] * 3 + ["early"] * 3
    assert list(table.flood_level) == LEVELS * 2
    table = table.set_index(["stopping", "flood_level"])
    for level in LEVELS:
        generator.set_state(start)
        epochs = list(plain_loop(network, data, level, settings, generator))
        accuracies = [scores["val_accuracy_noisy"] for scores in epochs[1:]]
        first_best = accuracies.index(max(accuracies))
        for stopping, epoch in (("last epoch", 12), ("early", first_best + 1)):
            row = table.loc[stopping, level].to_dict()
            assert row["epoch"] == epoch
            expected = {k: v for k, v in epochs[epoch].items() if k.startswith(("val", "test"))}
            assert_equal({name: row[name] for name in expected}, expected, 2e-4)


def test_the_boundary_is_the_networks():
    data = small_data()
    network, generator = network_and_generator(batch_norm=True)
    *_, last = train.train(network, data, [0.0, 0.5], training(), CPU, generator)
    networks = last.networks()
    assert list(networks) == [0.0, 0.5]
    boundary = train.find_boundary(list(networks.values()), data.train)
    for predictions, accuracy in zip(boundary.predictions, last.metrics.train_accuracy_noisy):
        assert (predictions == data.train.labels).mean() == accuracy
    points = torch.tensor([[boundary.axis[7], boundary.axis[190]]])  # x1, x2
    expected = folded_logits(last.folded, with_constant(points), 10).softmax(dim=-1)[:, 0, 1]
    np.testing.assert_allclose(boundary.probability[:, 190, 7], expected, atol=1e-6)


def test_a_prepared_process_flushes_denormal_numbers_to_zero():
    torch.set_flush_denormal(False)  # another test may have prepared this process
    denormal = torch.tensor(1e-40)
    assert denormal * 0.5 > 0
    try:
        assert train.prepare_process("cpu") == CPU and denormal * 0.5 == 0
    finally:
        torch.set_flush_denormal(False)


def test_defaults_depend_on_the_optimizer():
    sgd, adam = (TrainSettings(optimizer=name, batch_size=8, epochs=1) for name in ("sgd", "adam"))
    assert (sgd.learning_rate, sgd.momentum, sgd.flood_on) == (0.01, 0.9, "batch")
    assert (adam.learning_rate, adam.momentum, adam.flood_on) == (0.001, 0.0, "batch")


GOOD = {"optimizer": "sgd", "batch_size": 8, "epochs": 1}
LAYERS = {"hidden_layers": 1, "hidden_units": 1, "batch_norm": True}


@pytest.mark.parametrize(
    ("kind", "good", "name", "value"),
    [
        (TrainSettings, GOOD, "learning_rate", 0.0),
        (TrainSettings, GOOD, "learning_rate", math.nan),
        (TrainSettings, GOOD, "momentum", 1.0),
        (TrainSettings, {**GOOD, "optimizer": "adam"}, "momentum", 0.9),
        (TrainSettings, GOOD, "weight_decay", -1.0),
        (TrainSettings, GOOD, "batch_size", 0),
        (TrainSettings, GOOD, "epochs", 0),
        (TrainSettings, {**GOOD, "learning_rate": 0.1}, "optimizer", "lbfgs"),
        (TrainSettings, GOOD, "flood_on", "epoch"),
        (ModelSettings, LAYERS, "hidden_layers", 0),
        (ModelSettings, LAYERS, "hidden_units", 0),
    ],
)
def test_bad_settings_name_the_setting_and_the_value(kind, good, name, value):
    with pytest.raises(SettingError, match=f"^{name} .*{value}"):
        kind(**{**good, name: value})
