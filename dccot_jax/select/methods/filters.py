"""Filters: keep a group by what is known of it alone."""

from __future__ import annotations

from collections.abc import Sequence

from dccot_jax.select.candidates import Candidate, Selected, Setting, Step, partition, with_values


def none(candidates: Sequence[Candidate], step: Step, setting: Setting) -> Selected:
    """Keep all."""
    return list(candidates), {}


def teacher_correct(candidates: Sequence[Candidate], step: Step, setting: Setting) -> Selected:
    """Keep groups whose forward part was verified correct and no part of which was found wrong (Fine-tune-CoT, arXiv 2212.10071)."""

    def reason(c: Candidate) -> tuple[str, str] | None:
        if c.verdict is None:
            return "not_verified", f"teacher_correct: {c.verdict_reason or 'no verdict'}"
        return None if c.verdict else ("teacher_wrong", f"teacher_correct: {c.verdict_reason or 'wrong'}")

    return partition(candidates, reason)


def student_error(candidates: Sequence[Candidate], step: Step, setting: Setting) -> Selected:
    """Keep groups whose question the student answers wrongly."""
    scored, missing = with_values(candidates, "student_error")
    detail = ("student_correct", "student_error: the student answers this question correctly")
    kept, reasons = partition(scored, lambda c: None if c.values["student_error"] >= 0.5 else detail)
    return kept, missing | reasons


def threshold(candidates: Sequence[Candidate], step: Step, setting: Setting) -> Selected:
    """Keep `min` <= signal <= `max`."""
    name, low, high = step["signal"], step.get("min"), step.get("max")

    def reason(c: Candidate) -> tuple[str, str] | None:
        value = c.values[name]
        if low is not None and value < low:
            return f"{name}_below_min", f"threshold: {name} = {value:.6g} < {low:g}"
        if high is not None and value > high:
            return f"{name}_above_max", f"threshold: {name} = {value:.6g} > {high:g}"
        return None

    scored, missing = with_values(candidates, name)
    kept, reasons = partition(scored, reason)
    return kept, missing | reasons
