"""Copying, matching, singular directions, and the measurements on weights."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from oracle import Oracle
from test_composition import (
    REFERENCE,
    anatomy,
    attention_only,
    dense,
    oracle_anatomy,
    random_anatomy,
    split_gpt2,
)
from torch import Tensor, nn

from lightning_mi import ArgumentError, Context, ModelError
from lightning_mi.anatomy import Anatomy, Norm, ReaderInput, Writer
from lightning_mi.circuits import (
    Composition,
    Copying,
    HeadDirections,
    SubspaceOverlap,
    Vocabulary,
    composition,
    copying_score,
    matching_score,
    principal_angles,
    singular_directions,
    subspace_overlap,
    vocabulary,
)
from lightning_mi.circuits.weights.copying import copying_null
from lightning_mi.nodes import Head

KINDS = ("eigenvalue", "logit", "top_k", "argmax")


def with_tokens(a: Anatomy, tokens: int = 30, seed: int = 9, **parts: Any) -> Anatomy:
    generator = torch.Generator().manual_seed(seed)
    dtype = a.W_Q[0].dtype
    W_E = torch.randn(tokens, a.d_model, generator=generator, dtype=torch.float64).to(dtype)
    W_U = torch.randn(a.d_model, tokens, generator=generator, dtype=torch.float64).to(dtype)
    return dataclasses.replace(a, W_E=W_E, W_U=W_U, **parts)


# The hand-built model.


def test_the_hand_built_model_copies() -> None:
    a = oracle_anatomy(Oracle(5.0))
    for kind in KINDS:
        assert float(copying_score(a, kind)[1, 0]) == pytest.approx(1.0, abs=1e-5), kind
    # Head 0.0 writes where the answer does not read: 0/0 of eigenvalues is 0.
    assert float(copying_score(a)[0, 0]) == 0.0
    assert math.isnan(copying_score(a, "logit")[0, 0])
    assert float(copying_score(a, "top_k")[0, 0]) == float(copying_score(a, "argmax")[0, 0]) == 0


def test_a_negated_head_anti_copies() -> None:
    a = oracle_anatomy(Oracle(5.0), anti=True)
    for kind in KINDS:
        anti = copying_score(a, kind, anti=True)
        assert float(anti[1, 0]) == pytest.approx(1.0, abs=1e-5), kind
    assert float(copying_score(a)[1, 0]) == pytest.approx(-1.0, abs=1e-5)
    assert float(copying_score(a, "logit")[1, 0]) == pytest.approx(-1.0, abs=1e-5)
    assert float(copying_score(a, "argmax")[1, 0]) == 0.0


def test_a_head_that_looks_for_its_own_token_matches() -> None:
    a = random_anatomy((1,), d_model=20, d_head=(20,))
    W_Q = a.W_Q[0]
    same = anatomy([W_Q], [W_Q], list(a.W_V), list(a.W_O))
    other = anatomy([W_Q], [-W_Q], list(a.W_V), list(a.W_O))
    assert float(matching_score(with_tokens(same))[0, 0]) == pytest.approx(1.0)
    assert float(matching_score(with_tokens(other))[0, 0]) == pytest.approx(-1.0)


# Slow twins and TransformerLens.


def slow_balance(matrix: Tensor) -> float:
    values = np.linalg.eigvals(matrix.numpy())
    return float(values.real.sum() / np.abs(values).sum())


@pytest.mark.parametrize("norm", [None, "layer", "rms"])
def test_eigenvalue_scores_are_those_of_whole_matrices(norm: str | None) -> None:
    gain = torch.linspace(0.2, 2, 24, dtype=torch.float64)
    final = None if norm is None else Norm("final", norm, gain)  # type: ignore[arg-type]
    base = random_anatomy((4, 4), (2, 2), d_head=(5, 5), norm=norm)
    a = with_tokens(base, final_norm=final)
    assert a.W_E is not None and a.W_U is not None  # noqa: PT018
    W_U = a.W_U - a.W_U.mean(1, keepdim=True)
    if final is not None:
        W_U = final.folded(W_U)
    copying, matching = copying_score(a), matching_score(a)
    for layer in range(2):
        for head in range(4):
            whole = dense(a, layer, head)
            expected = slow_balance(a.W_E @ whole["V"] @ W_U)
            assert float(copying[layer, head]) == pytest.approx(expected, abs=1e-6)
            expected = slow_balance(a.W_E @ whole["Q"] @ a.W_E.T)
            assert float(matching[layer, head]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["tl2_attn_only", "tl4_gpt2"])
def test_eigenvalue_copying_is_that_of_transformer_lens(name: str) -> None:
    a = attention_only() if name == "tl2_attn_only" else split_gpt2()
    assert a.W_E is not None and a.W_U is not None  # noqa: PT018
    # Theirs does not take the mean over tokens off W_U.
    tokens = Vocabulary(torch.arange(len(a.W_E)), a.W_E, a.W_E, a.W_U, "W_E")
    expected = torch.tensor(np.load(REFERENCE / f"{name}.npz")["ov_copying_score"])
    torch.testing.assert_close(copying_score(a, tokens=tokens), expected, atol=2e-5, rtol=0)


def test_logit_copying_is_a_loop_over_sequences() -> None:
    a = with_tokens(random_anatomy((2,), d_head=(5,)), tokens=12)
    assert a.W_E is not None and a.W_U is not None  # noqa: PT018
    # Of 12 tokens every sequence holds all of them, in another order: an exact value.
    for head, anti in ((0, False), (1, True)):
        logits = a.W_E @ dense(a, 0, head)["V"] @ (a.W_U - a.W_U.mean(1, keepdim=True))
        above = -logits if anti else logits
        above = (above - above.mean(1, keepdim=True)).clamp(min=0)
        expected = 2 * float((above.diagonal() / above.sum(1)).mean()) - 1
        found = copying_score(a, "logit", anti=anti)[0, head]
        assert float(found) == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["top_k", "argmax"])
def test_top_k_copying_counts_tokens(kind: str) -> None:
    norm = Norm("norm", "layer", torch.linspace(0.5, 2, 24).double(), torch.randn(24).double())
    base = random_anatomy((4,), (2,), d_head=(5,), attention_norms=(norm,))
    bias = torch.randn(2, 5, dtype=torch.float64)
    a = with_tokens(dataclasses.replace(base, b_V=(bias,)), tokens=40)
    assert a.W_E is not None and a.W_U is not None  # noqa: PT018
    for head in range(4):
        z = norm(a.W_E) @ a.W_V[0][head // 2]
        z = z + bias[head // 2] if kind == "top_k" else z
        logits = z @ a.W_O[0][head] @ (a.W_U - a.W_U.mean(1, keepdim=True))
        best = logits.topk(5 if kind == "top_k" else 1).indices
        expected = (best == torch.arange(40)[:, None]).any(1).double().mean()
        assert float(copying_score(a, kind)[0, head]) == pytest.approx(float(expected))


@pytest.mark.parametrize("kind", KINDS)
def test_heads_with_random_weights_have_the_null(kind: str) -> None:
    a = with_tokens(random_anatomy((60, 60), d_model=32, d_head=(8, 8)), tokens=100)
    for anti in (False, True):
        found = copying_score(a, kind, anti=anti)
        error = float(found.std()) / math.sqrt(found.numel())
        assert abs(float(found.mean()) - copying_null(kind, 100)) < 4 * error + 1e-3


def test_random_spread_of_the_eigenvalue_score() -> None:
    a = with_tokens(random_anatomy((150,), d_model=64, d_head=(16,)), tokens=300)
    assert float(copying_score(a).std()) == pytest.approx(0.098, rel=0.25)


def test_copying_of_half_precision_weights() -> None:
    half = with_tokens(random_anatomy(dtype=torch.bfloat16))
    for kind in KINDS:
        values = copying_score(half, kind)
        assert values.dtype == torch.float32
        assert values.isfinite().all()


def test_ragged_layers_are_padded() -> None:
    a = with_tokens(random_anatomy((2, 3), d_head=(5, 4)))
    for values in (copying_score(a), matching_score(a), copying_score(a, "logit")):
        assert values.shape == (2, 3)
        assert values.isnan().tolist() == [[False, False, True], [False] * 3]


# Tokens.


class Tied(nn.Module):
    """Two blocks whose embedding is also the unembedding; the first block doubles and shifts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 24)
        self.first, self.second = nn.Linear(24, 24), nn.Identity()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.first(x).relu()
        return self.second(x) @ self.embed.weight.T


