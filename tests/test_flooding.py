"""Flooding against hand-written computations: values, gradients and real training machinery."""

from __future__ import annotations

import contextlib
import datetime
import functools
import math
import multiprocessing
import os
import subprocess
import sys
import textwrap
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import flooding
from flooding import Flooding, flood, flood_gradients

NO_NUMBERS = (True, None, "0.1", [0.1], np.array(0.1), np.array([0.1]), 1j)
NO_LEVELS = (-0.1, -1, math.nan, math.inf, -math.inf, np.float32(-0.1), *NO_NUMBERS)
UNEQUAL_PARTS = (30, 30, 30, 13)
CLASS_WEIGHTS = torch.tensor([1.0, 5.0, 0.2], dtype=torch.float64)


@pytest.mark.parametrize(
    ("loss", "level", "value", "gradient"),
    [
        (0.7, 0.2, 0.7, 1.0),  # above: the plain loss, descent
        (0.1, 0.25, 0.4, -1.0),  # below: mirrored, ascent
        (0.25, 0.25, 0.25, 0.0),  # at the level: nothing
        (0.7, 0.0, 0.7, 1.0),  # no flooding
        (-0.7, 0.0, -0.7, 1.0),  # nor where the loss is negative
        (0.0, 0.0, 0.0, 1.0),
        (math.inf, 0.2, math.inf, 1.0),
        (math.nan, 0.2, math.nan, 0.0),
    ],
)
def test_value_and_gradient(loss, level, value, gradient):
    loss = torch.tensor(loss, requires_grad=True)
    flooded = flood(loss, level)
    flooded.backward()
    assert flooded.item() == pytest.approx(value, nan_ok=True)
    assert loss.grad.item() == gradient


