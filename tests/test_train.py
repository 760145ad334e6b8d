"""Training many models at once against `reference.py`, which trains one at a time."""

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import models
import reference
import train
from datasets import Data, Dataset, make_dataset
from models import MLP, stacked_product
from settings import SCORES, SPLITS, Model, SettingError, Training
from train import DivergenceError, score_last_and_best

CPU = torch.device("cpu")
METRICS = [f"{split}_{score}" for split in SPLITS for score in SCORES]
METRICS += ["train_batch_loss", "train_flooded_fraction_so_far"]
LEVELS = [0.0, 0.3, 0.6]


def models_of(levels, starts=0) -> pd.DataFrame:
    return pd.DataFrame({"start": starts, "flood_level": levels})


def training(optimizer="sgd", **changes) -> Training:
    """30 examples a batch of 8 leave a last one of 6."""
    rate = {"sgd": 0.05, "adam": 0.005}[optimizer]
    options = {"learning_rate": rate, "batch_size": 8, "epochs": 4, "weight_decay": 1e-3}
    return Training(optimizer=optimizer, **{**options, **changes}).filled()


def small_data() -> Dataset:
    sizes = {"train_samples": 30, "val_samples": 20, "test_samples": 50}
    return make_dataset(Data(dataset="sinusoid2d", label_noise=0.1, **sizes), seed=3)


def network_and_generator(batch_norm: bool, copies: int = 1) -> tuple[MLP, torch.Generator]:
    generators = [torch.Generator().manual_seed(5 + k) for k in range(copies)]
    shape = Model(hidden_layers=2, hidden_units=13, batch_norm=batch_norm)
    network = MLP(2, shape, generators)
    for norm in network.norms:
        norm.running_var.fill_(0.01)  # small, so that batch norm's epsilon is seen
    return network, generators[0]


def one_network(network: MLP, k: int) -> nn.Module:
    """Copy k as a network of `reference.py`, with its weights and statistics."""
    shape = network.model
    plain = reference.make_network(2, shape.hidden_layers, shape.hidden_units, shape.batch_norm)
    theirs = network.select([k]).state_dict()
    ours = [name for i in range(3) for name in theirs if f"s.{i}." in name]  # layer by layer
    state = {name: theirs[other] for name, other in zip(plain.state_dict(), ours, strict=True)}
    plain.load_state_dict({n: v.view_as(plain.state_dict()[n]) for n, v in state.items()})
    return plain


def one_by_one(network, data, level, settings, generator, start) -> Iterator[dict[str, float]]:
    """Train one network by `reference.py`; yields its METRICS before training and every epoch."""
    plain = one_network(network, start)
    options = {"lr": settings.learning_rate, "weight_decay": 1e-3}
    optimizer = torch.optim.Adam(plain.parameters(), **options)
    if settings.optimizer == "sgd":
        optimizer = torch.optim.SGD(plain.parameters(), momentum=0.9, **options)
    inputs, labels = map(torch.from_numpy, (data.train.inputs, data.train.noisy_labels))
    reduction = "mean" if settings.flood_on == "batch" else "none"
    below, metrics = [], {"train_batch_loss": math.nan, "train_flooded_fraction_so_far": 0.0}
    for epoch in range(settings.epochs + 1):
        if epoch > 0:
            order = torch.randperm(len(labels), generator=generator)
            batches = [(inputs[i], labels[i]) for i in order.split(settings.batch_size)]
            losses = reference.train_epoch(plain, batches, level, optimizer, reduction)
            below += [loss.item() < level for batch in losses for loss in batch.view(-1)]
            metrics["train_batch_loss"] = np.mean([batch.mean().item() for batch in losses])
            metrics["train_flooded_fraction_so_far"] = np.mean(below)
        for name, kind in itertools.product(SPLITS, ("noisy", "clean")):
            split = getattr(data, name)
            tensors = map(torch.from_numpy, (split.inputs, getattr(split, f"{kind}_labels")))
            loss, accuracy = reference.evaluate(plain, *tensors)
            metrics |= {f"{name}_loss_{kind}": loss, f"{name}_accuracy_{kind}": accuracy}
        yield dict(metrics)


def train_all(network, data, models, settings, generator, **options) -> pd.DataFrame:
    """The metrics by flood level and epoch."""
    metrics = []
    for group, live in train.split_models(network, models, CPU):
        metrics += train.train(live, data, group, settings, generator, **options)
    return pd.concat(metrics).set_index(["flood_level", "epoch"])


def assert_equal(found, expected: dict[str, float]) -> None:
    """Accuracies are counts of examples."""
    for name, value in expected.items():
        tolerance = 0 if "accuracy" in name else 5e-5
        assert found[name] == pytest.approx(value, abs=tolerance, nan_ok=True), name