def tied_anatomy(model: Tied) -> Anatomy:
    readers = (ReaderInput("attn1", "second", 1, "attention"),)
    base = random_anatomy(dtype=torch.float32, readers=readers)
    W_E = model.embed.weight.detach()
    mlp = Writer("MLP0", "first", 0, "mlp")
    return dataclasses.replace(base, W_E=W_E, W_U=W_E.mT.clone(), writers=(mlp,))


def test_tied_weights_ask_for_the_stream_after_the_first_block() -> None:
    model = Tied()
    a = tied_anatomy(model)
    found = vocabulary(a, model=model, size=7, seed=3)
    x = model.embed(found.ids)
    torch.testing.assert_close(found.later, (x + model.first(x).relu()).detach())
    assert torch.equal(found.read(0), x)
    assert found.read(1) is found.later
    assert "block 0" in found.embedding
    assert len(found.ids.unique()) == 7
    assert vocabulary(a).embedding == "W_E"
    assert not list(model.second._forward_pre_hooks)


def test_untied_weights_ask_for_the_embedding() -> None:
    model = Tied()
    a = tied_anatomy(model)
    assert a.W_U is not None
    a = dataclasses.replace(a, W_U=a.W_U * 2)
    assert vocabulary(a, model=model).embedding == "W_E"


