"""Rows kept in four bits, and columns in eight and sixteen."""

import pytest
import torch

from avalanche_sp.gate.packed import PackedColumns, PackedRows


@pytest.mark.parametrize("columns", [1, 6, 7])
def test_an_error_is_half_a_level_at_most(columns):
    torch.manual_seed(0)
    rows = torch.randn(50, columns) * 10.0 ** torch.randint(-3, 4, (50, 1))
    packed = PackedRows.of(rows)
    level = rows.abs().amax(1, keepdim=True) / 7
    assert packed.unpacked().shape == rows.shape
    assert ((packed.unpacked() - rows).abs() <= level / 2 * 1.001).all()
    torch.testing.assert_close(PackedRows.of(packed.unpacked()).unpacked(), packed.unpacked())  # levels stay
    assert packed.state_bytes == 50 * ((columns + 1) // 2) + 50 * 4


def test_rows_of_zeros_and_extremes():
    rows = torch.tensor([[0.0, 0.0, 0.0], [-7.0, 7.0, 1.0], [1e-44, 0.0, -1e-44]])
    unpacked = PackedRows.of(rows).unpacked()
    assert torch.equal(unpacked[:2], rows[:2])
    assert unpacked.isfinite().all() and unpacked[2].abs().max() < 1e-43


@pytest.mark.parametrize("precise", [0, 2, 5, 9])
def test_the_last_columns_are_kept_in_half_precision_and_the_others_at_eight_bits(precise):
    torch.manual_seed(0)
    columns = torch.randn(50, 5) * torch.tensor([1e-3, 1e3, 1.0, 1e9, 0.0])  # half precision alone ends at 65504
    packed, rough = PackedColumns.of(columns, precise), max(5 - precise, 0)
    errors = (packed.unpacked() - columns).abs() / columns.abs().amax(0).clamp_min(1e-30)
    assert packed.unpacked().shape == columns.shape
    assert (errors[:, :rough] <= 0.501 / 127).all() and (errors[:, rough:] <= 2**-11).all()
    assert packed.state_bytes == PackedColumns.bytes_of(50, 5, precise) == 50 * (rough + 2 * (5 - rough)) + 4 * 5
