"""The embedded byte-level BPE tokenizer, and reading any Hugging Face tokenizer directory.

The embedded tokenizer is trained once, on a fixed corpus of every synthetic family, so it is the same artifact for every
arm. Digits are always single tokens (numbers line up column by column), every byte has a token (nothing is unknown), and
the chat template spends one special token per turn boundary, because the student's context is short.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from etils import epath

from dccot_jax.artifact import write_atomic
from dccot_jax.model.hf_files import TOKENIZER_FILES, read_json
from dccot_jax.records import InputError, canonical_json, content_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 512
PAD, END, USER, ASSISTANT, SYSTEM = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"
SPECIAL_TOKENS = (PAD, END, USER, ASSISTANT, SYSTEM)  # ids 0..4; END closes a turn and is the eos token
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_SPECIAL_KEYS = ("bos_token", "eos_token", "pad_token", "unk_token", "add_bos_token", "add_eos_token")


class TokenizerError(InputError):
    """A tokenizer directory that cannot be used; the message names the directory and what is missing."""


def train_tokenizer(corpus: Iterable[str], vocab_size: int = VOCAB_SIZE) -> str:
    """Train a byte-level BPE and return its ``tokenizer.json`` text; the same corpus gives the same text.

    Args:
      corpus: texts; their order does not matter, their counts do.
      vocab_size: tokens in all: special tokens, 256 bytes, and merges. The corpus may allow fewer.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(corpus), trainer=trainer)
    return tokenizer.to_str(pretty=False)


def write_tokenizer(out_dir: epath.PathLike, tokenizer_json: str, *, max_positions: int = 1024) -> None:
    """Write a Hugging Face tokenizer directory: ``tokenizer.json`` and ``tokenizer_config.json`` with the chat template.

    The config is written here and not by ``save_pretrained``, whose output differs between transformers versions.
    """
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "additional_special_tokens": [USER, ASSISTANT, SYSTEM],
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_positions,
        "padding_side": "right",
    }
    out = epath.Path(out_dir)
    write_atomic(out / "tokenizer.json", tokenizer_json.encode())
    write_atomic(out / "tokenizer_config.json", (json.dumps(config, indent=1, sort_keys=True) + "\n").encode())


def embedded_tokenizer_dir(out_dir: epath.PathLike, *, max_positions: int = 1024) -> None:
    """Train the embedded tokenizer on the fixed synthetic corpus and write it to `out_dir`."""
    from dccot_jax.tasks.synthetic.corpus import corpus

    write_tokenizer(out_dir, train_tokenizer(corpus()), max_positions=max_positions)


def load_tokenizer(directory: epath.PathLike, *, origin: epath.PathLike | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer of a Hugging Face directory.

    Args:
      origin: where the directory's files are from; it is what errors name, here and in `template`.
    Raises TokenizerError if there is no ``tokenizer.json``, or one that cannot be read.
    """
    path = epath.Path(directory).expanduser()
    named = epath.Path(origin).expanduser() if origin else path
    if not (path / "tokenizer.json").exists():
        raise TokenizerError(f"{named}: no tokenizer.json there; a fast Hugging Face tokenizer is needed")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # else it prints that torch is missing
    from transformers import AutoTokenizer  # slow to import

    with contextlib.ExitStack() as stack:
        local = str(path)
        if "://" in local:  # transformers reads local files only
            local = stack.enter_context(tempfile.TemporaryDirectory())
            copy_tokenizer(path, local)
        try:
            tokenizer = AutoTokenizer.from_pretrained(local, local_files_only=True)
        except Exception as error:  # the tokenizers library raises bare Exception
            for name in ("tokenizer.json", "tokenizer_config.json"):
                if (named / name).exists():
                    read_json(named / name)  # says which file and where
            said = " ".join(str(error).split()) or type(error).__name__
            raise TokenizerError(f"{named}: transformers cannot read this tokenizer: {said[:300]}") from error
    if not len(tokenizer):
        raise TokenizerError(f"{named}: tokenizer.json holds no tokens")
    tokenizer.name_or_path = str(named)
    return tokenizer


def copy_tokenizer(source: epath.PathLike, target: epath.PathLike) -> None:
    """Copy the tokenizer files of a Hugging Face directory. Raises TokenizerError if it has no ``tokenizer.json``."""
    src, dst = epath.Path(source).expanduser(), epath.Path(target)
    if not (src / "tokenizer.json").exists():
        raise TokenizerError(f"{src}: no tokenizer.json there; a fast Hugging Face tokenizer is needed")
    for name in TOKENIZER_FILES:
        if (src / name).exists():
            write_atomic(dst / name, (src / name).read_bytes())
        elif (dst / name).exists():
            (dst / name).unlink()


def tokenizer_hash(directory: epath.PathLike) -> str:
    """Content hash of what a tokenizer does: ``tokenizer.json`` (as JSON), the chat template and the special tokens.

    Formatting, the maximal length and the file the template lives in do not matter.
    """
    path = epath.Path(directory)
    model = read_json(path / "tokenizer.json")
    for key in ("truncation", "padding"):  # call-time settings, which save_pretrained may leave behind
        model.pop(key, None)
    config = read_json(path / "tokenizer_config.json") if (path / "tokenizer_config.json").exists() else {}
    return content_hash("tokenizer/1", model, _template_text(path, config), _special_tokens(config), digits=64)


def _template_text(path: epath.Path, config: Mapping[str, Any]) -> str:
    if (path / "chat_template.jinja").exists():
        return (path / "chat_template.jinja").read_text()
    if (path / "chat_template.json").exists():
        return str(read_json(path / "chat_template.json").get("chat_template", ""))
    template = config.get("chat_template") or ""
    return template if isinstance(template, str) else canonical_json(template)


def _special_tokens(config: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: config.get(key) for key in _SPECIAL_KEYS}
    return {key: value["content"] if isinstance(value, Mapping) and "content" in value else value for key, value in found.items()}
