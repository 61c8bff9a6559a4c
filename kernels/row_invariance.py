"""Does a matrix product give a row the same bits, however many rows there are? Measured, here and now.

Arithmetic only. Matrix libraries choose a kernel by shape, and only some sum in the same order in all of them:
oneDNN's bf16 kernels do on every CPU seen so far, MKL's float32 ones do not for one to three rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

MULTIPLES = (1, 4, 16, 64)
# Around the block sizes of matrix kernels (4, 6, 16, 32, 48, 64), and what the engine's callers like to use.
ROW_COUNTS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 47, 48, 49, 64, 65, 100, 128, 192, 256, 300, 512)


def differing_row_counts(product: Callable[[Tensor], Tensor], rows: Tensor, counts: Iterable[int]) -> list[int]:
    """Those of `counts` for which `product(rows[..., :count, :])` differs from the product of all rows in any bit.
    Each is tried at the first and at the last rows."""
    expected = product(rows)
    total = rows.shape[-2]
    return [
        count
        for count in counts
        if not torch.equal(product(rows[..., :count, :].contiguous()), expected[..., :count, :])
        or not torch.equal(product(rows[..., total - count :, :].contiguous()), expected[..., total - count :, :])
    ]


def least_row_multiple(products: Iterable[tuple[Callable[[Tensor], Tensor], Tensor]]) -> int | None:
    """The least of `MULTIPLES` such that row counts that are multiples of it agree in all `products`
    (each with its own example rows); None if none does."""
    products = list(products)
    for multiple in MULTIPLES:
        counts = sorted({-(-count // multiple) * multiple for count in ROW_COUNTS})
        if not any(
            differing_row_counts(product, rows, [c for c in counts if c <= rows.shape[-2]])
            for product, rows in products
        ):
            return multiple
    return None
