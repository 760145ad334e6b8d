"""The multi-layer perceptron of demo and table, K of them as one network."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from settings import Model

CLASSES = 2
ONE_BY_ONE = {"padding": (0, 0), "stride": (1, 1), "dilation": (1, 1)}  # of a convolution


class MLP(nn.Module):
    """K perceptrons side by side, which see the same inputs and never mix.

    Each has hidden layers of Linear, BatchNorm1d (or none), ReLU; then Linear to the class logits.
    With batch norm the hidden linear layers have no bias. [released code] Copy k draws PyTorch's
    default weights and biases, uniform in ±1/sqrt(inputs of the layer), from the k-th generator.
    Maps inputs [n, input_dim] to logits [n, K, 2]. Between the layers stand rows [n, K * units],
    on which one `BatchNorm1d` over K * units channels is K norms.
    """

    def __init__(self, input_dim: int, model: Model, generators: Sequence[torch.Generator]) -> None:
        super().__init__()
        self.input_dim, self.model, self.copies = input_dim, model, len(generators)
        widths = [input_dim] + [model.hidden_units] * model.hidden_layers
        bias = not model.batch_norm
        hidden = [StackedLinear(self.copies, *ends, bias) for ends in itertools.pairwise(widths)]
        output = StackedLinear(self.copies, widths[-1], CLASSES, bias=True)
        self.linears = nn.ModuleList([*hidden, output])
        normed = widths[1:] if model.batch_norm else []
        self.norms = nn.ModuleList(nn.BatchNorm1d(self.copies * width) for width in normed)
        for k, generator in enumerate(generators):
            for linear in self.linears:
                bound = 1 / math.sqrt(linear.weight.shape[2])
                for parameter in linear.parameters():  # first the weight, as nn.Linear does
                    nn.init.uniform_(parameter[k], -bound, bound, generator)

    def forward(self, inputs: Tensor) -> Tensor:
        rows = inputs
        for layer, linear in enumerate(self.linears[:-1]):
            rows = linear(rows)
            if self.norms:
                rows = self.norms[layer](rows)
            rows = rows.relu_()
        return self.linears[-1](rows).view(len(inputs), self.copies, CLASSES)

    def select(self, copies: Sequence[int]) -> "MLP":
        """Return a network of these copies, in this order, with weights and statistics of its own.

        A copy may be named several times: `select([0] * 5)` makes five equal ones of the first.
        """
        blank = [torch.Generator()] * len(copies)  # what it draws is overwritten
        chosen = MLP(self.input_dim, self.model, blank).to(self.linears[0].weight.device)
        for mine, theirs in zip(chosen._stacks(), self._stacks()):
            mine.copy_(theirs[copies])
        return chosen.train(self.training)

    def update(self, other: "MLP", copies: Sequence[int]) -> None:
        """Make these copies what they are in another network of as many."""
        for mine, theirs in zip(self._stacks(), other._stacks()):
            mine[copies] = theirs[copies]

    def _stacks(self) -> list[Tensor]:
        """Weights and statistics, each [K, ...]; but for the count of batches, which is of all."""
        state = [value for value in self.state_dict().values() if value.dim() > 0]
        return [value.view(self.copies, -1) for value in state]


class StackedLinear(nn.Module):
    """K linear layers: rows [n, K * inputs], or [n, inputs] for all, to rows [n, K * outputs]."""

    def __init__(self, copies: int, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(copies, outputs, inputs))
        self.bias = nn.Parameter(torch.empty(copies, outputs)) if bias else None

    def forward(self, rows: Tensor) -> Tensor:
        inputs = self.weight.shape[2]
        if rows.shape[1] == inputs:  # the same for all: one matrix, their outputs in a row
            bias = None if self.bias is None else self.bias.flatten()
            return nn.functional.linear(rows, self.weight.flatten(0, 1), bias)
        rows = stacked_product(rows, self.weight)
        return rows if self.bias is None else rows.add_(self.bias.flatten())


def stacked_product(rows: Tensor, weight: Tensor) -> Tensor:
    """Multiply K matrices: rows [n, K * in] and weight [K, out, in] give rows [n, K * out]."""
    if prefers_convolution(rows.device):
        image = _Convolution.apply(rows, weight)
        return image.permute(0, 2, 3, 1).reshape(len(rows), -1)
    return torch.einsum("nki,koi->nko", rows.unflatten(1, (len(weight), -1)), weight).flatten(1)


def prefers_convolution(device: torch.device) -> bool:
    """Return whether oneDNN multiplies faster here than PyTorch's `bmm`.

    With AVX-512 it does, up to twice as fast on AMD's processors, where `bmm` (MKL) uses AVX2 only.
    With AVX2 they are as fast; but `bmm` needs its rows by model: evaluation copies every layer.
    """
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    capability = torch.backends.cpu.get_cpu_capability()
    return capability == "AVX512" or (capability == "AVX2" and not torch.is_grad_enabled())


class _Convolution(torch.autograd.Function):
    """The product as oneDNN's convolution of K groups with kernels of 1 x 1.

    An example is a pixel and a unit a channel, so that rows are an image in channels-last format
    as they lie. PyTorch's own `conv2d` would leave oneDNN where it has one thread. Returns the
    operator's own tensor [1, K * out, n, 1]: a view of it could not be changed in place.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        image, kernels = _as_image(rows), weight.flatten(0, 1)[..., None, None]
        convolution = torch.ops.aten.mkldnn_convolution
        return convolution(image, kernels, bias=None, groups=len(weight), **ONE_BY_ONE)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        rows, weight = ctx.saved_tensors
        gradient = gradient.permute(0, 2, 3, 1).reshape(len(rows), -1)
        image, kernels = _as_image(gradient), weight.flatten(0, 1)[..., None, None]
        transposed = torch.ops.mkldnn._convolution_transpose_pointwise
        plain = {"output_padding": (0, 0), "attr": "none", "scalars": [], "algorithm": ""}
        of_rows = transposed(image, kernels, None, groups=len(weight), **ONE_BY_ONE, **plain)
        of_rows = of_rows.permute(0, 2, 3, 1).reshape(rows.shape)
        by_copy = [x.unflatten(1, (len(weight), -1)) for x in (gradient, rows)]
        return of_rows, torch.einsum("nko,nki->koi", *by_copy)


def _as_image(rows: Tensor) -> Tensor:
    """[n, channels] to [1, channels, n, 1], the same memory."""
    return rows[None, :, None].permute(0, 3, 1, 2)
