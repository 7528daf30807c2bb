"""The tokenizer inside a GGUF file as a Hugging Face tokenizer directory.

transformers' own conversion makes the vocabulary, the merges and SentencePiece's rules. What it leaves open for byte-level BPE is set
here, from the name under which llama.cpp files a pre-tokenizer: how text is split, whether whole tokens skip the merges, and NFC.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from dccot_jax.artifact import write_atomic
from dccot_jax.data.tokenizer import TokenizerError
from dccot_jax.model.gguf_io import open_gguf

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _Pre(NamedTuple):
    """A byte-level pre-tokenizer: `split` by a pattern (None: GPT-2's own), single `digits` first, `whole` tokens skip the merges."""

    split: str | None
    digits: bool = False
    whole: bool = False
    nfc: bool = False


_GPT2, _LLAMA3 = _Pre(None), _Pre(_CONTRACTIONS + _WORDS + r"\p{N}{1,3}" + _REST, whole=True)
_QWEN2 = _Pre(_CONTRACTIONS + _WORDS + r"\p{N}" + _REST, nfc=True)
_PRE_TOKENIZERS: Mapping[str, _Pre] = {
    "gpt-2": _GPT2,
    "smollm": _Pre(None, digits=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _Pre(_TEKKEN, whole=True),
}
_CONTROL, _USER_DEFINED = 3, 4  # token types of llama.cpp
_IDS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def write_gguf_tokenizer(path: str | os.PathLike, out_dir: epath.PathLike) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` (with the chat template) of a GGUF file.

    Raises TokenizerError naming a tokenizer or pre-tokenizer that is not known here, ModelError if the file does not read.
    """
    metadata = open_gguf(path).metadata
    own = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items() if key.startswith("tokenizer.ggml.")}
    tokens, kind, pre = own.get("tokens"), own.get("model"), own.get("pre")
    if not tokens or kind not in ("gpt2", "llama"):
        raise TokenizerError(f"{path}: tokenizer.ggml.model = {kind!r} is not supported; known: gpt2, llama (SentencePiece)")
    splits = _PRE_TOKENIZERS.get(str(pre))
    if kind == "gpt2" and splits is None:
        raise TokenizerError(f"{path}: tokenizer.ggml.pre = {pre!r} is not supported; known: {', '.join(_PRE_TOKENIZERS)}")
    tokenizer = _convert(metadata["general.architecture"], own)
    if kind == "gpt2" and splits is not None:
        _set_pre_tokenizer(tokenizer, splits)
    special = {name: tokens[own[f"{key}_token_id"]] for name, key in _IDS.items() if own.get(f"{key}_token_id") is not None}
    _add_tokens(tokenizer, tokens, own.get("token_type") or [], special)
    adds = {"bos": own.get("add_bos_token", kind == "llama"), "eos": own.get("add_eos_token", False)}
    _set_post_processor(
        tokenizer, {end: special[f"{end}_token"] for end, added in adds.items() if added and f"{end}_token" in special}, own
    )
    config = {
        **special,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": metadata.get("tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": metadata[f"{metadata['general.architecture']}.context_length"],
        "padding_side": "right",
    }
    out = epath.Path(out_dir)
    write_atomic(out / "tokenizer.json", tokenizer.to_str(pretty=False).encode())
    write_atomic(out / "tokenizer_config.json", (json.dumps(config, indent=1, sort_keys=True) + "\n").encode())


def _convert(architecture: str, own: Mapping[str, Any]) -> Any:
    """transformers' conversion, as a `tokenizers.Tokenizer`, without the special tokens of the class that it passes through."""
    from tokenizers import Tokenizer

    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # else it prints that torch is missing
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer
    except ImportError:
        raise TokenizerError("the tokenizer of a GGUF file needs a newer transformers: pip install 'dccot-jax[gguf]'") from None

    names = {"model": "tokenizer_type", "unknown_token_id": "unk_token_id", "padding_token_id": "pad_token_id"}
    names["add_space_prefix"] = "add_prefix_space"
    converted, _ = convert_gguf_tokenizer(architecture, {names.get(key, key): value for key, value in own.items()})
    return Tokenizer.from_str(json.dumps({**json.loads(converted.to_str()), "added_tokens": []}))


def _set_pre_tokenizer(tokenizer: Any, pre: _Pre) -> None:
    from tokenizers import Regex, normalizers, pre_tokenizers

    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if pre.digits else []
    if pre.split is not None:
        steps.append(pre_tokenizers.Split(Regex(pre.split), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.split is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.model.ignore_merges = pre.whole
    tokenizer.normalizer = normalizers.NFC() if pre.nfc else None


def _add_tokens(tokenizer: Any, tokens: list[str], kinds: list[int], special: Mapping[str, str]) -> None:
    """Tokens that text is cut at: control tokens are special, the user's own are not. None is new."""
    from tokenizers import AddedToken

    control = {token for token, kind in zip(tokens, kinds) if kind == _CONTROL} | set(special.values())
    known = tokenizer.get_vocab()
    in_order = [token for token in tokens if token in known]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in in_order if token in control])
    users = {token for token, kind in zip(tokens, kinds) if kind == _USER_DEFINED} - control
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in in_order if token in users])


def _set_post_processor(tokenizer: Any, ends: Mapping[str, str], own: Mapping[str, Any]) -> None:
    """What is put around a text that is no conversation."""
    from tokenizers import processors

    single = [*([ends["bos"]] if "bos" in ends else []), "$A", *([ends["eos"]] if "eos" in ends else [])]
    ids = [(token, own[f"{end}_token_id"]) for end, token in ends.items()]
    level = processors.ByteLevel(trim_offsets=False)
    around = processors.TemplateProcessing(single=single, pair=[*single, *(p.replace("$A", "$B") for p in single)], special_tokens=ids)
    if own["model"] == "gpt2":
        tokenizer.post_processor = processors.Sequence([level, around]) if ends else level
    elif ends:
        tokenizer.post_processor = around
