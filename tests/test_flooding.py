"""Flooding against hand-written computations. Whole loops, DDP among them, are in examples/."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from flooding import Flooding, flood, flood_gradients

NO_NUMBERS = (True, None, "0.1", [0.1], np.array(0.1), np.array([0.1]), 1j)
NO_TENSORS = tuple(torch.tensor(level) for level in ([0.1], [[0.1]], 1, True))
NO_LEVELS = (-0.1, -1, math.nan, math.inf, -math.inf, np.float32(-0.1), *NO_NUMBERS, *NO_TENSORS)
UNEQUAL_PARTS = (30, 30, 30, 13)


@pytest.mark.parametrize(
    ("loss", "level", "value", "gradient"),
    [
        (0.7, 0.2, 0.7, 1.0),  # above: the plain loss, descent
        (0.1, 0.25, 0.4, -1.0),  # below: mirrored, ascent
        (0.25, 0.25, 0.25, 0.0),  # at the level: nothing
        (-0.7, 0.0, -0.7, 1.0),  # no flooding, whatever the loss
        (-0.7, -0.0, -0.7, 1.0),
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


@pytest.mark.parametrize("shape", [(5,), (1, 5), (7, 5), (5, 5), (1,), (1, 1)], ids=str)
def test_losses_of_several_models_each_with_its_level(shape):
    losses = torch.rand(shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
    levels = torch.linspace(0, 1, shape[-1], requires_grad=True)
    flooded = flood(losses, levels)
    (gradient,) = torch.autograd.grad(flooded.sum(), losses)
    for index in np.ndindex(shape):
        alone = flood(losses[index], levels[index[-1]].item())
        assert flooded[index] == alone
        assert gradient[index] == torch.autograd.grad(alone, losses)[0][index]
    assert flooded.shape == shape
    with torch.no_grad():
        assert flood(losses, levels) is losses


def test_shapes():
    """An unreduced loss with one level is refused: it would be flooded example by example."""
    shapes = [(), (1,), (5,), (7,), (1, 5), (7, 5), (7, 1), (5, 5), (2, 7, 5)]
    for loss, level in itertools.product(shapes, [None, *shapes]):
        dimensions = 2 if level and len(level) == 1 else 0  # of the loss, at most
        levels = 0.1 if level is None else torch.ones(level)
        if len(loss) <= dimensions and (level or ()) == loss[-1:]:
            assert flood(torch.ones(loss), levels).shape == loss
            continue
        wrong = "level .* of shape" if len(loss) <= dimensions else "acts on the mean loss .* shape"
        with pytest.raises(ValueError, match=rf"^flood(ing)? {wrong} \["):
            flood(torch.ones(loss), levels)


def test_module_floods_in_training_mode_only():
    criterion = Flooding(nn.CrossEntropyLoss(), 0.5)
    logits, labels = torch.tensor([[4.0, -4.0], [-3.0, 3.0]]), torch.tensor([0, 1])
    plain = cross_entropy(logits, labels)
    assert criterion(logits, labels) == pytest.approx(1.0 - plain.item())
    criterion.eval()
    assert criterion(logits, labels) == plain
    assert "level=0.5" in repr(criterion)


@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
def test_a_validation_loss_is_plain_where_eval_was_forgotten(without_gradients):
    criterion = Flooding(mse_loss, 0.5)
    inputs = torch.full((2,), 0.1, requires_grad=True)
    with without_gradients():
        plain = mse_loss(inputs, torch.zeros(2))
        assert criterion(inputs, torch.zeros(2)) == plain
        assert flood(plain, 0.5) == flood(plain, torch.tensor(0.5)) == plain
    assert criterion(inputs, torch.zeros(2)) == 0.5 - plain + 0.5


@pytest.mark.parametrize("level", NO_LEVELS, ids=repr)
def test_bad_level(level):
    criterion = Flooding(nn.CrossEntropyLoss(), 0.1)
    loss = torch.tensor(1.0)
    for call in (
        lambda: Flooding(nn.CrossEntropyLoss(), level),
        lambda: setattr(criterion, "level", level),
        lambda: flood(loss, level),
        torch.no_grad()(lambda: flood(loss, level)),
        lambda: flood_gradients([], loss, level),
    ):
        with pytest.raises(ValueError, match=r"^flood level .* finite number >= 0 .*$") as error:
            call()
        assert (str(level.dtype) if isinstance(level, Tensor) else repr(level)) in str(error.value)
    assert criterion.level == 0.1


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
    """Each is used as it is, no gradient flows into it, and the loss keeps its shape and dtype."""
    criterion = Flooding(mse_loss, level)
    assert not list(criterion.parameters())
    assert not getattr(criterion.level, "requires_grad", False)
    for flooded_loss in (lambda loss: flood(loss, level), Flooding(lambda loss: loss, level)):
        loss = torch.ones((), dtype=dtype, requires_grad=True)
        flooded = flooded_loss(loss)
        assert (flooded.item(), flooded.shape, flooded.dtype) == (3, (), dtype)
        flooded.backward()
        assert loss.grad == -1
    assert getattr(level, "grad", None) is None


def test_a_level_can_be_set_and_follows_to():
    criterion = Flooding(mse_loss, 0.1)
    values = []
    for level in (0.2, torch.tensor(0.5), torch.tensor(1.0), np.float64(2.0), 0):
        criterion.level = level
        values.append(criterion(torch.zeros(3), torch.zeros(3)).item())
        assert not criterion.state_dict()
    assert values == pytest.approx([0.4, 1.0, 2.0, 4.0, 0.0])
    criterion.level = torch.tensor(0.5)
    for value in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"flood level .* finite"):
            criterion.level = torch.tensor(value)
    assert criterion.level == 0.5
    assert nn.Sequential(criterion).to("meta")[0].level.device.type == "meta"


@pytest.mark.parametrize(
    ("returned", "named"),
    [
        (0.3, "0.3"),
        ({"loss": torch.tensor(0.3)}, "{'loss': tensor"),
        ((torch.tensor(0.3), 1), "(tensor"),
        (torch.tensor(3), "shape [], torch.int64"),
        (torch.zeros(4), "shape [4], torch.float32"),
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
    criterion = Flooding(lambda loss: loss * 1, 0.1)
    loss = torch.tensor(1.0, requires_grad=True)
    compiled = compile_whole(lambda level: criterion(loss) if set_level else flood(loss * 1, level))
    for step in range(12):
        level = 0.15 * (step + 1)
        if set_level:
            criterion.level = np.float64(level)
        flooded = compiled(None if set_level else level)
        assert flooded.item() == pytest.approx(abs(1 - level) + level)
        assert torch.autograd.grad(flooded, loss)[0] == (1 if level < 1 else -1)
    assert len(graphs) <= 2
    with torch.no_grad():
        assert compiled(None if set_level else 1.8) == 1.0
    assert len(graphs) <= 3


@pytest.mark.parametrize("level", [-0.1, math.nan, math.inf])
def test_a_compiled_schedule_refuses_bad_levels(compile_counting, level):
    compile_whole, _ = compile_counting
    in_parts = torch.compile(flood, backend="eager")
    for compiled, error in (
        (compile_whole(flood), (ValueError, torch._dynamo.exc.Unsupported)),
        (in_parts, ValueError),
    ):
        torch.compiler.reset()
        for good in (0.1, 0.2, 0.3):  # from the second on, of any level
            compiled(torch.tensor(1.0), good)
        with pytest.raises(error):
            compiled(torch.tensor(1.0), level)


def test_several_models_compile_in_one_graph(compile_counting):
    compile_whole, graphs = compile_counting
    losses, levels = torch.rand(7, 5, requires_grad=True), torch.rand(5)
    assert torch.equal(compile_whole(flood)(losses, levels), flood(losses, levels))
    assert len(graphs) == 1


def test_flooding_does_not_wait_for_the_device():
    """A tensor on the meta device has no values: looking at one is an error."""
    inputs = torch.ones(3, device="meta", requires_grad=True)
    for level in (0.1, torch.tensor(0.1, device="meta")):
        loss = flood((inputs**2).mean(), level)
        loss.backward()
        flood_gradients([inputs], loss, level)
    flood(inputs**2, torch.ones(3, device="meta"))


# The gradients, after backward() -----------------------------------------------------------------


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    """A network in float64 and 103 examples, those of high loss last."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    inputs, labels = torch.randn(103, 4, dtype=torch.float64) * 2, torch.randint(3, (103,))
    order = cross_entropy(model(inputs), labels, reduction="none").argsort()
    return model, inputs[order], labels[order]


