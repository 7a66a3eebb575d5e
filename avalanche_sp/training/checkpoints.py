"""Makes Avalanche's checkpoints work with torch's own optimizers. Importing the package is enough.

Avalanche saves with dill. ``torch.optim`` deletes the names of its submodules, so dill does not find
``torch.optim.sgd.SGD`` by its name, pickles the class by value, and fails. Here dill pickles an optimizer of torch by
the public name of its class. Other ways to copy or to pickle an optimizer are as they were.
"""

import dill
import torch
from torch.optim import Optimizer


def _new(name: str) -> Optimizer:
    cls = getattr(torch.optim, name)
    return cls.__new__(cls)


def _save(pickler, optimizer: Optimizer) -> None:
    pickler.save_reduce(_new, (type(optimizer).__name__,), optimizer.__getstate__(), obj=optimizer)


for _value in vars(torch.optim).values():
    if isinstance(_value, type) and issubclass(_value, Optimizer):
        dill.register(_value)(_save)
