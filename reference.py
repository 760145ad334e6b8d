"""Flooding as one would write it: one network at a time, in plain PyTorch. Read this first.

`python reference.py` trains the demo's network on a trial of the demo's data, once without flooding
and once with b = 0.26, and prints the accuracies. The rest of the repository does the same for
many levels at once, faster; its tests hold its training to this file.
"""

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from datasets import Data, make_dataset

Batches = Iterable[tuple[Tensor, Tensor]]  # inputs [n, d] and labels [n] of each mini-batch


def make_network(
    input_dim: int, hidden_layers: int = 4, hidden_units: int = 500, batch_norm: bool = True
) -> nn.Sequential:
    """Return the released demo's network, or one of another shape; two classes."""
    layers = []
    widths = [input_dim] + [hidden_units] * hidden_layers
    for inputs, outputs in itertools.pairwise(widths):
        layers.append(nn.Linear(inputs, outputs, bias=not batch_norm))
        layers += [nn.BatchNorm1d(outputs)] if batch_norm else []
        layers.append(nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(widths[-1], 2))


def train_epoch(
    network: nn.Module, batches: Batches, b: float, optimizer: torch.optim.Optimizer,
    reduction: str = "mean",
) -> list[Tensor]:  # fmt: skip
    """Train on every mini-batch once; return their losses before flooding, in nats.

    With `reduction` "none" it is each example's loss that is flooded (iFlood, ICLR 2022).
    """
    network.train()
    losses = []
    for inputs, labels in batches:
        loss = nn.functional.cross_entropy(network(inputs), labels, reduction=reduction)
        losses.append(loss.detach())
        loss = (loss - b).abs() + b  # the paper's line
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    return losses


@torch.no_grad()
def evaluate(network: nn.Module, inputs: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return mean loss in nats and accuracy, a fraction, in evaluation mode."""
    logits = network.eval()(inputs)
    accuracy = (logits.argmax(dim=1) == labels).double().mean().item()
    return nn.functional.cross_entropy(logits, labels).item(), accuracy


def main() -> None:
    data = make_dataset(Data(dataset="sinusoid2d", label_noise=0.1), seed=0)
    inputs, noisy_labels = map(torch.from_numpy, (data.train.inputs, data.train.noisy_labels))
    test_inputs, clean_labels = map(torch.from_numpy, (data.test.inputs, data.test.clean_labels))
    for b in (0.0, 0.26):
        torch.manual_seed(0)
        network = make_network(input_dim=2)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
        batches = DataLoader(TensorDataset(inputs, noisy_labels), batch_size=200, shuffle=True)
        for _ in range(200):
            train_epoch(network, batches, b, optimizer)
        _, train_accuracy = evaluate(network, inputs, noisy_labels)
        _, test_accuracy = evaluate(network, test_inputs, clean_labels)
        print(
            f"b = {b:<4g}  train accuracy, noisy labels: {train_accuracy:6.1%}  "
            f"test accuracy, clean labels: {test_accuracy:6.1%}"
        )


if __name__ == "__main__":
    main()