def test_a_vector_of_levels_gives_each_model_its_own_gradient_to_the_last_bit():
    weights = torch.randn(51, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    losses = torch.func.vmap(lambda weight: (weight - 1).pow(2).mean())(weights)
    levels = losses.detach() * torch.linspace(0, 2, 51)
    flooded = flood(losses, levels)
    flooded.sum().backward()
    assert torch.equal(flooded, (losses - levels).abs() + levels)
    assert not weights.grad[25].any()  # at its level
    for k in range(51):
        weight = weights.detach()[k].clone().requires_grad_()
        flood((weight - 1).pow(2).mean(), levels[k].item()).backward()
        assert torch.equal(weight.grad, weights.grad[k])
        assert k == 25 or torch.equal(weight.grad > 0, (weight > 1) == (k < 25))


def test_level_zero_is_training_without_flooding_for_a_negative_loss():
    """A Gaussian negative log-likelihood goes below 0; flooded at 0 it would stay there."""
    targets = torch.randn(64, 1, generator=torch.Generator().manual_seed(0)) * 0.1
    final = []
    for flooded in (lambda loss: loss, lambda loss: flood(loss, 0), lambda loss: flood(loss, -0.0)):
        parameters = torch.tensor([0.5, 0.0], requires_grad=True)
        optimizer = torch.optim.SGD([parameters], lr=0.05)
        for _ in range(60):
            optimizer.zero_grad()
            variance = parameters[1].exp().expand(64, 1)
            loss = nn.functional.gaussian_nll_loss(parameters[0].expand(64, 1), targets, variance)
            flooded(loss).backward()
            flood_gradients([parameters], loss, 0.0)
            optimizer.step()
        final.append((loss.item(), *parameters.tolist()))
    assert final[0][0] < -0.5
    assert final[1] == final[2] == final[0]


def test_module_floods_in_training_mode_only():
    criterion = Flooding(nn.CrossEntropyLoss(), 0.5)
    logits, labels = torch.tensor([[4.0, -4.0], [-3.0, 3.0]]), torch.tensor([0, 1])
    plain = cross_entropy(logits, labels)
    assert criterion(logits, labels) == pytest.approx(1.0 - plain.item())
    assert criterion.criterion(logits, labels) == plain  # for logging
    nn.Linear(2, 2).eval()  # a model that the criterion is no part of
    assert criterion(logits, labels) != plain
    criterion.eval()
    assert criterion(logits, labels) == plain
    assert "level=0.5" in repr(criterion)


@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
def test_a_validation_loss_is_plain_where_eval_was_forgotten(without_gradients):
    criterion = Flooding(nn.functional.mse_loss, 0.5)
    inputs = torch.full((2,), 0.1, requires_grad=True)
    with without_gradients():
        plain = nn.functional.mse_loss(inputs, torch.zeros(2))
        assert criterion(inputs, torch.zeros(2)) == plain
        assert flood(plain, 0.5) == plain
        assert flood(plain, torch.tensor(0.5)) == plain
    assert criterion(inputs, torch.zeros(2)) == 0.5 - plain + 0.5


@pytest.mark.parametrize("level", NO_LEVELS, ids=repr)
def test_bad_level(level):
    message = r"flood level .* finite number >= 0"
    criterion = Flooding(nn.CrossEntropyLoss(), 0.1)
    loss = torch.tensor(1.0)
    for call in (
        lambda: Flooding(nn.CrossEntropyLoss(), level),
        lambda: setattr(criterion, "level", level),
        lambda: flood(loss, level),
        lambda: flood_gradients([], loss, level),
    ):
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert repr(level) in str(error.value)
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        flood(loss, level)
    assert criterion.level == 0.1


@pytest.mark.parametrize(
    "level",
    [torch.tensor([0.1]), torch.tensor([[0.1]]), torch.tensor(1), torch.tensor(True)],
    ids=repr,
)
def test_bad_level_tensor(level):
    """A level of another shape would change the loss's."""
    message = rf"flood level \[.*{level.dtype}.* shape, \[\]"
    for call in (
        lambda: Flooding(nn.CrossEntropyLoss(), level),
        lambda: flood(torch.tensor(1.0), level),
        lambda: flood_gradients([], torch.tensor(1.0), level),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match=r"shape, \[3\]"):
        flood(torch.ones(3), torch.ones(2))
    criterion = Flooding(nn.CrossEntropyLoss(), torch.tensor(0.25))
    for value in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"flood level .* finite"):
            criterion.level = torch.tensor(value)
    assert criterion.level == 0.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "level",
    [
        2,
        Fraction(2),
        np.float32(2),
        np.float64(2),
        np.int64(2),
        torch.tensor(2.0),
        torch.tensor(2.0, dtype=torch.float64, requires_grad=True),
        nn.Parameter(torch.tensor(2.0, dtype=torch.float16)),
    ],
    ids=repr,
)
def test_kinds_of_levels(level, dtype):
    """Each is used as it is, and the loss keeps its shape and dtype."""
    criterion = Flooding(nn.functional.mse_loss, level)
    assert not list(criterion.parameters())
    assert not getattr(criterion.level, "requires_grad", False)
    inputs = torch.ones(3, dtype=dtype, requires_grad=True)
    for flooded in (
        flood(nn.functional.mse_loss(inputs, 0 * inputs), level),
        criterion(inputs, 0 * inputs),
    ):
        assert (flooded.item(), flooded.shape, flooded.dtype) == (3, (), dtype)
        inputs.grad = None
        flooded.backward()
        assert (inputs.grad < 0).all()
    assert getattr(level, "grad", None) is None


def test_a_level_can_be_set_and_follows_to():
    criterion = Flooding(nn.functional.mse_loss, 0.1)
    values = []
    for level in (0.2, torch.tensor(0.5), torch.tensor(1.0), np.float64(2.0), 0):
        criterion.level = level
        values.append(criterion(torch.zeros(3), torch.zeros(3)).item())
        assert not criterion.state_dict()
    assert values == pytest.approx([0.4, 1.0, 2.0, 4.0, 0.0])
    criterion.level = torch.tensor(0.5)
    assert nn.Sequential(criterion).to("meta")[0].level.device.type == "meta"


@pytest.mark.parametrize(
    ("returned", "named"),
    [
        (0.3, "0.3"),
        (None, "None"),
        ({"loss": torch.tensor(0.3)}, "{'loss': tensor"),
        ((torch.tensor(0.3), 1), "(tensor"),
        (torch.tensor(3), "shape [], torch.int64"),
        (torch.zeros(4), "shape [4], torch.float32"),  # each example flooded is another method
    ],
)
def test_what_is_no_mean_loss_is_refused(returned, named):
    for call in (
        Flooding(lambda: returned, 0.1),
        Flooding(lambda: returned, 0.1).eval(),
        lambda: flood(returned, 0.1),
        lambda: flood_gradients([], returned, 0.1),
        lambda: flood_gradients([], returned, torch.zeros(4)),
    ):
        with pytest.raises(ValueError, match=r"mean loss .* scalar .* reduction='mean'") as error:
            call()
        assert f"got {named}" in str(error.value)