def gradients(model: nn.Module) -> Tensor:
    """All gradients as one vector; they are cleared."""
    flat = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    model.zero_grad()
    return flat


@pytest.mark.parametrize("times", [0.97, 1.03])  # the level, in units of J: above and below it
def test_a_batch_in_parts(times):
    """Flooded afterwards it is the whole batch, with each part flooded it is another method."""
    model, inputs, labels = problem()
    whole = cross_entropy(model(inputs), labels)
    level = times * whole.item()
    ((whole - level).abs() + level).backward()
    expected = gradients(model)

    def accumulate(sizes: tuple[int, ...], of_a_part=lambda loss: loss) -> Tensor:
        mean = torch.zeros((), dtype=torch.float64)
        for part, part_labels in zip(inputs.split(sizes), labels.split(sizes)):
            loss = cross_entropy(model(part), part_labels)
            (of_a_part(loss) * len(part) / 103).backward()
            mean += loss.detach() * len(part) / 103
        return mean

    flood_gradients(model.parameters(), accumulate(UNEQUAL_PARTS), level)
    torch.testing.assert_close(gradients(model), expected, rtol=1e-12, atol=1e-14)
    accumulate(UNEQUAL_PARTS, lambda loss: flood(loss, level))
    assert torch.cosine_similarity(gradients(model), expected, dim=0) < 0.75
    accumulate((1,) * 103, lambda loss: flood(loss, level))  # iFlood
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
        (0.7, 9.0, -1),
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
    model = nn.Sequential(nn.Linear(4, 3))
    for parameters, named in (
        (model, "Linear"),
        (model.named_parameters(), "tuple"),
        (dict(model.named_parameters()), "str"),
        (torch.optim.SGD(model.parameters()).param_groups, "dict"),
        (None, "NoneType"),
    ):
        with pytest.raises(ValueError, match=rf"{named}, no tensor: pass model\.param"):
            flood_gradients(parameters, torch.tensor(1.0), 9.0)


