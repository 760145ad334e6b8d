# SPDX-License-Identifier: MIT
"""A Hugging Face trainer (transformers 5.24, accelerate 1.15): python -m examples.hugging_face"""

import tempfile

import torch
import transformers
from torch.nn.functional import cross_entropy

from flooding import flood, flood_gradients

LEVEL = 0.9


class FloodingTrainer(transformers.Trainer):
    mean = 0.0

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)  # this part's share of J
        self.mean = self.mean + loss
        if self.accelerator.sync_gradients:  # it was the last part; the trainer clips after this
            mean, self.mean = self.accelerator.reduce(self.mean, "mean"), 0.0
            flood_gradients(self.model.parameters(), mean, LEVEL)
            self.compare(mean)
        return loss

    def compare(self, mean):  # one step's batch is all data here, in parts of 4, 4, 4 and 2
        plain = self.model(**transformers.default_data_collator(self.train_dataset)).loss
        whole = torch.autograd.grad(flood(plain, LEVEL), [*self.model.parameters()])
        off = max((p.grad - g).abs().max() for p, g in zip(self.model.parameters(), whole))
        print(f"J {mean:.3f}, gradient off the whole batch's by {off:.0e}")
        assert off < 1e-5


# The shares add up to J if the model divides its loss by `num_items_in_batch`, as most causal
# language models do. Most others ignore it: J and gradient are times the number of parts then.
def mean_of_step(outputs, labels, num_items_in_batch):
    logits, labels = outputs.logits.flatten(0, -2), labels.flatten()
    return cross_entropy(logits, labels, reduction="sum") / num_items_in_batch


torch.manual_seed(0)
tokens, sizes = torch.randint(1, 20, (14, 6)), {"num_hidden_layers": 1, "num_attention_heads": 2}
sizes |= {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "pad_token_id": 0}
options = {"num_train_epochs": 20, "learning_rate": 0.03, "per_device_train_batch_size": 4}
options |= {"gradient_accumulation_steps": 4, "save_strategy": "no", "report_to": []}
for model_class, labels, compute_loss_func in (
    (transformers.LlamaForCausalLM, tokens.where(tokens > 3, -100), None),
    (transformers.LlamaForSequenceClassification, tokens[:, 0] % 2, mean_of_step),
):
    print(model_class.__name__)
    FloodingTrainer(
        model_class(transformers.LlamaConfig(**sizes)),
        transformers.TrainingArguments(tempfile.gettempdir(), use_cpu=True, **options),
        train_dataset=[{"input_ids": x, "labels": y} for x, y in zip(tokens, labels)],
        compute_loss_func=compute_loss_func,
    ).train()
