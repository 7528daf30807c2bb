"""The small files of a Hugging Face directory, for everyone who reads, copies or writes one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from etils import epath

from dccot_jax.model.config import ModelError

# Everything a tokenizer may be made of; copied as is, so that an export is byte for byte what the student learned with.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
)
GENERATION_CONFIG = "generation_config.json"  # how the model's authors generate; goes with its weights


def read_json(path: Path | epath.Path) -> dict[str, Any]:
    """Raises ModelError if the file is not JSON."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ModelError(f"{path}: not JSON ({error})") from None


def write_json(path: Path, value: Any) -> None:
    """Written beside and renamed."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
    os.replace(beside, path)
