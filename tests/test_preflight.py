"""Configs that cannot work fail in preflight, naming the field, the value and what is accepted."""

from __future__ import annotations

import dataclasses
import gzip
import json
import re

import jax
import jax.numpy as jnp
import pytest
from tiny import TINY_MODEL, tiny_config
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from toy_task import TOY, install

from dccot_jax import preflight
from dccot_jax.artifact import ArtifactWriter, StageResult, finish
from dccot_jax.config import ConfigError, default_config, flatten, lookup, override, resolved_text
from dccot_jax.data.tokenizer import load_tokenizer, train_tokenizer, write_tokenizer
from dccot_jax.model.config import from_config
from dccot_jax.model.hf import save_hf
from dccot_jax.model.sharding import weight_shapes
from dccot_jax.pipeline import graph
from dccot_jax.preflight import check

ARMS = ({"name": "one"}, {"name": "two", "train.steps": 3})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"arms": ARMS, "report__compare": (("one", "two"), ("two", "base"))},
        {"evaluate__limits": {"synth_arithmetic": 0, "synth_arithmetic_long": 5}, "mix__kind": "teacher", "mix__strong": ("a",)},
    ],
)
def test_what_can_work_passes_unchanged(changes):
    config = tiny_config(**changes)
    before = resolved_text(config)
    check(config)
    assert resolved_text(config) == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train__log_every": 0}, ["train.log_every: 0", "at least 1"]),
        ({"train__checkpoint_every": 0}, ["train.checkpoint_every: 0", "at least 1"]),
        ({"evaluate__batch_rows": 0}, ["evaluate.batch_rows: 0", "at least 1"]),
        ({"evaluate__limits": {"svamp": 3}}, ["evaluate.limits: 'svamp'", "evaluated are synth_arithmetic, synth_arithmetic_long"]),
        ({"evaluate__limits": {"synth_arithmetic": -3}}, ["evaluate.limits: 'synth_arithmetic'", "-3", "at least 0"]),
        ({"evaluate__limit": -1}, ["evaluate.limit: -1", "at least 0"]),
        ({"traces__samples": 0}, ["traces.samples: 0", "at least 1"]),
        (
            {"score__signals": ("nll", "embedding_prompt"), "select__steps": (), "curriculum__difficulty": "embedding_prompt"},
            ["curriculum.difficulty: 'embedding_prompt'", "config.score.signals"],
        ),
        (
            {"curriculum__difficulty": "nlll", "curriculum__kind": "none"},
            ["difficulty: 'nlll'", "n_steps, completion_tokens", "mean 'nll'"],
        ),
        ({"score__warmup__share": 0.0}, ["score.warmup.share: 0.0", "(0, 1]"]),
        ({"score__warmup__share": 1.5}, ["score.warmup.share: 1.5", "(0, 1]"]),
        ({"score__warmup__steps": 0}, ["score.warmup.steps: 0", "at least 1"]),
        ({"evaluate__max_new_tokens": 1024}, ["evaluate.max_new_tokens: 1024", "max_positions = 1024"]),
        ({"train__row_tokens": 1025}, ["train.row_tokens: 1025", "max_positions = 1024"]),
        ({"mix__kind": "teacher"}, ["mix.strong: empty", "strong teachers"]),
        ({"mix__total_examples": 5, "mix__total_tokens": 6}, ["mix.total_tokens: 6", "mix.total_examples = 5", "one of them"]),
        ({"report__compare": (("tiny", "tinny"),)}, ["report.compare[0]: 'tinny'", "did you mean 'tiny'"]),
        ({"report__compare": (("tiny", "base"),), "evaluate__base": False}, ["report.compare[0]: 'base'", "arms are tiny"]),
        ({"report__compare": (("one", "tiny"),), "arms": ARMS}, ["report.compare[0]: 'tiny'", "one, two"]),
        ({"report__compare": ("one",), "arms": ARMS}, ["report.compare[0]: 'one'", "pair"]),
        ({"mesh__data": 3}, ["config.mesh", "8 devices cannot be split", "'data': 3"]),
        ({"mesh__fsdp": 2}, ["config.mesh", "needs 2 devices, 8 are there"]),
        ({"mesh__data": 0}, ["config.mesh", "'data': 0", "at least 1"]),
        ({"student__model__family": "gpt2"}, ["student.model", "family 'gpt2'", "llama, mistral, qwen2"]),
        ({"student__model__num_kv_heads": 3}, ["student.model", "num_kv_heads = 3", "num_heads = 4"]),
        ({"student__model__head_dim": 15}, ["student.model", "head_dim = 15", "even"]),
        ({"traces__task": "asdiv"}, ["traces.task: task 'asdiv' has no train split", "only test"]),
        ({"traces__task": "gsm8k"}, ["traces.teachers[0]: a scripted teacher cannot", "'gsm8k'", "synth_arithmetic", "'kind': 'replay'"]),
        ({"evaluate__cross": ("untested",)}, ["evaluate.cross: task 'untested' has no test split", "only train"]),
        ({"score__student": "warmpu"}, ["score.student: 'warmpu'", "base, warmup", "did you mean 'warmup'"]),
        ({"arms": ({"name": "one", "train.log_every": 0},)}, ["log_every: 0"]),
    ],
)
def test_what_cannot_work_names_field_value_and_what_is_accepted(monkeypatch, changes, words):
    install(monkeypatch, tasks=(dataclasses.replace(TOY, name="untested", splits=("train",)),))
    with pytest.raises(ConfigError) as caught:
        check(tiny_config(**changes))
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value), word