@pytest.mark.parametrize(
    ("convolution", "optimizer", "batch_norm", "flood_on", "starts"),
    [  # each two of the first four meet
        (False, "sgd", True, "batch", [0, 2, 1]),
        (False, "adam", False, "example", [1, 1, 0]),
        (True, "sgd", False, "example", None),
        (True, "adam", True, "example", None),
        (True, "adam", True, "batch", None),
        (True, "adam", False, "batch", None),
    ],
)
def test_models_at_once_equal_models_one_by_one(
    convolution, optimizer, batch_norm, flood_on, starts, monkeypatch
):
    """By both ways to multiply, whatever this processor prefers; and so is early stopping."""
    monkeypatch.setattr(models, "prefers_convolution", lambda device: convolution)
    monkeypatch.setattr("train.EVALUATION_ROWS", {"cpu": 14})  # chunks of 7 examples, and of 14
    monkeypatch.setattr("train.MODELS_AT_ONCE", {"cpu": 2})
    settings, data = training(optimizer, flood_on=flood_on, epochs=8), small_data()
    network, generator = network_and_generator(batch_norm, copies=3)
    state = generator.get_state()
    asked = models_of(LEVELS, starts or 0)
    metrics = train_all(network, data, asked, settings, generator)
    scored = pd.concat(
        score_last_and_best(live, data, group, settings, generator)
        for group, live in train.split_models(network, asked, CPU)
    )
    assert set(metrics) == {"start", *METRICS}
    order = [(level, epoch) for group in ([0.0, 0.3], [0.6]) for epoch in range(9)
             for level in group]  # fmt: skip
    assert list(metrics.index) == order
    scored = scored.set_index(["scored_epoch", "flood_level"])
    groups = ([0.0, 0.3], [0.6])
    order = [pair for group in groups for pair in itertools.product(("last", "best"), group)]
    assert list(scored.index) == order
    for level, start in zip(LEVELS, starts or [0, 0, 0]):
        generator.set_state(state)
        expected = list(one_by_one(network, data, level, settings, generator, start))
        for found, scores in zip(metrics.loc[level].to_dict("records"), expected, strict=True):
            assert_equal(found, {"start": start, **scores})
        accuracies = [scores["val_accuracy_noisy"] for scores in expected[1:]]
        best = 1 + accuracies.index(max(accuracies))
        for scored_epoch, epoch in (("last", 8), ("best", best)):
            scores = {k: v for k, v in expected[epoch].items() if k.startswith(("val", "test"))}
            assert_equal(
                scored.loc[scored_epoch, level], {"start": start, "epoch": epoch, **scores}
            )
    shares = metrics.train_flooded_fraction_so_far.loc[0.6]
    assert 0 < shares.iloc[-1] < 1 and shares.nunique() > 3
    assert not metrics.train_flooded_fraction_so_far.loc[0.0].any()


