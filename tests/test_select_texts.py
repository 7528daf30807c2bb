"""Selectors over labels and texts: closed forms, published formulas, brute force."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections import Counter

import numpy as np
import pytest
from select_cases import ids, pool, select, singles, size, with_text

from dccot_jax.config import ConfigError
from dccot_jax.records import canonical_json
from dccot_jax.select.candidates import Candidate
from dccot_jax.select.methods import dsir, limo, minhash
from dccot_jax.select.methods.pareto import crowding_distance, pareto_fronts
from dccot_jax.select.methods.s1k import _longest_first
from dccot_jax.select.selectors import check_steps, required_corpora, required_signals


def texts(*records, **columns) -> list[Candidate]:
    return [dataclasses.replace(c, record=record) for c, record in zip(singles(len(records), **columns), records)]


# --- ranks ---------------------------------------------------------------------------------------------------------------


def test_quantile_windows_cut_the_pool_into_parts():
    candidates = pool(50, seed=7)
    scored = sorted((c for c in candidates if "nll" in c.values), key=lambda c: (c.values["nll"], c.group_id))
    parts = []
    for low, high in itertools.pairwise((0.0, 0.3, 0.55, 1.0)):
        kept, _, _ = select(candidates, {"name": "quantile", "signal": "nll", "low": low, "high": high})
        first, last = math.floor(low * len(scored) + 1e-9), math.floor(high * len(scored) + 1e-9)
        assert {c.group_id for c in kept} == {c.group_id for c in scored[first:last]}
        parts.append(ids(kept))
    assert sum(map(len, parts)) == len(set().union(*parts)) == size(scored)


def test_gumbel_topk_draws_in_proportion():
    values = [0.0, 1.0, 2.0]
    candidates = singles(3, nll=lambda i: values[i])
    for temperature, prefer in ((1.0, "high"), (2.0, "low")):
        step = {"name": "gumbel_topk", "signal": "nll", "rows": 1, "temperature": temperature, "prefer": prefer}
        counts = Counter(select(candidates, step, seed=seed)[0][0].group_id for seed in range(2000))
        weights = np.exp(np.array(values) / temperature * (1 if prefer == "high" else -1))
        expected = 2000 * weights / weights.sum()
        # a chi-square of 2 degrees of freedom exceeds 14 once in a thousand times
        assert sum((counts[f"g{i:03d}"] - expected[i]) ** 2 / expected[i] for i in range(3)) < 14


def test_gumbel_topk_grows_by_supersets_and_cold_is_top():
    candidates = pool(60, seed=3)
    small, large = (ids(select(candidates, {"name": "gumbel_topk", "signal": "nll", "rows": n})[0]) for n in (8, 30))
    assert small < large
    distinct = singles(30, nll=lambda i: i)
    cold, _, _ = select(distinct, {"name": "gumbel_topk", "signal": "nll", "rows": 7, "temperature": 1e-3})
    assert cold == select(distinct, {"name": "top", "signal": "nll", "rows": 7})[0]


# --- labels --------------------------------------------------------------------------------------------------------------


def labelled(counts: dict[str, int]) -> list[Candidate]:
    names = [name for name, n in counts.items() for _ in range(n)]
    return texts(*(with_text(question=str(i), teacher=name) for i, name in enumerate(names)), nll=lambda i: i % 7)


@pytest.mark.parametrize("rows", [1, 2, 7, 10, 23, 40, 50])
def test_stratified_is_sainte_lague(rows):
    counts = {"a": 30, "b": 13, "c": 7}
    kept, _, _ = select(labelled(counts), {"name": "stratified", "by": "teacher", "rows": rows})
    seats = dict.fromkeys(counts, 0)
    for _ in range(rows):  # next seat to the largest n / (2 s + 1)
        seats[max(seats, key=lambda name: (counts[name] / (2 * seats[name] + 1), [-ord(name[0])]))] += 1
    assert Counter(c.record.teacher for c in kept) == {name: n for name, n in seats.items() if n}


def test_stratified_equal_uses_up_small_strata_and_ranks_inside():
    candidates = labelled({"a": 30, "b": 4, "c": 9})
    step = {"name": "stratified", "by": "teacher", "rows": 24, "allocation": "equal", "signal": "nll", "prefer": "low"}
    kept, dropped, _ = select(candidates, step)
    assert Counter(c.record.teacher for c in kept) == {"a": 11, "b": 4, "c": 9}
    best = sorted((c for c in candidates if c.record.teacher == "a"), key=lambda c: (c.values["nll"], c.group_id))[:11]
    assert {c.group_id for c in kept if c.record.teacher == "a"} == {c.group_id for c in best}
    assert all(d.detail.endswith("teacher = a") for d in dropped)


def test_stratified_by_quantile_bins_of_a_signal():
    candidates = singles(40, nll=lambda i: i)
    kept, _, _ = select(candidates, {"name": "stratified", "by": "nll", "bins": 4, "rows": 8})
    assert Counter(int(c.values["nll"]) // 10 for c in kept) == {0: 2, 1: 2, 2: 2, 3: 2}
    assert required_signals([{"name": "stratified", "by": "nll", "bins": 4, "rows": 8}]) == ("nll",)


def test_meta_keys_are_labels():
    candidates = texts(*(with_text(question=str(i), meta=canonical_json({"subject": "ab"[i % 2]})) for i in range(6)))
    kept, _, _ = select(candidates, {"name": "stratified", "by": "meta.subject", "rows": 2})
    assert {c.record.meta for c in kept} == {'{"subject":"a"}', '{"subject":"b"}'}


def test_per_question_best_over_the_normalised_question():
    records = [with_text(question=q, target=str(i)) for i, q in enumerate(["One?", "one", "ONE!", "two", "two.", "three"])]
    candidates = texts(*records, nll=lambda i: [3, 1, 2, 5, 5, 0][i])
    kept, dropped, _ = select(candidates, {"name": "per_question_best", "signal": "nll"})
    assert [c.group_id for c in kept] == ["g000", "g003", "g005"]  # a tie: the lower id
    assert {d.id: d.reason for d in dropped} == dict.fromkeys(("g001", "g002", "g004"), "not_best_nll")
    kept, _, _ = select(candidates, {"name": "per_question_best", "signal": "nll", "prefer": "low", "count": 2})
    assert [c.group_id for c in kept] == ["g001", "g002", "g003", "g004", "g005"]


# --- Pareto --------------------------------------------------------------------------------------------------------------


def brute_fronts(points: np.ndarray) -> list[int]:
    def dominated(i: int, others: set[int]) -> bool:
        return any((points[j] >= points[i]).all() and (points[j] > points[i]).any() for j in others)

    left, fronts = set(range(len(points))), [0] * len(points)
    for number in itertools.count():
        if not left:
            return fronts
        front = {i for i in left if not dominated(i, left)}
        for i in front:
            fronts[i] = number
        left -= front
    raise AssertionError


@pytest.mark.parametrize("seed", range(8))
def test_pareto_fronts_match_brute_force(seed):
    points = np.random.default_rng(seed).integers(0, 6, (30, 2)).astype(float)
    assert pareto_fronts(points).tolist() == brute_fronts(points)


def test_pareto_keeps_the_front_or_fronts_until_the_budget_is_spent():
    points = [(0, 9), (1, 7), (2, 6.8), (9, 0), (8, 1), (0, 0), (1, 1)]
    candidates = singles(7, nll=lambda i: points[i][0], entropy=lambda i: points[i][1])
    step = {"name": "pareto", "signals": ("nll", "entropy")}
    kept, dropped, _ = select(candidates, step)
    assert [c.group_id for c in kept] == ["g000", "g001", "g002", "g003", "g004"]
    assert {d.id: d.detail.split()[-1] for d in dropped} == {"g005": "3", "g006": "2"}
    kept, _, _ = select(candidates, {**step, "rows": 4})  # both ends, then the two with the widest gaps
    crowding = crowding_distance(np.array(points[:5], float))
    assert np.isinf(crowding[[0, 3]]).all()
    widest = sorted((1, 2, 4), key=lambda i: -crowding[i])[:2]
    assert {int(c.group_id[1:]) for c in kept} == {0, 3, *widest}
    kept, _, _ = select(candidates, {**step, "rows": 6})
    assert "g006" in ids(kept) and "g005" not in ids(kept)
    kept, _, _ = select(candidates, {**step, "prefer": ("low", "low")})
    assert [c.group_id for c in kept] == ["g005"]


# --- near-duplicate texts ------------------------------------------------------------------------------------------------


def shingle_set(text: str, n: int) -> set[tuple[str, ...]]:
    words = text.lower().split()
    return {tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))}


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9])
def test_minhash_matches_all_pairs(threshold):
    rng = np.random.default_rng(0)
    base = [[f"w{w}" for w in rng.integers(0, 500, 60)] for _ in range(12)]
    made = []
    for words in base:
        for edits in (0, 1, 3, 12):
            copy = list(words)
            for place in rng.integers(0, 60, edits):
                copy[place] = f"x{rng.integers(0, 10**6)}"
            made.append(" ".join(copy))
    candidates = texts(*(with_text(target=text) for text in made))
    kept_sets: list[tuple[str, set]] = []
    expected = {}
    for c in candidates:
        own = shingle_set(c.record.target, 3)
        alike = [(len(own & other) / len(own | other), name) for name, other in kept_sets]
        if any(value >= threshold for value, _ in alike):
            expected[c.group_id] = max(alike, key=lambda pair: (pair[0], [-int(pair[1][1:])]))[1]
        else:
            kept_sets.append((c.group_id, own))
    kept, dropped, _ = select(candidates, {"name": "minhash", "ngram": 3, "threshold": threshold})
    assert {c.group_id for c in kept} == {name for name, _ in kept_sets}
    assert {d.id: d.detail.split()[-1] for d in dropped} == expected and len(expected) >= 12


def test_minhash_keeps_the_best_by_signal():
    candidates = texts(*(with_text(question=f"Same {'text ' * 9}{end}") for end in ("here", "Here!", "here?")), nll=lambda i: [1, 3, 2][i])
    kept, _, _ = select(candidates, {"name": "minhash", "text": "question", "signal": "nll"})
    assert [c.group_id for c in kept] == ["g001"]
    kept, _, _ = select(candidates, {"name": "minhash", "text": "question"})
    assert [c.group_id for c in kept] == ["g000"]


def test_bands_agree_as_often_as_they_should():
    rng = np.random.default_rng(1)
    hits = total = 0
    for _ in range(60):
        shared, left, right = (rng.integers(0, 2**63, n).astype(np.uint64) for n in (60, 20, 20))
        a, b = (np.unique(np.concatenate([shared, own])) for own in (left, right))
        hits += sum(x == y for x, y in zip(minhash.bands(a), minhash.bands(b)))
        total += minhash.BANDS
    expected = 0.6**minhash.ROWS  # Jaccard 60 / 100
    assert abs(hits / total - expected) < 5 * math.sqrt(expected * (1 - expected) / total)


# --- DSIR ----------------------------------------------------------------------------------------------------------------


def test_dsir_weights_equal_a_hand_computation():
    raw = ["Red box, red!", "blue pen", "red pen"]
    target = ["red red box"]

    def counts(text: str) -> Counter:
        words = {"Red box, red!": ["red", "box", ",", "red", "!"]}.get(text, text.lower().split())
        grams = words + [f"{a} {b}" for a, b in itertools.pairwise(words)]
        return Counter(int(hashlib.sha256(gram.encode()).hexdigest(), 16) % 10_000 for gram in grams)

    wanted = sum((counts(text) for text in target), Counter())
    pool_counts = sum((counts(text) for text in raw), Counter())

    def log_p(total: Counter, b: int) -> float:
        return math.log(total[b] / sum(total.values()) + 1e-8)

    expected = [sum(n * (log_p(wanted, b) - log_p(pool_counts, b)) for b, n in counts(text).items()) for text in raw]
    assert dsir.log_weights(raw, target) == pytest.approx(expected, rel=1e-12)


def test_dsir_prefers_texts_like_the_target_and_samples_by_seed():
    records = [with_text(question=f"{'pens and boxes' if i % 2 else 'dates and times'} {i}") for i in range(20)]
    step = {"name": "dsir", "target": "synth_arithmetic", "rows": 8}
    corpora = {"synth_arithmetic:question": ["pens and boxes 3", "boxes and pens 4"]}
    assert required_corpora([step]) == {"synth_arithmetic:question": "synth_arithmetic"}
    kept, _, _ = select(texts(*records), {**step, "sample": False}, corpora=corpora)
    assert all(int(c.group_id[1:]) % 2 for c in kept) and len(kept) == 8
    draws = {frozenset(ids(select(texts(*records), step, corpora=corpora, seed=seed)[0])) for seed in range(4)}
    assert len(draws) > 1
    with pytest.raises(ValueError, match="target has no words"):
        select(texts(*records), step, corpora={"synth_arithmetic:question": [""]})


# --- s1K and LIMO ----------------------------------------------------------------------------------------------------------


def test_the_rank_draw_follows_its_distribution():
    for count in (1, 2, 5):
        draws = Counter(_longest_first(count, (i + 0.5) / 4096) for i in range(4096))
        total = sum(2.0**-r for r in range(1, count + 1))
        assert draws == pytest.approx({r: 4096 * 2.0 ** -(r + 1) / total for r in range(count)}, abs=2)


def test_s1k_is_even_over_domains_and_prefers_long_chains():
    names = ["big"] * 90 + ["small"] * 10
    candidates = texts(*(with_text(question=str(i), teacher=name) for i, name in enumerate(names)), completion_tokens=lambda i: i)
    counts: Counter = Counter()
    first: Counter = Counter()
    for seed in range(300):
        kept, _, _ = select(candidates, {"name": "s1k", "by": "teacher", "rows": 1}, seed=seed)
        counts[kept[0].record.teacher] += 1
        first[kept[0].group_id] += 1
    assert abs(counts["big"] - 150) < 5 * math.sqrt(75)
    assert first["g089"] + first["g099"] == pytest.approx(150, abs=45)  # the longest of its domain: one half
    kept, _, _ = select(candidates, {"name": "s1k", "by": "teacher", "rows": 60})
    assert len(kept) == 60 and sum(c.record.teacher == "small" for c in kept) == 10  # used up, then the rest from the other
    kept, _, _ = select(candidates, {"name": "s1k", "by": "teacher", "rows": 20, "weights": {"big": 1.0}})
    assert len(kept) == 20 and sum(c.record.teacher == "small" for c in kept) <= 14  # only the first 70 % are drawn evenly


def test_limo_score_is_the_published_sum():
    reasonings = ["We check it and might verify.", "Therefore, since perhaps so.", "Plain words only here now done.", ""]
    candidates = texts(*(with_text(reasoning=r) for r in reasonings))
    kept, dropped, _ = select(candidates, {"name": "limo", "rows": 2})
    columns = np.array([[6, 2 / 6, 1 / 6, 0], [4, 0, 1 / 4, 2 / 4], [6, 0, 0, 0]])
    np.testing.assert_allclose([limo.features(r) for r in reasonings[:3]], columns)
    z = (columns - columns.mean(0)) / columns.std(0)
    score = z @ [0.30, 0.20, 0.25, 0.25]
    assert {c.group_id for c in kept} == {f"g{i:03d}" for i in np.argsort(-score)[:2]}
    assert {d.id: d.reason for d in dropped} == {"g003": "no_reasoning", f"g{np.argmin(score):03d}": "not_in_limo"}
    worst = next(d for d in dropped if d.reason == "not_in_limo")
    assert float(worst.detail.split()[-1]) == pytest.approx(score.min(), rel=1e-4)


@pytest.mark.parametrize(
    "reasoning, words",
    [
        ("Проверим: дважды два — 4.", 4),
        ("हिन्दी में दो और दो", 5),
        ("كان معه ٣ أقلام", 4),
        ("因为三加四等于七，所以答案是七。", 2),  # written without spaces: a word is what stands between punctuation
        ("Café, cafe\u0301: don’t, don't CHECK", 5),
        ("x_1 = 2", 3),
    ],
)
def test_limo_counts_words_of_any_script(reasoning, words):
    assert limo.features(reasoning)[0] == words
    kept, dropped, _ = select(texts(with_text(reasoning=reasoning)), {"name": "limo", "rows": 1})
    assert len(kept) == 1 and not dropped


def test_limo_tells_no_words_from_no_rationale():
    _, dropped, _ = select(texts(*(with_text(reasoning=r) for r in ("?!", " \n", "so"))), {"name": "limo", "rows": 3})
    assert {d.id: d.reason for d in dropped} == {"g000": "no_words", "g001": "no_reasoning"}
    assert next(d.detail for d in dropped if d.reason == "no_words") == "step 0 limo: no word or number in the rationale '?!'"


@pytest.mark.parametrize(
    "step, message",
    [
        ({"name": "quantile", "signal": "nll", "low": 0.5, "high": 0.5}, "needs low < high"),
        ({"name": "quantile", "signal": "nll", "low": -0.5}, r"low: -0.5 must be a finite number in \[0, 1\]"),
        ({"name": "gumbel_topk", "signal": "nll", "rows": 3, "temperature": 0}, r"temperature: 0 must be a finite number in \(0, inf\)"),
        ({"name": "gumbel_topk", "signal": "nll", "rows": 3, "prefer": "hi"}, "prefer: 'hi' is not one of high, low"),
        ({"name": "stratified", "by": "techer", "rows": 3}, r"'techer' is not one of task, teacher.*did you mean 'teacher'"),
        ({"name": "stratified", "by": "nll", "rows": 3}, "bins: missing; 'nll' is a number"),
        ({"name": "stratified", "by": "ifd", "bins": 3, "rows": 3}, "by: signal 'ifd' has no scores"),
        ({"name": "per_question_best", "signal": "nll", "rows": 3}, "takes signal, prefer, count"),
        ({"name": "pareto", "signals": ("nll",)}, "must be 2 signals"),
        ({"name": "pareto", "signals": ("nll", "entropy"), "prefer": "low"}, "two of high, low"),
        ({"name": "minhash", "text": "answer"}, "text: 'answer' is not one of question, reasoning, target"),
        ({"name": "minhash", "threshold": 0}, r"threshold: 0 must be a finite number in \(0, 1\]"),
        ({"name": "dsir", "rows": 3}, "unknown task"),
        ({"name": "dsir", "target": "asdiv", "rows": 3}, "only a test split"),
        ({"name": "s1k", "rows": 3}, "by: None is not one of task"),
        ({"name": "s1k", "by": "teacher", "rows": 3, "weights": {"a": 0}}, "weights of at least 0, some of them above"),
    ],
)
def test_malformed_steps(step, message):
    with pytest.raises(ConfigError, match=message):
        check_steps([step], ("nll", "entropy"), ("embedding",))
