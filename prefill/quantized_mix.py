"""The file that says which layers' pages are finer and which coarser than their pool's kind. Reads and writes it.

A page mix (quantized_layout.py) belongs to a model as its weights do, and stands beside them as `page_mix.json`:
`{"int4": {"keys": [kind of each layer], "values": [...]}}`. `scripts/choose_page_mix.py` finds one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

from prefill.kv_layout import KVLayout
from prefill.quantized_layout import LayerKind, PageMix, QuantizedPagesUnsupported, check_mix

FILE_NAME = "page_mix.json"


def read_page_mix(model_folder: str | Path, kind: str, layout: KVLayout) -> PageMix | None:
    """The mix beside a model's weights for pools of this kind, or None. Raises `QuantizedPagesUnsupported`."""
    path = Path(model_folder) / FILE_NAME
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get(kind)
        mix = None if found is None else PageMix(keys=_kinds(found["keys"]), values=_kinds(found["values"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise QuantizedPagesUnsupported(f"{path} is no page mix ({error}): make it again or remove it") from error
    if mix is not None:
        check_mix(layout, mix)
    return mix


def _kinds(names: list[str]) -> tuple[LayerKind, ...]:
    known: dict[str, LayerKind] = {kind: kind for kind in get_args(LayerKind)}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"unknown kind {unknown[0]!r}")
    return tuple(known[name] for name in names)


def write_page_mix(model_folder: str | Path, kind: str, mix: PageMix) -> Path:
    """Beside the model's weights, whatever the file says of other kinds kept. Returns its path."""
    path = Path(model_folder) / FILE_NAME
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    content[kind] = {"keys": list(mix.keys), "values": list(mix.values)}
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")
    return path
