"""Flooding against hand-written computations. Whole loops, DDP among them, are in examples/."""

import ast
import itertools
import math
import re
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import PROJECT
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from flooding import Flooding, flood, flood_gradients

MEAN = torch.tensor(1.0)
NO_LEVELS = [-0.1, -1, math.nan, math.inf, -math.inf, np.float32(-0.1)]
NO_LEVELS += [True, None, "0.1", [0.1], np.array(0.1), np.array([0.1]), 1j]
NO_LEVEL_TENSORS = [torch.tensor(level) for level in ([0.1], [[0.1]], 1, True)]


@pytest.mark.parametrize(
    ("loss", "level", "value", "sign"),
    [
        (0.7, 0.2, 0.7, 1),  # above: the plain loss, descent
        (0.1, 0.25, 0.4, -1),  # below: mirrored, ascent
        (0.25, torch.tensor(0.25), 0.25, 0),  # at the level: nothing
        (-0.7, 0.0, -0.7, 1),  # no flooding, whatever the loss
        (-0.7, -0.0, -0.7, 1),
        (0.0, 0, 0.0, 1),
        (math.inf, 0.2, math.inf, 1),
        (math.nan, 0.2, math.nan, 0),
    ],
)
def test_value_and_gradient(loss, level, value, sign):
    """Flooding after backward() leaves infinite and NaN gradients so, or makes them NaN."""
    loss = torch.tensor(loss, requires_grad=True)
    flooded = flood(loss, level)
    flooded.backward()
    assert flooded.item() == pytest.approx(value, nan_ok=True)
    assert loss.grad.item() == sign
    parameter = torch.zeros(3, requires_grad=True)
    parameter.grad = torch.tensor([-3.0, math.inf, math.nan])
    expected = parameter.grad * sign
    flood_gradients(parameter, loss, level)
    torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=0, equal_nan=True)


def test_losses_of_several_models_each_with_its_level():
    """An unreduced loss with one level is refused: it would be flooded example by example."""
    shapes = [(), (1,), (5,), (7,), (1, 5), (7, 5), (7, 1), (5, 5), (1, 1), (2, 7, 5)]
    generator = torch.Generator().manual_seed(0)
    for shape, level in itertools.product(shapes, [None, *shapes]):
        losses = torch.rand(shape, generator=generator, requires_grad=True)
        levels = 0.5 if level is None else torch.rand(level, generator=generator)
        dimensions = 2 if level and len(level) == 1 else 0  # of the loss, at most
        if len(shape) <= dimensions and (level or ()) == shape[-1:]:
            flooded = flood(losses, levels)
            by_hand = torch.where(losses > levels, losses, 2 * levels - losses)
            torch.testing.assert_close(flooded, by_hand)
            (gradient,) = torch.autograd.grad(flooded.sum(), losses)
            assert torch.equal(gradient, torch.where(losses > levels, 1.0, -1.0))
            with torch.no_grad():
                assert flood(losses, levels) is losses
            continue
        wrong = "level .* of shape" if len(shape) <= dimensions else "acts on the mean .* shape"
        with pytest.raises(ValueError, match=rf"^flood(ing)? {wrong} \["):
            flood(losses, levels)


def test_the_criterion_is_plain_in_evaluation_mode_and_without_gradients():
    criterion = Flooding(nn.CrossEntropyLoss(), 0.5)
    logits, labels = torch.tensor([[4.0, -4.0], [-3.0, 3.0]]).requires_grad_(), torch.tensor([0, 1])
    plain = cross_entropy(logits, labels).item()
    assert criterion(logits, labels).item() == pytest.approx(1.0 - plain)
    for without_gradients in (torch.no_grad, torch.inference_mode):  # where eval() was forgotten
        with without_gradients():
            loss = criterion(logits, labels)
            assert loss == flood(loss, 0.5) == flood(loss, torch.tensor(0.5)) == plain
    criterion.eval()
    assert criterion(logits, labels) == plain
    assert "level=0.5" in repr(criterion)