# A number far below zero means something here: any whole number is a seed, and a negative count of checkpoints keeps all.
MAY_BE_NEGATIVE = {"seed", "traces.seed", "score.sampling.seed", "train.keep_checkpoints"}
NUMBERS = [key for key, value in flatten("", default_config()) if isinstance(value, (int, float)) and not isinstance(value, bool)]


@pytest.mark.parametrize("key", NUMBERS)
def test_no_number_far_from_all_sense_gets_through(key):
    """Each is refused as an error of the config, never by another exception."""
    for value in (-1e9, float("nan"), float("inf")):
        meant = int(value) if value == -1e9 and isinstance(lookup(default_config(), key), int) else value
        if key in MAY_BE_NEGATIVE and meant == -1e9:
            check(override(default_config(), {key: meant}), devices=False)
            continue
        with pytest.raises(ConfigError, match=key.split(".")[-1]):
            check(override(default_config(), {key: meant}), devices=False)


def _rows(folder, *names):
    """Files of tasks, one row each that their readers take."""
    row = {"question": "1+1?", "answer": "So it is 2.\n#### 2", "input": "1+1?", "target": 2, "code": "", "problem": "1+1", "solution": "."}
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        data = (json.dumps(row) + "\n").encode()
        (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)


def test_local_rows_are_there_before_any_work(tmp_path):
    def refused(**changes) -> str:
        with pytest.raises(ConfigError) as caught:
            check(tiny_config(**changes))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert refused(data_dir=str(tmp_path / "no")) == f"config.data_dir: {str(tmp_path / 'no')!r} is not a directory"
    replayed = ({"kind": "replay", "name": "t", "files": ("nowhere.jsonl",)},)
    assert refused(traces__teachers=replayed).endswith(
        "'nowhere.jsonl' is not in this directory; config.data_dir is empty: name the folder"
    )
    assert f"is not in data_dir {str(tmp_path)!r}" in refused(traces__teachers=replayed, data_dir=str(tmp_path))
    (tmp_path / "t.jsonl").write_text("{}")
    gsm8k = {
        "data_dir": str(tmp_path),
        "traces__task": "gsm8k",
        "traces__teachers": ({"kind": "replay", "name": "t", "files": ("t.jsonl",)},),
    }
    synthetic = {"evaluate__iid": ("synth_arithmetic",), "evaluate__ood": ()}
    assert refused(**gsm8k, **synthetic).startswith("config.traces.task: task gsm8k: file gsm8k/train.jsonl.gz is missing under")
    _rows(tmp_path, "gsm8k/train.jsonl.gz", "gsm8k/test.jsonl.gz", "pal_math_ood/gsmhardv2.jsonl.gz")
    check(tiny_config(**gsm8k, **synthetic))
    said = refused(**gsm8k, evaluate__iid=("gsm8k",), evaluate__ood=("gsm_hard", "math500"))
    assert said.startswith("config.evaluate.ood: task math500: file math500/test.jsonl is missing under")
    assert said.endswith("; put the file there, or set config.evaluate.ood=('gsm_hard',)")
    said = refused(**gsm8k, evaluate__iid=(), evaluate__ood=())
    assert "names no task, so the relations of traces.task = 'gsm8k' are evaluated: put" in said
    assert said.endswith("or set config.evaluate.iid=('gsm8k',) config.evaluate.ood=('gsm_hard',) config.evaluate.cross=()")
    (tmp_path / "gsm8k" / "train.jsonl.gz").unlink()
    check(tiny_config(**gsm8k | {"evaluate__iid": ("gsm8k",), "evaluate__ood": ()}), traces=False)  # to evaluate, its test rows are enough
    assert "mawps_addsub has no hub data set" in refused(evaluate__iid=("mawps_addsub",))
    check(tiny_config(evaluate__ood=("math500",)))  # of the hub


