"""The flooding line: value and gradient on both sides of the level, one model or many."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from flooding import Flooding, flood


@pytest.mark.parametrize(
    ("loss", "level", "value", "gradient"),
    [
        (0.7, 0.2, 0.7, 1.0),  # above: the plain loss, descent
        (0.1, 0.25, 0.4, -1.0),  # below: mirrored, ascent
        (0.25, 0.25, 0.25, 0.0),  # at the level: nothing
        (0.7, 0.0, 0.7, 1.0),  # no flooding
    ],
)
def test_value_and_gradient(loss, level, value, gradient):
    loss = torch.tensor(loss, requires_grad=True)
    flooded = flood(loss, level)
    flooded.backward()
    assert flooded.item() == pytest.approx(value)
    assert loss.grad.item() == gradient


def test_a_vector_of_levels_gives_each_model_its_own_gradient():
    weights = torch.tensor([0.9, 0.1, 0.3], requires_grad=True)
    losses = weights**2
    levels = torch.tensor([0.0, 0.2, 0.09])
    flooded = flood(losses, levels)
    flooded.sum().backward()
    torch.testing.assert_close(flooded.detach(), torch.tensor([0.81, 0.39, 0.09]))
    torch.testing.assert_close(weights.grad, torch.tensor([1.8, -0.2, weights.grad[2].item()]))
    for k in range(3):
        weight = weights.detach()[k].clone().requires_grad_()
        flood(weight**2, levels[k].item()).backward()
        assert weight.grad == weights.grad[k]


def test_module_floods_in_training_mode_only():
    criterion = Flooding(nn.CrossEntropyLoss(), 0.5)
    logits, labels = torch.tensor([[4.0, -4.0], [-3.0, 3.0]]), torch.tensor([0, 1])
    plain = nn.functional.cross_entropy(logits, labels)
    assert criterion(logits, labels) == pytest.approx(1.0 - plain.item())
    criterion.eval()
    assert criterion(logits, labels) == plain
    assert "level=0.5" in repr(criterion)


def test_module_wraps_a_function():
    assert Flooding(nn.functional.mse_loss, 1.0)(torch.zeros(3), torch.zeros(3)) == 2.0


@pytest.mark.parametrize("level", [-0.1, float("nan"), float("inf"), -float("inf")])
def test_bad_level(level):
    with pytest.raises(ValueError, match=r"flood level .* finite"):
        Flooding(nn.CrossEntropyLoss(), level)
    with pytest.raises(ValueError, match=r"flood level .* finite"):
        flood(torch.tensor(1.0), level)


@pytest.mark.parametrize("training", [True, False])
def test_a_loss_per_example_is_refused(training):
    criterion = Flooding(nn.CrossEntropyLoss(reduction="none"), 0.1).train(training)
    with pytest.raises(ValueError, match=r"shape \[4\].*reduction='mean'"):
        criterion(torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))


def test_the_file_needs_only_torch(tmp_path):
    blocked = "numpy", "datasets", "models", "train", "mlflow", "matplotlib"
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked})); import flooding"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "Error" not in result.stderr and result.returncode == 0, result.stderr
