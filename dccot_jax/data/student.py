"""Stage `student`: what the student is before training: model config, where its weights come from, its tokenizer.

Weights are not copied: a pretrained student stays where it is and is known by the hash of its files; a fresh one is a
seed. Files: ``student.json`` and ``tokenizer/``.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dccot_jax.artifact import Artifact, ArtifactWriter, StageResult, file_hash, json_hash, write_atomic
from dccot_jax.config import ConfigError
from dccot_jax.context import Context
from dccot_jax.data.gguf_tokenizer import write_gguf_tokenizer
from dccot_jax.data.template import check_template, stop_ids
from dccot_jax.data.tokenizer import copy_tokenizer, embedded_tokenizer_dir, load_tokenizer, tokenizer_hash
from dccot_jax.model.gguf_io import is_gguf
from dccot_jax.model.hf_files import GENERATION_CONFIG
from dccot_jax.records import content_hash, derive_seed

EMBEDDED = "embedded"


def run(cfg: ConfigDict, inputs: Mapping[str, Artifact], out: ArtifactWriter, ctx: Context) -> StageResult:
    """Write the student. Raises ConfigError, TokenizerError or TemplateError if it cannot be trained."""
    del inputs
    if not ctx.is_main:
        return StageResult("")
    from dccot_jax.model.config import ModelError, from_config
    from dccot_jax.model.hf import read_config

    tokenizer_dir, origin = out.file("tokenizer"), None
    if cfg.student.path:
        source = Path(cfg.student.path).expanduser()
        try:
            model = read_config(source)
        except ModelError as error:
            raise ConfigError(f"config.student.path: {error}") from None
        if is_gguf(source):
            write_gguf_tokenizer(source, tokenizer_dir)
        else:
            copy_tokenizer(source, tokenizer_dir)
        origin = source
        if (source / GENERATION_CONFIG).exists():
            write_atomic(tokenizer_dir / GENERATION_CONFIG, (source / GENERATION_CONFIG).read_bytes())
        weights: dict[str, Any] = {"kind": "hf", "path": str(source.resolve()), "hash": weights_hash(source)}
    else:
        if cfg.student.tokenizer == EMBEDDED:
            embedded_tokenizer_dir(tokenizer_dir, max_positions=cfg.student.model.max_positions)
        else:
            origin = Path(cfg.student.tokenizer).expanduser()
            copy_tokenizer(origin, tokenizer_dir)
        model = from_config(cfg.student.model, len(load_tokenizer(tokenizer_dir, origin=origin)))
        weights = {"kind": "random", "seed": derive_seed(cfg.seed, "init")}

    tokenizer = load_tokenizer(tokenizer_dir, origin=origin)
    check_template(tokenizer)
    _check_vocabulary(tokenizer, model.vocab_size)
    stops = stop_ids(tokenizer, model.eos_token_ids)
    about = {
        "hash": tokenizer_hash(tokenizer_dir),
        "tokens": len(tokenizer),
        "eos_id": stops[0],  # closes the assistant's turn; what the student learns to end with
        "stop_ids": stops,  # what ends a reply: the template's tokens and those of generation_config.json, else config.json
        "pad_id": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0],  # padding is masked by segment, never by id
    }
    if weights["kind"] == "random":  # a pretrained student keeps what its own config says
        model = dataclasses.replace(model, eos_token_ids=tuple(stops), pad_token_id=about["pad_id"])
    fields = model.to_dict()
    out.write_json("student", {"model": fields, "weights": weights, "tokenizer": about})
    meaning = {"model": fields, "weights": {key: value for key, value in weights.items() if key != "path"}, "tokenizer": about}
    ctx.log(f"  student: {weights['kind']} weights, vocabulary {model.vocab_size:,}, tokenizer {about['hash'][:12]}")
    return StageResult(
        json_hash(meaning), facts={"tokenizer_hash": about["hash"], "weights": weights["kind"], "vocab_size": model.vocab_size}
    )


def check_tokenizer(source: Path, vocab_size: int = 0) -> None:
    """What `run` will ask of the tokenizer of a Hugging Face directory: it reads, and renders a row.

    Args:
      vocab_size: of the model, which must have a row for every token; 0: as many as there are tokens.
    Raises TokenizerError, TemplateError or ConfigError.
    """
    with tempfile.TemporaryDirectory() as folder:  # without the model's config.json, which transformers would look at, as in an artifact
        copy_tokenizer(source, folder)
        tokenizer = load_tokenizer(folder, origin=source)
    check_template(tokenizer)
    _check_vocabulary(tokenizer, vocab_size or len(tokenizer))


def _check_vocabulary(tokenizer: Any, vocab_size: int) -> None:
    if len(tokenizer) > vocab_size:
        raise ConfigError(f"config.student: the tokenizer has {len(tokenizer)} tokens and the model's vocabulary only {vocab_size}")


def weights_hash(directory: Path) -> str:
    """Content hash of the safetensors files of a Hugging Face directory, or of a GGUF file. Raises ConfigError if there are none."""
    files = [directory] if is_gguf(directory) else sorted(directory.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"config.student.path: no *.safetensors in {directory}")
    return content_hash("weights/1", {path.name: file_hash(path) for path in files}, digits=64)
