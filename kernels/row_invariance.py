"""Does a matrix product give a row the same bits, however many rows there are? Measured, here and now.

Arithmetic only. Matrix libraries choose a kernel by shape, and only some kernels sum in the same order. Seen with
torch 2.13: oneDNN's bf16 differs for a single row at depth 4,096 on Zen 4 (not at 256 to 1,024), and for a single row
at every depth where the CPU has AVX-512 but no bf16 instructions; MKL's float32 differs for one to three rows.

Random matrices hardly show it: rounding the result to bf16 hides all but one in 10,000 differences. So the
examples here cancel: every product meets its negative, the exact sum is 0, and what comes out is nothing but the
rounding errors of the order taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

Product = Callable[[Tensor, Tensor], Tensor]

MULTIPLES = (1, 2, 4, 16, 64)
# Around the block sizes of matrix kernels (4, 6, 16, 32, 48, 64), and what the engine's callers like to use.
ROW_COUNTS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 47, 48, 49, 64, 65, 100, 128, 192, 256, 300, 512)


def cancelling_example(
    rows: int, depth: int, columns: int, *, dtype: torch.dtype, batch: int | None = None, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """[rows, depth] and [depth, columns], with a batch dimension before both if given, whose product is 0."""
    generator = torch.Generator().manual_seed(seed)
    lead = () if batch is None else (batch,)
    order = torch.randperm(2 * (depth // 2), generator=generator)
    left = torch.randn(*lead, rows, depth // 2, generator=generator)
    right = torch.randn(*lead, depth // 2, columns, generator=generator)
    left = torch.cat((left, -left), dim=-1)[..., order]
    right = torch.cat((right, right), dim=-2)[..., order, :]
    missing = depth - len(order)
    left = torch.nn.functional.pad(left, (0, missing))
    right = torch.nn.functional.pad(right, (0, 0, 0, missing))
    return left.to(dtype), right.to(dtype)


def differing_row_counts(product: Product, left: Tensor, right: Tensor, counts: Iterable[int]) -> list[int]:
    """Those of `counts` for which the product of only so many rows of `left` [..., R, K], the first or the last,
    differs in any bit from the same rows of the whole product."""
    expected = product(left, right)
    total = left.shape[-2]
    different = []
    for count in counts:
        for first in {0, total - count}:
            rows = slice(first, first + count)
            if not torch.equal(product(left[..., rows, :].contiguous(), right), expected[..., rows, :]):
                different.append(count)
                break
    return different


def least_row_multiple(examples: Iterable[tuple[Product, Tensor, Tensor]]) -> int | None:
    """The least of `MULTIPLES` such that all row counts that are multiples of it agree in all products, or None."""
    examples = list(examples)
    for multiple in MULTIPLES:
        counts = sorted({-(-count // multiple) * multiple for count in ROW_COUNTS})
        if not any(
            differing_row_counts(product, left, right, [c for c in counts if c <= left.shape[-2]])
            for product, left, right in examples
        ):
            return multiple
    return None
