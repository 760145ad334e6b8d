# SPDX-License-Identifier: MIT
"""Flooding: keep the training loss from going to zero (Ishida et al., ICML 2020).

With J >= 0 the mean loss of a mini-batch and b >= 0 the flood level, training minimises

    |J - b| + b

which is gradient descent while J is above b and gradient *ascent* while it is below: J floats
around b. Choose b on validation data, 0 (no flooding) among the levels. This file needs nothing
but torch; copy it.

    flood(loss, 0.1).backward()  # instead of loss.backward()

`Flooding` wraps a criterion. `flood_gradients` floods after `backward()`, where the batch of a step
comes in parts: accumulation, DDP. `examples/` has the loops. What goes wrong silently:

- A flooded loss is never below b: log the plain one, and the share of steps with J below b. If it
  is 0 %, b does nothing; it may be below the lowest J there is (label smoothing of 0.1 keeps
  cross-entropy above 0.500 with 10 classes, 0.291 with 3). If it is 100 % and J does not rise, J
  lies flat at 0 (hinge, triplet with all margins kept) and has no gradient to be lifted by.
- b has the unit of J, nats for cross-entropy only. J summed, divided or scaled before `flood` meets
  a b of another size: scale the flooded loss. Weight decay in the optimizer is outside J, a penalty
  that is added before `flood` is inside.
- Flooding each part of a batch is another method, with parts of one example iFlood (ICLR 2022).
  Batch norm sees the parts, whichever way they are flooded.
- FGM, PGD and the like, between backward and step, walk downhill while J is below b: flood with
  `flood_gradients` after them, J then being the mean of plain and adversarial loss.
- `model.eval()` does not reach a `Flooding` outside the model; `torch.no_grad()` does.
- In bfloat16, 49 of the 2 001 values 0.09, 0.09001, ..., 0.11 equal b = 0.1. Flood in float32.
- An infinite J leaves gradients as they are, a NaN one multiplies them by 0: finite ones vanish,
  others are NaN, so that a GradScaler leaves out an overflowing step as ever.
- The level is not in the state_dict: after loading a checkpoint, set it again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from numbers import Real

import torch
from torch import Tensor, nn


def flood(loss: Tensor, level: float | Tensor) -> Tensor:
    """Return the flooded loss `(loss - level).abs() + level` (section 3 of the paper).

    Args:
        loss: mean loss J of a mini-batch in nats, a scalar; or, of K models at once, one such mean
            each, [K] or [1, K], or the losses of n examples, [n, K], each of which is flooded then.
        level: the flood level b in nats, a finite number >= 0 or a scalar tensor; for K models one
            each, [K]: a scalar would let an unreduced loss pass. No gradient flows into it.

    Shape and dtype are the loss's; where it equals the level the gradient is zero. The loss itself
    is returned under `torch.no_grad()`, so that no validation loss is flooded, and when the level
    is the number 0, whatever the loss; other levels, tensors of zeros too, assume J >= 0.
    `flood(losses, levels).sum().backward()` gives each of K models exactly its own gradient.

    Raises:
        ValueError: loss or level is not as above. The values of a tensor are not looked at: on a
            GPU that would wait for the device at every step.
    """
    _check_loss(loss, dimensions=2 if isinstance(level, Tensor) and level.dim() == 1 else 0)
    _check_level(level, loss.shape[-1:])
    if not torch.is_grad_enabled():
        return loss
    if isinstance(level, Tensor):
        level = level.detach().to(loss.dtype)
    elif (level := float(level)) == 0:
        return loss
    return (loss - level).abs() + level


@torch.no_grad()
def flood_gradients(parameters: Iterable[Tensor], loss: Tensor, level: float | Tensor) -> None:
    """Multiply each parameter's `.grad` by sign(loss - level), in place: flooding after backward.

    Call it once a step, after the last `backward()`. It does not wait for the device.

    Args:
        parameters: the tensors to flood, such as `model.parameters()`; one without a gradient is
            passed over. A rank may have none, or only frozen ones and empty shards: an error there
            would leave the other ranks waiting.
        loss: J in nats, a scalar: the plain loss of the step's whole batch, whose gradient (or a
            positive multiple of it) is in `.grad`.
        level: the flood level b in nats, as for `flood`, but no vector. 0 changes nothing.

    Raises:
        ValueError: an argument is not as above, or no parameter has a gradient and some require
            one: that is a forgotten `backward()`, or a rank whose parameters took no part in the
            step, which cannot be told apart: do not call it there. Or a generator has been used up
            before, for which a `filter`, `map` or `chain` that yields nothing is taken.
    """
    _check_loss(loss, dimensions=0)
    _check_level(level, loss.shape)
    if isinstance(parameters, Tensor) or not isinstance(parameters, Iterable):
        parameters = [parameters]
    at_end = isinstance(parameters, Iterator) and getattr(parameters, "gi_frame", None) is None
    parameters = list(parameters)
    used_up = at_end and not parameters
    if wrong := [type(each).__name__ for each in parameters if not isinstance(each, Tensor)]:
        raise ValueError(f"flooding found a {wrong[0]}, no tensor: pass model.parameters()")
    # Each parameter once: twice would leave a tied weight's gradient as it was.
    gradients = [p.grad for p in dict.fromkeys(parameters) if p.grad is not None]
    if not gradients and (used_up or any(p.requires_grad and p.numel() for p in parameters)):
        raise ValueError("flooding found no gradient: no backward() yet, or a used-up generator")
    if isinstance(level, Tensor) or level != 0:
        level = level.to(loss.dtype) if isinstance(level, Tensor) else level  # as `flood` does
        sign = (loss - level).sign()
        for gradient in gradients:
            gradient.mul_(sign.to(gradient.device))


class Flooding(nn.Module):
    """Wrap a criterion: flooded loss in training mode, plain in evaluation mode and `no_grad()`.

    The mode is the criterion's own: unless it is a part of the model, `model.eval()` leaves it in
    training mode, and a validation loss with gradients enabled is flooded. Call its `eval()` too.
    The plain loss, to log, is its `criterion(outputs.detach(), labels)`.

    Args:
        criterion: any callable, `nn.Module` or not, that returns the scalar mean loss of a
            mini-batch in nats.
        level: the flood level b in nats, a finite number >= 0 or a scalar tensor, which follows
            `.to(device)`. It can be set at any step, also when compiled: `criterion.level = 0.2`.

    Raises:
        ValueError: the criterion or the level is not as above, the level also when it is set, the
            criterion's value when it is called.
    """

    def __init__(self, criterion: Callable[..., Tensor], level: float | Tensor) -> None:
        super().__init__()
        if not callable(criterion) or isinstance(criterion, type):
            raise ValueError(f"criterion {criterion!r:.60}: needed is a function or module")
        self.criterion = criterion
        self.level = level

    def __setattr__(self, name: str, value: object) -> None:
        if name != "level":
            return super().__setattr__(name, value)
        _check_level(value, torch.Size())
        if isinstance(value, Tensor):
            _check_level(value.item(), torch.Size())  # waits for the device: here, not every step
        if hasattr(self, name):
            del self.level
        if isinstance(value, Tensor):
            self.register_buffer(name, value.detach(), persistent=False)
        else:
            super().__setattr__(name, float(value))

    def forward(self, *args, **kwargs) -> Tensor:
        return flood(self.criterion(*args, **kwargs), self.level if self.training else 0)

    def extra_repr(self) -> str:
        return f"level={self.level}"


def _check_loss(loss: Tensor, dimensions: int) -> None:
    if not (isinstance(loss, Tensor) and loss.is_floating_point() and loss.dim() <= dimensions):
        found = f"shape {list(loss.shape)}, {loss.dtype}" if isinstance(loss, Tensor) else loss
        raise ValueError(
            f"flooding acts on the mean loss of a mini-batch, a scalar floating-point tensor, and "
            f"got {found!s:.60}: pass the loss that reduction='mean' gives, not its item()"
        )


def _check_level(level: float | Tensor, shape: torch.Size) -> None:
    if isinstance(level, Tensor):
        valid = level.is_floating_point() and level.shape == shape
    else:
        # Not `< math.inf`: torch.compile takes that for true of any number, and lets inf pass.
        valid = isinstance(level, Real) and 0 <= float(level) <= sys.float_info.max
        valid = valid and not isinstance(level, bool)
    if not valid:
        found = f"{list(level.shape)}, {level.dtype}" if isinstance(level, Tensor) else repr(level)
        raise ValueError(
            f"flood level {found:.60}: a finite number >= 0 is needed (0 turns flooding off), or a "
            f"floating-point tensor of shape {list(shape)}"
        )
