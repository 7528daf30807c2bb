"""The TPU compiler's figures beside the analytic ones; needs libtpu (extra `aot`), no TPU. Each compilation takes a minute or two."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from dccot_jax import config as config_lib
from dccot_jax.cli import main
from dccot_jax.estimate.aot import over_full
from dccot_jax.estimate.assess import assess

STUDENTS = Path(__file__).parent.parent / "configs" / "students"
GIB = 2**30


def test_the_compilers_refusal_is_read():
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 21.30G of 15.75G hbm. Exceeded hbm capacity by 5.55G."
    assert over_full(message) == int(21.3 * GIB)
    assert over_full("Used 900.50M of 15.75G hbm") == int(900.5 * 2**20)
    newer = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO temporaries (16.71G) "
        "exceeds available HBM (15.75G). HLO module: jit_step."
    )
    assert over_full(newer) == int(16.71 * GIB)
    assert over_full("INTERNAL: Mosaic failed") is None


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_libtpu_aot_says_what_to_install(capsys):
    config = Path(__file__).parent.parent / "configs" / "quickstart.py"
    assert main(["estimate", f"--config={config}", "--topology=v5e-16", "--aot"]) == 2
    assert "pip install -e '.[aot]'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("student", "topology", "changes"),
    [
        ("qwen2.5-0.5b", "v5e-16", {}),
        ("qwen2.5-0.5b", "v5e-16", {"train.remat": "dots", "train.rows_per_step": 256}),  # does not fit
        ("llama-3.1-8b", "v5e-16", {"train.rows_per_step": 32, "train.microbatches": 2}),
    ],
)
def test_analytic_figures_are_near_the_compilers(student, topology, changes):
    """With the attention that the trainer takes there, which is in the program."""
    pytest.importorskip("libtpu")
    settings = {"student.path": str(STUDENTS / student), "compute_dtype": "bfloat16", "train.row_tokens": 4096} | changes
    result = assess(config_lib.override(config_lib.default_config(), settings), topology, compile_for=True)
    memory, compiler = result["memory"], result["compiler"]
    assert result["training"]["attention"] == "splash"
    assert compiler["fits"] == result["fits"]
    assert memory["allocated"] == pytest.approx(compiler["allocated"], rel=0.15)
    if compiler["fits"]:
        assert memory["arguments"] == pytest.approx(compiler["arguments"], rel=0.01)
        assert memory["total"] == pytest.approx(compiler["total"], rel=0.15)
