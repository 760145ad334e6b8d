# SPDX-License-Identifier: MIT
"""A Lightning module, with accumulation (lightning 2.6): python -m examples.lightning_module"""

import lightning
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from flooding import flood, flood_gradients

LEVEL = 0.7


class FloodedModule(lightning.LightningModule):
    mean = 0.0

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))

    def training_step(self, batch):
        loss = cross_entropy(self.model(batch[0]), batch[1])  # of a part
        self.mean = self.mean + loss.detach() / self.trainer.accumulate_grad_batches
        return loss  # Lightning divides it as well: exact where all steps have as many equal parts

    def on_before_optimizer_step(self, optimizer):  # Lightning clips after this
        mean, self.mean = self.trainer.strategy.reduce(self.mean, reduce_op="mean"), 0.0
        flood_gradients(self.parameters(), mean, LEVEL)
        whole = flood(cross_entropy(self.model(inputs), labels), LEVEL)
        gradients = torch.autograd.grad(whole, [*self.parameters()])
        off = max((p.grad - g).abs().max() for p, g in zip(self.parameters(), gradients))
        print(f"J {mean:.3f}, gradient off the whole batch's by {off:.0e}")
        assert off < 1e-6

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)


torch.manual_seed(0)
inputs, labels = torch.randn(66, 8), torch.randint(3, (66,))
loader = DataLoader(TensorDataset(inputs, labels), batch_size=22, shuffle=True)
off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
options = {"max_epochs": 30, "accumulate_grad_batches": 3, "gradient_clip_val": 1.0}
trainer = lightning.Trainer(accelerator="cpu", **options, **dict.fromkeys(off, False))
trainer.fit(FloodedModule(), loader)
