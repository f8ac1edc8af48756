"""What goes between host and device, without the host waiting for the device more often than it must.

A tensor made on a CUDA device from a list makes the host wait for all that the device still has to do, and so does each
`.cpu()` or `.tolist()`. Here what goes up waits for nothing, and what comes down comes together.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor


def upload(numbers: Any, device: torch.device) -> Tensor:
    """A list of numbers, a numpy array or a tensor of the host as a tensor on the device."""
    host = numbers if isinstance(numbers, Tensor) else torch.as_tensor(numbers)
    if device.type != "cuda":
        return host.to(device)
    # Only from pinned memory a copy goes on while the host does.
    return host.pin_memory().to(device, non_blocking=True)


def to_host(*tensors: Tensor) -> list[Tensor]:
    """The tensors, all on one device, on the host; by one copy."""
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return list(tensors)
    return unpacked(packed(*tensors).cpu(), *tensors)


def packed(*tensors: Tensor) -> Tensor:
    """The bytes of the tensors one after the other, (n,) uint8; those of wide numbers first, so that all are aligned."""
    return torch.cat([tensors[i].contiguous().view(-1).view(torch.uint8) for i in _by_width(tensors)])


def unpacked(data: Tensor, *like: Tensor) -> list[Tensor]:
    """What `packed` was given: tensors of the shapes and dtypes of these."""
    found: dict[int, Tensor] = {}
    start = 0
    for i in _by_width(like):
        n_bytes = prod(like[i].shape) * like[i].element_size()
        found[i] = data[start : start + n_bytes].view(like[i].dtype).view(like[i].shape)
        start += n_bytes
    return [found[i] for i in range(len(like))]


def _by_width(tensors: tuple[Tensor, ...]) -> list[int]:
    return sorted(range(len(tensors)), key=lambda i: -tensors[i].element_size())
