"""Decorrelating transforms of one head's channels: Karhunen-Loeve, Fisher-weighted, Hadamard. Pure, numpy.

Row vectors, as in codec/levels.py: y = (x - mean) @ analysis, x = mean + y @ synthesis. Analysis columns have length 1,
so y keeps x's unit. All are built in float64; files hold them as 16-bit integers with an exponent a row, and everybody
uses what the file says.

With errors weighed by F (KL = 1/2 e F e, e a row of errors), the best transform at fine steps is the KLT in the space
where F is the identity: S = F^(1/2), Q the KLT of S C S, analysis S Q, synthesis Q' S^-1, one step for all channels.

Sources: Goyal, "Theoretical foundations of transform coding" (2001); KVTC (ICLR 2026) for KLT on KV.
Legend: D channels, C covariance, F Fisher information: [D, D] symmetric, not negative.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray
PACKED_MAX = 32767
LEAST_EXPONENT = -80


def regularised(f: Array, reg: float, floor: float = 0.0) -> Array:
    """F with `reg` times its mean diagonal, and at least `floor`, added to the diagonal: an estimate from finitely many
    scores calls some directions free that are not."""
    dim = f.shape[-1]
    extra = np.maximum(reg * np.trace(f, axis1=-2, axis2=-1) / dim, floor)
    out: Array = f + extra[..., None, None] * np.eye(dim) if f.ndim > 2 else f + extra * np.eye(dim)
    return out


def _eigen(a: Array) -> tuple[Array, Array]:
    """Eigenvalues and vectors (columns), largest first, each vector's largest entry positive: the same everywhere."""
    values, vectors = np.linalg.eigh((a + a.T) / 2)
    values, vectors = values[::-1], vectors[:, ::-1]
    lead = np.abs(vectors).argmax(axis=0)
    return np.maximum(values, 0), vectors * np.sign(vectors[lead, np.arange(len(lead))])


def klt(c: Array) -> tuple[Array, Array]:
    """Covariance [D, D] -> (analysis, synthesis), orthonormal, most varying channel first."""
    _, vectors = _eigen(c)
    return vectors, vectors.T


def fisher_klt(c: Array, f: Array, reg: float) -> tuple[Array, Array]:
    """The KLT where errors weigh f + reg * its mean diagonal; not orthogonal. reg 0 if f is regularised already."""
    values, vectors = _eigen(regularised(f, reg))
    root = np.sqrt(np.maximum(values, 1e-12 * max(float(values[0]), 1e-30)))
    weigh, unweigh = (vectors * root) @ vectors.T, (vectors / root) @ vectors.T
    _, q = _eigen(weigh @ c @ weigh)
    return unit_columns(weigh @ q, q.T @ unweigh)


def unit_columns(analysis: Array, synthesis: Array) -> tuple[Array, Array]:
    """The same pair with analysis columns of length 1."""
    length = np.linalg.norm(analysis, axis=0)
    return analysis / length, synthesis * length[:, None]


def hadamard(dim: int) -> tuple[Array, Array]:
    """Orthonormal +-1 mixing, in blocks of the largest powers of two that fit."""
    out = np.zeros((dim, dim))
    at = 0
    while at < dim:
        size = 1 << ((dim - at).bit_length() - 1)
        block = np.ones((1, 1))
        while len(block) < size:
            block = np.block([[block, block], [block, -block]])
        out[at : at + size, at : at + size] = block / np.sqrt(size)
        at += size
    return out, out.T


def sensitivity(synthesis: Array, f: Array) -> Array:
    """[D] what an error of each channel of y costs: row_j F row_j."""
    out: Array = np.einsum("ji,ik,jk->j", synthesis, f, synthesis)
    return out


def sort_channels(analysis: Array, synthesis: Array, spread_in_steps: Array) -> tuple[Array, Array, Array]:
    """-> the pair with its channels by spread over step, largest first, and that order."""
    order = np.argsort(-spread_in_steps, kind="stable")
    return np.ascontiguousarray(analysis[:, order]), np.ascontiguousarray(synthesis[order]), order


def apply_ordered(x: Array, matrix: Array) -> Array:
    """x [T, I] @ matrix [I, J] as the format defines it: float32, i ascending, multiply, round, add, round."""
    x, matrix = x.astype(np.float32), matrix.astype(np.float32)
    out = np.zeros((len(x), matrix.shape[1]), np.float32)
    for i in range(matrix.shape[0]):
        out += x[:, i : i + 1] * matrix[i]
    return out


def pack_matrix(matrix: Array) -> tuple[Array, Array]:
    """[.., I, J] -> int16 [.., I, J] and exponents int8 [.., I]: entry = integer * 2^exponent of its row. Packing what
    was unpacked gives the same."""
    largest = np.abs(matrix).max(axis=-1, initial=0).astype(np.float64)
    exponent = np.ceil(np.log2(np.maximum(largest, 2.0**-60) / PACKED_MAX)).astype(np.int64)
    exponent += largest > np.ldexp(float(PACKED_MAX), exponent)
    exponent -= largest <= np.ldexp(float(PACKED_MAX), exponent - 1)
    exponent = np.maximum(exponent, LEAST_EXPONENT)
    packed = np.rint(np.ldexp(matrix.astype(np.float64), -exponent[..., None])).astype(np.int16)
    return packed, exponent.astype(np.int8)


def unpack_matrix(packed: Array, exponent: Array) -> Array:
    """Inverse of pack_matrix, float32, exact."""
    out: Array = np.ldexp(packed.astype(np.float32), exponent.astype(np.int32)[..., None])
    return out


def as_stored(analysis: Array) -> tuple[Array, Array]:
    """(analysis, synthesis) as they come back from a file: synthesis inverts the analysis as it was stored."""
    stored = unpack_matrix(*pack_matrix(analysis))
    inverse = np.linalg.inv(stored.astype(np.float64))
    return stored, unpack_matrix(*pack_matrix(inverse))


def inverse_error(analysis: Array, synthesis: Array) -> float:
    """The largest entry of analysis @ synthesis - 1: what a row loses without quantization, as a share of its largest
    value times D."""
    product = analysis.astype(np.float64) @ synthesis.astype(np.float64)
    return float(np.abs(product - np.eye(len(product))).max())