# What the docstring says -----------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.1, 9.0])  # of a J between them
def test_adversarial_training_floods_after_the_attack(level):
    model, inputs, labels = problem()

    def attack(flooded) -> tuple[Tensor, Tensor]:
        """J plain and with the first weights moved along their gradient."""
        plain = cross_entropy(model(inputs), labels)
        flooded(plain).backward(retain_graph=True)
        step = model[0].weight.grad / model[0].weight.grad.norm() / 10
        weights = {"0.weight": model[0].weight + step}
        return plain, cross_entropy(torch.func.functional_call(model, weights, inputs), labels)

    plain, adversarial = attack(lambda loss: flood(loss, level))
    assert (adversarial > plain) == (level == 0.1)  # or it attacks downhill
    model.zero_grad()
    plain, adversarial = attack(lambda loss: loss)
    assert adversarial > plain
    adversarial.backward(retain_graph=True)
    flood_gradients(model.parameters(), (plain + adversarial) / 2, level)
    found = gradients(model)
    flood((plain + adversarial) / 2, level).backward()
    torch.testing.assert_close(found, 2 * gradients(model), rtol=1e-12, atol=1e-14)


def test_a_loss_that_lies_flat_at_zero_is_not_lifted():
    outputs = torch.tensor([2.0, -3.0], requires_grad=True)
    loss = nn.functional.relu(1 - outputs * torch.tensor([1.0, -1.0])).mean()
    flood(loss, 0.1).backward()
    assert loss == 0 and not outputs.grad.any()


@pytest.mark.parametrize(("classes", "lowest"), [(10, 0.500), (3, 0.291)])
def test_lowest_cross_entropy_with_label_smoothing(classes, lowest):
    target = 0.1 / classes + 0.9 * torch.eye(classes)[0]
    loss = cross_entropy(target.log()[None], torch.tensor([0]), label_smoothing=0.1)
    assert loss.item() == pytest.approx(lowest, abs=5e-4)


def test_a_loss_in_bfloat16_often_equals_the_level():
    losses = torch.linspace(0.09, 0.11, 2001).bfloat16().requires_grad_()
    flood(losses, torch.full((2001,), 0.1)).sum().backward()
    assert (losses.grad == 0).sum() == 49


@pytest.mark.parametrize("spoiled", [1.0, math.inf, math.nan])
def test_a_grad_scaler_leaves_out_an_overflowing_step(spoiled):
    weight = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale((weight * math.inf).sum()).backward()
    flood_gradients([weight], torch.tensor(spoiled), 2.0)
    scaler.step(optimizer)
    assert torch.equal(weight, torch.ones(3))


def test_the_file_needs_only_torch():
    blocked = "numpy", "datasets", "models", "train", "mlflow", "matplotlib"
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked})); import flooding"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "Error" not in result.stderr and result.returncode == 0, result.stderr
