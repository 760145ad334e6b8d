# SPDX-License-Identifier: MIT
"""Class weights and ignored labels, with accumulation: python -m examples.class_weights"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from flooding import flood, flood_gradients

LEVEL = 0.5

torch.manual_seed(0)
class_weights = torch.tensor([1.0, 5.0, 0.2])
inputs, labels = torch.randn(66, 8), torch.randint(3, (66,))
labels[::7] = labels[20:40] = -100  # ignored, in the second part all
parts = list(zip(inputs.split(20), labels.split(20)))
model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
for _ in range(30):
    # Cross-entropy's mean divides by the weights of the labels that count, 1 each without any, so
    # add them up before the first part. In DDP: distributed.all_reduce(total.div_(ranks))
    counted = torch.cat([part_labels[part_labels != -100] for _, part_labels in parts])
    total = class_weights[counted].sum()
    mean = torch.zeros(())
    for part, part_labels in parts:
        loss = cross_entropy(model(part), part_labels, class_weights, reduction="sum") / total
        loss.backward()
        mean += loss.detach()
    flood_gradients(model.parameters(), mean, LEVEL)
    whole = flood(cross_entropy(model(inputs), labels, class_weights), LEVEL)
    gradients = torch.autograd.grad(whole, [*model.parameters()])
    off = max((p.grad - g).abs().max() for p, g in zip(model.parameters(), gradients))
    print(f"J {mean:.3f}, gradient off the whole batch's by {off:.0e}")
    assert off < 1e-6
    optimizer.step()
    optimizer.zero_grad()
