"""Tokens that end a reply: the template's and those that a student's generation_config.json lists."""

from __future__ import annotations

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from plan_cases import config
from training_cases import finished

from dccot_jax.artifact import ArtifactWriter
from dccot_jax.config import ConfigError
from dccot_jax.context import Context
from dccot_jax.data import student
from dccot_jax.data.template import render_prompt, reply_text
from dccot_jax.data.tokenizer import load_tokenizer, train_tokenizer, write_tokenizer
from dccot_jax.evaluate import stage
from dccot_jax.generate.greedy import greedy, make_sampler
from dccot_jax.generate.sampler import Generated
from dccot_jax.model import hf
from dccot_jax.model.config import ModelConfig
from dccot_jax.model.sharding import make_mesh
from dccot_jax.records import make_trace
from dccot_jax.select import sampled
from dccot_jax.tasks.base import make_item
from dccot_jax.tasks.registry import get_task
from dccot_jax.train.checkpoint import export_hf, load_student, random_params

END = 1  # <|end|>, which closes a turn in the template
GENERATION = "generation_config.json"


@pytest.fixture
def mesh():
    return make_mesh({"fsdp": 1}, jax.devices()[:1])


@pytest.fixture
def pretrained(tmp_path, mesh):
    """A Hugging Face directory whose config.json names the template's end token, without a generation_config.json."""
    write_tokenizer(tmp_path / "tok", train_tokenizer(["one two three", "The answer is 5."], 300))
    mc = ModelConfig("llama", 300, 16, 32, 1, 2, 2, 8, max_positions=128, eos_token_ids=(END,), pad_token_id=0)
    hf.save_hf(random_params(mc, mesh, 4), mc, tmp_path / "tok", tmp_path / "hf")
    (tmp_path / "hf" / GENERATION).unlink()
    return tmp_path / "hf"


def stage_student(path, tmp_path, name="student"):
    out = ArtifactWriter(tmp_path / name)
    result = student.run(config(student__path=str(path)), {}, out, Context(tmp_path))
    return finished(out.path, "student", result.logical_hash, dict(result.facts))


def generation(path, eos, **fields):
    (path / GENERATION).write_text(json.dumps({"eos_token_id": eos, **fields}))


@pytest.mark.parametrize(("eos", "stops"), [(None, [END]), (END, [END]), ([9, END, 7], [END, 9, 7]), (7, [END, 7])])
def test_the_student_artifact_and_its_directory_carry_every_stop_token(pretrained, tmp_path, mesh, eos, stops):
    plain = stage_student(pretrained, tmp_path, "plain")
    assert plain.json("student")["tokenizer"]["stop_ids"] == [END]
    if eos is not None:
        generation(pretrained, eos)
    found = stage_student(pretrained, tmp_path)
    about = found.json("student")["tokenizer"]
    assert (about["eos_id"], about["stop_ids"]) == (END, stops)  # the student still learns to end with the template's token
    assert found.facts["tokenizer_hash"] == plain.facts["tokenizer_hash"]
    assert (found.logical_hash == plain.logical_hash) == (stops == [END])
    for source in (found, pretrained):
        assert load_student(source, mesh).stop_ids == tuple(stops)


def test_without_generation_config_the_eos_of_config_json_counts(pretrained, tmp_path):
    fields = json.loads((pretrained / "config.json").read_text())
    (pretrained / "config.json").write_text(json.dumps({**fields, "eos_token_id": [5, END]}))
    assert stage_student(pretrained, tmp_path).json("student")["tokenizer"]["stop_ids"] == [END, 5]


@pytest.mark.parametrize("eos", ["</s>", [1, None], 300, -1])
def test_an_eos_that_is_no_token_is_refused(pretrained, tmp_path, eos):
    generation(pretrained, eos)
    with pytest.raises(ConfigError, match=r"eos_token_id = .* must be a token id of the vocabulary"):
        stage_student(pretrained, tmp_path)


def test_evaluation_and_student_error_stop_at_them(pretrained, tmp_path, mesh):
    """The same replies, cut behind the first stop token; both stages ask through `make_sampler`."""
    cfg = config(evaluate__batch_rows=4)
    prompts = [render_prompt(load_tokenizer(pretrained), text) for text in ("one two", "three", "5 is the answer")]

    def replies(path):
        return greedy(make_sampler(cfg, load_student(path, mesh), mesh), prompts, 12, row_ids=range(3))

    free = replies(stage_student(pretrained, tmp_path, "free"))
    assert {reply.finish_reason for reply in free} == {"length"}
    extra = free[0].tokens[4]
    generation(pretrained, [END, extra])
    for reply, before in zip(replies(stage_student(pretrained, tmp_path, "stopped")), free, strict=True):
        places = np.flatnonzero(np.asarray(before.tokens) == extra)
        assert reply.tokens == (before.tokens[: places[0] + 1] if len(places) else before.tokens)
        assert reply.finish_reason == ("stop" if len(places) else "length")


