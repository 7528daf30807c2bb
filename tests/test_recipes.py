"""Every selection recipe is a config that validates, and says where it comes from, what it costs and what it keeps."""

from __future__ import annotations

import ast
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from dccot_jax.cli import main
from dccot_jax.data.tokenizer import embedded_tokenizer_dir, load_tokenizer
from dccot_jax.model.config import ModelConfig
from dccot_jax.model.hf import save_hf
from dccot_jax.model.sharding import make_mesh
from dccot_jax.select.selectors import RULES
from dccot_jax.train.checkpoint import random_params

RECIPES = sorted((Path(__file__).parent.parent / "configs" / "select").glob("*.py"))


def test_the_recipes_are_there():
    assert len(RECIPES) >= 20


@pytest.fixture(scope="module", autouse=True)
def other_model(tmp_path_factory):
    """A Hugging Face directory for the recipes that compare the student with another model."""
    tokenizer, folder = tmp_path_factory.mktemp("tokenizer"), tmp_path_factory.mktemp("other")
    embedded_tokenizer_dir(tokenizer)
    mc = ModelConfig("llama", len(load_tokenizer(tokenizer)), 32, 64, 1, 2, 1, 16, tie_embeddings=True, max_positions=1024)
    save_hf(random_params(mc, make_mesh({"fsdp": -1}), 1), mc, tokenizer, folder)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DCCOT_HOLDOUT", "DCCOT_REFERENCE", "DCCOT_TEACHER"):
            patch.setenv(name, str(folder))
        yield


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_validates_and_is_documented(path, capsys):
    assert main(["validate", f"--config={path}"]) == 0, capsys.readouterr().err
    assert f"select_{path.stem}: " in capsys.readouterr().out
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert text and all(f"\n{word}: " in text for word in ("Source", "Cost", "Keeps"))


def test_every_selector_has_a_recipe():
    """Beside those that are parts of others, not methods: see the list."""
    used = {name for path in RECIPES for name in RULES if f'"name": "{name}"' in path.read_text()}
    assert set(RULES) - used == {"none", "gumbel_topk", "pareto"}


@pytest.mark.slow
def test_every_recipe_selects(tmp_path, capsys):
    """On a tiny task and student, one folder for all: shared stages run once."""
    settings = ["student.model.hidden_size=32", "student.model.intermediate_size=64", "student.model.num_layers=2"]
    settings += ["traces.questions=100", "score.warmup.steps=8", "train.rows_per_step=8", "evaluate.max_new_tokens=24"]
    for path in RECIPES:
        command = ["run", f"--config={path}", f"--workdir={tmp_path}", "--until=select", *(f"--config.{s}" for s in settings)]
        assert main(command) == 0, (path.stem, capsys.readouterr().err)
    kept = [pq.read_table(file).num_rows for file in tmp_path.glob("artifacts/select-*/kept.parquet")]
    assert len(kept) == len(RECIPES) and min(kept) > 0
