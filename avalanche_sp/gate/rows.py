"""Which rows of a mini-batch come from the stream, and which are stored samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StreamRows:
    """The stream's samples in a mini-batch.

    Attributes:
        batch: number of samples in the mini-batch.
        count: number of them that come from the stream.
        rows: their places: a slice, or indices in a tensor.
    """

    batch: int
    count: int
    rows: slice | Tensor

    @classmethod
    def unlike(cls, stored: Tensor | Sequence[bool]) -> StreamRows:
        """All rows that are not stored samples.

        Args:
            stored: True for each row of the mini-batch that is a stored sample, shape (batch,).

        Raises:
            ValueError: it is not a list of truth values.
        """
        mask = torch.as_tensor(stored)
        if mask.dim() != 1 or mask.dtype != torch.bool:
            raise ValueError(
                f"Invalid stored value: shape {tuple(mask.shape)}, {mask.dtype} (allowed: a truth value for each row "
                "of the mini-batch)"
            )
        places = (~mask).nonzero().flatten()
        count = len(places)
        if count and int(places[-1]) - int(places[0]) + 1 == count:  # next to each other: views, no copies
            return cls(len(mask), count, slice(int(places[0]), int(places[-1]) + 1))
        return cls(len(mask), count, places)

    def of(self, x: Tensor) -> Tensor:
        """The stream's part of a layer's input or output; a sample may have several rows, in sequence.

        Raises:
            ValueError: it is of another mini-batch, whose size differs.
        """
        if self.count == self.batch:
            return x
        if not self.count:
            return x[:0]
        if len(x) % self.batch:
            raise ValueError(
                f"Invalid stored value: {self.batch} truth values for a mini-batch of {len(x)} (allowed: one for each "
                "row of the mini-batch)"
            )
        each = len(x) // self.batch
        if isinstance(self.rows, slice):
            return x[self.rows.start * each : self.rows.stop * each]
        return x.unflatten(0, (self.batch, each))[self.rows.to(x.device)].flatten(0, 1)
