"""What the settings of single signals are worth: who reads which section of `config.score`, and checks of them before any work."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from ml_collections import ConfigDict

from dccot_jax.artifact import Artifact
from dccot_jax.config import ConfigError, lookup
from dccot_jax.data.gguf_tokenizer import write_gguf_tokenizer
from dccot_jax.data.template import TemplateError
from dccot_jax.data.tokenizer import embedded_tokenizer_dir, load_tokenizer, tokenizer_hash
from dccot_jax.model.config import ModelError
from dccot_jax.model.gguf_io import is_gguf
from dccot_jax.model.hf import read_config
from dccot_jax.select.deita_scores import check_prompts, digit_tokens, grader_models
from dccot_jax.select.judged import make_judges
from dccot_jax.select.sentences import check_sentences
from dccot_jax.select.signals import DEITA, GRADIENTS, JUDGED, OVER_TIME, SENTENCES
from dccot_jax.select.trajectories import check_over_time
from dccot_jax.select.two_model import check_tokenizers, open_other, other_models

READERS = {
    "score.sampling": ("pass_rate",),
    "score.gradients": GRADIENTS,
    "score.judge": JUDGED,
    "score.deita": DEITA,
    "score.over_time": OVER_TIME,
    "score.sentences": SENTENCES,
}


def sections_read(cfg: ConfigDict) -> tuple[str, ...]:
    """The sections of `score` that a requested signal reads: these alone are part of the identity of the scores."""
    return tuple(section for section, names in READERS.items() if set(names) & set(cfg.score.signals))


def snapshots_needed(cfg: ConfigDict) -> int:
    """How many snapshots the warm-up training must keep for the requested signals; 0: none.

    Raises ConfigError if two signals want different numbers.
    """
    wanted = {"score.gradients.checkpoints": ("less",), "score.over_time.snapshots": OVER_TIME}
    counts = {key: int(lookup(cfg, key)) for key, names in wanted.items() if set(names) & set(cfg.score.signals)}
    if len(set(counts.values())) > 1:
        both = " and ".join(f"config.{key}: {count}" for key, count in counts.items())
        raise ConfigError(f"{both}: one training makes the snapshots of both; give the same number")
    return max(counts.values(), default=0)


def models_read(cfg: ConfigDict) -> dict[str, str]:
    """{config key: path} of the models that the requested signals read beside the student. Raises ConfigError as `other_models` does."""
    found = {f"score.models.{role}": path for role, path in other_models(cfg).items()}
    return found | {f"score.deita.{name.removeprefix('deita_')}_model": path for name, path in grader_models(cfg).items() if path}


def check_settings(cfg: ConfigDict) -> None:
    """Check what the requested signals need beside the student. Raises ConfigError with field, value and what is accepted."""
    if set(cfg.score.signals) & set(JUDGED):
        make_judges(cfg)
    if set(cfg.score.signals) & set(SENTENCES):
        check_sentences(cfg)
    check_over_time(cfg)
    if cfg.score.student == "warmup":
        snapshots_needed(cfg)
    check_prompts(cfg)
    for key, path in models_read(cfg).items():
        found, _ = open_other(key, path)
        try:
            _ = found if isinstance(found, Artifact) else read_config(found)
        except ModelError as error:
            raise ConfigError(f"config.{key}: {error}") from None
    for role, path in other_models(cfg).items():
        key = f"score.models.{role}"
        check_tokenizers(key, path, open_other(key, path)[1], _student_tokenizer(cfg))
    for name, path in grader_models(cfg).items():
        if path:
            what = name.removeprefix("deita_")
            found, _ = open_other(f"score.deita.{what}_model", path)
            tokenizer = load_tokenizer(found.file("tokenizer") if isinstance(found, Artifact) else found)
            try:
                digit_tokens(tokenizer, cfg.score.deita[f"{what}_prompt"], chat=cfg.score.deita.chat)
            except TemplateError as error:
                raise ConfigError(f"config.score.deita.chat: True, but {error}; False grades plain text") from None


def _student_tokenizer(cfg: ConfigDict) -> str:
    """Hash of the tokenizer that the rows will be written with."""
    source = cfg.student.path or cfg.student.tokenizer
    if source != "embedded" and not is_gguf(source):
        return tokenizer_hash(Path(source).expanduser())
    return _written_tokenizer(source)


@functools.cache
def _written_tokenizer(source: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        if source == "embedded":
            embedded_tokenizer_dir(folder)
        else:
            write_gguf_tokenizer(source, folder)
        return tokenizer_hash(folder)
