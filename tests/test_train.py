"""Training many models at once against straightforward loops over one model at a time."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import train as train_module
from datasets import make_dataset
from models import MLP, StackedMLP, folded_logits, with_constant
from settings import SPLITS, DataSettings, ModelSettings, SettingError, TrainSettings
from train import (
    METRICS,
    DivergenceError,
    count_epochs,
    find_boundary,
    train,
    train_with_early_stopping,
)

CPU = torch.device("cpu")
LEVELS = [0.0, 0.3, 0.6]
OPTIMIZERS = {
    "sgd": TrainSettings("sgd", 0.05, batch_size=8, epochs=4, momentum=0.9, weight_decay=1e-3),
    "adam": TrainSettings("adam", 0.005, batch_size=8, epochs=4, weight_decay=1e-3),
}


def small_data(test_samples=50):
    return make_dataset(
        DataSettings(
            "sinusoid2d", 0.1, train_samples=30, val_samples=20, test_samples=test_samples
        ),
        seed=3,
    )


def network_and_generator(batch_norm, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return MLP(2, ModelSettings(2, 13, batch_norm), generator), generator


def plain_loop(network, split, level, settings, generator, flooding=True):
    """One model, `nn.Module`, `torch.optim`, the flooding line; yields the model every epoch."""
    model = copy.deepcopy(network).train()
    kind = torch.optim.SGD if settings.optimizer == "sgd" else torch.optim.Adam
    options = {"momentum": settings.momentum} if settings.optimizer == "sgd" else {}
    optimizer = kind(
        model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, **options
    )
    inputs, labels = torch.from_numpy(split.inputs), torch.from_numpy(split.labels)
    for _ in range(settings.epochs):
        flooded, batches = 0, torch.randperm(len(labels), generator=generator)
        batches = batches.split(settings.batch_size)
        for batch in batches:
            loss = nn.functional.cross_entropy(model(inputs[batch]), labels[batch])
            flooded += int(loss < level)
            optimizer.zero_grad()
            (((loss - level).abs() + level) if flooding else loss).backward()
            optimizer.step()
        yield model, flooded / len(batches)


def plain_scores(model, split, name):
    """A split's scores by their names."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(split.inputs))
    scores = {}
    for kind, labels in (("noisy", split.labels), ("clean", split.clean_labels)):
        labels = torch.from_numpy(labels)
        scores[f"{name}_loss_{kind}"] = nn.functional.cross_entropy(logits, labels).item()
        correct = (logits.argmax(1) == labels).sum().item()
        scores[f"{name}_accuracy_{kind}"] = correct / len(labels)
    return scores


def all_scores(model, data):
    return {
        k: v for name in SPLITS for k, v in plain_scores(model, getattr(data, name), name).items()
    }


def train_all(network, data, levels, settings, generator, **options):
    """All evaluations of one group of models as {metric: [epochs, K]}, and their epochs."""
    evaluations = list(train(network, data, levels, settings, CPU, generator, **options))
    names = evaluations[0].metrics
    metrics = {name: np.array([now.metrics[name] for now in evaluations]) for name in names}
    return metrics, [now.epoch for now in evaluations]


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_models_at_once_equal_models_one_by_one(optimizer, batch_norm):
    settings, data = OPTIMIZERS[optimizer], small_data()
    network, generator = network_and_generator(batch_norm)
    start = generator.get_state()
    metrics, epochs = train_all(network, data, LEVELS, settings, generator)
    assert epochs == [0, 1, 2, 3, 4] and set(metrics) == set(METRICS)
    for k, level in enumerate(LEVELS):
        generator.set_state(start)
        loop = plain_loop(network, data.train, level, settings, generator)
        for epoch, (model, flooded) in enumerate(loop, start=1):
            expected = {**all_scores(model, data), "train_flooded_fraction": flooded}
            found = {name: metrics[name][epoch, k] for name in METRICS}
            assert found == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("batch_norm", [True, False])