@pytest.mark.parametrize(
    ("loss", "level", "named"),
    [
        *((MEAN, level, repr(level)) for level in NO_LEVELS),
        *((MEAN, level, str(level.dtype)) for level in NO_LEVEL_TENSORS),
        (0.3, 0.1, "0.3"),
        ({"loss": MEAN}, 0.1, "{'loss': tensor"),
        ((MEAN, 1), 0.1, "(tensor"),
        (torch.tensor(3), 0.1, "shape [], torch.int64"),
        (torch.zeros(4), 0.1, "shape [4], torch.float32"),
    ],
    ids=repr,
)
def test_what_is_no_mean_loss_or_no_level_is_refused(loss, level, named):
    said = rf"^flood level .*{re.escape(named)}: a finite number >= 0 "
    if loss is not MEAN:
        said = rf"mean loss .* scalar .* and got {re.escape(named)}.* reduction='mean'"
    criterion = Flooding(lambda: loss, 0.1)
    for call in (
        lambda: [setattr(criterion, "level", level), criterion()],
        lambda: Flooding(lambda: loss, level).eval()(),
        lambda: flood(loss, level),
        torch.no_grad()(lambda: flood(loss, level)),
        lambda: flood_gradients([], loss, level),
    ):
        with pytest.raises(ValueError, match=said):
            call()
    assert criterion.level == 0.1
    with pytest.raises(ValueError, match="mean loss"):
        flood_gradients([], torch.zeros(4), torch.zeros(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "level",
    [
        *(2, Fraction(2), np.float32(2), np.float64(2), np.int64(2), torch.tensor(2.0)),
        torch.tensor(2.0, dtype=torch.float64, requires_grad=True),
        nn.Parameter(torch.tensor(2.0, dtype=torch.float16)),
    ],
    ids=repr,
)
def test_kinds_of_levels(level, dtype):
    """Each is used as it is, no gradient flows into it, and the loss keeps its shape and dtype."""
    criteria = [Flooding(lambda loss: loss, before) for before in (level, 0.1, torch.tensor(0.1))]
    for criterion in criteria:
        criterion.level = level
        assert not criterion.state_dict() and not list(criterion.parameters())
        assert not getattr(criterion.level, "requires_grad", False)
    for flooded_loss in (lambda loss: flood(loss, level), *criteria):
        loss = torch.ones((), dtype=dtype, requires_grad=True)
        flooded = flooded_loss(loss)
        assert (flooded.item(), flooded.shape, flooded.dtype) == (3, (), dtype)
        flooded.backward()
        assert loss.grad == -1
    assert getattr(level, "grad", None) is None


def test_a_level_that_is_a_tensor_is_looked_at_when_it_is_set_and_follows_to():
    criterion = Flooding(mse_loss, torch.tensor(0.5))
    for value in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"flood level .* finite"):
            criterion.level = torch.tensor(value)
    assert criterion.level == 0.5
    assert nn.Sequential(criterion).to("meta")[0].level.device.type == "meta"


@pytest.mark.parametrize("criterion", [0.1, None, nn.CrossEntropyLoss])
def test_bad_criterion(criterion):
    with pytest.raises(ValueError, match=r"criterion .* function or module"):
        Flooding(criterion, 0.1)


@pytest.mark.parametrize("set_level", [True, False])
def test_a_schedule_of_levels_compiles_at_most_twice_and_refuses_bad_ones(set_level):
    torch.compiler.reset()
    criterion, graphs = Flooding(lambda loss: loss * 1, 0.1), []

    def backend(graph, _):  # which needs no compiler of C
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=backend, fullgraph=True)
    def flooded_loss(loss, level):
        return criterion(loss) if set_level else flood(loss * 1, level)

    loss = torch.tensor(1.0, requires_grad=True)
    for step in range(12):
        level = 0.15 * (step + 1)
        if set_level:
            criterion.level = np.float64(level)
        flooded = flooded_loss(loss, None if set_level else level)
        assert flooded.item() == pytest.approx(abs(1 - level) + level)
        assert torch.autograd.grad(flooded, loss)[0] == (1 if level < 1 else -1)
    assert len(graphs) <= 2
    with torch.no_grad():
        assert flooded_loss(loss, None if set_level else 1.8) == 1.0
    assert len(graphs) <= 3
    for level in () if set_level else (-0.1, math.nan, math.inf):
        with pytest.raises((ValueError, torch._dynamo.exc.Unsupported)):
            flooded_loss(loss, level)


