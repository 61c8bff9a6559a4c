"""What a query reads quantized, and what quantized pages cost in bytes. Pure arithmetic on positions and shapes.

A block is 32 tokens and one group of keys (kernels/kv_quant_reference.py). A query at position `p` reads the keys
before `boundary(p)` quantized and those from there on, the 32 to 63 before it and its own, in the model's dtype:

    p         0 .. 63    64 .. 95    96 .. 127   ...
    boundary  0          32          64          ...

The rule looks at positions only, so what a query sees does not depend on how its prompt was cut or on its company.
The recent tokens of a sequence live in a ring of 64: token `t` at `t % 64`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from prefill.kv_layout import KVLayout

Kind = Literal["int8", "int4", "fp8"]
KINDS: tuple[Kind, ...] = get_args(Kind)
BLOCK_TOKENS = 32
RECENT_TOKENS = 32  # at least so many before a query are read as they were computed
RING_TOKENS = 64
LayerKind = Literal["int8", "int4", "int2", "fp8"]
CODE_BITS: dict[LayerKind, int] = {"int8": 8, "int4": 4, "int2": 2, "fp8": 8}


class QuantizedPagesUnsupported(ValueError):
    """The model's KV cannot be kept in such pages; the text says why and what can."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PageMix:
    """The kind of each layer's keys and values, [L] each. A few layers can carry nearly all that quantizing costs (in
    the bundled model the keys of the first two): a mix gives those more bits and takes them from others."""

    keys: tuple[LayerKind, ...]
    values: tuple[LayerKind, ...]

    @property
    def mean_bits(self) -> float:
        """Of a code, keys and values of equal dims."""
        return sum(CODE_BITS[kind] for kind in (*self.keys, *self.values)) / len(self.keys + self.values)


def uniform(layout: KVLayout, kind: LayerKind) -> PageMix:
    return PageMix(keys=(kind,) * layout.num_layers, values=(kind,) * layout.num_layers)


def check_mix(layout: KVLayout, mix: PageMix) -> None:
    """Raises `QuantizedPagesUnsupported`."""
    for name, kinds, dim in (("keys", mix.keys, layout.head_dim_k), ("values", mix.values, layout.head_dim_v)):
        if len(kinds) != layout.num_layers:
            raise QuantizedPagesUnsupported(
                f"the page mix has {len(kinds)} layers of {name}, and the model has {layout.num_layers}: "
                "it is of another model, make it again or remove it"
            )
        for kind in kinds:
            if dim * CODE_BITS[kind] % 8:
                raise QuantizedPagesUnsupported(
                    f"{kind} pages need head dims that fill whole bytes, and this model's {name} have {dim}: use int8"
                )


def boundary(position: int) -> int:
    """The first key that a query at `position` reads unquantized."""
    return max(0, (position - RECENT_TOKENS) // BLOCK_TOKENS * BLOCK_TOKENS)


def settled_tokens(num_tokens: int) -> int:
    """How many of a sequence's first tokens its last query reads quantized, and so have to be in pages."""
    return boundary(max(num_tokens - 1, 0))


def blocks_for(num_tokens: int) -> int:
    """How many blocks a sequence of so many tokens needs. The last 33 to 64 tokens are in its ring alone."""
    return settled_tokens(num_tokens) // BLOCK_TOKENS


def check_kind(layout: KVLayout, kind: str, mix: PageMix | None = None) -> Kind:
    """Raises `QuantizedPagesUnsupported`."""
    for known in KINDS:
        if kind == known:
            check_mix(layout, mix or uniform(layout, known))
            return known
    raise QuantizedPagesUnsupported(f"{kind!r} is no kind of quantized pages: use one of {', '.join(KINDS)}")


def block_bytes(layout: KVLayout, kind: Kind, mix: PageMix | None = None) -> int:
    """One block's codes, scales and zeros, of all layers. `mix`: where layers differ from `kind`."""
    mix = mix or uniform(layout, kind)
    keys = sum(_side_bytes(layout.head_dim_k, each, layout.head_dim_k) for each in mix.keys)
    values = sum(_side_bytes(layout.head_dim_v, each, BLOCK_TOKENS) for each in mix.values)
    return layout.num_kv_heads * (keys + values)


def _side_bytes(head_dim: int, kind: LayerKind, num_groups: int) -> int:
    """A block's keys or values of one head."""
    codes = BLOCK_TOKENS * head_dim * CODE_BITS[kind] // 8
    return codes + (4 if kind == "fp8" else 4 * num_groups)  # a float32 scale; a float16 scale and zero each


def ring_bytes(layout: KVLayout) -> int:
    """One sequence's recent tokens."""
    return RING_TOKENS * layout.bytes_per_token


def sequence_bytes(layout: KVLayout, kind: Kind, num_tokens: int, mix: PageMix | None = None) -> int:
    """All that a sequence of so many tokens takes."""
    return blocks_for(num_tokens) * block_bytes(layout, kind, mix) + ring_bytes(layout)
