"""Writes what calibration measured as Markdown, with the same as JSON beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from codec.calibrate import Report
from codec.profile import Profile

_COLUMNS = (
    "kl",
    "delta_nll",
    "greedy_agreement",
    "recall",
    "text_kl",
    "text_delta_nll",
    "text_greedy_agreement",
)


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4f}"


def _level_row(name: str, bits: float, row: Mapping[str, Any]) -> str:
    ratio = f"{16 / bits:.1f}" if bits else ""
    cells = [name, f"{bits:.3f}", ratio, *(_number(row.get(c)) for c in _COLUMNS)]
    return "| " + " | ".join(cells) + " |"


def render(profile: Profile, report: Report, summary: Mapping[str, Any]) -> str:
    """The report's text."""
    made = profile.provenance
    on = [row for row in report.delta if row.is_on]
    lines = [
        f"# Profile of {made.get('model', 'a model')}",
        "",
        f"Profile `{profile.id}` for model fingerprint `{profile.fingerprint}`, made {made.get('made', '')} in "
        f"{summary['seconds']} s ({made.get('machine', '')}, one thread, torch {made.get('torch', '')}); "
        f"{summary['profile_bytes']} bytes.",
        "",
        "Every level was coded and decoded for real in chunks of 256 tokens, every byte counted, on documents that the "
        "calibration did not see. `kl` (nats a token against the uncompressed KV), `delta_nll` and `greedy_agreement` "
        "are over the answers' tokens of recall questions about the context; `text_*` are over tokens that continue "
        "plain text. "
        f"`control` drops all KV but the last 64 tokens: where it costs little, the measure proves little. "
        f"{made.get('questions', '')} questions.",
        "",
        "| level | bits a value | ratio | " + " | ".join(_COLUMNS) + " |",
        "|" + "---|" * (3 + len(_COLUMNS)),
        *(_level_row(row["level"], row["bits_per_value"], row) for row in report.levels),
        _level_row("control", 0.0, report.control),
        "",
        "## Rate against loss",
        "",
        "Steps allotted at a target rate (bits a value by entropy, no side information), on the calibration documents.",
        "",
        "| rate | " + " | ".join(_COLUMNS) + " |",
        "|" + "---|" * (1 + len(_COLUMNS)),
        *(f"| {row['rate']} | " + " | ".join(_number(row.get(c)) for c in _COLUMNS) + " |" for row in report.curve),
        "",
        "## Anchor delta: where it won, and why",
        "",
        "At the middle level. Deltas are taken between quantized values, so distortion is equal and only bits count. "
        f"On for {len(on)} of {len(report.delta)} (layer, K or V). A delta helps where tokens resemble their group's "
        "first one, that is where `delta/spread` (rms difference of neighbours over rms spread) is well under 1; "
        "independent tokens have 1.41.",
        "",
        "| layer | K/V | plain bits | best delta bits | group | delta/spread | on |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {r.layer} | {r.which} | {r.plain_bits:.3f} | {r.delta_bits:.3f} | {r.group} | "
            f"{r.delta_over_spread:.2f} | {'yes' if r.is_on else 'no'} |"
            for r in report.delta
        ),
        "",
        "## Sensitivity",
        "",
        "KL when one tensor alone is quantized at half its spread.",
        "",
        "| layer | K/V | head | kl |",
        "|---|---|---|---|",
        *(f"| {r['layer']} | {r['which']} | {r['head']} | {r['kl']:.5f} |" for r in report.probes),
        "",
    ]
    return "\n".join(lines)


def write_report(path: Path, profile: Profile, report: Report, summary: Mapping[str, Any]) -> None:
    """`path` (Markdown) and the same name with .json."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(profile, report, summary), encoding="utf-8")
    data = {
        **summary,
        "curve": report.curve,
        "delta": [r.to_dict() for r in report.delta],
        "probes": report.probes,
    }
    path.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
