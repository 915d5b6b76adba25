"""After a step whose numbers are not finite: in which part of it they first were not."""

from __future__ import annotations

import torch

from .functional import finite
from .still import Now, Still


def blame(still: Still, now: Now, step: int) -> str:
    """Make a step again in pieces, and name the first that is not finite.

    Args:
        still: The run.
        now: The state before the step.
        step: Its number.

    Returns:
        Words to go on a line with, `: the gradient of inputs is not finite`; nothing where each piece is finite.
    """
    slot, net, real, draws = still.inputs_of(now, step)
    if not finite((tuple(net.state), tuple(net.goal or ()))):
        return ": the network that it was given has weights that are not finite"
    if still.settings.rows:
        return ""  # whole, its pieces would not fit the run's memory
    if real is not None and not finite(tuple(real)):
        return ": the transformed data are not finite"
    with torch.no_grad():
        target = still.target(net, real, draws)
        if not finite(target):
            return ": what the objective makes of the data is not finite"
        if known := still.objective.why(still.synthetic(now.learned), target, net):
            return f": {known}"
    loss, grads, own = still.value_and_grad(now, target, net, draws)
    if not finite(loss):
        return ""
    for part, grad in grads.items():
        if not finite(grad):
            return f": the gradient of {part} is not finite"
    after = still.update(now, step, slot, net, grads, own)
    for part, value in after.learned.items():
        if not finite(value):
            return f": the optimiser takes {part} to what is not finite"
    return ""