def test_initial_weights_are_pytorchs(batch_norm):
    """Uniform in ±1/sqrt(inputs), biases too, as `nn.Linear` draws them."""
    generator = torch.Generator().manual_seed(0)
    network = MLP(2, ModelSettings(2, 400, batch_norm), generator)
    for ours, inputs in zip(network.linears, (2, 400, 400)):
        theirs = nn.Linear(inputs, ours.out_features)
        assert (ours.bias is None) == (batch_norm and ours is not network.linears[-1])
        for parameter, like in zip(ours.parameters(), theirs.parameters()):
            bound = 1 / inputs**0.5
            assert parameter.shape == like.shape and parameter.abs().max() <= bound
            if parameter.numel() > 300:
                assert parameter.abs().max() > 0.97 * bound
                assert parameter.std().item() == pytest.approx(like.std().item(), rel=0.15)


def test_epoch_0_is_the_untrained_network():
    data = small_data()
    network, generator = network_and_generator(batch_norm=True)
    metrics, _ = train_all(network, data, LEVELS, OPTIMIZERS["sgd"], generator)
    for name, value in all_scores(network, data).items():
        np.testing.assert_allclose(metrics[name][0], value, atol=1e-6)
    assert not metrics["train_flooded_fraction"][0].any()


@pytest.mark.parametrize("batch_norm", [True, False])
def test_level_zero_equals_training_without_the_line(batch_norm):
    settings, data = OPTIMIZERS["sgd"], small_data()
    network, generator = network_and_generator(batch_norm)
    start = generator.get_state()
    metrics, _ = train_all(network, data, [0.0], settings, generator)
    generator.set_state(start)
    *_, (model, _) = plain_loop(network, data.train, 0.0, settings, generator, flooding=False)
    for name, value in all_scores(model, data).items():
        assert metrics[name][-1, 0] == pytest.approx(value, abs=1e-5)


def test_accuracies_are_counts_of_examples():
    data = small_data(test_samples=37)
    network, generator = network_and_generator(batch_norm=False)
    metrics, _ = train_all(network, data, LEVELS, OPTIMIZERS["sgd"], generator)
    for name, samples in (("train", 30), ("val", 20), ("test", 37)):
        counts = metrics[f"{name}_accuracy_noisy"] * samples
        np.testing.assert_array_equal(np.round(counts) / samples, metrics[f"{name}_accuracy_noisy"])


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("chunk", [7, 1000])
def test_folded_evaluation_equals_eval_mode(batch_norm, chunk):
    data = small_data()
    network, generator = network_and_generator(batch_norm)
    stack = StackedMLP(network, 2, CPU)
    levels = torch.tensor([0.0, 0.7])
    for _ in train_module._train_epochs(stack, data.train, levels, OPTIMIZERS["sgd"], generator):
        pass
    inputs = torch.from_numpy(data.test.inputs)
    found = folded_logits(stack.fold(), with_constant(inputs), chunk)
    for k in range(2):
        model = copy.deepcopy(network).eval()
        state = {
            name: (value[k].mT if name.startswith("linears") and value.dim() == 3 else value[k])
            for name, value in {**stack.parameters, **stack.buffers}.items()
        }
        model.load_state_dict(state)
        torch.testing.assert_close(found[k], model(inputs), atol=1e-5, rtol=1e-5)
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_batches_flooded_all_none_and_at_the_level():
    network, generator = network_and_generator(batch_norm=False)
    for parameter in network.linears[-1].parameters():
        torch.nn.init.zeros_(parameter)  # its loss is log 2, to the last bit
    data, settings = small_data(), TrainSettings("sgd", 1e-12, batch_size=30, epochs=1)
    stack = StackedMLP(network, 4, CPU)
    inputs, labels = (torch.from_numpy(x) for x in (data.train.inputs, data.train.labels))
    order = torch.randperm(30, generator=torch.Generator().set_state(generator.get_state()))
    equal = stack.losses(inputs[order], labels[order])[0]
    levels = [0.0, 0.1, equal.item(), 50.0]
    metrics, _ = train_all(network, data, levels, settings, generator)
    np.testing.assert_array_equal(metrics["train_flooded_fraction"][1], [0, 0, 0, 1])


