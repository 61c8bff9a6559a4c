"""Writes what calibration measured as Markdown, with the same as JSON and a rate-distortion picture beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from codec.calibrate import BOUNDS, MARGIN, PROMISE_MARGIN, Report
from codec.profile import Profile

_LEVEL_COLUMNS = {
    "kl": "worst KL", "answers_far_kl": "KL answers", "answers_far_kl_error": "±", "text_far_kl": "KL text",
    "text_far_kl_error": "±",
}  # fmt: skip
_ALL_COLUMNS = {
    "recall": "recall", "answers_kl": "KL answers", "answers_delta_nll": "Δnll answers",
    "answers_delta_nll_error": "±", "text_kl": "KL text", "text_delta_nll": "Δnll text", "text_delta_nll_error": "±",
    "answers_greedy_agreement": "greedy answers", "text_greedy_agreement": "greedy text",
}  # fmt: skip
_AUDIT_COLUMNS = (
    "chunk_entropy", "chunk_entropy_unbiased", "entropy", "nested_entropy", "coded", "exceptions", "states", "sent",
    "overhead", "nesting_cost",
)  # fmt: skip


def _number(value: Any, digits: int = 4) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def _promise(value: float | None) -> str:
    return "" if value is None else f"≤ {value:g}" if value else "exact"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def audit_rows(profile: Profile, report: Report) -> list[dict[str, Any]]:
    """The audit's rows, finest first, with what was sent in all and how much that is over the chunks' entropy."""
    rows = []
    for name, row in zip(BOUNDS, reversed(report.audit), strict=True):
        sent = profile.bits_per_value[name]
        rows.append({"level": name, **row, "sent": sent, "overhead": sent - row["chunk_entropy"]})
    return rows


def _levels(profile: Profile, report: Report) -> list[str]:
    rows = [*report.levels, {"level": "control", "bits_per_value": 0.0, **report.control}]

    def first(row: Mapping[str, Any]) -> list[str]:
        bits = row["bits_per_value"]
        return [row["level"], f"{bits:.3f}", f"{16 / bits:.1f}" if bits else ""]

    promised = _table(
        ["level", "bits a value", "ratio", "promise", *_LEVEL_COLUMNS.values()],
        [[*first(r), _promise(r.get("promise")), *(_number(r.get(c)) for c in _LEVEL_COLUMNS)] for r in rows],
    )
    rest = _table(
        ["level", "bits a value", "ratio", *_ALL_COLUMNS.values()],
        [[*first(r), *(_number(r.get(c)) for c in _ALL_COLUMNS)] for r in rows],
    )
    return [
        "Tokens that depend on the far context:", "", *promised, "", "All scored tokens:", "", *rest,
    ]  # fmt: skip


def _audit(profile: Profile, report: Report) -> list[str]:
    return [
        "## Where the bits go, and what nesting costs",
        "",
        "Bits a value on the judged documents. `chunk_entropy`: of each channel in each chunk by its own counts, "
        "`_unbiased` with Miller and Madow's correction (256 tokens are few for many values); `entropy`: of each "
        "channel over all documents, at once or `nested` in stages; `coded`: what the profile's tables spend, with "
        "`exceptions`; `states` of the lanes; `sent`: every byte; `overhead`: sent less chunk_entropy. "
        "`nesting_cost`: what is coded against the level's integers at once with a codebook of their own, as a share.",
        "",
        *_table(
            ["level", *_AUDIT_COLUMNS],
            [[row["level"], *(_number(row[c]) for c in _AUDIT_COLUMNS)] for row in audit_rows(profile, report)],
        ),
        "",
    ]


def _decisions(report: Report) -> list[str]:
    decisions = report.decisions
    names = list(dict.fromkeys(name for d in decisions for name in d.bits))
    groups = list(dict.fromkeys(group for d in decisions for group in d.delta_bits))
    on = sum(d.group > 0 for d in decisions)
    return [
        "## Which steps are on, and why",
        "",
        "Bits a value (mean over the levels) at equal Fisher-weighted distortion, learned on half of the documents and "
        "judged on the other. Keys before RoPE unless `after`. `per token`: one step a token as CacheGen has it, for "
        "comparison; the format has none. A matrix costs decoding time and has to save 3 %. As stored (16 bits an "
        f"entry), the pairs invert each other but for {report.inverse_error:.1e} an entry.",
        "",
        *_table(
            ["layer", "K/V", *names, "on"],
            [[str(d.layer), d.which, *(_number(d.bits.get(n), 2) for n in names), d.chosen] for d in decisions],
        ),
        "",
        f"Anchor deltas (bits a value of all stages, by group; 0: none) are on for {on} of {len(decisions)}. Deltas "
        "are taken between quantized values, so distortion is equal. They help where tokens resemble their group's "
        "first, that is where `delta/spread` (rms difference of neighbours over rms spread) is well under 1; "
        "independent tokens have 1.41.",
        "",
        *_table(
            ["layer", "K/V", *map(str, groups), "delta/spread", "group"],
            [
                [str(d.layer), d.which, *(_number(d.delta_bits.get(g), 3) for g in groups),
                 _number(d.delta_over_spread, 2), str(d.group)]
                for d in decisions
            ],
        ),
        "",
    ]  # fmt: skip


def render(profile: Profile, report: Report, summary: Mapping[str, Any], picture: str) -> str:
    """The report's text."""
    made = profile.provenance
    curve = ["kl", "answers_far_kl", "text_far_kl", "text_delta_nll", "recall"]
    lines = [
        f"# Profile of {made.get('model', 'a model')}",
        "",
        f"Profile `{profile.id}` for model fingerprint `{profile.fingerprint}`, made {made.get('made', '')} in "
        f"{summary['seconds']} s ({made.get('machine', '')}, {made.get('threads', '')} threads, torch "
        f"{made.get('torch', '')}); {summary['profile_bytes']} bytes.",
        "",
        "Every level was coded and decoded for real in chunks of 256 tokens, every byte counted, on documents that "
        "calibration did not see. KL in nats a token against the uncompressed KV. *Answers*: of recall questions about "
        "the context, half of them about names that the bundled model never saw, so that it is unsure; *text*: tokens "
        "that continue plain text. A token depends on the far context if dropping all but the last 64 tokens of "
        "context moves its log-probability by more than 0.1 nat. A promise bounds the mean KL of such tokens, for "
        f"answers and text alike: {PROMISE_MARGIN:g} times the worst measured, here or on the documents that the steps "
        "were chosen on, rounded up to 1, 2, 3 or 5 of a power of ten; the rest is as measured. `control` drops all KV "
        "but the last 64 tokens: it must break every promise. ± are standard errors by documents. Judged on: "
        f"`{json.dumps(made.get('judged_on', {}))}`.",
        "",
        *_levels(profile, report),
        "",
        f"![bits against loss]({picture})",
        "",
        *_audit(profile, report),
        "## Rate against loss",
        "",
        f"All steps are c over the root of a channel's sensitivity; one c, {report.scale:.4g} at the coarsest level "
        f"and a third of that at each finer one. It is the largest where {MARGIN:g} times the KL on the calibration "
        f"documents is within {', '.join(f'{bound:g}' for bound in BOUNDS.values())} at {', '.join(BOUNDS)}. "
        f"Regularisation of the Fisher information: {report.reg} (bits a value at equal cost: "
        f"{', '.join(f'{r}: {b:.3f}' for r, b in report.regs.items())}).",
        "",
        *_table(["c", *curve], [[_number(r["scale"]), *(_number(r.get(x), 5) for x in curve)] for r in report.curve]),
        "",
        *_decisions(report),
        "## Sensitivity",
        "",
        "What replacing a head's K or V by its mean would cost to second order (1/2 tr(F C)), nats a token.",
        "",
        *_table(
            ["layer", "K/V", "head", "nats"],
            [[str(r["layer"]), r["which"], str(r["head"]), _number(r["kl"])] for r in report.sensitivity],
        ),
        "",
    ]
    return "\n".join(lines)


