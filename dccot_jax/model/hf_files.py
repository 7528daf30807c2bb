"""Names of the small files of a Hugging Face directory, for everyone who copies one."""

from __future__ import annotations

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