def test_a_model_without_tokens_has_no_copying() -> None:
    with pytest.raises(ModelError, match="embedding"):
        copying_score(random_anatomy())


# Singular directions.


@pytest.mark.parametrize("which", ["OV", "QK"])
def test_singular_directions_make_up_the_matrix(which: str) -> None:
    a = with_tokens(random_anatomy((4, 4), (2, 2), d_head=(5, 5), norm="layer"))
    found = singular_directions(a, Head(1, 3), which)
    whole = dense(a, 1, 3)["V" if which == "OV" else "Q"]
    again = found.inputs.T @ torch.diag(found.values) @ found.outputs
    torch.testing.assert_close(again, whole)
    eye = torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(found.inputs @ found.inputs.T, eye)
    torch.testing.assert_close(found.outputs @ found.outputs.T, eye)
    largest = found.read.gather(1, found.read.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()
    assert len(singular_directions(a, Head(1, 3), which, count=2).values) == 2


def test_a_direction_names_the_tokens_that_it_reads_and_writes() -> None:
    W_E = torch.eye(6, dtype=torch.float64)
    reading, writing = W_E[2][None, :, None], W_E[4][None, None] * 3
    a = anatomy([reading], [reading], [reading], [writing], W_E=W_E, W_U=W_E)
    found = singular_directions(a, Head(0, 0))
    words = found.tokens(0, 1, lambda ids: [f"<{i}>" for i in ids])
    assert words["reads"] == ["<2>"]
    assert words["writes"] == ["<4>"]
    assert found.tokens(0, 1)["writes"] == ["4"]
    assert float(found.values[0]) == pytest.approx(3.0)


def test_equal_singular_values_are_marked() -> None:
    eye = torch.eye(8, dtype=torch.float64)
    reading, writing = eye[:, :4][None], (torch.tensor([5.0, 2, 2, 1])[:, None] * eye[:4])[None]
    a = anatomy([reading], [reading], [reading], [writing], W_E=eye, W_U=eye)
    assert singular_directions(a, Head(0, 0)).arbitrary.tolist() == [False, True, True, False]


# Refusals.


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: copying_score(with_tokens(random_anatomy()), "ov"),
        lambda: singular_directions(with_tokens(random_anatomy()), Head(0, 0), "VO"),
        lambda: singular_directions(with_tokens(random_anatomy()), Head(0, 7)),
        lambda: Composition(kinds=("Q", "X")),
        lambda: Composition(rotations=1),
        lambda: Copying(kinds=("eigen",)),
        lambda: Copying(vocabulary=1),
        lambda: SubspaceOverlap(reads=("O",)),
        lambda: SubspaceOverlap(energy=2.0),
        lambda: SubspaceOverlap(k=0),
        lambda: HeadDirections(),
        lambda: HeadDirections(heads=("MLP0",)),
        lambda: HeadDirections(heads=("L0H0",), which=("VO",)),
        lambda: HeadDirections(heads=("L0H0",), count=0),
        lambda: singular_directions(with_tokens(random_anatomy()), "L0H0", count=0),
        lambda: principal_angles(random_anatomy(), "L0H9", "L1H0.k"),
        lambda: principal_angles(random_anatomy(), "L0H0", "L1H0"),
        lambda: vocabulary(with_tokens(random_anatomy()), size=0),
    ],
)
def test_wrong_arguments_are_refused(wrong: Any) -> None:
    with pytest.raises(ArgumentError):
        wrong()