def test_a_mesh_for_another_machine_can_be_validated_here():
    check(tiny_config(mesh__fsdp=64), devices=False)
    with pytest.raises(ConfigError, match="at most one may be -1"):
        check(tiny_config(mesh__data=-1), devices=False)


def test_the_scoring_student_is_a_train_artifact(tmp_path):
    def refused(path) -> str:
        with pytest.raises(ConfigError) as caught:
            check(tiny_config(score__student=str(path)))
        return str(caught.value)

    for kind in ("train", "student", "verify"):
        writer = ArtifactWriter(tmp_path / kind)
        writer.write_text("x.txt", "x")
        finish(writer, kind=kind, identity=kind, version=1, config={}, inputs={}, result=StageResult(""), wall_seconds=0.0, recorded={})
    check(tiny_config(score__student=str(tmp_path / "train")))
    check(tiny_config(score__student=str(tmp_path / "student")))
    assert "artifact of stage verify" in refused(tmp_path / "verify")
    (tmp_path / "train" / "x.txt").unlink()
    assert "x.txt" in refused(tmp_path / "train")
    assert "holds no manifest.json" in refused(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert "takes a train artifact, for Hugging Face use student.path" in refused(tmp_path)


def test_the_student_is_looked_at_before_any_work(tmp_path):
    """Its weight files are whole and of the config's shapes, its tokenizer reads, its template renders; the user's path is named."""
    path = tmp_path / "student"
    write_tokenizer(path, train_tokenizer(["one two three"] * 9, vocab_size=270))
    mc = from_config({"family": "llama", **TINY_MODEL, "max_positions": 1024}, len(load_tokenizer(path)))
    params = jax.tree.map(lambda shape: jnp.zeros(shape), weight_shapes(mc), is_leaf=lambda x: isinstance(x, tuple))
    save_hf(params, mc, None, path)
    config, tokens = tiny_config(student__path=str(path)), tiny_config(student__tokenizer=str(path))
    check(config)
    check(tokens)

    def refused(name: str, content: bytes | None, config=config) -> str:
        before = (path / name).read_bytes()
        (path / name).unlink() if content is None else (path / name).write_bytes(content)
        with pytest.raises(ConfigError) as caught:
            check(config)
        (path / name).write_bytes(before)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500 and str(path) in str(caught.value)
        return str(caught.value)

    weights = (path / "model.safetensors").read_bytes()
    start = f"config.student.path: {path}: model.safetensors is torn: "
    assert refused("model.safetensors", b"") == start + "its header is cut off"
    assert re.fullmatch(re.escape(start) + r"\S+ reaches beyond its end; and \d+ more", refused("model.safetensors", weights[:9000]))
    assert "its header is not JSON" in refused("model.safetensors", weights[:8] + b"x" + weights[9:])
    assert "neither model.safetensors nor" in refused("model.safetensors", None)
    fields = json.loads((path / "config.json").read_text())
    larger = json.dumps(fields | {"intermediate_size": 80}).encode()
    assert re.search(r"has shape \[.*\], the config says \[.*\] \(and 5 more like it\)$", refused("config.json", larger))
    about = json.loads((path / "tokenizer_config.json").read_text())
    for config_, field in ((config, "path"), (tokens, "tokenizer")):
        assert refused("tokenizer.json", b"{}", config_).startswith(f"config.student.{field}: {path}: ")
        for template, said in (("", f"at {path} has no chat template"), ("{% for m in messages %}", f"at {path} does not render (line 1)")):
            content = json.dumps(about | {"chat_template": template}).encode()
            assert said in refused("tokenizer_config.json", content, config_)


def test_the_warm_up_student_sees_other_rows_than_a_random_control():
    [step] = graph(tiny_config(), base=False)["select:warmup"].config.select.steps
    assert step["stream"] == "warmup"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cudnn", r"config\.attention: 'cudnn' needs an NVIDIA GPU; this is cpu; 'auto' takes 'xla' here$"),
        ("splash", r"config\.attention: 'splash' needs a TPU; this is cpu; 'auto' takes 'xla' here$"),
        ("cudn", r"config\.attention: 'cudn' is not one of auto, xla, splash, cudnn, tokamax \(did you mean 'cudnn'\?\)$"),
    ],
)
def test_an_attention_backend_that_cannot_be_used_here_is_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        check(tiny_config(attention=name))
    if name != "cudn":
        check(tiny_config(attention=name), devices=False)  # the machine that runs it may be another