@pytest.mark.parametrize("criterion", [0.1, None, nn.CrossEntropyLoss])
def test_bad_criterion(criterion):
    with pytest.raises(ValueError, match=r"criterion .* function or module"):
        Flooding(criterion, 0.1)


# torch.compile ---------------------------------------------------------------------------------


@pytest.fixture
def compile_counting():
    """torch.compile in one whole graph, without a compiler of C; the list gets each graph."""
    torch.compiler.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    yield lambda function: torch.compile(function, backend=backend, fullgraph=True), graphs
    torch.compiler.reset()


@pytest.mark.parametrize("set_level", [True, False])
def test_a_schedule_of_levels_compiles_at_most_twice(compile_counting, set_level):
    compile_whole, graphs = compile_counting
    criterion = Flooding(nn.functional.mse_loss, 0.1)
    inputs = torch.full((3,), 1.0, requires_grad=True)
    compiled = compile_whole(
        (lambda level: criterion(inputs, 0 * inputs))
        if set_level
        else (lambda level: flood(nn.functional.mse_loss(inputs, 0 * inputs), level))
    )
    for step in range(12):
        level = 0.15 * (step + 1)
        if set_level:
            criterion.level = np.float64(level)
        flooded = compiled(None if set_level else level)
        (gradient,) = torch.autograd.grad(flooded, inputs)
        assert flooded.item() == pytest.approx(abs(1 - level) + level)
        assert torch.equal(gradient, torch.full((3,), 2 / 3 if level < 1 else -2 / 3))
    assert len(graphs) <= 2
    with torch.no_grad():
        assert compiled(None if set_level else 1.8) == 1.0
    assert len(graphs) <= 3


@pytest.mark.parametrize("level", [-0.1, math.nan, math.inf])
def test_a_compiled_schedule_refuses_bad_levels(compile_counting, level):
    compile_whole, graphs = compile_counting
    whole = compile_whole(flood)
    for good in (0.1, 0.2, 0.3):
        whole(torch.tensor(1.0), good)
    assert len(graphs) == 2
    with pytest.raises((ValueError, torch._dynamo.exc.Unsupported)):
        whole(torch.tensor(1.0), level)
    torch.compiler.reset()
    in_parts = torch.compile(flood, backend="eager")
    for good in (0.1, 0.2, 0.3):
        in_parts(torch.tensor(1.0), good)
    with pytest.raises(ValueError, match=r"flood level .* finite"):
        in_parts(torch.tensor(1.0), level)


# The batch of one step in parts ----------------------------------------------------------------


