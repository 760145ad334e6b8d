"""The multi-layer perceptron of the paper and the demo, and K of them trained as one."""

from __future__ import annotations

import copy
import itertools
import math

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from settings import ModelSettings

CLASSES = 2


class MLP(nn.Module):
    """Hidden layers of Linear, BatchNorm1d (or none), ReLU; then Linear to the class logits.

    With batch norm the hidden linear layers have no bias. [released code] Weights and biases are
    PyTorch's default, uniform in ±1/sqrt(inputs of the layer), drawn from `generator`. Maps inputs
    [n, input_dim] to logits [n, 2].
    """

    def __init__(self, input_dim: int, settings: ModelSettings, generator: torch.Generator) -> None:
        super().__init__()
        widths = [input_dim] + [settings.hidden_units] * settings.hidden_layers
        self.linears = nn.ModuleList(
            _linear(*shape, not settings.batch_norm, generator)
            for shape in itertools.pairwise(widths)
        )
        self.linears.append(_linear(widths[-1], CLASSES, True, generator))
        normed = widths[1:] if settings.batch_norm else []
        self.norms = nn.ModuleList(map(nn.BatchNorm1d, normed))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = inputs
        for layer, linear in enumerate(self.linears[:-1]):
            hidden = linear(hidden)
            if self.norms:
                hidden = self.norms[layer](hidden)
            hidden = hidden.relu_()
        return self.linears[-1](hidden)


def _linear(inputs: int, outputs: int, bias: bool, generator: torch.Generator) -> nn.Linear:
    # `nn.Linear` would draw from PyTorch's global generator.
    linear = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias)
    bound = 1 / math.sqrt(inputs)
    for parameter in linear.parameters():
        nn.init.uniform_(parameter, -bound, bound, generator=generator)
    return linear


class StackedMLP:
    """K copies of one MLP, trained side by side: every parameter leads with a dimension K.

    The network stays the plain `MLP`: `functional_call` under `vmap` runs it on the stacked
    parameters, so that a step is one batched matrix product a layer. Weight matrices are kept as
    [K, inputs, outputs], the transpose of `nn.Linear`'s: then their gradients lie in memory as
    they do and are not copied.
    """

    def __init__(self, network: MLP, copies: int, device: torch.device) -> None:
        # Only the structure of the network is used: its own tensors are replaced by the stacks.
        self.network = copy.deepcopy(network).to("meta").train()
        parameters, buffers = stack_module_state([network] * copies)
        self.buffers = {name: value.to(device) for name, value in buffers.items()}
        self.parameters = {}
        for name, value in parameters.items():
            value = value.mT.contiguous() if value.dim() == 3 else value
            self.parameters[name] = value.detach().to(device).requires_grad_()

    def losses(self, inputs: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        """Return each model's mean cross-entropy in nats, [K], in training mode.

        All models see the same mini-batch, inputs [n, d] and labels [n]; batch-norm statistics
        are updated. With `reduction="none"` it is each example's cross-entropy, [K, n].
        """

        def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
            of_linear = {
                name: value.mT if value.dim() == 2 else value for name, value in parameters.items()
            }
            logits = functional_call(self.network, (of_linear, buffers), (inputs,))
            return nn.functional.cross_entropy(logits, labels, reduction=reduction)

        return vmap(loss)(self.parameters, self.buffers)

    @torch.no_grad()
    def fold(self) -> list[Tensor]:
        """Return the evaluation-mode networks as one matrix a layer, for `folded_logits`.

        Batch norm is an affine map in evaluation mode and goes into the linear layer before it.
        Biases go in as well, as outgoing weights of an extra unit that is always 1, which saves a
        pass over memory a layer. Hidden widths, that unit included, are padded with zeros to a
        multiple of 8, which the matrix products like. Shapes [K, inputs + 1, width],
        [K, width, width], ..., [K, width, classes].
        """
        matrices, tensors = [], {**self.parameters, **self.buffers}
        for layer in range(len(self.network.linears)):
            weight, bias = (tensors.get(f"linears.{layer}.{name}") for name in ("weight", "bias"))
            if bias is None:  # batch norm follows
                norm, epsilon = f"norms.{layer}.", self.network.norms[layer].eps
                inverse_deviation = (tensors[norm + "running_var"] + epsilon).rsqrt()
                scale = tensors[norm + "weight"] * inverse_deviation  # [K, units]
                weight = weight * scale.unsqueeze(1)
                bias = tensors[norm + "bias"] - tensors[norm + "running_mean"] * scale
            copies, inputs, outputs = weight.shape
            rows = matrices[-1].shape[2] if matrices else inputs + 1
            hidden = layer < len(self.network.linears) - 1
            columns = (outputs + 8) // 8 * 8 if hidden else outputs
            matrix = weight.new_zeros(copies, rows, columns)
            matrix[:, :inputs, :outputs] = weight
            matrix[:, inputs, :outputs] = bias
            if hidden:
                matrix[:, inputs, outputs] = 1  # the constant unit, kept alive
            matrices.append(matrix)
        return matrices


def with_constant(inputs: Tensor) -> Tensor:
    """Append the constant unit that carries the biases: [n, d] to [n, d + 1]."""
    return torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1)


@torch.no_grad()
def folded_logits(matrices: list[Tensor], inputs: Tensor, chunk: int) -> Tensor:
    """Return the logits [K, n, classes] of K folded networks on inputs [n, d + 1].

    `inputs` come from `with_constant`. `chunk` examples are taken through all layers before the
    next, so that the activations stay in the cache.
    """
    logits = []
    for rows in inputs.split(chunk):
        hidden = rows.expand(len(matrices[0]), -1, -1)
        for matrix in matrices[:-1]:
            hidden = torch.bmm(hidden, matrix).relu_()
        logits.append(torch.bmm(hidden, matrices[-1]))
    return torch.cat(logits, dim=1)
