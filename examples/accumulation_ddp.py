# SPDX-License-Identifier: MIT
"""Accumulation, in two processes of DDP or N: python -m examples.accumulation_ddp [N]"""

import contextlib
import sys
import tempfile

import torch
from torch import distributed, nn
from torch.nn.functional import cross_entropy

from flooding import flood, flood_gradients

LEVEL = 0.7


def train(rank: int, ranks: int, folder: str) -> None:
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=ranks)
    torch.manual_seed(0)
    inputs, labels = torch.randn(66, 8), torch.randint(3, (66,))  # of one step, on all ranks
    parts = list(zip(inputs[rank::ranks].split(10), labels[rank::ranks].split(10)))
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for _ in range(30):
        mean = torch.zeros(())
        for number, (part, part_labels) in enumerate(parts, start=1):
            with parallel.no_sync() if number < len(parts) else contextlib.nullcontext():
                share = len(part) / len(inputs) * ranks  # times ranks, since DDP averages
                loss = cross_entropy(parallel(part), part_labels) * share
                loss.backward()
            mean += loss.detach()
        distributed.all_reduce(mean.div_(ranks))  # averaged as DDP does the gradients
        flood_gradients(model.parameters(), mean, LEVEL)

        if rank == 0:
            whole = flood(cross_entropy(model(inputs), labels), LEVEL)
            gradients = torch.autograd.grad(whole, [*model.parameters()])
            off = max((p.grad - g).abs().max() for p, g in zip(model.parameters(), gradients))
            print(f"J {mean:.3f}, gradient off the whole batch's by {off:.0e}")
            assert off < 1e-6

        nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # after flood_gradients or before
        optimizer.step()
        optimizer.zero_grad()
    distributed.destroy_process_group()


if __name__ == "__main__":
    ranks = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(train, (ranks, folder), nprocs=ranks)
