"""A KV receipt as a readable account: was the target met, where did the time go, what came when and why. Pure.

    for line in account(receipt, width=100): console.print(line)

Fields that are null (a request that failed, was cancelled, or had nothing to load) are left out or shown as `-`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from rich.text import Text

from scripts.explain_timeline import LEGEND, STYLES, Axis, Row, chunk_rows, chunks_per_row, tail_row

PARTS = {
    "queue": "waited for room",
    "open": "until a source answered",
    "fill": "until the last chunk was in place",
    "refine": "spent on better levels before the first token",
    "tail": "the end of the prompt, and the first token",
}
MAX_REASONS = 24
MIN_WIDTH, MIN_BAR = 60, 16
MAX_LEVELS_WIDTH = 24
_SAME_MS = 0.01  # parts are rounded to a thousandth each


class NotAReceipt(ValueError):
    """What was given is no KV receipt; the text says why."""


def read_receipt(value: Any) -> dict[str, Any]:
    """A receipt, or the one inside a whole answer. Raises NotAReceipt."""
    if isinstance(value, dict) and isinstance(value.get("kv_receipt"), dict):
        value = value["kv_receipt"]
    if not isinstance(value, dict):
        raise NotAReceipt("it is not a JSON object")
    missing = [name for name in ("request_id", "ttft_parts_ms", "chunks") if name not in value]
    if missing:
        raise NotAReceipt(f"it has no `{missing[0]}`")
    if not isinstance(value["ttft_parts_ms"], dict) or not _are_objects(value["chunks"]):
        raise NotAReceipt("`ttft_parts_ms` is an object in a receipt, and `chunks` a list of objects")
    if not _are_objects(value.get("reasons") or []):
        raise NotAReceipt("`reasons` is a list of objects in a receipt")
    return value


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def account(receipt: Mapping[str, Any], *, width: int = 100, how_to_ask: str = "") -> list[Text]:
    """The lines, none longer than `width` (60 at least). how_to_ask: options that `kvstream explain` needs again."""
    width = max(width, MIN_WIDTH)
    sections = [
        [_verdict(receipt), *_what(receipt, width)],
        _parts(receipt, width),
        _timeline(receipt, width),
        _reasons(receipt, width),
        [*_quality(receipt, width), *_totals(receipt, width)],
        _again(receipt, width, how_to_ask),
    ]
    lines: list[Text] = []
    for section in sections:
        if section:
            lines += [*([Text()] if lines else []), *section]
    return lines


def _verdict(receipt: Mapping[str, Any]) -> Text:
    ttft_ms, target_ms = receipt.get("ttft_ms"), receipt.get("target_ms")
    if ttft_ms is None:
        why = receipt.get("ended") or "the request failed or was cancelled before it."
        return Text(f"No first token: {why}", style="bold red")
    after_ms = ttft_ms - (receipt["ttft_parts_ms"].get("queue") or 0.0)
    took = f"first token {_ms(after_ms)} after admission"
    if not target_ms or target_ms <= 0:
        return Text(f"No target, as fast as possible: {took}.", style="bold")
    gap_ms = target_ms - after_ms
    if gap_ms >= 0:
        return Text(f"Met its target of {_ms(target_ms)}: {took}, {_ms(gap_ms)} early.", style="bold green")
    return Text(f"Missed its target of {_ms(target_ms)}: {took}, {_ms(-gap_ms)} late.", style="bold red")


def _what(receipt: Mapping[str, Any], width: int) -> list[Text]:
    chunks = receipt["chunks"]
    facts = [f"request {receipt['request_id']}"]
    if receipt.get("prompt_tokens") is not None:
        cut = f"{receipt['prompt_tokens']:,} prompt tokens"
        if chunks:
            cut += (
                f" in {len(chunks)} chunks of {receipt.get('chunk_tokens')} and a tail of {receipt.get('tail_tokens')}"
            )
        facts.append(cut)
    if receipt.get("partial_tokens"):
        facts.append(f"{receipt['partial_tokens']:,} tokens from a part of a stored chunk")
    if receipt.get("kv_mode") not in (None, "auto"):
        facts.append(f"mode {receipt['kv_mode']}")
    sources = receipt.get("sources") or ([receipt["source"]] if receipt.get("source") else [])
    facts.append(f"from {' and '.join(map(str, sources))}" if sources else "no source: all computed here")
    if receipt.get("link_mbps") is not None:
        facts.append(f"link {receipt['link_mbps']:,.1f} Mbit/s at the end")
    if receipt.get("live_prefill"):
        facts.append("a source computed some of it meanwhile")
    return _wrapped("; ".join(facts) + ".", width)


def _parts(receipt: Mapping[str, Any], width: int) -> list[Text]:
    parts, whole_ms = receipt["ttft_parts_ms"], receipt.get("ttft_ms")
    if all(value is None for value in parts.values()):
        return []
    lines = [_title("Time to first token", "" if whole_ms is None else _ms(whole_ms))]
    for name, what in PARTS.items():
        value = parts.get(name)
        share = value / whole_ms if value is not None and whole_ms else None
        line = f"  {name:<7}{'-' if value is None else _ms(value):>11}"
        line += f"{'' if share is None else f'{share:.0%}':>6}  "
        bar = "#" * round((share or 0.0) * 20)
        lines.append(_cut(f"{line}{bar:<20}  {what}", width))
    known = [value for value in parts.values() if value is not None]
    if whole_ms is not None and len(known) == len(parts):
        sum_ms = sum(known)
        if abs(sum_ms - whole_ms) > _SAME_MS:
            lines.append(Text(f"  they add up to {_ms(sum_ms)}, not to {_ms(whole_ms)}", style="bold red"))
        else:
            lines.append(Text(f"  {'sum':<7}{_ms(sum_ms):>11}"))
    return lines


def _timeline(receipt: Mapping[str, Any], width: int) -> list[Text]:
    chunks = receipt["chunks"]
    if not chunks:
        return []
    rows = chunk_rows(chunks, Axis.of(receipt, MIN_BAR))  # how wide the other columns are
    levels_width = min(MAX_LEVELS_WIDTH, max(5, *(len(row.levels) for row in rows)))
    source_names = dict.fromkeys(chunk["source"] for chunk in chunks if chunk.get("source") is not None)
    sources_width = max(6, *(len(row.sources) for row in rows)) if len(source_names) > 1 else 0
    fixed = len(_columns(rows[0], levels_width, sources_width))
    axis = Axis.of(receipt, max(MIN_BAR, width - fixed))
    rows = chunk_rows(chunks, axis)
    per_row = chunks_per_row(len(chunks))
    folded = f"{per_row} a row: bytes in all, times the mean" if per_row > 1 else ""
    head = f"  {'chunk':<9}{'level':<{levels_width}} "
    head += f"{'source':<{sources_width}} " if sources_width else ""
    head += f"{'bytes':>11}{'wait':>7}{'wire':>7}{'decode':>7}{'compute':>8}  "
    lines = [_title("Chunks, times in ms", folded), Text(_clip(head + axis.ruler(), width), style="dim")]
    tail = tail_row(receipt, axis)
    for row in [*rows, *([tail] if tail else [])]:
        line = Text(_columns(row, levels_width, sources_width))
        for cell in row.bar.rstrip():
            line.append(cell, style=STYLES.get(cell, ""))
        lines.append(line)
    legend = "  ".join(f"{symbol} {what}" for symbol, what in LEGEND.items())
    return [*lines, *_wrapped(f"{legend}.  level: at the first token|at the end", width, style="dim")]


def _columns(row: Row, levels_width: int, sources_width: int) -> str:
    source = f"{row.sources:<{sources_width}} " if sources_width else ""
    times = f"{_cell(row.wait_ms):>7}{_cell(row.wire_ms):>7}{_cell(row.decode_ms):>7}{_cell(row.compute_ms):>8}"
    size = "" if row.num_bytes is None else f"{row.num_bytes:,}"
    levels = f"{_clip(row.levels, levels_width):<{levels_width}}"
    return f"  {row.name:<9}{levels} {source}{size:>11}{times}  "


def _reasons(receipt: Mapping[str, Any], width: int) -> list[Text]:
    reasons = receipt.get("reasons") or []
    if not reasons:
        return []
    decisions = receipt.get("num_decisions")
    lines = [_title("What the controller decided, and why", f"{decisions} plans looked at" if decisions else "")]
    half = MAX_REASONS // 2
    for i, reason in enumerate(reasons):
        if len(reasons) > MAX_REASONS and half <= i < len(reasons) - half:
            if i == half:
                lines.append(Text(f"  {'':>9}   {len(reasons) - 2 * half} more, see --json", style="dim"))
            continue
        at = reason.get("at_ms")
        at_text = f"  {'-' if at is None else _ms(at):>11}  "
        lines += _wrapped(str(reason.get("what")), width, indent=at_text)
    return lines


def _quality(receipt: Mapping[str, Any], width: int) -> list[Text]:
    is_quantized = receipt.get("kv_cache_dtype") in ("int8", "int4", "fp8")
    if receipt.get("ttft_ms") is None:
        return []
    worst, mean = receipt.get("promised_kl"), receipt.get("mean_promised_kl")
    if worst is None:
        text = "not known: a level was used for which nothing was measured (see `kvstream calibrate`)"
    elif worst == 0:
        text = "exact: every chunk was computed or came without loss"
        if is_quantized:
            text = f"every chunk was computed or came without loss, and stood in {receipt['kv_cache_dtype']} pages"
    else:
        text = f"the worst level used promises a KL divergence of at most {worst:.3g} nats a token"
        if mean is not None:
            text += f"; {mean:.3g} as a mean over all chunks"
        text += ". A bound on the mean over many tokens"
    lines = _wrapped(text + ".", width, indent=_label("Quality"))
    pages = receipt.get("quality")
    if isinstance(pages, dict) and (worst != 0 or is_quantized):
        first, end, rest = (_loss(pages.get(at)) for at in ("at_first_token", "at_end", "generated_on"))
        text = f"pages of the chunks: {first} at the first token, {end} at the end; tail and answer rest on {rest}."
        lines += _wrapped(text, width, indent=_label(""))
    return lines


def _loss(kl: float | None) -> str:
    return "no promise" if kl is None else "exact" if kl == 0 else f"{kl:.3g}"


def _totals(receipt: Mapping[str, Any], width: int) -> list[Text]:
    if not receipt["chunks"]:
        return []
    used, refined = receipt.get("bytes") or 0, receipt.get("refined_bytes") or 0
    facts = [f"{used:,} {'of chunks in place' if receipt.get('ttft_ms') is None else 'for the first token'}"]
    if refined:
        facts.append(f"{refined:,} to refine after it")
    in_vain = (receipt.get("received_bytes") or 0) - used - refined
    if in_vain > 0:
        facts.append(f"{in_vain:,} not used")
    lines = _wrapped(", ".join(facts) + ".", width, indent=_label("Bytes"))
    in_part = receipt.get("chunks_in_part") or 0
    if in_part:
        unseen = sum(chunk.get("layers") == 0 for chunk in receipt["chunks"])
        text = f"{in_part} of {len(receipt['chunks'])} chunks in part: sliding windows have left the other layers"
        text += f"; of {unseen} of these nothing was needed." if unseen else "."
        lines += _wrapped(text, width, indent=_label("Layers"))
    levels = _counts(receipt.get("levels"))
    at_end = _counts(receipt.get("levels_at_end"))
    text = levels if at_end in ("", levels) else f"{levels} at the first token, {at_end} at the end"
    return [*lines, *(_wrapped(f"{text}.", width, indent=_label("Levels")) if levels else [])]


def _again(receipt: Mapping[str, Any], width: int, how_to_ask: str) -> list[Text]:
    plan = receipt.get("plan")
    if not isinstance(plan, dict):
        return []
    command = " ".join(filter(None, ("kvstream explain", how_to_ask or str(receipt["request_id"]), "--plan-only")))
    text = (
        "send the same prompt with this plan as `kv.plan`: the same chunks, computed, loaded and refined alike, give "
        "the same KV at every token."
    )
    steps = len(plan.get("refinements") or ())
    what = f"with {steps} refinement{'s' if steps > 1 else ''} after the first token" if steps else ""
    return [
        _title("To have it again", what),
        *_wrapped(text, width, indent="  "),
        Text(f"  plan=$({_printable(command)})"),
        Text("""  curl URL/v1/completions -H 'content-type: application/json' \\"""),
        Text("""    -d '{"prompt": "...", "max_tokens": 32, "kv": {"plan": '"$plan"'}}'"""),
    ]


def _counts(levels: Any) -> str:
    return ", ".join(f"{count} {level}" for level, count in levels.items()) if isinstance(levels, dict) else ""


def _title(text: str, more: str = "") -> Text:
    title = Text(text, style="bold")
    return title.append(f"  {more}", style="not bold dim") if more else title


def _label(text: str) -> str:
    return f"{text:<9}"


def _ms(value: float) -> str:
    return f"{value:,.1f} ms"


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.1f}"


def _clip(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 2] + ".."


def _cut(text: str, width: int) -> Text:
    return Text(_clip(text.rstrip(), width))


def _wrapped(text: str, width: int, *, indent: str = "", style: str = "") -> list[Text]:
    """Lines of at most `width`; those after the first stand below the text of the first."""
    found = textwrap.wrap(
        _printable(text), width, initial_indent=indent, subsequent_indent=" " * len(indent), break_on_hyphens=False
    )
    return [Text(line, style=style) for line in found]


def _printable(text: str) -> str:
    """Without control characters: some of the words are a source's."""
    return "".join(char if char.isprintable() else "?" for char in text)
