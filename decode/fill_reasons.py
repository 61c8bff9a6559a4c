"""What the controller writes into a receipt: its plans in words. Pure."""

from __future__ import annotations

from decode.plan import Plan


def plan_in_words(plan: Plan, *, left_s: float, floor: str, bytes_per_s: float) -> str:
    """For example `load at q3 first, then refine to q1: 56 ms predicted, 112 ms left (in time), link 36.4 Mbit/s`."""
    at = f"at {plan.level}"
    if plan.first_level == floor != plan.level:
        at = f"at {plan.first_level} first, then refine to {plan.level}"
    how = f"compute {plan.compute_chunks} from the front, load the others" if plan.compute_chunks else "load"
    verdict = "in time" if plan.meets_target else "as fast as possible"
    return (
        f"{how} {at}: {plan.predicted_s * 1e3:.0f} ms predicted, {left_s * 1e3:.0f} ms left ({verdict}), "
        f"link {bytes_per_s * 8e-6:.1f} Mbit/s"
    )


def why_infeasible(plan: Plan, *, left_s: float, floor: str) -> str:
    """Why a request is refused whose policy says so, and what to do."""
    return (
        f"The first token cannot be in time: the KV takes {plan.predicted_s * 1e3:.0f} ms at the coarsest level "
        f"allowed ({floor}), {left_s * 1e3:.0f} ms are left. Allow a longer time to the first token, a coarser "
        "floor, or `infeasible: best_effort` in the policy"
    )
