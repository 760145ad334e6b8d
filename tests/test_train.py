"""Training many models at once against straightforward loops over one model at a time."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from datasets import DataSettings, make_dataset
from models import MLP, ModelSettings, StackedMLP, folded_logits, with_constant
from train import (
    METRICS,
    DivergenceError,
    TrainSettings,
    choose_level,
    count_epochs,
    train,
    train_early_stopping,
    train_epochs,
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
    return MLP(2, ModelSettings(2, 13, batch_norm), generator=generator), generator


def plain_loop(network, split, level, settings, generator):
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
            ((loss - level).abs() + level if level is not None else loss).backward()
            optimizer.step()
        yield model, flooded / len(batches)


def plain_scores(model, split):
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(split.inputs))
    scores = []
    for labels in (split.labels, split.clean_labels):
        labels = torch.from_numpy(labels)
        scores.append(nn.functional.cross_entropy(logits, labels).item())
        scores.append((logits.argmax(1) == labels).float().mean().item())
    return scores


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_models_at_once_equal_models_one_by_one(optimizer, batch_norm):
    settings, data = OPTIMIZERS[optimizer], small_data()
    network, generator = network_and_generator(batch_norm)
    start = generator.get_state()
    history = train(network, data, LEVELS, settings, CPU, generator)
    assert list(history.epochs) == [0, 1, 2, 3, 4]
    for k, level in enumerate(LEVELS):
        generator.set_state(start)
        for epoch, (model, flooded) in enumerate(
            plain_loop(network, data.train, level, settings, generator), start=1
        ):
            splits = (data.train, data.val, data.test)
            expected = [score for split in splits for score in plain_scores(model, split)]
            found = [history.metrics[name][epoch, k] for name in METRICS]
            np.testing.assert_allclose(found, [*expected, flooded], atol=2e-5)


def test_epoch_0_is_the_untrained_network():
    data = small_data()
    network, generator = network_and_generator(batch_norm=True)
    history = train(network, data, LEVELS, OPTIMIZERS["sgd"], CPU, generator)
    for split in ("train", "val", "test"):
        expected = plain_scores(network, getattr(data, split))
        names = (f"{split}_{s}" for s in ("loss", "accuracy", "loss_clean", "accuracy_clean"))
        for name, value in zip(names, expected):
            np.testing.assert_allclose(history.metrics[name][0], value, atol=1e-6)
    assert not history.metrics["flooded_fraction"][0].any()


@pytest.mark.parametrize("batch_norm", [True, False])
def test_level_zero_equals_plain_training(batch_norm):
    settings, data = OPTIMIZERS["sgd"], small_data()
    network, generator = network_and_generator(batch_norm)
    start = generator.get_state()
    history = train(network, data, [0.0], settings, CPU, generator)
    generator.set_state(start)
    # None leaves the flooding line out.
    loop = plain_loop_without_flooding(network, data.train, settings, generator)
    expected = plain_scores(loop, data.test)
    found = [history.metrics[name][-1, 0] for name in METRICS if name.startswith("test")]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def plain_loop_without_flooding(network, split, settings, generator):
    model = copy.deepcopy(network).train()
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )
    inputs, labels = torch.from_numpy(split.inputs), torch.from_numpy(split.labels)
    for _ in range(settings.epochs):
        order = torch.randperm(len(labels), generator=generator)
        for batch in order.split(settings.batch_size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[batch]), labels[batch]).backward()
            optimizer.step()
    return model


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("chunk", [7, 1000])
def test_folded_evaluation_equals_eval_mode(batch_norm, chunk):
    data = small_data()
    network, generator = network_and_generator(batch_norm)
    stack = StackedMLP(network, 2, CPU)
    for _ in train_epochs(stack, data.train, [0.0, 0.7], OPTIMIZERS["sgd"], generator):
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


def test_batches_flooded_all_and_none():
    network, generator = network_and_generator(batch_norm=False)
    settings = TrainSettings("sgd", 1e-4, batch_size=8, epochs=2)
    history = train(network, small_data(), [0.0, 0.1, 50.0], settings, CPU, generator)
    np.testing.assert_array_equal(history.metrics["flooded_fraction"][1:], [[0, 0, 1]] * 2)


def test_same_seed_same_bits_and_eval_every_changes_nothing():
    histories = []
    for eval_every in (1, 1, 3):
        network, generator = network_and_generator(batch_norm=True)
        settings = TrainSettings("sgd", 0.05, 8, epochs=5, momentum=0.9, eval_every=eval_every)
        histories.append(train(network, small_data(), LEVELS, settings, CPU, generator))
    first, second, sparse = histories
    assert list(sparse.epochs) == [0, 3, 5]
    for name in METRICS:
        np.testing.assert_array_equal(first.metrics[name], second.metrics[name])
        np.testing.assert_array_equal(first.metrics[name][[0, 3, 5]], sparse.metrics[name])


def test_hook_sees_every_epoch_in_order():
    network, generator = network_and_generator(batch_norm=True)
    settings = TrainSettings("sgd", 0.05, 8, epochs=5, eval_every=2)
    seen = []
    history = train(
        network,
        small_data(),
        LEVELS,
        settings,
        CPU,
        generator,
        lambda epoch, metrics: seen.append((epoch, metrics)),
    )
    assert [epoch for epoch, _ in seen] == list(range(6))
    evaluated = [metrics for _, metrics in seen if metrics]
    assert [epoch for epoch, metrics in seen if metrics] == [0, 2, 4, 5]
    for name in METRICS:
        np.testing.assert_array_equal([m[name] for m in evaluated], history.metrics[name])


@pytest.mark.parametrize("eval_every", [1, 100])
def test_divergence_names_model_level_epoch_and_learning_rate(eval_every):
    network, generator = network_and_generator(batch_norm=False)
    settings = TrainSettings("sgd", 1e30, 8, epochs=3, eval_every=eval_every)
    with pytest.raises(
        DivergenceError, match=r"model 0 \(flood level 0\.5\).* epoch 1.*learning rate 1e\+30"
    ):
        train(network, small_data(), [0.5], settings, CPU, generator)


@pytest.mark.parametrize("level", [-0.1, float("nan"), float("inf")])
def test_bad_flood_level(level):
    network, generator = network_and_generator(batch_norm=False)
    with pytest.raises(ValueError, match="flood_levels"):
        train(network, small_data(), [0.0, level], OPTIMIZERS["sgd"], CPU, generator)


@pytest.mark.parametrize("batch_size", [1, 29])
def test_batch_norm_needs_two_examples(batch_size):
    network, generator = network_and_generator(batch_norm=True)
    settings = TrainSettings("sgd", 0.1, batch_size, epochs=1)
    with pytest.raises(ValueError, match="batch_size"):
        train(network, small_data(), [0.0], settings, CPU, generator)


def test_training_leaves_global_randomness_and_the_network_alone():
    before = torch.get_rng_state()
    network, generator = network_and_generator(batch_norm=True)
    weights = copy.deepcopy(network.state_dict())
    train(network, small_data(), LEVELS, OPTIMIZERS["adam"], CPU, generator)
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in network.state_dict().items():
        assert torch.equal(value, weights[name])


@pytest.mark.parametrize("batch_norm", [True, False])
def test_early_stopping_equals_a_plain_loop(batch_norm, monkeypatch):
    monkeypatch.setattr("train.MODELS_AT_ONCE", {"cpu": 2})
    settings, data = TrainSettings("adam", 0.01, batch_size=8, epochs=12), small_data()
    network, generator = network_and_generator(batch_norm)
    start = generator.get_state()
    ticks = []
    last, best = train_early_stopping(
        network, data, LEVELS, settings, CPU, generator, lambda: ticks.append(1)
    )
    assert len(ticks) == count_epochs(LEVELS, 12, CPU) == 24
    for k, level in enumerate(LEVELS):
        generator.set_state(start)
        models = [
            copy.deepcopy(model)
            for model, _ in plain_loop(network, data.train, level, settings, generator)
        ]
        accuracies = [plain_scores(model, data.val)[1] for model in models]
        first_best = accuracies.index(max(accuracies))
        assert best.epochs[k] == first_best + 1 and last.epochs[k] == 12
        for side, model in ((last, models[-1]), (best, models[first_best])):
            for split in ("val", "test"):
                found = [
                    side.scores[f"{split}_{s}"][k]
                    for s in ("loss", "accuracy", "loss_clean", "accuracy_clean")
                ]
                np.testing.assert_allclose(
                    found, plain_scores(model, getattr(data, split)), atol=2e-4
                )
    np.testing.assert_array_equal(last.flood_levels, LEVELS)


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
    with pytest.raises(ValueError, match=f"^{name} .*{value}"):
        TrainSettings(**{**good, **changes})


@pytest.mark.parametrize("name", ["hidden_layers", "hidden_units"])
def test_bad_network_names_the_setting_and_the_value(name):
    with pytest.raises(ValueError, match=f"^{name} 0"):
        ModelSettings(**{"hidden_layers": 1, "hidden_units": 1, "batch_norm": True, name: 0})


def test_choice_ties():
    levels = [0.0, 0.1, 0.2, 0.3]
    assert choose_level(levels, [0.8, 0.9, 0.9, 0.7]) == 1  # the lowest of equals
    assert choose_level(levels, [0.9, 0.9, 0.9, 0.7]) == 0  # no flooding
    assert choose_level(levels, [0.8, 0.9, 0.9, 0.7], [1, 0.5, 0.4, 0]) == 2  # the lower loss
    assert choose_level(levels, [0.8, 0.9, 0.9, 0.7], [1, 0.4, 0.4, 0]) == 1
