"""The packed loss equals the unpacked loss and TRL's best-fit-decreasing packing, on the same rows and weights."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from training_cases import TINY, UNTIED, Sequence_, mesh, pack, params_on, place

from dccot_jax.model import hf
from dccot_jax.train.losses import weighted_loss

ROW_TOKENS = 320
forward_only = jax.jit(weighted_loss, static_argnums=1)


def _first_fit(rows: list[Sequence_]) -> list[list[Sequence_]]:
    packed: list[list[Sequence_]] = []
    for seq in rows:
        for row in packed:
            if sum(len(other.ids) for other in row) + len(seq.ids) <= ROW_TOKENS:
                row.append(seq)
                break
        else:
            packed.append([seq])
    return packed


@pytest.mark.parity
@pytest.mark.parametrize("mc", [dataclasses.replace(mc, max_positions=512) for mc in (TINY, UNTIED)], ids=["llama tied", "qwen2 untied"])
def test_packed_equals_unpacked_equals_trl_bfd(mc, tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import pack_dataset
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    rng = np.random.default_rng(0)
    rows = []
    for length in [*rng.integers(6, 150, 24), 300]:
        rows.append(Sequence_(rng.integers(0, mc.vocab_size, length).astype(np.int32), int(rng.integers(1, length - 2)), 1.0))
    one = mesh(1, 1, 1)
    params = params_on(mc, one)
    hf.save_hf(params, mc, None, tmp_path)

    losses = {}
    with jax.set_mesh(one):
        for name, layout in (("packed", _first_fit(rows)), ("unpacked", [[seq] for seq in rows])):
            total, weight = forward_only(params, mc, place(pack(layout, ROW_TOKENS), one))
            assert float(weight) == sum(len(seq.ids) - seq.prompt for seq in rows)
            losses[name] = float(total) / float(weight)

    labels = [np.where(np.arange(len(seq.ids)) < seq.prompt, -100, seq.ids).tolist() for seq in rows]
    dataset = pack_dataset(Dataset.from_dict({"input_ids": [seq.ids.tolist() for seq in rows], "labels": labels}), ROW_TOKENS, "bfd")
    assert len(dataset) < len(rows) / 3  # it did pack
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(list(dataset))
    with torch.no_grad():  # without a cache, as in training: with one, transformers does not tell packed documents apart
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0, :-1].double()
    target = batch["labels"][0, 1:]
    losses["trl bfd"] = float(torch.nn.functional.cross_entropy(logits, target, ignore_index=-100))
    assert int((target != -100).sum()) == sum(len(seq.ids) - seq.prompt for seq in rows)
    print(losses)
    assert losses["packed"] == pytest.approx(losses["unpacked"], rel=1e-5)
    assert losses["packed"] == pytest.approx(losses["trl bfd"], rel=1e-5)
