"""The file that says which layers' pages are finer and which coarser than their pool's kind. Reads and writes it.

A page mix (quantized_layout.py) belongs to a model as its weights do, and stands beside them as `page_mix.json`:
`{"int4": {"keys": [kind of each layer], "values": [...], "kl": what it loses}}`. `scripts/choose_page_mix.py` finds one
and measures it, as calibration measures the codec's levels: nats a token, beside KV in the model's dtype.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, get_args

from prefill.kv_layout import KVLayout
from prefill.quantized_layout import LayerKind, PageMix, QuantizedPagesUnsupported, check_mix

FILE_NAME = "page_mix.json"


def read_page_mix(model_folder: str | Path, kind: str, layout: KVLayout) -> PageMix | None:
    """The mix beside a model's weights for pools of this kind, or None. Raises `QuantizedPagesUnsupported`."""
    found = _entry(model_folder, kind)
    if found is None:
        return None
    try:
        mix = PageMix(keys=_kinds(found["keys"]), values=_kinds(found["values"]))
    except (ValueError, KeyError, TypeError) as error:
        raise _unreadable(model_folder, error) from error
    check_mix(layout, mix)
    return mix


def read_page_kl(model_folder: str | Path, kind: str) -> float | None:
    """What pages of this kind lose with that mix, nats a token; None if nobody measured it. Raises
    `QuantizedPagesUnsupported`."""
    found = _entry(model_folder, kind)
    if found is None or found.get("kl") is None:
        return None
    try:
        kl = float(found["kl"])
    except (ValueError, TypeError) as error:
        raise _unreadable(model_folder, error) from error
    if not 0 <= kl < math.inf:
        raise _unreadable(model_folder, f"a loss of {kl}")
    return kl


def _entry(model_folder: str | Path, kind: str) -> dict[str, Any] | None:
    path = Path(model_folder) / FILE_NAME
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get(kind)
    except (ValueError, AttributeError) as error:
        raise _unreadable(model_folder, error) from error
    if not isinstance(found, dict | None):
        raise _unreadable(model_folder, f"{kind} is no mapping")
    return found


def _unreadable(model_folder: str | Path, why: object) -> QuantizedPagesUnsupported:
    path = Path(model_folder) / FILE_NAME
    return QuantizedPagesUnsupported(f"{path} is no page mix ({why}): make it again or remove it")


def _kinds(names: list[str]) -> tuple[LayerKind, ...]:
    known: dict[str, LayerKind] = {kind: kind for kind in get_args(LayerKind)}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"unknown kind {unknown[0]!r}")
    return tuple(known[name] for name in names)


def write_page_mix(model_folder: str | Path, kind: str, mix: PageMix, kl: float | None = None) -> Path:
    """Beside the model's weights, whatever the file says of other kinds kept. kl: what it loses, if that was measured.
    Returns its path."""
    path = Path(model_folder) / FILE_NAME
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    content[kind] = {"keys": list(mix.keys), "values": list(mix.values)} | ({} if kl is None else {"kl": kl})
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")
    return path
