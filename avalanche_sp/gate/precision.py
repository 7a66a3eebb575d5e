"""The gate's products have the precision of its tensors, also where ``torch.autocast`` would round them."""

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import torch


class _OnDevice(Protocol):
    @property
    def device_type(self) -> str: ...


Owner = TypeVar("Owner", bound=_OnDevice)
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def outside_autocast(
    call: Callable[Concatenate[Owner, Arguments], Result],
) -> Callable[Concatenate[Owner, Arguments], Result]:
    """Decorates a method of an object with a ``device_type``: it runs as outside of the caller's ``torch.autocast``."""

    @wraps(call)
    def outside(self: Owner, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        device = self.device_type
        if not torch.is_autocast_enabled(device):
            return call(self, *args, **kwargs)
        with torch.autocast(device, enabled=False):
            return call(self, *args, **kwargs)

    return outside
