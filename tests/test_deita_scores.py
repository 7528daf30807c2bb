"""DEITA's expected grade against float64 on the prompt alone, and the tokens of its six digits."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from etils import epath
from reference_decoder import reference_logits
from rich.console import Console
from test_score_engine import Fake, tokens_table
from test_score_items import TEXTS, rows_of

from dccot_jax import config as config_lib
from dccot_jax.artifact import Artifact, ArtifactWriter
from dccot_jax.config import ConfigError
from dccot_jax.context import Context
from dccot_jax.data.tokenizer import load_tokenizer, train_tokenizer, write_tokenizer
from dccot_jax.model.config import ModelConfig
from dccot_jax.model.hf import save_hf
from dccot_jax.model.sharding import make_mesh, param_shardings, weight_shapes
from dccot_jax.records import make_trace, traces_to_table
from dccot_jax.select import deita_scores, engine
from dccot_jax.select.views import plan_tiles
from dccot_jax.train.checkpoint import Student

NAMES = ("deita_complexity", "deita_quality")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    prompts = list(config_lib.default_config().score.deita.values())
    write_tokenizer(folder, train_tokenizer([text for row in TEXTS for text in row] * 3 + [str(p) for p in prompts], vocab_size=320))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def traces():
    made = []
    for question, target, gold in TEXTS:
        made.append(make_trace(task="toy", split="train", question=question, target=target, gold_answer=gold, answer_type="number"))
    part = {"part": "backward_question", "group_id": made[0].group_id}
    return [*made, make_trace(task="toy", split="train", question="Turn it round.", target="Ann has x pens.", **part)]


def weights(mc, seed):
    rng = np.random.default_rng(seed)
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(lambda shape: (0.4 * rng.normal(size=shape)).astype(np.float32), weight_shapes(mc), is_leaf=is_shape)


def expected(host, mc, ids, digits):
    """sum_k k softmax(z)_k over the six digits, float64."""
    z = np.asarray(reference_logits(host, mc, np.asarray(ids)))[-1, list(digits)]
    p = np.exp(z - z.max())
    return float(np.arange(1, 7) @ (p / p.sum()))


def test_grades_equal_float64_in_chat_and_in_plain_text(folder, tokenizer, traces, monkeypatch, tmp_path):
    mc = ModelConfig("llama", len(tokenizer), 16, 32, 1, 2, 1, 8, tie_embeddings=True, max_positions=400)
    grader = ModelConfig("llama", len(tokenizer), 24, 32, 2, 2, 1, 8, tie_embeddings=False, max_positions=500)
    mesh = make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    host, other = weights(mc, 0), weights(grader, 1)
    save_hf(jax.device_put(other, param_shardings(grader, mesh)), grader, folder, tmp_path / "grader")
    config = json.loads((tmp_path / "grader" / "tokenizer_config.json").read_text())
    (tmp_path / "grader" / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "chat_template"}))
    (tmp_path / "grader" / "chat_template.jinja").unlink(missing_ok=True)  # a trained grader has no chat template

    monkeypatch.setattr(engine, "make_mesh", lambda _: mesh)
    monkeypatch.setattr(engine, "load_tokenizer", lambda _: tokenizer)
    about = {"tokenizer_dir": epath.Path(folder), "eos_id": 1, "stop_ids": (1,), "pad_id": 0, "source": "test"}
    placed = jax.device_put(host, param_shardings(mc, mesh))
    monkeypatch.setattr(engine, "load_student", lambda *_: Student(mc=mc, params=placed, **about))

    def run(name, **changes):
        settings = {"score.signals": NAMES} | {f"score.deita.{key}": value for key, value in changes.items()}
        given = {
            "tokenize": Fake({"tokens": tokens_table(rows_of(tokenizer, traces))}),
            "verify": Fake({"traces": traces_to_table(traces)}),
            "student": Fake({}),
        }
        cfg, out = config_lib.override(config_lib.default_config(), settings), ArtifactWriter(tmp_path / name)
        result = engine.run(cfg, given, out, Context(tmp_path, console=Console(quiet=True)))
        return cfg, {row["id"]: row for row in Artifact(out.path, {}).table("scores").to_pylist()}, result

    def check(cfg, found, models, encode):
        for signal, (parameters, shape) in models.items():
            template = cfg.score.deita[f"{signal.removeprefix('deita_')}_prompt"]
            for trace in traces[:-1]:
                ids = encode(template.replace("{question}", trace.question).replace("{response}", trace.target))
                digits = [encode(f"x{k}")[-1] for k in range(1, 7)]
                assert found[trace.id][signal] == pytest.approx(expected(parameters, shape, ids, digits), abs=2e-5)
                assert 1 <= found[trace.id][signal] <= 6
            assert found[traces[-1].id][signal] == found[traces[0].id][signal]  # a part takes its forward part's

    def chat(text):
        shown = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        return tokenizer.encode(text, add_special_tokens=False) if text[0] == "x" else tokenizer.encode(shown, add_special_tokens=False)

    cfg, found, result = run("chat")
    check(cfg, found, dict.fromkeys(NAMES, (host, mc)), chat)
    assert result.facts["deita_quality"]["grader"] == "student" and result.facts["deita_quality"]["graded"] == len(TEXTS)
    assert len({row["deita_quality"] for row in found.values()}) == len(TEXTS)

    plain = {"chat": False, "complexity_prompt": "Query: {question} Complexity:", "quality_model": str(tmp_path / "grader")}
    cfg, found, result = run("plain", **plain)
    check(cfg, found, {NAMES[0]: (host, mc), NAMES[1]: (other, grader)}, lambda text: tokenizer.encode(text, add_special_tokens=False))
    assert result.facts["deita_quality"]["grader"].endswith("grader")


def test_a_prompt_too_long_for_the_grader_drops_the_row(tokenizer, traces):
    cfg = config_lib.override(config_lib.default_config(), {"score.signals": NAMES})
    rows, uses, dropped, digits = deita_scores.grader_rows("deita_quality", cfg, traces, tokenizer, 10_000)
    assert len(digits) == 6 and not dropped and len(uses) == len(traces)
    limit = sorted(len(row.input_ids) for row in rows)[-2]
    rows, uses, dropped, _ = deita_scores.grader_rows("deita_quality", cfg, traces, tokenizer, limit)
    assert {d.reason for d in dropped} == {"exceeds_positions"} and len(rows) == len(TEXTS) - 1
    assert set(uses) | {d.id for d in dropped} == {t.id for t in traces}


def test_fields_are_filled_once():
    assert deita_scores.fill("a {question} b {response} {x}", "{response}", r"\1 {question}") == r"a {response} b \1 {question} {x}"


def test_a_digit_must_be_one_token_after_the_prompt(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(["grade:4"] * 20, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    merging = PreTrainedTokenizerFast(tokenizer_object=model)
    with pytest.raises(ConfigError, match="'4' as one token"):
        deita_scores.digit_tokens(merging, "{question} grade:", chat=False)
    assert len(set(deita_scores.digit_tokens(merging, "{question} grade: ", chat=False))) == 6


def test_prompts_hold_what_they_grade():
    cfg = config_lib.override(
        config_lib.default_config(), {"score.signals": ("deita_quality",), "score.deita.quality_prompt": "{question}?"}
    )
    with pytest.raises(ConfigError, match=r"score.deita.quality_prompt: '\{question\}\?' has no \{response\}"):
        deita_scores.check_prompts(cfg)
    assert deita_scores.grader_models(cfg) == {"deita_quality": ""}


@pytest.mark.parity
def test_grades_equal_those_of_a_torch_model(folder, tokenizer, traces, tmp_path):
    """As the published scorer does: logits of the first new token, the six digits' softmax times 1..6."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    mc = ModelConfig("llama", len(tokenizer), 24, 32, 2, 2, 1, 8, tie_embeddings=False, max_positions=500)
    mesh = make_mesh({"fsdp": 1}, jax.devices()[:1])
    params = jax.device_put(weights(mc, 1), param_shardings(mc, mesh))
    save_hf(params, mc, folder, tmp_path / "grader")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "grader", dtype=torch.float32)
    cfg = config_lib.override(config_lib.default_config(), {"score.signals": NAMES})
    for name in NAMES:
        rows, _, _, digits = deita_scores.grader_rows(name, cfg, traces, tokenizer, 500)
        tiles = plan_tiles(rows, 0, shards=1, tile_tokens=1024)
        program = deita_scores.make_grader(mc, digits, "float32")
        for found, values in engine.score_tiles(program, params, mesh, rows, tiles, ("conditional",), (), in_flight=1):
            for place, value in zip(found, values[:, 0]):
                with torch.no_grad():
                    z = model(torch.tensor(rows[place].input_ids[None, :-1].astype(np.int64))).logits[0, -1, list(digits)]
                assert value == pytest.approx(float(torch.softmax(z, -1) @ torch.arange(1.0, 7.0)), abs=1e-4)