@pytest.mark.parametrize("convolution", [False, True])
@pytest.mark.parametrize("shape", [(7, 3, 5, 4), (1, 2, 1, 3), (40, 5, 33, 17)])
def test_a_stacked_product_and_its_gradients_are_right(shape, convolution, monkeypatch):
    monkeypatch.setattr(models, "prefers_convolution", lambda device: convolution)
    samples, copies, inputs, outputs = shape
    rows = torch.randn(samples, copies * inputs, requires_grad=True)
    weight = torch.randn(copies, outputs, inputs, requires_grad=True)
    each = [x @ matrix.T for x, matrix in zip(rows.chunk(copies, dim=1), weight)]
    found, expected = (
        (product, *torch.autograd.grad(product.sin().sum(), (rows, weight)))
        for product in (stacked_product(rows, weight), torch.cat(each, dim=1))
    )
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("capability", "training", "onednn"),
    [("AVX512", True, True), ("AVX2", True, False), ("AVX2", False, True), ("", False, False)],
)
def test_the_processor_decides_which_kernel_multiplies(
    threads, capability, training, onednn, monkeypatch
):
    """With one thread PyTorch's own `conv2d` would be a slow one."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    rows, weight = torch.randn(50, 3 * 20).requires_grad_(), torch.randn(3, 30, 20)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    with torch.profiler.profile() as profile, torch.set_grad_enabled(training):
        total = stacked_product(rows, weight.requires_grad_()).sum()
        if training:
            total.backward()
    torch.set_num_threads(before)
    ran = {event.key for event in profile.key_averages()}
    assert ("aten::mkldnn_convolution" in ran) == onednn
    assert ("mkldnn::_convolution_transpose_pointwise" in ran) == (onednn and training)
    assert not any("slow_conv" in kernel or "thnn" in kernel for kernel in ran)


def test_the_training_loss_floats_at_the_level():
    network, generator = network_and_generator(batch_norm=False)
    settings = training("adam", batch_size=30, epochs=300)
    models = models_of([0.0, 0.5])
    metrics = train_all(network, small_data(), models, settings, generator, eval_every=300)
    last = metrics.loc[0.5, 300]
    assert last.train_loss_noisy == pytest.approx(0.5, abs=0.02)
    assert 0.1 < last.train_flooded_fraction_so_far < 0.9
    assert metrics.loc[0.0, 300].train_loss_noisy < 0.3


@pytest.mark.parametrize("batch_norm", [True, False])
def test_initial_weights_are_pytorchs(batch_norm):
    network, _ = network_and_generator(batch_norm, copies=2)
    for k in range(2):
        with torch.random.fork_rng():
            torch.manual_seed(5 + k)
            for ours, inputs, outputs in zip(network.linears, (2, 13, 13), (13, 13, 2)):
                theirs = nn.Linear(inputs, outputs, bias=outputs == 2 or not batch_norm)
                mine = {name: value[k] for name, value in ours.state_dict().items()}
                torch.testing.assert_close(mine, dict(theirs.state_dict()), atol=0, rtol=0)


def test_a_loss_at_the_level_is_not_below_it():
    network, generator = network_and_generator(batch_norm=False)
    for parameter in network.linears[-1].parameters():
        nn.init.zeros_(parameter)  # its loss is log 2, to the last bit
    levels = [0.0, 0.1, torch.tensor(2.0).log().item(), 50.0]
    settings = training(learning_rate=1e-12, batch_size=2, epochs=1)  # the mean of two is exact
    metrics = train_all(network, small_data(), models_of(levels), settings, generator)
    assert list(metrics.xs(1, level="epoch").train_flooded_fraction_so_far) == [0, 0, 0, 1]


def test_same_bits_again_also_where_few_epochs_are_evaluated():
    """Training leaves the network, its generator and the global one alone."""
    network, generator = network_and_generator(batch_norm=True)
    randomness, found, ticks = torch.get_rng_state(), [], []
    for eval_every in (1, 1, 3):
        options = {"eval_every": eval_every, "on_epoch": ticks.append}
        arguments = network, small_data(), models_of(LEVELS), training("adam", epochs=5), generator
        found.append(train_all(*arguments, **options))
    first, second, sparse = found
    pd.testing.assert_frame_equal(first, second, check_exact=True)
    evaluated = first[first.index.isin([0, 3, 5], level="epoch")]
    pd.testing.assert_frame_equal(evaluated, sparse, check_exact=True)
    assert ticks == [3] * 3 * 5
    assert torch.equal(torch.get_rng_state(), randomness)


def test_divergence_names_level_epoch_and_learning_rate_and_bad_levels_are_refused():
    data = small_data()
    network, generator = network_and_generator(batch_norm=False)
    arguments = network, data, models_of([0.5]), training(learning_rate=1e30), generator
    for eval_every in (1, 100):
        with pytest.raises(DivergenceError, match=r"flood level 0\.5: .* epoch 1.*rate 1e\+30"):
            train_all(*arguments, eval_every=eval_every)
    data.test.inputs[3] = np.inf
    with pytest.raises(DivergenceError, match="test_loss_noisy is nan"):
        score_last_and_best(network, data, models_of([0.5]), training(), generator)
    for level in (-0.1, math.nan, math.inf):
        with pytest.raises(SettingError, match="flood_levels"):
            train_all(network, data, models_of([0.0, level]), training(), generator)


def test_the_boundary_is_the_networks():
    data = small_data()
    network, generator = network_and_generator(batch_norm=True)
    [(models, live)] = train.split_models(network, models_of([0.0, 0.5]), CPU)
    *_, last = train.train(live, data, models, training(), generator)
    boundary = train.find_boundary([live.select([k]) for k in range(2)], data.train)
    for predictions, accuracy in zip(boundary.predictions, last.train_accuracy_noisy):
        assert (predictions == data.train.noisy_labels).mean() == accuracy
    point = torch.tensor([[boundary.axis[7], boundary.axis[190]]])  # x1, x2
    expected = live.eval()(point).softmax(dim=-1)[0, :, 1].detach()
    np.testing.assert_allclose(boundary.probability[:, 190, 7], expected, atol=1e-6)


def test_a_prepared_process_flushes_denormal_numbers_to_zero():
    torch.set_flush_denormal(False)  # another test may have prepared this process
    denormal = torch.tensor(1e-40)
    assert denormal * 0.5 > 0
    try:
        assert train.prepare_process("cpu") == CPU and denormal * 0.5 == 0
    finally:
        torch.set_flush_denormal(False)