@pytest.mark.parametrize(
    "wrong",
    [composition, subspace_overlap, copying_score, matching_score, vocabulary],
)
def test_a_model_is_no_anatomy(wrong: Any) -> None:
    with pytest.raises(ArgumentError, match="anatomy: expected an Anatomy, got a Linear"):
        wrong(nn.Linear(2, 2))


# Measurements.


def context_of(a: Anatomy, model: nn.Module | None = None) -> tuple[nn.Module, Context]:
    """A context in which the anatomy has been found already."""
    model = nn.Linear(1, 1) if model is None else model
    context = Context(model)
    context.shared("anatomy", lambda: a)
    return model, context


def test_composition_panels_name_the_pair() -> None:
    a = oracle_anatomy(Oracle(5.0))
    panels = Composition()(*context_of(a))
    pairs = panels["K"]
    assert pairs.axes == ("writer", "reader")
    assert (pairs.coords["writer"], pairs.coords["reader"]) == (["L0H0"], ["L1H0.k"])
    assert float(pairs.values) == pytest.approx(1 / math.sqrt(40))
    assert pairs.convention["null"] == pytest.approx(1 / math.sqrt(a.d_model))
    strongest = panels["K_strongest"]
    assert strongest.convention["pair"] == "L0H0 -> L1H0.k"
    assert strongest.item() == pytest.approx(1 / math.sqrt(40) - 1 / math.sqrt(a.d_model))
    assert panels["K_reader"].values.tolist() == [[0.0], [pytest.approx(strongest.item())]]
    # A null has been taken off: what a picture is centred on is 0.
    for name in ("K_reader", "K_strongest"):
        assert panels[name].convention["null"] == 0.0
        assert panels[name].convention["subtracted"] == pytest.approx(1 / math.sqrt(a.d_model))
    assert panels["K_z"].convention["rotations"] == 64
    assert set(panels) == {
        f"{k}{end}" for k in "QKV" for end in ("", "_spectrum", "_z", "_reader", "_strongest")
    }


def test_pair_panels_are_the_tables_without_what_is_not_there() -> None:
    a = random_anatomy((2, 1, 3), d_head=(5, 5, 5))
    panels = Composition(kinds=("Q",), rotations=0)(*context_of(a))
    table = composition(a, "Q", corrected=False)
    assert panels["Q"].coords["writer"] == ["L0H0", "L0H1", "L1H0"]
    assert panels["Q"].coords["reader"] == ["L1H0.q", "L2H0.q", "L2H1.q", "L2H2.q"]
    values = panels["Q"].values
    assert float(values[1, 2]) == float(table[0, 1, 2, 1])
    assert float(values[2, 0]) == 0.0  # a head and itself
    assert panels["Q_reader"].values.isnan().tolist() == [
        [False, False, True],
        [False, True, True],
        [False, False, False],
    ]
    assert panels["Q_reader"].convention["reason"]


def test_without_weights_the_strongest_pair_is_undefined() -> None:
    found = Composition(kinds=("K",))(*context_of(oracle_anatomy(Oracle(0.0))))["K_strongest"]
    assert math.isnan(found.item())
    assert found.convention["reason"]
    single = random_anatomy((3,), d_head=(4,))
    panels = Composition(kinds=("K",))(*context_of(single))
    assert math.isnan(panels["K_strongest"].item())
    assert panels["K"].values.numel() == 0
    assert panels["K_reader"].values.tolist() == [[0.0, 0.0, 0.0]]
    assert math.isnan(SubspaceOverlap()(*context_of(single))["K_strongest"].item())