def draw(path: Path, report: Report) -> None:
    """Bits a value against KL, judged; with the promises."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in report.levels if row["level"] in BOUNDS]
    bits = [row["bits_per_value"] for row in rows]
    figure, axes = plt.subplots(figsize=(5, 3.4), dpi=100)
    for name, label in (("answers_far_kl", "answers"), ("text_far_kl", "text")):
        if all(name in row for row in rows):
            axes.plot(bits, [max(row[name], 1e-7) for row in rows], "o-", label=label)
    axes.plot(bits, [row["promise"] for row in rows], "k_", markersize=14, label="promise")
    for row in rows:
        axes.annotate(
            row["level"], (row["bits_per_value"], row["promise"]), (0, 5), textcoords="offset points", ha="center"
        )
    axes.set(xscale="log", yscale="log", xlabel="bits a value (bf16: 16)", ylabel="KL, nats a depending token")
    axes.set_xticks(bits, [f"{b:.2f}" for b in bits])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def write_report(path: Path, profile: Profile, report: Report, summary: Mapping[str, Any]) -> None:
    """`path` (Markdown) and the same name with .json and .png."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = path.with_suffix(".png")
    draw(picture, report)
    path.write_text(render(profile, report, summary, picture.name), encoding="utf-8")
    data = {
        **summary,
        "audit": audit_rows(profile, report),
        "curve": report.curve,
        "scale": report.scale,
        "reg": report.reg,
        "decisions": [decision.to_dict() for decision in report.decisions],
        "sensitivity": report.sensitivity,
    }
    path.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