def test_flooding_does_not_wait_for_the_device():
    """A tensor on the meta device has no values: looking at one is an error."""
    inputs = torch.ones(3, device="meta", requires_grad=True)
    for level in (0.1, torch.tensor(0.1, device="meta")):
        loss = flood((inputs**2).mean(), level)
        loss.backward()
        flood_gradients([inputs], loss, level)
    flood(inputs**2, torch.ones(3, device="meta"))


def gradients(model: nn.Module) -> Tensor:
    """All gradients as one vector; they are cleared."""
    flat = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    model.zero_grad()
    return flat


@pytest.mark.parametrize("times", [0.97, 1.03])  # the level, in units of J: above and below it
def test_a_batch_in_parts(times):
    """Flooded afterwards it is the whole batch, with each part flooded it is another method."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    inputs, labels = torch.randn(103, 4, dtype=torch.float64) * 2, torch.randint(3, (103,))
    losses = cross_entropy(model(inputs), labels, reduction="none")
    rising = losses.argsort()
    level = times * losses.mean().item()
    ((losses.mean() - level).abs() + level).backward()
    expected = gradients(model)

    def accumulate(of_a_part=lambda loss: loss) -> Tensor:
        mean = torch.zeros((), dtype=torch.float64)
        for part in rising.split((30, 30, 30, 13)):
            loss = cross_entropy(model(inputs[part]), labels[part])
            (of_a_part(loss) * len(part) / 103).backward()
            mean += loss.detach() * len(part) / 103
        return mean

    flood_gradients(model.parameters(), accumulate(), level)
    torch.testing.assert_close(gradients(model), expected, rtol=1e-12, atol=1e-14)
    accumulate(lambda loss: flood(loss, level))
    assert torch.cosine_similarity(gradients(model), expected, dim=0) < 0.75


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
    rank = filter(lambda parameter: parameter.requires_grad, [frozen, empty])
    for parameters in ([], [frozen], frozen, [frozen, empty], nn.ReLU().parameters(), rank):
        flood_gradients(parameters, loss, 2.0)
    assert frozen.grad is empty.grad is None and frozen.equal(torch.ones(3))
    # But backward() was forgotten, or a generator has been used before.
    tied.grad, used_up = None, nn.Linear(1, 1).parameters()
    filtered = filter(lambda parameter: parameter.requires_grad, nn.Linear(1, 1).parameters())
    torch.optim.SGD(filtered), list(used_up)
    for parameters in (tied, [empty, frozen, tied], used_up, filtered):
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


def test_a_loss_in_bfloat16_often_equals_the_level():
    losses = torch.linspace(0.09, 0.11, 2001).bfloat16().requires_grad_()
    flood(losses, torch.full((2001,), 0.1)).sum().backward()
    assert (losses.grad == 0).sum() == 49
    parameter = nn.Parameter(torch.zeros(()))
    for level in (0.1, torch.tensor(0.1)):
        parameter.grad = torch.ones(())
        flood_gradients([parameter], torch.tensor(0.1).bfloat16(), level)
        assert parameter.grad == 0


def test_the_file_needs_only_torch():
    nodes = list(ast.walk(ast.parse((PROJECT / "flooding.py").read_text())))
    names = [one.name for node in nodes if isinstance(node, ast.Import) for one in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    assert {name.split(".")[0] for name in names} - sys.stdlib_module_names == {"torch"}