# --- the teacher of train.distill -------------------------------------------------------------------------------------


def _directory(path, vocab: int, words: tuple[str, ...]):
    """A Hugging Face directory of a model with so large a vocabulary, and a tokenizer of these words; its weights are no weights."""
    fields = {"model_type": "llama", "vocab_size": vocab, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    fields |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024, "rms_norm_eps": 1e-6}
    path.mkdir()
    (path / "config.json").write_text(json.dumps(fields))
    (path / "model.safetensors").write_bytes(b"not read")
    Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, unk_token=words[0])).save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": words[0]}))
    return path


def _distilled(teacher, **changes):
    return tiny_config(train__distill__kind="jsd", train__distill__teacher=str(teacher), **changes)


WORDS = ("?", "one", "two", "three")


def test_the_teacher_of_distributions_is_opened_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "check_tokenizer", lambda *_: None)  # the directories here hold neither weights nor templates
    monkeypatch.setattr("dccot_jax.model.hf.check_weights", lambda *_: None)

    def refused(config) -> str:
        with pytest.raises(ConfigError) as caught:
            check(config)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "config.train.distill.teacher: '/no/such': /no/such: neither an artifact" in refused(_distilled("/no/such"))
    assert refused(_distilled("/no/such", arms=ARMS)).startswith("arm one: ")
    same = _directory(tmp_path / "same", 6, WORDS)
    for student in ({}, {"student__path": str(_directory(tmp_path / "student", 6, WORDS))}):
        check(_distilled(same, **student))
        check(_distilled(same, **student, train__distill__top_k=6))
        words = "config.train.distill.top_k: 7 exceeds the teacher's 6 tokens; it must be 0 (the teacher runs beside the student) to 6"
        assert refused(_distilled(same, **student, train__distill__top_k=7)) == words

    path = {"student__path": str(tmp_path / "student")}
    larger = _directory(tmp_path / "larger", 8, WORDS)
    message = refused(_distilled(larger, **path))
    assert f"config.train.distill.teacher: {str(larger)!r}" in message and "the student has 6 tokens and the teacher 8" in message
    other = _directory(tmp_path / "other", 6, (*WORDS[:3], "four"))
    assert refused(_distilled(other, **path)).startswith(f"config.train.distill.teacher: {str(other)!r} has other tokens than the student")
    tokens = {"student__tokenizer": str(_directory(tmp_path / "tokens", 4, WORDS))}  # an untrained student has as many as its tokenizer
    assert "the student has 4 tokens and the teacher 6" in refused(_distilled(same, **tokens))
    check(_distilled(tmp_path / "tokens", **tokens))

    for file, words in (("tokenizer.json", "no tokenizer.json"), ("model.safetensors", "no *.safetensors")):
        (same / file).unlink()
        message = refused(_distilled(same, **path))
        assert f"config.train.distill.teacher: {str(same)!r}" in message and words in message


def test_the_teacher_of_distributions_may_be_an_artifact(tmp_path):
    for kind in ("train", "verify"):
        writer = ArtifactWriter(tmp_path / kind)
        writer.write_json("student", {"model": from_config({"family": "llama", **TINY_MODEL}, 9).to_dict()})
        writer.write_text("tokenizer/tokenizer.json", "{}")
        finish(writer, kind=kind, identity=kind, version=1, config={}, inputs={}, result=StageResult(""), wall_seconds=0.0, recorded={})
    check(_distilled(tmp_path / "train", train__distill__top_k=9))
    with pytest.raises(ConfigError, match=r"config\.train\.distill\.top_k: 10 exceeds the teacher's 9 tokens"):
        check(_distilled(tmp_path / "train", train__distill__top_k=10))
    with pytest.raises(ConfigError, match=r"config\.train\.distill\.teacher: .*an artifact of stage verify, not of student or train"):
        check(_distilled(tmp_path / "verify"))
    (tmp_path / "train" / "student.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.train\.distill\.teacher: .*student\.json: listed in the manifest and missing"):
        check(_distilled(tmp_path / "train"))
