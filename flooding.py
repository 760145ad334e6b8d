"""Flooding: keep the training loss from going to zero (Ishida et al., ICML 2020).

With J the training loss of a mini-batch and b >= 0 the flood level, training minimises

    |J - b| + b

which is gradient descent while J is above b and gradient *ascent* while it is below: the loss
floats around b instead of sinking to zero. This file needs nothing but torch; copy it. Three
lines of a training loop change:

    from flooding import Flooding                               # 1
    criterion = Flooding(torch.nn.CrossEntropyLoss(), 0.1)      # 2
    ...
    criterion.train()                                           # 3: criterion.eval() to validate
    for inputs, labels in loader:
        optimizer.zero_grad()
        criterion(model(inputs), labels).backward()
        optimizer.step()

What goes wrong in practice:

- Flood the *mean* loss of the mini-batch. Flooding each example's loss and averaging afterwards
  is another method (iFlood, ICLR 2022).
- Flood the whole loss, penalties included, before anything scales it: before it is divided by
  the number of gradient-accumulation steps and before a mixed-precision `GradScaler` scales it.
- Never flood a loss that is reported, plotted or used to choose a model: it could not show a
  value below b. `Flooding` in evaluation mode returns the plain loss.
- Under data-parallel training each rank floods the loss of its own mini-batch, with the same b.
- Choose b on validation data; 0 is training without flooding.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn


def flood(loss: Tensor, level: float | Tensor) -> Tensor:
    """Return the flooded loss `(loss - level).abs() + level` (section 3 of the paper).

    Args:
        loss: mean loss of a mini-batch in nats, a scalar; or one such mean a model, shape [K].
        level: the flood level b in nats, a finite number >= 0; or one level a model, shape [K].

    Where the loss equals the level the gradient is zero. A vector of losses with a vector of
    levels floods K models at once: `flood(losses, levels).sum().backward()` gives each model
    exactly its own gradient.

    Raises:
        ValueError: the level is a number that is negative, NaN or infinite. The values of a
            tensor are not looked at: on a GPU that would wait for the device at every step.
    """
    if not isinstance(level, Tensor):
        _check_level(level)
    return (loss - level).abs() + level


class Flooding(nn.Module):
    """Wrap a criterion: the flooded loss in training mode, the plain loss in evaluation mode.

    Args:
        criterion: any callable, `nn.Module` or not, that returns the scalar mean loss of a
            mini-batch in nats.
        level: the flood level b in nats, a finite number >= 0.

    Raises:
        ValueError: the level is negative, NaN or infinite; or, when called, the criterion
            returns anything but a scalar.
    """

    def __init__(self, criterion: Callable[..., Tensor], level: float) -> None:
        super().__init__()
        _check_level(level)
        self.criterion = criterion
        self.level = level

    def forward(self, *args, **kwargs) -> Tensor:
        loss = self.criterion(*args, **kwargs)
        if loss.dim() != 0:
            raise ValueError(
                f"flooding acts on the mean loss of a mini-batch, a scalar, and the criterion "
                f"returned shape {list(loss.shape)}: use reduction='mean', or take the mean "
                f"over the examples in the criterion"
            )
        return flood(loss, self.level) if self.training else loss

    def extra_repr(self) -> str:
        return f"level={self.level}"


def _check_level(level: float) -> None:
    if not (math.isfinite(level) and level >= 0):
        raise ValueError(
            f"flood level {level}: a finite number of nats >= 0 is needed; 0 turns flooding off"
        )
