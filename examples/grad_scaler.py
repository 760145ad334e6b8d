# SPDX-License-Identifier: MIT
"""A GradScaler in float16, on a GPU or, without one, the CPU: python -m examples.grad_scaler"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from flooding import flood, flood_gradients

LEVEL = 0.7
device = "cuda" if torch.cuda.is_available() else "cpu"


def mean_loss(inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    with torch.autocast(device, torch.float16):
        outputs = model(inputs)
    return cross_entropy(outputs.float(), labels)  # float16 is too coarse for |J - b|


torch.manual_seed(0)
inputs, labels = torch.randn(66, 8, device=device), torch.randint(3, (66,), device=device)
model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3)).to(device)
optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
scaler = torch.amp.GradScaler(device, init_scale=2.0**24)  # too large: the first steps overflow
for _ in range(30):
    mean = torch.zeros((), device=device)
    for part, part_labels in zip(inputs.split(20), labels.split(20)):
        loss = mean_loss(part, part_labels) * len(part) / len(inputs)
        scaler.scale(loss).backward()  # in one part: scaler.scale(flood(loss, LEVEL)).backward()
        mean += loss.detach()  # the plain loss, not the scaled one
    scaler.unscale_(optimizer)
    flood_gradients(model.parameters(), mean, LEVEL)  # after unscale_ or before
    whole = flood(mean_loss(inputs, labels), LEVEL)
    gradients = torch.autograd.grad(whole, [*model.parameters()])
    off = max((p.grad - g).abs().max() for p, g in zip(model.parameters(), gradients))
    print(f"J {mean:.3f}, gradient off the whole batch's by {off:.0e}, {scaler.get_scale():.0f}")
    assert off < 1e-3 or not off.isfinite()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # after unscale_
    scaler.step(optimizer)  # leaves out the steps that overflowed, as without flooding
    scaler.update()
    optimizer.zero_grad()
