"""Adapters and distillation in the config: what is refused, by which words, and what counts for a run's identity."""

from __future__ import annotations

import pytest
from training_cases import TINY

from dccot_jax import config as config_lib
from dccot_jax.config import ConfigError
from dccot_jax.config_identity import config_slice
from dccot_jax.preflight import check
from dccot_jax.train.adapters import trained_model
from dccot_jax.train.settings import LORA_PRESETS, lora_settings


def test_presets_are_the_papers():
    """DC-CoT (arXiv 2505.18759): rank 16, α 32 on q and v; rank 32, α 64 on every matrix. Both scale by 2."""
    assert LORA_PRESETS == {
        "r16_qv": {"rank": 16, "alpha": 32.0, "targets": ("q_proj", "v_proj")},
        "r32_all": {"rank": 32, "alpha": 64.0, "targets": ("all-linear",)},
    }
    matrices = {"r16_qv": {"wq", "wv"}, "r32_all": {"wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down"}}
    for name, targets in matrices.items():
        train = config_lib.override(config_lib.default_config(), {"train.lora.preset": name}).train
        lora = trained_model(TINY, train).lora
        assert lora is not None and set(lora.targets) == targets and lora.scale == 2.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train.lora.preset": "r16_qw"}, ["train.lora.preset", "r16_qw", "did you mean 'r16_qv'"]),
        ({"train.lora.preset": "r16_qv", "train.lora.rank": 8}, ["train.lora.rank", "8", "preset"]),
        ({"train.lora.rank": 8}, ["train.lora.targets", "empty", "q_proj"]),
        ({"train.lora.rank": 8, "train.lora.targets": ("q_prj",)}, ["q_prj", "did you mean 'q_proj'"]),
        ({"train.lora.dropout": 0.1}, ["train.lora.rank", "0"]),
        ({"train.distill.kind": "kl"}, ["train.distill.kind", "forward_kl"]),
        ({"train.distill.kind": "jsd"}, ["train.distill.teacher", "give both"]),
        ({"train.distill.kind": "jsd", "train.distill.teacher": "x", "train.distill.beta": 1.0}, ["train.distill.beta", "reverse_kl"]),
        ({"train.distill.top_k": 32}, ["train.distill.top_k", "32", "none"]),
        (
            {"train.distill.kind": "jsd", "train.distill.teacher": "x", "train.distill.top_k": -1},
            ["train.distill.top_k", "-1", "at least 1"],
        ),
        ({"train.distill.top_k_dtype": "float61"}, ["train.distill.top_k_dtype", "float16"]),
    ],
)
def test_what_cannot_work_is_named(changes, words):
    with pytest.raises(ConfigError) as caught:
        check(config_lib.override(config_lib.default_config(), changes), devices=False)
    for word in words:
        assert word in str(caught.value)


def test_adapters_count_with_the_seed_they_are_drawn_by_and_nothing_changes_without_them():
    plain = config_lib.default_config()
    later = ("train.lora", "train.distill", "seed")
    assert not [name for name in config_slice(plain, ("train",)) if name.startswith(later)]
    chosen = config_lib.override(plain, {"train.lora.preset": "r32_all", "seed": 5})
    check(chosen, devices=False)
    assert config_slice(chosen, ("train",))["seed"] == 5
    assert lora_settings(chosen.train) == {"rank": 32, "alpha": 64.0, "targets": ("all-linear",), "dropout": 0.0}
