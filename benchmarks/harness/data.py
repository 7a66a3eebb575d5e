"""The data sets: facts about each, and how its images are read. Only reading them imports torch."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

PIXELS = ("normalised", "0-1")  # to a mean of 0 and a deviation of 1 over the training pixels, or as they are
FOLDER = Path(__file__).resolve().parents[1] / "data"  # the shipped data sets, and the default place of downloads


@dataclass(frozen=True)
class Data:
    """A data set of images.

    Attributes:
        shape: of an image: channels, height, width.
        mean, std: of the training pixels, between 0 and 1, by channel.
        file: one that its folder holds.
        read: of the folder, whether the training images are asked for, and whether to download them if they are not
            there: images (n, channels, height, width), uint8, and labels (n,).
        shipped: whether the repository holds it.
    """

    title: str
    classes: int
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    file: str
    read: Callable[[Path, bool, bool], tuple]
    shipped: bool = False

    @property
    def inputs(self) -> int:
        return math.prod(self.shape)


def _torchvision(name: str, root: Path, train: bool, download: bool) -> tuple:
    import torch
    import torchvision

    part = getattr(torchvision.datasets, name)(root, train=train, download=download)
    images = torch.as_tensor(part.data)  # without channels, or these last
    images = images.unsqueeze(1) if images.dim() == 3 else images.movedim(3, 1).contiguous()
    return images, torch.as_tensor(part.targets)


def _avalanche(name: str, root: Path, train: bool, download: bool, **kwargs) -> tuple:
    import torch
    from avalanche.benchmarks import datasets
    from torchvision.transforms.functional import pil_to_tensor

    part = getattr(datasets, name)(root, train=train, download=download, transform=pil_to_tensor, **kwargs)
    return torch.stack([part[i][0] for i in range(len(part))]), torch.as_tensor(part.targets)


def _glyphs(root: Path, train: bool, download: bool) -> tuple:
    import numpy as np
    import torch

    with np.load(root / "greek-cyrillic.npz") as file:
        images, labels = (file[f"{'train' if train else 'test'}_{what}"] for what in ("images", "labels"))
    return torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels).long()


_GREY, _COLOUR = (1, 28, 28), (3, 32, 32)
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_TINY = (0.4802, 0.4481, 0.3975), (0.277, 0.2691, 0.2821)
# fmt: off
DATA = {
    "mnist": Data("MNIST", 10, _GREY, (0.1307,), (0.3081,), "MNIST/raw/train-images-idx3-ubyte",
                  partial(_torchvision, "MNIST"), shipped=True),
    "fashion-mnist": Data("Fashion-MNIST", 10, _GREY, (0.286,), (0.353,), "FashionMNIST/raw/train-images-idx3-ubyte",
                          partial(_torchvision, "FashionMNIST"), shipped=True),
    "glyphs": Data("glyphs", 76, _GREY, (0.0926,), (0.2587,), "greek-cyrillic.npz", _glyphs, shipped=True),
    "cifar10": Data("CIFAR-10", 10, _COLOUR, (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616),
                    "cifar-10-batches-py/batches.meta", partial(_torchvision, "CIFAR10")),
    "cifar100": Data("CIFAR-100", 100, _COLOUR, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762),
                     "cifar-100-python/meta", partial(_torchvision, "CIFAR100")),
    "tiny-imagenet": Data("Tiny ImageNet", 200, (3, 64, 64), *_TINY, "tiny-imagenet-200/wnids.txt",
                          partial(_avalanche, "TinyImagenet")),
    "core50": Data("CORe50", 50, _COLOUR, *_IMAGENET, "core50_32x32", partial(_avalanche, "CORe50Dataset", mini=True)),
}
# fmt: on


def folder_of(name: str, dataset_root: Path | None) -> Path:
    """The folder of a data set: ``dataset_root``, or its own."""
    return FOLDER / name if dataset_root is None else Path(dataset_root)


class Part(NamedTuple):
    """The training or the test images of a data set, an ``avalanche_sp.data.Images``; ``pixels``: one of PIXELS."""

    name: str
    folder: str
    train: bool
    pixels: str = "normalised"

    def read(self) -> tuple:
        return _read(self)


@lru_cache(maxsize=4)  # the tensors are shared by every benchmark of a process, and never written to
def _read(part: Part) -> tuple:
    import torch

    data = DATA[part.name]
    images, labels = data.read(Path(part.folder), part.train, False)
    if part.pixels == "normalised":
        return images, labels, tuple(torch.tensor(values).view(-1, 1, 1) for values in (data.mean, data.std))
    return images, labels, (torch.zeros(1, 1, 1), torch.ones(1, 1, 1))


def parts_of(name: str, dataset_root: Path | None, pixels: str = "normalised") -> tuple[Part, Part]:
    """The training and the test images of a data set."""
    folder = str(folder_of(name, dataset_root).resolve())
    return Part(name, folder, True, pixels), Part(name, folder, False, pixels)