def problem(seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    """A network in float64 and 103 examples, those of high loss last."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    inputs, labels = torch.randn(103, 4, dtype=torch.float64) * 2, torch.randint(3, (103,))
    order = cross_entropy(model(inputs), labels, reduction="none").argsort()
    return model, inputs[order], labels[order]


def gradients(model: nn.Module) -> Tensor:
    """All gradients as one vector; they are cleared."""
    flat = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    model.zero_grad()
    return flat


def sum_of_weights(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The docstring's line, of the labels that count."""
    return CLASS_WEIGHTS[torch.cat([labels[labels != -100] for _, labels in parts])].sum()


@pytest.mark.parametrize("times", [0.97, 1.03])  # the level, in units of J: above and below it
@pytest.mark.parametrize("weighted", [False, True])
def test_accumulated_gradients_are_those_of_the_whole_batch(times, weighted):
    model, inputs, labels = problem()
    criterion = cross_entropy
    if weighted:
        labels[::7] = labels[30:60] = -100  # the second are all those of a part
        criterion = functools.partial(criterion, weight=CLASS_WEIGHTS, label_smoothing=0.1)
    whole = criterion(model(inputs), labels)
    level = times * whole.item()
    ((whole - level).abs() + level).backward()
    expected = gradients(model)

    parts = list(zip(inputs.split(UNEQUAL_PARTS), labels.split(UNEQUAL_PARTS)))
    mean, total = torch.zeros((), dtype=torch.float64), sum_of_weights(parts)
    for part, part_labels in parts:
        if weighted:
            loss = criterion(model(part), part_labels, reduction="sum") / total
        else:
            loss = criterion(model(part), part_labels) * len(part) / 103
        loss.backward()
        mean += loss.detach()
    flood_gradients(model.parameters(), mean, level)
    torch.testing.assert_close(mean, whole.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients(model), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("times", [0.97, 1.03])
def test_flooding_each_part_is_another_method(times):
    model, inputs, labels = problem()
    whole = cross_entropy(model(inputs), labels)
    level = times * whole.item()
    ((whole - level).abs() + level).backward()
    expected, below = gradients(model), set()
    for part, part_labels in zip(inputs.split(UNEQUAL_PARTS), labels.split(UNEQUAL_PARTS)):
        loss = cross_entropy(model(part), part_labels)
        below.add(loss.item() < level)
        (flood(loss, level) * len(part) / 103).backward()
    assert below == {True, False}
    assert torch.cosine_similarity(gradients(model), expected, dim=0) < 0.75
    # With parts of one example it is iFlood.
    for part, part_labels in zip(inputs.split(1), labels.split(1)):
        (flood(cross_entropy(model(part), part_labels), level) / 103).backward()
    one_by_one = gradients(model)
    losses = cross_entropy(model(inputs), labels, reduction="none")
    ((losses - level).abs() + level).mean().backward()
    torch.testing.assert_close(one_by_one, gradients(model), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("loss", "level", "factor"),
    [
        (0.7, 0.0, 1),
        (-0.7, 0, 1),
        (0.7, torch.tensor(0.7), 0),
        (0.7, torch.tensor(9.0), -1),
        (math.inf, 0.1, 1),
        (math.nan, 0.1, 0),  # like a loss at the level: infinite and NaN gradients become NaN
    ],
)
def test_flooded_gradients_by_hand(loss, level, factor):
    parameter = torch.zeros(3, requires_grad=True)
    parameter.grad = torch.tensor([-3.0, math.inf, math.nan])
    expected = parameter.grad * factor
    flood_gradients(parameter, torch.tensor(loss), level)
    torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=0, equal_nan=True)


def test_gradients_of_tied_frozen_and_single_parameters():
    tied, frozen = torch.ones(3, requires_grad=True), torch.ones(3)
    loss = (tied * frozen).mean()
    loss.backward()
    flood_gradients([tied, frozen, tied], loss, 2.0)
    assert torch.equal(tied.grad, torch.full((3,), -1 / 3))
    flood_gradients(tied, loss, 2.0)
    assert torch.equal(tied.grad, torch.full((3,), 1 / 3))
    assert not tied.grad.requires_grad  # though the loss does
    # A rank without anything to flood goes on; FSDP's empty shards require gradients.
    empty = torch.ones(0, requires_grad=True)
    for parameters in ([], [frozen], frozen, [frozen, empty], nn.ReLU().parameters()):
        flood_gradients(parameters, loss, 2.0)
    assert frozen.grad is empty.grad is None and frozen.equal(torch.ones(3))
    # But backward() was forgotten, or a generator has been used before.
    tied.grad, used_up = None, nn.Linear(1, 1).parameters()
    list(used_up)
    for parameters in (tied, [empty, frozen, tied], used_up):
        with pytest.raises(ValueError, match="no gradient"):
            flood_gradients(parameters, loss, 2.0)


def test_parameters_that_are_no_tensors_are_refused():
    model, inputs, labels = problem()
    loss = cross_entropy(model(inputs), labels)
    loss.backward()
    for parameters, named in (
        (model, "Linear"),
        (model[0], "Linear"),
        (model.named_parameters(), "tuple"),
        (dict(model.named_parameters()), "str"),
        (torch.optim.SGD(model.parameters()).param_groups, "dict"),
        (None, "NoneType"),
    ):
        with pytest.raises(ValueError, match=rf"{named}, no tensor: pass model\.param"):
            flood_gradients(parameters, loss, 9.0)


def test_flooding_does_not_wait_for_the_device():
    """A tensor on the meta device has no values: looking at one is an error."""
    inputs = torch.ones(3, device="meta", requires_grad=True)
    for level in (0.1, torch.tensor(0.1, device="meta")):
        loss = flood((inputs**2).mean(), level)
        loss.backward()
        flood_gradients([inputs], loss, level)


@pytest.mark.parametrize("how", ["flood", "before unscale_", "after unscale_"])
def test_grad_scaler(how):
    """A GradScaler's factor is positive: flooding before or after it is taken out is the same."""
    model, inputs, labels = problem()
    by_hand, _, _ = problem()
    level = 1.03 * cross_entropy(model(inputs), labels).item()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer_by_hand = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    losses = []
    for _ in range(3):
        loss = cross_entropy(model(inputs), labels)
        losses.append(loss.item())
        scaler.scale(flood(loss, level) if how == "flood" else loss).backward()
        if how == "before unscale_":
            flood_gradients(model.parameters(), loss, level)
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        if how == "after unscale_":
            flood_gradients(model.parameters(), loss, level)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

        ((cross_entropy(by_hand(inputs), labels) - level).abs() + level).backward()
        nn.utils.clip_grad_norm_(by_hand.parameters(), 0.1)
        optimizer_by_hand.step()
        optimizer_by_hand.zero_grad()
    assert losses[0] < losses[1] < losses[2]  # it went uphill
    parameters = nn.utils.parameters_to_vector(model.parameters()).detach()
    expected = nn.utils.parameters_to_vector(by_hand.parameters()).detach()
    torch.testing.assert_close(parameters, expected, rtol=1e-12, atol=1e-14)

    # An overflow is still seen, whatever it did to J, and the step left out.
    for mean in (loss, loss * math.inf, loss * math.nan):
        scaler.scale(cross_entropy(model(inputs), labels) * math.inf).backward()
        flood_gradients(model.parameters(), mean, level)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(nn.utils.parameters_to_vector(model.parameters()), parameters)
    assert scaler.get_scale() == 2.0**9  # halved each time


def train_in_parts(rank: int, weighted: bool) -> None:
    """Train on one of two ranks and compare with the whole batch in one process."""
    model, inputs, labels = problem()
    alone, _, _ = problem()
    inputs, labels, split = inputs[:102], labels[:102], 51
    if weighted:  # and ignored labels, and ranks of unequal sizes
        labels[::7] = labels[:30] = -100  # all those of a part
        split = 70
    criterion = functools.partial(cross_entropy, weight=CLASS_WEIGHTS if weighted else None)
    level = 0.98 * criterion(alone(inputs), labels).item()
    mine = slice(split) if rank == 0 else slice(split, 102)  # rank 0 has the examples of low loss
    parts = list(zip(inputs[mine].split(30), labels[mine].split(30)))
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.5)
    optimizer_alone = torch.optim.SGD(alone.parameters(), lr=0.01, momentum=0.5)
    directions, own_directions = [], []
    for _ in range(20):
        mean = torch.zeros((), dtype=torch.float64)
        torch.distributed.all_reduce((total := sum_of_weights(parts)).div_(2))
        for number, (part, part_labels) in enumerate(parts, start=1):
            with parallel.no_sync() if number < len(parts) else contextlib.nullcontext():
                if weighted:
                    loss = criterion(parallel(part), part_labels, reduction="sum") / total
                else:
                    loss = criterion(parallel(part), part_labels) * len(part) / 51
                loss.backward()
            mean += loss.detach()
        own_directions.append(mean.item() > level)
        torch.distributed.all_reduce(mean.div_(2))
        flood_gradients(model.parameters(), mean, level)
        directions.append(mean.item() > level)

        whole = criterion(alone(inputs), labels)
        ((whole - level).abs() + level).backward()
        torch.testing.assert_close(mean, whole.detach(), rtol=1e-12, atol=0)
        for parameter, expected in zip(model.parameters(), alone.parameters()):
            torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-10, atol=1e-13)
        for each in (optimizer, optimizer_alone):
            each.step()
            each.zero_grad()
    for parameter, expected in zip(model.parameters(), alone.parameters()):
        torch.testing.assert_close(parameter, expected, rtol=1e-10, atol=1e-13)
    # Or nothing was tested: both directions, and ranks on both sides of the level.
    assert set(directions) == {True, False}
    assert set(own_directions) == {rank == 1}