def test_same_seed_same_bits_and_eval_every_changes_nothing():
    found = []
    for eval_every in (1, 1, 3):
        network, generator = network_and_generator(batch_norm=True)
        settings = TrainSettings("sgd", 0.05, 8, epochs=5, momentum=0.9, eval_every=eval_every)
        found.append(train_all(network, small_data(), LEVELS, settings, generator))
    (first, _), (second, _), (sparse, epochs) = found
    assert epochs == [0, 3, 5]
    for name in METRICS:
        np.testing.assert_array_equal(first[name], second[name])
        np.testing.assert_array_equal(first[name][[0, 3, 5]], sparse[name])


def test_groups_of_models_train_like_one_group(monkeypatch):
    data, settings = small_data(), OPTIMIZERS["adam"]
    network, generator = network_and_generator(batch_norm=True)
    start = generator.get_state()
    metrics, _ = train_all(network, data, LEVELS, settings, generator)
    monkeypatch.setattr("train.MODELS_AT_ONCE", {"cpu": 2})
    generator.set_state(start)
    ticks, seen = [], []
    for now in train(
        network, data, LEVELS, settings, CPU, generator, ("val",), lambda: ticks.append(1)
    ):
        seen.append((now.models, now.epoch))
        assert set(now.metrics) == {n for n in METRICS if n.startswith("val_")} | {
            "train_flooded_fraction"
        }
        for name, values in now.metrics.items():
            np.testing.assert_allclose(values, metrics[name][now.epoch, now.models], atol=1e-5)
    assert seen == [(group, e) for group in (slice(0, 1), slice(1, 3)) for e in range(5)]
    assert len(ticks) == count_epochs(LEVELS, settings.epochs, CPU) == 8


def test_every_epoch_ticks_also_the_unevaluated():
    network, generator = network_and_generator(batch_norm=True)
    settings, ticks = TrainSettings("sgd", 0.05, 8, epochs=5, eval_every=2), []
    evaluations = train(
        network, small_data(), LEVELS, settings, CPU, generator, on_epoch=lambda: ticks.append(1)
    )
    assert [(now.epoch, len(ticks)) for now in evaluations] == [(0, 0), (2, 2), (4, 4), (5, 5)]


@pytest.mark.parametrize("eval_every", [1, 100])
def test_divergence_names_level_epoch_and_learning_rate(eval_every):
    network, generator = network_and_generator(batch_norm=False)
    settings = TrainSettings("sgd", 1e30, 8, epochs=3, eval_every=eval_every)
    with pytest.raises(DivergenceError, match=r"flood level 0\.5: .* epoch 1.*rate 1e\+30"):
        train_all(network, small_data(), [0.5], settings, generator)


def test_a_split_whose_loss_is_not_finite_is_a_divergence():
    data = small_data()
    data.test.inputs[3] = np.inf
    network, generator = network_and_generator(batch_norm=False)
    settings = TrainSettings("adam", 0.01, 8, epochs=1)
    with pytest.raises(DivergenceError, match="test_loss_noisy is nan in epoch 0"):
        train_all(network, data, [0.5], settings, generator)
    with pytest.raises(DivergenceError, match="test_loss_noisy is nan"):
        train_with_early_stopping(network, data, [0.5], settings, CPU, generator)


@pytest.mark.parametrize("level", [-0.1, float("nan"), float("inf")])
def test_bad_flood_level(level):
    network, generator = network_and_generator(batch_norm=False)
    with pytest.raises(SettingError, match="flood_levels"):
        train_all(network, small_data(), [0.0, level], OPTIMIZERS["sgd"], generator)


