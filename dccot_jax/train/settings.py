"""What ``train.lora`` and ``train.distill`` may hold, and what they mean."""

from __future__ import annotations

from typing import Any

from dccot_jax.config import DTYPES, ConfigError, nearest

# What DC-CoT (arXiv 2505.18759) trains its students with.
LORA_PRESETS = {
    "r16_qv": {"rank": 16, "alpha": 32.0, "targets": ("q_proj", "v_proj")},
    "r32_all": {"rank": 32, "alpha": 64.0, "targets": ("all-linear",)},
}
STORED_DTYPES = ("float16", "float32")
DIVERGENCES = ("none", "forward_kl", "reverse_kl", "jsd")
LORA_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "all-linear")


def lora_settings(train: Any) -> dict[str, Any] | None:
    """rank, alpha, dropout and targets of ``train.lora`` with its preset filled in; None: all weights are trained."""
    lora = train.lora
    chosen = (
        LORA_PRESETS[lora.preset] if lora.preset else {"rank": lora.rank, "alpha": lora.alpha or 2.0 * lora.rank, "targets": lora.targets}
    )
    return {**chosen, "targets": tuple(chosen["targets"]), "dropout": lora.dropout} if chosen["rank"] else None


def check_lora(train: Any) -> None:
    """Raises ConfigError at the first field of ``train.lora`` that cannot work."""
    lora = train.lora
    if lora.preset and lora.preset not in LORA_PRESETS:
        raise ConfigError(
            f"config.train.lora.preset: {lora.preset!r} is not one of {', '.join(LORA_PRESETS)}{nearest(lora.preset, tuple(LORA_PRESETS))}"
        )
    for name in ("rank", "alpha", "targets") if lora.preset else ():
        if lora[name]:
            raise ConfigError(
                f"config.train.lora.{name}: {lora[name]!r} beside the preset {lora.preset!r}, which fixes it; give one of them"
            )
    for name, most in (("rank", None), ("alpha", None), ("dropout", 1.0)):
        if lora[name] < 0 or (most is not None and lora[name] >= most):
            raise ConfigError(f"config.train.lora.{name}: {lora[name]} must be at least 0{'' if most is None else f' and below {most}'}")
    if lora.rank and not lora.targets:
        raise ConfigError(f"config.train.lora.targets: empty; name some of {', '.join(LORA_MODULES)}, e.g. ('q_proj', 'v_proj')")
    for name in lora.targets:
        if name not in LORA_MODULES:
            raise ConfigError(f"config.train.lora.targets: {name!r} is not one of {', '.join(LORA_MODULES)}{nearest(name, LORA_MODULES)}")
    if (lora.targets or lora.alpha or lora.dropout) and not (lora.rank or lora.preset):
        raise ConfigError("config.train.lora.rank: 0 trains all weights; adapters need a rank, e.g. 16, or a preset")
    if lora.frozen_dtype not in DTYPES:
        raise ConfigError(f"config.train.lora.frozen_dtype: {lora.frozen_dtype!r} is not one of {', '.join(DTYPES)}")


def check_distill(train: Any) -> None:
    """Raises ConfigError at the first field of ``train.distill`` that cannot work."""
    distill = train.distill
    for name, accepted in (("kind", DIVERGENCES), ("teacher_dtype", DTYPES), ("top_k_dtype", STORED_DTYPES)):
        if distill[name] not in accepted:
            raise ConfigError(
                f"config.train.distill.{name}: {distill[name]!r} is not one of {', '.join(accepted)}{nearest(distill[name], accepted)}"
            )
    if (distill.kind == "none") != (not distill.teacher):
        raise ConfigError(
            f"config.train.distill.teacher: {distill.teacher!r} does not go with train.distill.kind = {distill.kind!r};"
            " give both or neither"
        )
    if not 0.0 < distill.weight <= 1.0:
        raise ConfigError(f"config.train.distill.weight: {distill.weight} must lie in (0, 1]")
    if not distill.temperature > 0.0:
        raise ConfigError(f"config.train.distill.temperature: {distill.temperature} must be above 0")
    if distill.top_k < 0 or (distill.top_k and distill.kind == "none"):
        raise ConfigError(
            f"config.train.distill.top_k: {distill.top_k} does not go with train.distill.kind = {distill.kind!r};"
            " it must be 0 (the teacher runs beside the student), or at least 1 with a kind and a teacher"
        )
    if not 0.0 < distill.beta < 1.0:
        raise ConfigError(f"config.train.distill.beta: {distill.beta} must lie in (0, 1); its ends are forward_kl and reverse_kl")