def check_a_rank(rank: int, store: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        # DDP ends in there: were it the last to hold the process group, it could wait for ever.
        train_in_parts(rank, weighted=False)
        train_in_parts(rank, weighted=True)
    finally:
        torch.distributed.destroy_process_group()


def test_two_ranks_are_one_process_with_the_whole_batch(tmp_path):
    multiprocessing.set_forkserver_preload(["torch._dynamo"])  # imported once: it takes seconds
    torch.multiprocessing.start_processes(
        check_a_rank, (str(tmp_path / "store"),), nprocs=2, start_method="forkserver"
    )


@pytest.mark.parametrize("times", [0.9, 1.1])
@pytest.mark.parametrize(
    "name",
    [
        "BertForSequenceClassification",  # this and the next ignore num_items_in_batch
        "BertForMaskedLM",
        "ModernBertForMaskedLM",  # this and the next divide by it
        "LlamaForCausalLM",
    ],
)
def test_the_hugging_face_trainer(name, times, tmp_path):
    """The docstring's own lines. 25 examples: a step of 11 parts, then one of 2, the last short."""
    transformers = pytest.importorskip("transformers", minversion="5")
    lines = flooding.__doc__[flooding.__doc__.index("    def mean_of_step") :]
    lines = textwrap.dedent(lines[: lines.index("What goes wrong")])
    model_class = getattr(transformers, name)
    settings = dict.fromkeys(("hidden_size", "intermediate_size", "num_labels"), 4)
    settings |= {"num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
    settings |= {f"{token}_token_id": 0 for token in ("pad", "bos", "eos", "cls", "sep")}
    settings |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**settings)).double()
    inputs, labels = torch.randint(1, 50, (25, 7)), torch.randint(4, (25,))
    if "LM" in name:
        labels = inputs.where(torch.rand(25, 7) < 0.5, -100)
    level = times * model(inputs, labels=labels).loss.item()
    expected, found = [], []
    for rows in (slice(22), slice(22, 25)):
        ((model(inputs[rows], labels=labels[rows]).loss - level).abs() + level).backward()
        expected.append(gradients(model))

    class Record(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kwargs):
            found.append(gradients(model))

    names = {"transformers": transformers, "cross_entropy": cross_entropy}
    names["flood_gradients"] = lambda parameters, mean, _: flood_gradients(parameters, mean, level)
    exec(lines, names)
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 11}
    settings |= {"learning_rate": 0.0, "max_grad_norm": 0.0, "num_train_epochs": 1, "use_cpu": True}
    settings |= {"train_sampling_strategy": "sequential", "save_strategy": "no", "report_to": []}
    names["FloodingTrainer"](
        model,
        transformers.TrainingArguments(tmp_path, **settings),
        train_dataset=[{"input_ids": i, "labels": j} for i, j in zip(inputs, labels)],
        compute_loss_func=names["mean_of_step"] if name != "LlamaForCausalLM" else None,
        callbacks=[Record()],
    ).train()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


# What the docstring says -----------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "lowest"), [(10, 0.500), (3, 0.291)])
def test_lowest_cross_entropy_with_label_smoothing(classes, lowest):
    target = torch.full((classes,), 0.1 / classes)
    target[0] += 0.9
    loss = cross_entropy(target.log()[None], torch.tensor([0]), label_smoothing=0.1)
    assert loss.item() == pytest.approx(lowest, abs=5e-4)


def test_a_loss_in_bfloat16_often_equals_the_level():
    losses = torch.linspace(0.09, 0.11, 2001).bfloat16()
    zero = 0
    for loss in losses:
        loss = loss.clone().requires_grad_()
        flood(loss, 0.1).backward()
        zero += loss.grad.item() == 0
    assert zero == 49


def test_the_file_needs_only_torch():
    blocked = "numpy", "datasets", "models", "train", "mlflow", "matplotlib"
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked})); import flooding"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "Error" not in result.stderr and result.returncode == 0, result.stderr