@pytest.mark.parametrize("batch_size", [1, 29])
def test_batch_norm_needs_two_examples(batch_size):
    network, generator = network_and_generator(batch_norm=True)
    settings = TrainSettings("sgd", 0.1, batch_size, epochs=1)
    with pytest.raises(SettingError, match="batch_size"):
        train_all(network, small_data(), [0.0], settings, generator)


def test_training_leaves_global_randomness_and_the_network_alone():
    before = torch.get_rng_state()
    network, generator = network_and_generator(batch_norm=True)
    weights = copy.deepcopy(network.state_dict())
    train_all(network, small_data(), LEVELS, OPTIMIZERS["adam"], generator)
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in network.state_dict().items():
        assert torch.equal(value, weights[name])


@pytest.mark.parametrize("batch_norm", [True, False])
def test_early_stopping_equals_a_plain_loop(batch_norm, monkeypatch):
    monkeypatch.setattr("train.MODELS_AT_ONCE", {"cpu": 2})
    settings, data = TrainSettings("adam", 0.01, batch_size=8, epochs=12), small_data()
    network, generator = network_and_generator(batch_norm)
    start = generator.get_state()
    table = train_with_early_stopping(network, data, LEVELS, settings, CPU, generator)
    assert list(table.stopping) == ["last epoch"] * 3 + ["early"] * 3
    assert list(table.flood_level) == LEVELS * 2
    for level in LEVELS:
        generator.set_state(start)
        models = [
            copy.deepcopy(model)
            for model, _ in plain_loop(network, data.train, level, settings, generator)
        ]
        accuracies = [plain_scores(m, data.val, "val")["val_accuracy_noisy"] for m in models]
        first_best = accuracies.index(max(accuracies))
        for stopping, epoch in (("last epoch", 12), ("early", first_best + 1)):
            of_level = table[(table.stopping == stopping) & (table.flood_level == level)]
            [row] = of_level.to_dict("records")
            assert row["epoch"] == epoch
            expected = all_scores(models[epoch - 1], data)
            expected = {k: v for k, v in expected.items() if not k.startswith("train")}
            assert {name: row[name] for name in expected} == pytest.approx(expected, abs=2e-4)


def test_the_boundary_is_the_networks():
    data = small_data()
    network, generator = network_and_generator(batch_norm=True)
    *_, last = train(network, data, [0.0, 0.5], OPTIMIZERS["sgd"], CPU, generator)
    networks = [[matrix[k, None] for matrix in last.folded] for k in range(2)]
    boundary = find_boundary(networks, data.train)
    for k in range(2):
        accuracy = (boundary.predictions[k] == data.train.labels).mean()
        assert accuracy == last.metrics["train_accuracy_noisy"][k]
    points = torch.tensor([[boundary.axis[7], boundary.axis[190]]])  # x1, x2
    logits = folded_logits(last.folded, with_constant(points), 10)
    expected = logits.softmax(dim=-1)[:, 0, 1]
    np.testing.assert_allclose(boundary.probability[:, 190, 7], expected, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "lbfgs"},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"momentum": 1.0},
        {"weight_decay": -1.0},
        {"batch_size": 0},
        {"epochs": 0},
        {"eval_every": 0},
    ],
)
def test_bad_settings_name_the_setting_and_the_value(changes):
    [(name, value)] = changes.items()
    good = {"optimizer": "sgd", "learning_rate": 0.1, "batch_size": 8, "epochs": 1}
    with pytest.raises(SettingError, match=f"^{name} .*{value}"):
        TrainSettings(**{**good, **changes})


@pytest.mark.parametrize("name", ["hidden_layers", "hidden_units"])
def test_bad_network_names_the_setting_and_the_value(name):
    with pytest.raises(SettingError, match=f"^{name} 0"):
        ModelSettings(**{"hidden_layers": 1, "hidden_units": 1, "batch_norm": True, name: 0})