def test_overlap_panels_store_how_many_directions() -> None:
    a = random_anatomy()
    panels = SubspaceOverlap(reads=("K",), k=2)(*context_of(a))
    assert panels["K"].convention["k"] == 2
    assert panels["K"].convention["null"] == pytest.approx(2 / 24)
    assert panels["K_reader"].convention["null"] == 0.0
    assert panels["K_reader"].convention["subtracted"] == pytest.approx(2 / 24)
    best = panels["K_weighted"].values.max() - 2 / 24
    assert panels["K_strongest"].item() == pytest.approx(float(best))


def test_the_strongest_pair_has_its_angles() -> None:
    a = random_anatomy()
    about = SubspaceOverlap(reads=("K",), k=3)(*context_of(a))["K_strongest"].convention
    writer, reader = about["pair"].split(" -> ")
    expected = principal_angles(a, writer, reader, k=3)
    assert about["angles"] == pytest.approx(expected.tolist(), abs=1e-4)


def test_direction_panels_name_tokens_at_both_ends() -> None:
    a = with_tokens(random_anatomy((3, 3), d_head=(5, 2)))
    chosen = HeadDirections(heads=("L0H2", "L1H0"), count=4, tokens=3)
    model, context = context_of(a)
    context.decode = lambda ids: [f"<{i}>" for i in ids]
    panels = chosen(model, context)
    assert list(panels) == ["OV", "OV_read", "OV_written", "QK", "QK_read", "QK_written"]
    found = singular_directions(a, "L0H2", "QK", count=4)
    dense = a.W_Q[0][2] @ a.grouped(0, "K")[2].mT
    sizes = torch.linalg.svdvals(dense)
    assert torch.allclose(panels["QK"].values[0], sizes[:4])
    assert panels["QK"].values[1].isnan().tolist() == [False, False, True, True]
    assert "fewer" in panels["QK"].convention["reason"]
    written = panels["QK_written"]
    assert written.axes == ("head", "feature", "token")
    order = found.written[1].argsort(descending=True).tolist()
    labels = written.coords["head,feature,token"][0][1]
    assert labels == [f"<{i}>" for i in (*order[:3], *order[-3:])]
    assert float(written.values[0, 1, 0]) == pytest.approx(float(found.written[1].max()))
    assert float(written.values[0, 1, 5]) == pytest.approx(float(found.written[1].min()))


def test_copying_panels_carry_null_and_embedding() -> None:
    a = with_tokens(random_anatomy())
    panels = Copying(kinds=KINDS, tied=False, vocabulary=20)(*context_of(a))
    assert set(panels) == {*KINDS, "logit_anti", "top_k_anti", "argmax_anti", "matching"}
    about = panels["top_k"].convention
    assert (about["null"], about["tokens"], about["embedding"]) == (0.25, 20, "W_E")
    assert panels["logit"].convention["null"] == pytest.approx(2 / 20 - 1)


def test_copying_without_tokens_is_undefined() -> None:
    panels = Copying()(*context_of(random_anatomy((2, 3), d_head=(4, 4))))
    assert panels["eigenvalue"].values.shape == (2, 3)
    assert panels["eigenvalue"].values.isnan().all()
    assert "token" in panels["eigenvalue"].convention["reason"]


def test_what_is_approximate_stands_in_every_convention() -> None:
    from lightning_mi.anatomy import Note

    query = Note("W_Q", 1, "approximate", "queries pass a norm")
    output = Note("W_O", 1, "approximate", "a norm follows")
    a = with_tokens(random_anatomy(notes=(query, output)))
    where = context_of(a)
    directions = HeadDirections(heads=("L1H0",))
    for measurement in (Composition(), Copying(tied=False), SubspaceOverlap(), directions):
        for name, panel in measurement(*where).items():
            said = panel.convention["approximate"]
            # Q and K rest on what the writer writes as well; values rest on no query.
            looks = name == "matching" or name.startswith("QK")
            moves = name[0] == "V" or name.startswith("OV") or measurement.name == "copying"
            expected = [str(query)] if looks else [str(output)] if moves else [*map(str, a.notes)]
            assert said == expected, name
