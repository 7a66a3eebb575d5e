"""Matrices remembered roughly: four bits a number, or eight and sixteen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_LARGEST = 7  # four bits hold -7 to 7
_LARGEST_CODE = 127  # eight bits


@dataclass
class PackedRows:
    """Rows rounded to fifteen levels, evenly spaced up to each row's largest magnitude; two numbers a byte.

    Attributes:
        codes: (n, ceil(d / 2)), uint8: the first half of each row in the low bits, the second in the high ones.
        scale: (n, 1), the distance of two levels.
        columns: d.
    """

    codes: Tensor
    scale: Tensor
    columns: int

    @classmethod
    def of(cls, rows: Tensor) -> PackedRows:
        """Packs rows (n, d); an error is half a level at most."""
        scale = rows.abs().amax(1, keepdim=True) / _LARGEST
        levels = (rows / scale.clamp_min(torch.finfo(rows.dtype).tiny)).round() + _LARGEST + 1
        first, second = F.pad(levels.to(torch.uint8), (0, rows.shape[1] % 2)).chunk(2, dim=1)
        return cls(first | second << 4, scale, rows.shape[1])

    def unpacked(self) -> Tensor:
        """The rows (n, d)."""
        levels = torch.cat([self.codes & 15, self.codes >> 4], dim=1)[:, : self.columns]
        return levels.to(self.scale.dtype).sub_(_LARGEST + 1).mul_(self.scale)

    @property
    def state_bytes(self) -> int:
        return self.codes.numel() + self.scale.numel() * self.scale.element_size()


@dataclass
class PackedColumns:
    """Columns rounded to eight bits a number, and the last ones, which weigh most, to half precision.

    Attributes:
        codes: (n, r - k), int8: shares of each column's largest magnitude, in units of 1/127.
        precise: (n, k), float16: the same shares.
        scale: (1, r), each column's largest magnitude.
    """

    codes: Tensor
    precise: Tensor
    scale: Tensor

    @classmethod
    def of(cls, columns: Tensor, precise: int) -> PackedColumns:
        """Packs columns (n, r), of which the last ``precise`` are kept in half precision."""
        scale = columns.abs().amax(0, keepdim=True)
        shares = columns / scale.clamp_min(torch.finfo(columns.dtype).tiny)
        rough = max(columns.shape[1] - precise, 0)
        return cls((shares[:, :rough] * _LARGEST_CODE).round().to(torch.int8), shares[:, rough:].half(), scale)

    def unpacked(self) -> Tensor:
        """The columns (n, r)."""
        return torch.cat([self.codes.to(self.scale) / _LARGEST_CODE, self.precise.to(self.scale)], 1) * self.scale

    @staticmethod
    def bytes_of(rows: int, columns: int, precise: int) -> int:
        """Bytes of packed columns (rows, columns)."""
        return rows * (columns + min(columns, precise)) + 4 * columns

    @property
    def state_bytes(self) -> int:
        return self.codes.nbytes + self.precise.nbytes + self.scale.nbytes
