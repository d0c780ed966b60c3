"""The order in which a training keeps the numbers of images and weights (``SOLVER.MEMORY_FORMAT``).

Convolutions give their output in the order of their weights, so that all feature maps follow.  The
order changes no value but rounding, and no checkpoint.
"""

import torch
from torch import nn

CHANNELS_LAST = "channels_last"
CONTIGUOUS = "contiguous"
AUTO = "auto"


def memory_format_on(device: torch.device, choice: str) -> str:
    """``SOLVER.MEMORY_FORMAT`` with ``auto`` decided.

    That is ``channels_last`` on a CPU with AVX-512, where a step took 1 / 1.24 (Mask R-CNN) and
    1 / 1.37 (discriminative loss) of the time (AMD Zen 5).  On one without it took 1 / 1.02 and
    1 / 0.86 (AMD Zen 3), and a GPU was not measured: both keep ``contiguous``.
    """
    if choice != AUTO:
        return choice
    is_wide = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return CHANNELS_LAST if is_wide else CONTIGUOUS


def set_memory_format(model: nn.Module, memory_format: str) -> None:
    """Store the weights of convolutions in the order ``memory_format``, in place."""
    order = torch.channels_last if memory_format == CHANNELS_LAST else torch.contiguous_format
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=order)


def match_memory_format(optimizer: torch.optim.Optimizer) -> None:
    """Store the state of each parameter in the order of that parameter, in place.

    A state that was loaded has the order of the training that saved it, and fused optimizers
    read parameter, gradient and state number by number.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
                continue
            if value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, requires_grad=False).copy_(value)