def test_the_token_that_ended_a_reply_is_not_its_text(pretrained):
    """An eos that is an ordinary token of the tokenizer would else spoil the answer."""
    tokenizer = load_tokenizer(pretrained)
    ids = tokenizer("The answer is 5.", add_special_tokens=False)["input_ids"]
    extra = tokenizer("5", add_special_tokens=False)["input_ids"][0]
    assert reply_text(tokenizer, [*ids, END], [END]) == reply_text(tokenizer, ids, [END]) == "The answer is 5."
    assert reply_text(tokenizer, [*ids, extra], [END, extra]) == "The answer is 5."
    assert reply_text(tokenizer, [*ids, extra], [END]) == "The answer is 5.5"  # cut by the budget
    assert reply_text(tokenizer, [], [END]) == reply_text(tokenizer, [extra], [extra]) == ""
    reply, task = Generated([*ids, extra], "stop"), get_task("svamp")
    item = make_item("svamp", "test", "q", gold="5")
    asked = SimpleNamespace(panel=SimpleNamespace(task=task, group="iid"), item=item, prompt_ids=(2, 3))
    assert stage.make_sample(asked, tokenizer, reply, (END, extra), time_limit=5.0)["correct_strict"]  # type: ignore[arg-type]
    trace = make_trace(task="svamp", split="train", question="q", target="5", gold_answer="5", answer_type="number", method="vanilla")
    [question], _ = sampled.questions_of([trace])
    sample = sampled.make_sample(question, tokenizer, reply, (END, extra), time_limit=5.0)
    assert sample["correct_strict"] and sample["tokens"] == len(reply.tokens)


@pytest.mark.parametrize(
    ("own", "exported"),
    [
        (None, {"bos_token_id": None, "eos_token_id": END, "pad_token_id": 0}),
        ({"eos_token_id": [7, END], "temperature": 0.6}, {"eos_token_id": [7, END], "temperature": 0.6}),
        ({"eos_token_id": 7, "temperature": 0.6}, {"eos_token_id": [7, END], "temperature": 0.6}),
        ({"temperature": 0.6}, {"eos_token_id": END, "temperature": 0.6}),
    ],
)
def test_an_export_names_them_all(pretrained, tmp_path, mesh, own, exported):
    from transformers import GenerationConfig

    if own is not None:
        (pretrained / GENERATION).write_text(json.dumps(own))
    artifact = stage_student(pretrained, tmp_path)
    export_hf(artifact, tmp_path / "out")
    assert json.loads((tmp_path / "out" / GENERATION).read_text()) == exported
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == exported["eos_token_id"]
    assert load_student(tmp_path / "out", mesh).stop_ids == load_student(artifact, mesh).stop_ids


def test_a_fresh_student_exports_its_templates_end(pretrained, tmp_path, mesh):
    out = ArtifactWriter(tmp_path / "fresh")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2, "head_dim": 8}
    model = {f"student__model__{name}": size for name, size in sizes.items()}
    result = student.run(config(student__tokenizer=str(pretrained), **model), {}, out, Context(tmp_path))
    artifact = finished(out.path, "student", result.logical_hash, dict(result.facts))
    fresh = load_student(artifact, mesh)
    assert fresh.stop_ids == (END,)
    hf.save_hf(fresh.params, fresh.mc, fresh.tokenizer_dir, tmp_path / "out", stop_ids=fresh.stop_ids)
    assert json.loads((tmp_path / "out" / GENERATION).read_text()) == {"bos_token_id": None, "eos_token_id": END, "pad_token_id": 0}


@pytest.mark.parity
def test_transformers_stops_where_we_do(pretrained, tmp_path, mesh):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    [prompt] = [render_prompt(load_tokenizer(pretrained), "one two")]
    free = greedy(make_sampler(config(), load_student(pretrained, mesh), mesh), [prompt], 12, row_ids=[0])[0].tokens
    generation(pretrained, [END, free[4]])
    export_hf(stage_student(pretrained, tmp_path), tmp_path / "out")
    ours = greedy(make_sampler(config(), load_student(tmp_path / "out", mesh), mesh), [prompt], 12, row_ids=[0])[0].tokens
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    theirs = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
    assert theirs == ours and len(ours) < 12
