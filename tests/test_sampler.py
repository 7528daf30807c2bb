"""Generation against a naive loop that recomputes everything; slots, stops, draws, meshes."""

from __future__ import annotations

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_decoder import log_softmax, reference_logits
from test_model import TIED, UNTIED, random_params

from dccot_jax.generate.cache import bucket
from dccot_jax.generate.sampler import Sampler, programs
from dccot_jax.model.config import ModelConfig
from dccot_jax.model.sharding import make_mesh, param_shardings

RNG = np.random.default_rng(5)
PROMPTS = [RNG.integers(0, 90, length).tolist() for length in (5, 30, 1, 17, 44, 9, 2, 33, 12, 20, 7)]
NEW = 21  # more than one call of 16 steps


def naive(params: dict, mc: ModelConfig, prompt: list[int], eos: set[int], limit: int = NEW) -> tuple[list[int], str]:
    """Greedy, whole sequence recomputed in float64 for every token."""
    made: list[int] = []
    while len(made) < limit:
        made.append(int(np.argmax(reference_logits(params, mc, np.array(prompt + made))[-1])))
        if made[-1] in eos:
            return made, "stop"
    return made, "length"


@pytest.fixture(scope="module", params=[TIED, UNTIED], ids=["tied", "untied"])
def case(request):
    mc = request.param
    params = random_params(mc)
    free = [naive(params, mc, prompt, set())[0] for prompt in PROMPTS]
    # Stop ids picked so that rows stop at different places, and some never.
    eos: set[int] = set()
    for token in sorted({token for tokens in free for token in tokens}):
        if sum(eos.isdisjoint(tokens) and token not in tokens for tokens in free) >= 3:
            eos.add(token)
    expected = []
    for tokens in free:
        cut = next((i for i, token in enumerate(tokens) if token in eos), None)
        expected.append((tokens, "length") if cut is None else (tokens[: cut + 1], "stop"))
    assert {reason for _, reason in expected} == {"length", "stop"} and len({len(tokens) for tokens, _ in expected}) > 3
    return mc, params, eos, expected


def as_pairs(results) -> list[tuple[list[int], str]]:
    return [(result.tokens, result.finish_reason) for result in results]


def test_greedy_equals_naive_recomputation_with_refilled_slots(case):
    mc, params, eos, expected = case
    seen: Counter[int] = Counter()
    sampler = Sampler(mc, params, batch_rows=4, eos_id=sorted(eos))
    results = sampler.generate(PROMPTS, NEW, on_batch=lambda rows: seen.update(row for row, _ in rows))
    assert as_pairs(results) == expected
    assert seen == Counter(range(len(PROMPTS)))
    firsts = [(tokens[:1], "stop" if tokens[0] in eos else "length") for tokens, _ in expected]
    assert as_pairs(sampler.generate(PROMPTS[:3], 1)) == firsts[:3]


def test_one_at_a_time_equals_together_and_a_second_call_compiles_nothing(case):
    mc, params, eos, expected = case
    sampler = Sampler(mc, params, batch_rows=1, eos_id=sorted(eos))
    assert [as_pairs(sampler.generate([prompt], NEW))[0] for prompt in PROMPTS[:4]] == expected[:4]
    prefill, decode = programs(mc, sampler._mesh, 1, jnp.dtype("float32"), True, False)
    before = prefill._cache_size(), decode._cache_size()
    again = Sampler(mc, params, batch_rows=1, eos_id=sorted(eos))
    assert [as_pairs(again.generate([prompt], NEW))[0] for prompt in PROMPTS[:4]] == expected[:4]
    assert (prefill._cache_size(), decode._cache_size()) == before


def test_on_eight_devices(case):
    mc, params, eos, expected = case
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):  # as the stages call it
        sampler = Sampler(mc, jax.device_put(params, param_shardings(mc, mesh)), mesh, batch_rows=4, eos_id=sorted(eos))
        assert as_pairs(sampler.generate(PROMPTS[:6], NEW)) == expected[:6]


def test_draws_depend_on_seed_and_row_id_not_on_the_batch():
    mc, params = TIED, random_params(TIED)
    sampler = Sampler(mc, params, batch_rows=4, eos_id=0)
    together = sampler.generate(PROMPTS, NEW, temperature=0.8, seed=3)
    some = [8, 2, 5]
    apart = sampler.generate([PROMPTS[row] for row in some], NEW, temperature=0.8, seed=3, row_ids=some)
    assert as_pairs(apart) == [as_pairs(together)[row] for row in some]
    assert as_pairs(sampler.generate(PROMPTS, NEW, temperature=0.8, seed=4)) != as_pairs(together)
    assert len({tuple(result.tokens) for result in sampler.generate([PROMPTS[0]] * 8, NEW, temperature=0.8)}) > 1


def test_entropy_is_the_mean_over_the_written_tokens_whatever_the_batch(case):
    mc, params, eos, expected = case
    for rows in (1, 4):
        results = Sampler(mc, params, batch_rows=rows, eos_id=sorted(eos)).generate(PROMPTS[:6], NEW, entropy=True)
        assert as_pairs(results) == expected[:6]
        for prompt, result in zip(PROMPTS, results):
            logp = log_softmax(reference_logits(params, mc, np.array([*prompt, *result.tokens]))[len(prompt) - 1 : -1])
            assert result.entropy == pytest.approx(-np.mean(np.sum(np.exp(logp) * logp, axis=-1)), abs=1e-5)


def test_drawn_frequencies_follow_the_model():
    mc = ModelConfig("llama", 8, 8, 8, 1, 2, 1, 4)
    params = random_params(mc)
    params["embed"] = params["embed"] * 3
    sampler = Sampler(mc, params, batch_rows=256, eos_id=99)
    firsts = Counter(result.tokens[0] for result in sampler.generate([[1, 2, 3]] * 4096, 1, temperature=0.7, seed=1))
    expected = np.exp(log_softmax(reference_logits(params, mc, np.array([1, 2, 3]))[-1] / 0.7))
    observed = np.array([firsts[token] for token in range(8)]) / 4096
    assert np.abs(observed - expected).max() < 5 * np.sqrt(0.25 / 4096)
    assert expected.max() - expected.min() > 0.2


def test_bfloat16_weights_are_cast_once():
    sampler = Sampler(TIED, random_params(TIED), batch_rows=4, compute_dtype="bfloat16", eos_id=0)
    assert sampler._step_params["layers"][0]["wq"].dtype == jnp.bfloat16
    assert sampler._step_params["final_norm"].dtype == jnp.float32
    assert [len(result.tokens) for result in sampler.generate(PROMPTS[:1], 2)] <= [2]


def test_impossible_requests_are_refused():
    mc = dataclasses.replace(TIED, max_positions=40)
    sampler = Sampler(mc, random_params(mc), eos_id=0)
    assert sampler.generate([], 4) == []
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        sampler.generate([[1], []], 4)
    with pytest.raises(ValueError, match="prompt 0: 30 tokens and 11 new ones exceed the model's 40 positions"):
        sampler.generate([[1] * 30], 11)
    assert [bucket(n) for n in (1, 33, 64, 65, 100, 200, 1000)] == [32, 48, 64, 96, 128, 256, 1024]
