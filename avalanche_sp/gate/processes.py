"""What the processes of ``torch.distributed`` have to agree on, so that they keep equal weights."""

import torch.distributed as dist
from torch import Tensor


def several_processes() -> bool:
    """Whether this process is one of a group."""
    return dist.is_available() and dist.is_initialized()


def mean_over_processes(value: Tensor) -> Tensor:
    """Mean of a tensor over all processes, in each of them; the tensor itself if there is one process."""
    if not several_processes():
        return value
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / dist.get_world_size()
