"""What a level is, and how calibration says a model's KV is to be coded: plain data. Pure, numpy.

Quality comes in *stages*: stage 0 is the coarsest quantizer, each further stage splits every bin in three. A lossy
level is a number of stages, so one encoding serves all of them. Legend: L layers, H KV heads, D head dim, M stages,
n tables, P matrices.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from codec.entropy import CodeBook


class LevelKind(IntEnum):
    """How a level's blobs are coded. The numbers are in the bitstream."""

    RAW = 0  # the plain bytes
    LOSSLESS = 1  # exponents entropy coded, sign and mantissa plain
    QUANTIZED = 2  # unrotated (keys), centred, perhaps decorrelated, quantized, perhaps delta coded, entropy coded


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """A name for a kind; stages: how many of the profile's, for quantized levels."""

    name: str
    kind: LevelKind
    stages: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TensorPlan:
    """How one of K, V is coded, found by calibration.

    mean, step [L, H, D] float32, bf16 values: of the coded channels at the last (finest) stage; means are of x itself.
    is_turned [L] bool: keys are unrotated first. group [L] int64: anchor group in tokens, 0 = off.
    matrix [L, H] int64: which of analysis and synthesis [P, D, D] float32 decorrelates a head, -1 = none:
    y = (x - mean) @ analysis, x = mean + y @ synthesis.
    active [M, L, H] int64: leading channels coded at each stage. index [L, H, 2, D] uint8: base table of each
    channel, [.., 1, :] for deltas. refine [M - 1, L, H, D] uint8: refinement table of each channel at stages 1 up.
    """

    mean: np.ndarray
    step: np.ndarray
    is_turned: np.ndarray
    group: np.ndarray
    matrix: np.ndarray
    analysis: np.ndarray
    synthesis: np.ndarray
    active: np.ndarray
    index: np.ndarray
    refine: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Lossy:
    """The ladder of quantized levels. `k` and `v` are None where statistics travel in each blob ("shipped").

    codebook: base tables. cuts [M - 1, n, 3, 2] uint16: refinement tables. step_factor, if shipped: the finest step as
    a multiple of the segment's typical channel spread.
    """

    num_stages: int
    codebook: CodeBook
    cuts: np.ndarray
    k: TensorPlan | None = None
    v: TensorPlan | None = None
    step_factor: float = 0.0

    @property
    def is_shipped(self) -> bool:
        return self.k is None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Lossless:
    """The tables of one dtype's coded byte. k, v [L, H, D] uint8: each channel's table; None: shipped."""

    codebook: CodeBook
    k: np.ndarray | None = None
    v: np.ndarray | None = None

    @property
    def is_shipped(self) -> bool:
        return self.k is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """What calibration measured for a level against the uncompressed model; None where nothing was measured.

    kl: a bound on nats a token on tokens that depend on the context. delta_nll: nats a token. greedy_agreement and
    recall_drop: shares of 1.
    """

    kl: float | None = None
    delta_nll: float | None = None
    greedy_agreement: float | None = None
    recall_drop: float | None = None


EXACT = Promise(kl=0.0, delta_nll=0.0, greedy_agreement=1.0, recall_drop=0.0)
