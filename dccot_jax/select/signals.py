"""The signals: which there are, of what kind, and the forward signals themselves, one function each.

A forward signal is `f(stats, mask) -> scalar` for one row. `stats[view][stat]` and `mask[view]` have shape [T]: one entry per
scored completion position, mask 1.0 on real positions and 0.0 on padding. The engine vmaps it over rows and runs one
forward per view for all requested signals together. Adding one is adding one function here. The other kinds: vectors of
hidden states (`VECTORS`, pooled in the same forward), signals over pieces of a row (`select/items.py`), signals relative
to the other rows of a question (`select/relative.py`), sampled ones (`select/sampled.py`), and gradients
(`select/gradients/`).

Views (`select/views.py` builds them; both score exactly the same completion tokens, end-of-turn token included):
  conditional: the rendered prompt, then the completion.
  unconditional: the template's assistant header alone, then the completion.
Statistics, of the next-token distribution p at the position that predicts a completion token y (`model/head.py`):
  `label_logp` = log p_y, nats; `entropy` = H(p), nats; `margin` = largest minus second largest probability;
  `error_norm` = |p - one-hot(y)|; `label_rank` = 1 + number of tokens more probable than y.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp

from dccot_jax.config import ConfigError, nearest
from dccot_jax.model.head import STATS

VIEWS = ("conditional", "unconditional")
# Mean of the student's last hidden states (after the final norm) over the positions of the prompt, and of the completion.
VECTORS = ("embedding_prompt", "embedding_rationale")
# Signals over sequences made from pieces of a row; `select/items.py` makes them.
ITEMS = ("answer_gain", "local_naturalness")
# Vectors of a sentence encoder, of the same two texts; `select/sentences.py`.
SENTENCES = ("sentence_prompt", "sentence_rationale")
# Signals that compare a row with others, and the forward signal they are made of; `select/relative.py`.
RELATIVE = {"grape": "nll"}
# Signals that need the student to write an answer; `select/sampled.py` makes their columns.
SAMPLED = ("pass_rate", "student_entropy", "student_error")
# Signals made of gradients; `select/gradients/` makes their columns.
GRADIENTS = ("grand", "less")
# Signals of teachers that grade rows; `select/judged.py`, the rubrics behind them in `select/rubrics.py`.
JUDGED = ("judge", "judge_clarity", "judge_coherence", "judge_correctness", "proxy_complexity", "proxy_quality")
# Grades from the logits of a local model; `select/deita_scores.py`.
DEITA = ("deita_complexity", "deita_quality")
# Signals that subtract the loss of another model, and its key in `config.score.models`; `select/two_model.py`.
TWO_MODEL = {"excess": "reference", "rho": "holdout", "teacher_student_gap": "teacher"}
# Signals over the snapshots of a training; `select/trajectories.py`. One of them is a vector.
OVER_TIME = ("forgetting", "learning_speed", "s2l")
VECTOR_COLUMNS = (*VECTORS, *SENTENCES, "s2l")
_OTHERS = (*VECTORS, *SENTENCES, *ITEMS, *RELATIVE, *SAMPLED, *GRADIENTS, *JUDGED, *DEITA, *TWO_MODEL, *OVER_TIME)
RANK_LIMIT = 100.0

Stats = Mapping[str, Mapping[str, jax.Array]]
Mask = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Signal:
    """A registered forward signal.

    Attributes:
      name: column in `scores.parquet`. fn: the function over one row.
      needs: the statistics read from each view, as {view: (stat, ...)}.
    """

    name: str
    fn: Callable[[Stats, Mask], jax.Array]
    needs: Mapping[str, tuple[str, ...]]


_REGISTRY: dict[str, Signal] = {}
# Signals that no row without a gold answer can have.
NEEDS_GOLD = ("answer_gain", "pass_rate", "student_error")


def signal(**needs: Sequence[str]) -> Callable[[Callable[[Stats, Mask], jax.Array]], Callable[[Stats, Mask], jax.Array]]:
    """Register the decorated function under its own name; `needs` gives the statistics per view.

    Raises ValueError on an unknown view or statistic, or a name that is taken.
    """

    def register(fn: Callable[[Stats, Mask], jax.Array]) -> Callable[[Stats, Mask], jax.Array]:
        name = fn.__name__
        if name in _REGISTRY or name in _OTHERS:
            raise ValueError(f"signal {name!r} is registered already")
        for view, stats in needs.items():
            if view not in VIEWS or not set(stats) <= set(STATS):
                raise ValueError(f"signal {name!r}: {view}={tuple(stats)} is not a view of {VIEWS} with statistics of {STATS}")
        _REGISTRY[name] = Signal(name, fn, {view: tuple(stats) for view, stats in needs.items()})
        return fn

    return register


def signal_names() -> tuple[str, ...]:
    """All signals, of every kind, sorted."""
    return tuple(sorted((*_REGISTRY, *_OTHERS)))


def split_signals(names: Iterable[str]) -> tuple[tuple[Signal, ...], tuple[str, ...]]:
    """Requested names as (forward signals, names of other kinds), each sorted by name and without repeats.

    Raises ConfigError on an unknown name, with the nearest valid one.
    """
    wanted = sorted(set(names))
    for name in wanted:
        if name not in _REGISTRY and name not in _OTHERS:
            known = signal_names()
            raise ConfigError(f"config.score.signals: {name!r} is not one of {', '.join(known)}{nearest(name, known)}")
    return tuple(_REGISTRY[n] for n in wanted if n in _REGISTRY), tuple(n for n in wanted if n in _OTHERS)


def required_stats(signals: Iterable[Signal]) -> dict[str, tuple[str, ...]]:
    """{view: statistics} that serve all `signals`; views and statistics in registry order."""
    merged: dict[str, set[str]] = {}
    for item in signals:
        for view, stats in item.needs.items():
            merged.setdefault(view, set()).update(stats)
    return {view: tuple(s for s in STATS if s in merged[view]) for view in VIEWS if view in merged}


def _mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over real positions. Padding is selected away, not multiplied, so a non-finite value there cannot leak in."""
    return jnp.sum(jnp.where(mask > 0, values, 0.0)) / jnp.sum(mask)


