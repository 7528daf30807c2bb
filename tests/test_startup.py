"""What a command imports before it needs it, and programs that are compiled once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEAVY = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax",
    "grain",
    "transformers",
    "tokenizers",
    "datasets",
    "torch",
    "matplotlib",
    "sympy",
    "pandas",
)

_COMPILE = """
import json, sys
from dccot_jax import compile_cache
compile_cache._WORTH_SECONDS = 0.0
place = compile_cache.enable(sys.argv[1])
import jax, jax.numpy as jnp
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else None)
step = jax.jit(lambda x: jnp.tanh(x @ x) * 3, donate_argnums=0).lower(jax.ShapeDtypeStruct((8, 8), jnp.float32)).compile()
x = step(jnp.eye(8))
print(json.dumps({"place": str(place), "hits": len(hits), "sum": float(x.sum()), "memory": step.memory_analysis() is not None}))
"""


def _python(*words: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_and_the_package_import_nothing_heavy():
    report = f"import sys; print('heavy', [name for name in {HEAVY} if name in sys.modules])"
    assert _python("-c", f"import dccot_jax; {report}").strip() == "heavy []"
    assert _python("-c", f"from dccot_jax.cli import main; main(['--help']); {report}").strip().splitlines()[-1] == "heavy []"


def test_help_of_a_command_tells_its_flags_and_imports_nothing_heavy():
    from dccot_jax.cli import VERBS
    from dccot_jax.command_flags import FLAGS, STANDALONE

    verbs = [verb for verb in VERBS if verb not in STANDALONE]
    report = f"import sys; print('heavy', [name for name in {HEAVY} if name in sys.modules])"
    said = _python("-c", f"from dccot_jax.cli import main; [(print('==' + v), main([v, '--help'])) for v in {verbs}]; {report}")
    assert said.strip().splitlines()[-1] == "heavy []"
    for part, verb in zip(said.split("==")[1:], verbs, strict=True):
        assert part.startswith(f"{verb}\ndccot {verb} ")
        listed = {line.split("=")[0].split()[0] for line in part.split("Flags:")[1].splitlines() if line.startswith("  --")}
        assert listed == {f"--{flag.name}" for flag in FLAGS if verb in flag.verbs}
    assert {verb for flag in FLAGS for verb in flag.verbs} == set(VERBS)


def test_the_train_loop_imports_no_texts_library():
    names = ("transformers", "tokenizers", "datasets", "torch", "matplotlib", "sympy", "pandas")
    assert _python("-c", f"import dccot_jax.train.loop, sys; print([name for name in {names} if name in sys.modules])").strip() == "[]"


def test_a_second_process_loads_what_the_first_compiled(tmp_path):
    first, second = (json.loads(_python("-c", _COMPILE, str(tmp_path)).splitlines()[-1]) for _ in range(2))
    assert Path(first["place"]).parent == tmp_path and list(Path(first["place"]).iterdir())
    assert first["hits"] == 0 and second["hits"] > 0
    assert first["sum"] == second["sum"] and second["memory"]


def test_the_cache_can_be_turned_off_and_leaves_jax_settings_alone(tmp_path):
    say = "from dccot_jax import compile_cache; import jax; print(compile_cache.enable(), jax.config.jax_compilation_cache_dir)"
    assert _python("-c", say, DCCOT_COMPILE_CACHE="off").split() == ["None", "None"]
    own = str(tmp_path / "own")
    assert _python("-c", say, DCCOT_COMPILE_CACHE=str(tmp_path), JAX_COMPILATION_CACHE_DIR=own).split() == ["None", own]
    (tmp_path / "file").write_text("")
    assert _python("-c", say, DCCOT_COMPILE_CACHE=str(tmp_path / "file")).split() == ["None", "None"]
