"""Vectors of a sentence encoder (the package sentence-transformers, extra `sentences`), for selectors that look for diversity.

The student's own vectors (`embedding_prompt`, `embedding_rationale`) need no other model; these come from one that was trained so that
near vectors mean near texts (arXiv 1908.10084). Equal texts are encoded once. Texts lie in batches by their length, always the same ones,
so neither the rows' order nor `score.chunk_rows` changes a bit; processes take turns at chunks of batches.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from ml_collections import ConfigDict

from dccot_jax.artifact import ArtifactWriter
from dccot_jax.chunks import committed, drop_other_layouts, read_committed
from dccot_jax.config import ConfigError
from dccot_jax.context import Context
from dccot_jax.records import Trace, content_hash
from dccot_jax.select.signals import SENTENCES
from dccot_jax.select.tables import vector_array
from dccot_jax.train.checkpoint import first_line

BATCH = 32  # texts; part of what the last bits depend on
KEY = "config.score.sentences.model"
Encode = Callable[[list[str]], np.ndarray]


def check_sentences(cfg: ConfigDict) -> None:
    """Raises ConfigError without a model, or without the package that opens it."""
    model = cfg.score.sentences.model
    asked = next(name for name in cfg.score.signals if name in SENTENCES)
    if not model:
        raise ConfigError(f"{KEY}: empty; {asked} needs a sentence encoder: a directory or a hub name")
    place = Path(model).expanduser()
    local = model.startswith(("/", ".", "~")) or model.count("/") > 1 or (place.parts[1:] and Path(place.parts[0]).is_dir())
    if local and not place.is_dir():
        raise ConfigError(f"{KEY}: {model!r} is not a directory; accepted: a directory, or a hub name such as 'owner/name'")
    if importlib.util.find_spec("sentence_transformers") is None:
        raise ConfigError(f"config.score.signals: {asked} needs sentence-transformers: pip install -e '.[sentences]'")


def text_of(name: str, trace: Trace) -> str:
    """What a row's vector `name` is of: the question as it is asked, or the text the student learns to write."""
    return trace.target if name == "sentence_rationale" else trace.prompt or trace.question


def score(
    cfg: ConfigDict,
    names: Sequence[str],
    traces: Sequence[Trace],
    out: ArtifactWriter,
    ctx: Context,
    *,
    opened: Callable[[], Encode] | None = None,
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, Any]]:
    """({signal: {row id: float32 [D]}}, facts) of the signals `SENTENCES` among `names`; nothing on processes other than 0.

    `opened` gives the encoder of texts when it is first needed; None: that of `score.sentences.model`.
    """
    wanted = [name for name in names if name in SENTENCES]
    texts = sorted({text_of(name, trace) for name in wanted for trace in traces}, key=lambda text: (len(text), text))
    batches = [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]
    size = max(1, cfg.score.chunk_rows // BATCH)
    chunks = [batches[start : start + size] for start in range(0, len(batches), size)]
    layout = content_hash("sentences/1", cfg.score.sentences.model, texts, size)[:12]
    series = f"sentences-{layout}"
    drop_other_layouts(out, ctx, "sentences-", layout)
    done = committed(out, ctx, [series], len(chunks))
    todo = [index for index in range(len(chunks)) if not done[index]]
    own = todo[ctx.process_index :: ctx.process_count]
    started = time.monotonic()
    encode = (opened or (lambda: open_encoder(cfg.score.sentences.model)))() if own else None
    with ctx.progress("sentence vectors", sum(len(batch) for index in own for batch in chunks[index]), "texts") as meter:
        for turn in range(-(-len(todo) // ctx.process_count)):  # as many for every process: all meet at the stop point
            if turn < len(own) and encode is not None:
                vectors: list[np.ndarray] = []
                for batch in chunks[own[turn]]:
                    vectors += list(np.asarray(encode(batch), np.float32))
                    meter.advance(len(batch))
                out.commit_chunk(series, own[turn], pa.table({"vector": vector_array(vectors)}))
            ctx.stop_point("sentences: chunk committed")
    ctx.barrier("sentences-chunks")
    if not ctx.is_main:
        return {}, {}
    found: list[np.ndarray] = []
    for index in range(len(chunks)):
        column = read_committed(out, series, index)["vector"].combine_chunks()
        found += list(column.flatten().to_numpy().reshape(len(column), -1))
    of_text = dict(zip(texts, found, strict=True))
    columns = {name: {trace.id: of_text[text_of(name, trace)] for trace in traces} for name in wanted}
    facts = {"model": cfg.score.sentences.model, "texts": len(texts), "seconds": round(time.monotonic() - started, 3)}
    return columns, {"sentences": facts}


def open_encoder(model: str) -> Encode:
    """The encoder in a directory or on the hub, on the CPU; no code of its own and no pickled weights.

    Raises ConfigError where there is none, or it cannot be read.
    """
    from sentence_transformers import SentenceTransformer  # pyright: ignore[reportMissingImports]

    place = Path(model).expanduser()
    try:
        encoder = SentenceTransformer(
            str(place) if place.is_dir() else model, device="cpu", trust_remote_code=False, model_kwargs={"use_safetensors": True}
        )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{KEY}: {model!r} cannot be opened: {first_line(error)}") from None
    return lambda texts: encoder.encode(texts, batch_size=BATCH, convert_to_numpy=True, show_progress_bar=False)