@signal(conditional=("label_logp",))
def nll(stats: Stats, mask: Mask) -> jax.Array:
    """Mean -log p(token | prompt, earlier tokens) over the completion, nats per token."""
    return -_mean(stats["conditional"]["label_logp"], mask["conditional"])


@signal(conditional=("label_logp",))
def ppl(stats: Stats, mask: Mask) -> jax.Array:
    """Perplexity of the completion given the prompt: exp(nll)."""
    return jnp.exp(nll(stats, mask))


@signal(unconditional=("label_logp",))
def nll_unconditional(stats: Stats, mask: Mask) -> jax.Array:
    """Mean -log p(token | assistant header, earlier tokens) over the completion, nats per token."""
    return -_mean(stats["unconditional"]["label_logp"], mask["unconditional"])


@signal(conditional=("label_logp",), unconditional=("label_logp",))
def ifd_loss(stats: Stats, mask: Mask) -> jax.Array:
    """Instruction-following difficulty as in Cherry LLM (arXiv 2308.12032): ratio of mean token losses, s(A|Q) / s(A).

    As there, the unconditional text is the response header and the answer, and every answer token is scored in both
    views. Higher means that the question helps less; above 1 it misleads. Nothing is dropped here: use `threshold`.
    """
    return nll(stats, mask) / nll_unconditional(stats, mask)


@signal(conditional=("label_logp",), unconditional=("label_logp",))
def ifd_ppl(stats: Stats, mask: Mask) -> jax.Array:
    """Instruction-following difficulty as in Superfiltering (arXiv 2402.00530): ppl(A|Q) / ppl(A) = exp(l_cond - l_uncond).

    One difference from the published script: it scores the answer alone from an empty context, leaving its first token
    unscored; here both views score the same tokens, the first one given the assistant header.
    """
    return jnp.exp(nll(stats, mask) - nll_unconditional(stats, mask))


@signal(conditional=("entropy",))
def entropy(stats: Stats, mask: Mask) -> jax.Array:
    """Mean entropy of the student's next-token distribution over the completion positions given the prompt, nats."""
    return _mean(stats["conditional"]["entropy"], mask["conditional"])


@signal(conditional=("label_logp", "label_rank"))
def token_accuracy(stats: Stats, mask: Mask) -> jax.Array:
    """Share of completion tokens that are the student's most probable token given the prompt and the tokens before (ties count).

    What Tirumala et al. (arXiv 2205.10770) call memorised, per token. NaN where a probability is not finite.
    """
    share = _mean((stats["conditional"]["label_rank"] == 1.0).astype(jnp.float32), mask["conditional"])
    return jnp.where(jnp.isfinite(nll(stats, mask)), share, jnp.nan)


@signal(conditional=("margin",))
def margin(stats: Stats, mask: Mask) -> jax.Array:
    """Mean difference between the two largest next-token probabilities over the completion positions; small where unsure.

    The margin of uncertainty sampling (Scheffer et al. 2001), per token; the label does not enter.
    """
    return _mean(stats["conditional"]["margin"], mask["conditional"])


@signal(conditional=("error_norm",))
def el2n(stats: Stats, mask: Mask) -> jax.Array:
    """EL2N (Paul et al., arXiv 2107.07075) per token: mean norm of p - one-hot(token), that is of sqrt(sum p^2 - 2 p_y + 1)."""
    return _mean(stats["conditional"]["error_norm"], mask["conditional"])


@signal(conditional=("label_logp", "label_rank"))
def rank_surprisal(stats: Stats, mask: Mask) -> jax.Array:
    """Rank-surprisal ratio (arXiv 2601.14249): sum_t min(rank_t, 100) / sum_t -log p_t over the completion. Lower is better."""
    rank = jnp.minimum(stats["conditional"]["label_rank"], RANK_LIMIT)
    return _mean(rank, mask["conditional"]) / nll(stats, mask)
