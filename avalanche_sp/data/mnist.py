"""Split and Permuted MNIST as tensor-backed Avalanche benchmarks."""

from collections.abc import Sequence
from functools import lru_cache
from numbers import Integral
from pathlib import Path
from typing import NamedTuple

import torch
from avalanche.benchmarks.datasets import default_dataset_location
from avalanche.benchmarks.scenarios import CLScenario
from torch import Tensor
from torchvision.datasets import MNIST

from avalanche_sp.arguments import check_integer
from avalanche_sp.data.streams import permute_pixels, split_classes

# Avalanche's and torchvision's usual normalisation: mean and deviation of the training pixels.
_MEAN, _STD = torch.full((1, 1, 1), 0.1307), torch.full((1, 1, 1), 0.3081)


def split_mnist(
    n_experiences: int = 5,
    *,
    class_order: Sequence[int] | None = None,
    seed: int = 0,
    return_task_id: bool = False,
    class_ids_from_zero_in_each_exp: bool = False,
    dataset_root: str | Path | None = None,
    download: bool = False,
) -> CLScenario:
    """Split MNIST: the ten digits come in ``n_experiences`` groups of equal size.

    Class-incremental by default: labels stay 0-9 and every experience has task label 0. Images are
    normalised float32 tensors of shape (1, 28, 28), as in ``avalanche.benchmarks.SplitMNIST``; the
    streams are ``train_stream`` and ``test_stream``.

    Args:
        n_experiences: number of experiences: 1, 2, 5 or 10.
        class_order: the ten classes in their order of appearance. Default: 0 to 9, so that two
            experiences hold 0-4 and 5-9.
        seed: fixes the order of the samples within an experience (Avalanche's own builder leaves them
            sorted, which changes what EWC and MAS measure). The global random state is left alone.
        return_task_id: give experience i the task label i (task-incremental).
        class_ids_from_zero_in_each_exp: number the classes of every experience from 0 up, in ascending order of
            their digits, as a head for each task has them (``avalanche.benchmarks.nc_benchmark``'s argument).
        dataset_root: folder with ``MNIST/raw/*-ubyte``. Default: Avalanche's dataset folder.
        download: fetch MNIST into the folder if it isn't there.

    Raises:
        ValueError: an argument is not among the values above.
        FileNotFoundError: there is no MNIST in ``dataset_root`` and ``download`` is False.

    References:
        F. Zenke, B. Poole, S. Ganguli: Continual learning through synaptic intelligence, ICML 2017; G. van de Ven,
        A. Tolias: Three scenarios for continual learning, 2019.
    """
    if not isinstance(n_experiences, Integral) or n_experiences not in (1, 2, 5, 10):
        raise ValueError(f"Invalid n_experiences value: {n_experiences!r} (allowed: 1, 2, 5 or 10)")
    classes = list(range(10)) if class_order is None else [int(c) for c in class_order]
    if sorted(classes) != list(range(10)):
        raise ValueError(f"Invalid class_order value: {class_order} (allowed: the classes 0 to 9, each once)")
    train, test = _find_mnist(dataset_root, download)
    groups = torch.tensor(classes).chunk(n_experiences)
    return split_classes(
        train, test, groups, seed=seed, task_labels=return_task_id, from_zero=class_ids_from_zero_in_each_exp
    )


def permuted_mnist(
    n_experiences: int = 10,
    *,
    train_size: int | None = None,
    seed: int = 0,
    return_task_id: bool = False,
    dataset_root: str | Path | None = None,
    download: bool = False,
) -> CLScenario:
    """Permuted MNIST: the same ten digits, every experience with its own permutation of the pixels.

    Domain-incremental by default: one head, task label 0. The permutations are those of
    ``avalanche.benchmarks.PermutedMNIST(seed=seed)``; the first experience is permuted too.

    Args:
        n_experiences: number of experiences, at least 1.
        train_size: training images an experience, 1 to 60000, drawn independently for each. Default: all.
        seed: fixes the permutations, the draws and the order of the samples.
        return_task_id: give experience i the task label i (task-incremental).
        dataset_root: folder with ``MNIST/raw/*-ubyte``. Default: Avalanche's dataset folder.
        download: fetch MNIST into the folder if it isn't there.

    Raises:
        ValueError: an argument is not among the values above.
        FileNotFoundError: there is no MNIST in ``dataset_root`` and ``download`` is False.

    References:
        I. Goodfellow et al.: An empirical investigation of catastrophic forgetting in gradient-based
        neural networks, 2013; J. Kirkpatrick et al.: Overcoming catastrophic forgetting in neural
        networks, PNAS 2017.
    """
    check_integer("n_experiences value", n_experiences, 1)
    if train_size is not None:
        check_integer("train_size value", train_size, 1, 60000)
    train, test = _find_mnist(dataset_root, download)
    return permute_pixels(train, test, n_experiences, train_size=train_size, seed=seed, task_labels=return_task_id)


class _Part(NamedTuple):
    """MNIST's training or test images in a folder."""

    root: str
    download: bool
    number: int  # 0 is training, 1 is test

    def read(self) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        return *_read_mnist(self.root, self.download)[self.number], (_MEAN, _STD)


def _find_mnist(dataset_root: str | Path | None, download: bool) -> tuple[_Part, _Part]:
    """The training and the test images."""
    root = Path(default_dataset_location("mnist") if dataset_root is None else dataset_root).expanduser()
    if not download and not (root / "MNIST" / "raw" / "train-images-idx3-ubyte").exists():
        raise FileNotFoundError(
            f"Invalid dataset_root: no MNIST in {root} (expected {root}/MNIST/raw/train-images-idx3-ubyte "
            "and its three companions). Give the folder that holds MNIST/raw, or download=True to fetch it there."
        )
    return _Part(str(root.resolve()), download, 0), _Part(str(root.resolve()), download, 1)


@lru_cache(maxsize=2)  # the tensors are shared by every benchmark of a process, and never written to
def _read_mnist(root: str, download: bool) -> tuple[tuple[Tensor, Tensor], ...]:
    parts = (MNIST(root, train=train, download=download) for train in (True, False))
    return tuple((part.data.unsqueeze(1), part.targets) for part in parts)
