"""Composition and subspaces: hand-built circuits, dense twins, TransformerLens, random nulls."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import Oracle
from torch import Tensor

from lightning_mi import ArgumentError
from lightning_mi.anatomy import Anatomy, Norm, Writer
from lightning_mi.circuits import (
    composition,
    composition_z,
    principal_angles,
    subspace_overlap,
    subspaces,
)
from lightning_mi.circuits.weights.pairs import haar_corners
from lightning_mi.nodes import Head, Reader

REFERENCE = Path(__file__).parent / "reference"
KINDS = ("Q", "K", "V")


def anatomy(
    W_Q: list[Tensor], W_K: list[Tensor], W_V: list[Tensor], W_O: list[Tensor], **parts: Any
) -> Anatomy:
    """An anatomy of given weights: readers ``[head, d_model, d_head]``, W_O transposed."""
    layers, d_model = len(W_Q), W_Q[0].shape[1]

    def zeros(weights: list[Tensor]) -> tuple[Tensor, ...]:
        return tuple(w.new_zeros(len(w), w.shape[2]) for w in weights)

    return Anatomy(
        n_layers=layers,
        n_heads=tuple(map(len, W_Q)),
        n_kv_heads=tuple(map(len, W_K)),
        d_head=tuple(w.shape[2] for w in W_Q),
        d_model=d_model,
        modules=tuple(f"layers.{i}" for i in range(layers)),
        W_Q=tuple(W_Q),
        W_K=tuple(W_K),
        W_V=tuple(W_V),
        W_O=tuple(W_O),
        b_Q=zeros(W_Q),
        b_K=zeros(W_K),
        b_V=zeros(W_V),
        b_O=tuple(w.new_zeros(d_model) for w in W_O),
        scale=(1.0,) * layers,
        **parts,
    )


def oracle_anatomy(model: Oracle, anti: bool = False) -> Anatomy:
    model.requires_grad_(False)
    weights = [[getattr(m, f"W_{n}")[None].clone() for m in model.layers] for n in "QKVO"]
    if anti:
        weights[3][1] = -weights[3][1]
    width = weights[0][0].shape[1]
    W_E = torch.eye(model.V, width)
    return anatomy(*weights, W_E=W_E, W_U=W_E.mT.clone())


def random_anatomy(
    heads: tuple[int, ...] = (3, 3, 3),
    kv_heads: tuple[int, ...] | None = None,
    d_model: int = 24,
    d_head: tuple[int, ...] = (5, 5, 5),
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    norm: str | None = None,
    **parts: Any,
) -> Anatomy:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    kv = heads if kv_heads is None else kv_heads
    sizes = list(zip(heads, kv, d_head, strict=True))
    queries = [draw(h, d_model, e) for h, _, e in sizes]
    keys = [draw(k, d_model, e) for _, k, e in sizes]
    values = [draw(k, d_model, e) for _, k, e in sizes]
    outputs = [draw(h, e, d_model) for h, _, e in sizes]
    if norm is not None:
        gains = [draw(d_model).abs() + 0.1 for _ in heads]
        parts["attention_norms"] = tuple(
            Norm(f"norm{i}", norm, gain)  # type: ignore[arg-type]
            for i, gain in enumerate(gains)
        )
    return anatomy(queries, keys, values, outputs, **parts)


def dense(a: Anatomy, layer: int, head: int) -> dict[str, Tensor]:
    """W_OV, W_QK and its transpose as whole matrices, as the head reads the stream."""
    kv = head // (a.n_heads[layer] // a.n_kv_heads[layer])
    norm = a.attention_norms[layer] if a.attention_norms else None
    mix = torch.eye(a.d_model, dtype=a.W_Q[0].dtype)
    if norm is not None and norm.weight is not None:
        mix = torch.diag(norm.weight)
        if norm.kind == "layer":
            mix = (torch.eye(a.d_model) - 1 / a.d_model).to(mix) @ mix
    qk = (mix @ a.W_Q[layer][head]) @ (mix @ a.W_K[layer][kv]).T
    ov = (mix @ a.W_V[layer][kv]) @ a.W_O[layer][head]
    return {"Q": qk, "K": qk.T, "V": ov}


def slow_composition(a: Anatomy, kind: str, spectrum: bool = False) -> Tensor:
    most = max(a.n_heads)
    found = torch.full((a.n_layers, most, a.n_layers, most), math.nan, dtype=torch.float64)
    for w in range(a.n_layers):
        for i in range(a.n_heads[w]):
            for r in range(a.n_layers):
                for j in range(a.n_heads[r]):
                    A, B = dense(a, w, i)["V"], dense(a, r, j)[kind]
                    if a.attention_norms and a.attention_norms[r].kind == "layer":
                        A = A - A.mean(1, keepdim=True)
                    size = A.norm() * B.norm()
                    if spectrum:
                        size = (torch.linalg.svdvals(A) * torch.linalg.svdvals(B)).norm()
                    found[w, i, r, j] = (A @ B).norm() / size if w < r else 0.0
    return found


# The hand-built model.


@pytest.mark.parametrize("beta", [0.5, 5.0, 30.0])
def test_composition_of_the_hand_built_model(beta: float) -> None:
    a = oracle_anatomy(Oracle(beta))
    raw = {kind: composition(a, kind, corrected=False) for kind in KINDS}
    assert float(raw["K"][0, 0, 1, 0]) == pytest.approx(1 / math.sqrt(40), abs=1e-6)
    assert float(raw["Q"][0, 0, 1, 0]) == float(raw["V"][0, 0, 1, 0]) == 0.0
    full = composition(a, "K", corrected=False, form="spectrum")
    assert float(full[0, 0, 1, 0]) == pytest.approx(1.0, abs=1e-6)
    excess = float(composition(a, "K")[0, 0, 1, 0])
    assert excess == pytest.approx(1 / math.sqrt(40) - 1 / math.sqrt(a.d_model), abs=1e-6)
    assert float(composition_z(a, "K")[0, 0, 1, 0]) > 10
    assert float(composition_z(a, "V")[0, 0, 1, 0]) < -10


def test_heads_without_weights_compose_with_nothing() -> None:
    a = oracle_anatomy(Oracle(0.0))
    for form in ("frobenius", "spectrum"):
        assert torch.equal(composition(a, "K", form=form), torch.zeros(2, 1, 2, 1))
    assert math.isnan(composition_z(a, "K")[0, 0, 1, 0])


# Slow twins, which do form the matrices.

SCENES: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"heads": (4, 4, 4), "kv_heads": (2, 2, 2)},
    "fourteen heads on two": {"heads": (14, 14), "kv_heads": (2, 2), "d_head": (3, 3)},
    "ragged": {"heads": (4, 1, 3), "d_head": (5, 7, 2)},
    "wider than the stream": {"d_model": 4, "d_head": (6, 6, 6)},
    "LayerNorm": {"norm": "layer"},
    "RMSNorm": {"norm": "rms"},
}


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("kind", KINDS)
def test_composition_is_that_of_whole_matrices(scene: str, kind: str) -> None:
    a = random_anatomy(**SCENES[scene])
    for spectrum, form in ((False, "frobenius"), (True, "spectrum")):
        found = composition(a, kind, corrected=False, form=form)
        expected = slow_composition(a, kind, spectrum)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12, equal_nan=True)


def test_a_mix_of_norms_drops_the_mean_only_where_it_is_not_seen() -> None:
    a = random_anatomy(norm="layer")
    norms = list(a.attention_norms)
    assert norms[1] is not None
    norms[1] = Norm("norm1", "rms", norms[1].weight)
    a = random_anatomy(attention_norms=tuple(norms))
    found, expected = composition(a, "K", corrected=False), slow_composition(a, "K")
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_gain_of_a_sandwich_norm_turns_what_is_written() -> None:
    gain = torch.linspace(0.1, 2.0, 24, dtype=torch.float64)
    writer = Writer("attn0", "layers.0", 0, "heads", norm=Norm("post", "rms", gain))
    a = random_anatomy(writers=(writer,))
    by_hand = random_anatomy()
    outputs = (by_hand.W_O[0] * gain, *by_hand.W_O[1:])
    by_hand = anatomy(list(by_hand.W_Q), list(by_hand.W_K), list(by_hand.W_V), [*outputs])
    torch.testing.assert_close(composition(a, "K"), composition(by_hand, "K"))
    plain = composition(random_anatomy(), "K")
    assert not torch.allclose(composition(a, "K")[0], plain[0], atol=1e-3)


def test_all_ones_direction_is_invisible_to_layer_norm_alone() -> None:
    ones = torch.ones(24, dtype=torch.float64)
    for kind, seen in (("layer", False), ("rms", True)):
        a = random_anatomy(norm=kind)
        for weight in a.W_O[:1]:
            weight.copy_(ones.expand_as(weight))
        value = composition(a, "Q", corrected=False)[0, 0, 1, 0]
        assert (float(value) > 1e-3) is seen


# Invariances.


@pytest.mark.parametrize("kind", KINDS)
def test_rotating_the_basis_and_scaling_weights_change_nothing(kind: str) -> None:
    a = random_anatomy()
    turn = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64)).Q
    turned = anatomy(
        [turn @ w * 1e-6 for w in a.W_Q],
        [turn @ w * 1e5 for w in a.W_K],
        [turn @ w * 30 for w in a.W_V],
        [w @ turn.T * 1e-9 for w in a.W_O],
    )
    for measured in (composition, composition_z, subspace_overlap):
        torch.testing.assert_close(measured(turned, kind), measured(a, kind))


def test_tiny_weights_do_not_vanish_in_single_precision() -> None:
    a = random_anatomy(dtype=torch.float32)
    small = anatomy(*[[w * 1e-18 for w in ws] for ws in (a.W_Q, a.W_K, a.W_V, a.W_O)])
    torch.testing.assert_close(composition(small, "K"), composition(a, "K"), rtol=1e-4, atol=1e-6)


def test_half_precision_weights_are_measured_in_single_precision() -> None:
    half = random_anatomy(dtype=torch.bfloat16)
    single = anatomy(*[[w.float() for w in ws] for ws in (half.W_Q, half.W_K, half.W_V, half.W_O)])
    assert composition(half).dtype == torch.float32
    assert torch.equal(composition(half), composition(single))
    assert torch.equal(subspace_overlap(half), subspace_overlap(single))


# Nulls.


@pytest.mark.parametrize(("d_model", "d_head"), [(16, 4), (64, 16)])
def test_unrelated_heads_have_the_exact_null(d_model: int, d_head: int) -> None:
    a = random_anatomy((40, 40), d_model=d_model, d_head=(d_head, d_head))
    raw = composition(a, "K", corrected=False)[0, :, 1]
    assert float(raw.square().mean().sqrt()) == pytest.approx(1 / math.sqrt(d_model), rel=0.02)
    assert float(composition(a, "K")[0, :, 1].mean()) == pytest.approx(0.0, abs=0.01)
    z = composition_z(a, "K", rotations=200)[0, :, 1]
    assert abs(float(z.mean())) < 0.3
    assert 0.8 < float(z.std()) < 1.25
    overlap = subspace_overlap(a, "K", k=3)[0, :, 1]
    weighted = subspace_overlap(a, "K", k=3, weighted=True)[0, :, 1]
    for values in (overlap, weighted):
        assert float(values.mean()) == pytest.approx(3 / d_model, rel=0.05)


def test_z_is_that_of_rotations_of_the_whole_basis() -> None:
    a = random_anatomy((1, 1), d_head=(3, 3), d_model=8)
    A, B = dense(a, 0, 0)["V"], dense(a, 1, 0)["K"]
    torch.manual_seed(1)
    found = torch.linalg.qr(torch.randn(20_000, 8, 8, dtype=torch.float64))
    # Haar-random only with a positive diagonal of R.
    turns = found.Q * found.R.diagonal(dim1=1, dim2=2).sign()[:, None]
    values = (A @ turns @ B).norm(dim=(1, 2)) / (A.norm() * B.norm())
    expected = ((A @ B).norm() / (A.norm() * B.norm()) - values.mean()) / values.std()
    z = composition_z(a, "K", rotations=10_000)[0, 0, 1, 0]
    assert float(z) == pytest.approx(float(expected), abs=0.05)


def test_corners_are_those_of_rotations() -> None:
    corners = haar_corners(6, 6, 3, seed=0)
    torch.testing.assert_close(
        corners @ corners.mT, torch.eye(6).expand(3, 6, 6), atol=1e-5, rtol=0
    )
    assert torch.equal(corners, haar_corners(6, 6, 3, seed=0))
    assert not torch.equal(corners, haar_corners(6, 6, 3, seed=1))


# TransformerLens.


def split_gpt2() -> Anatomy:
    from safetensors.torch import load_file

    state = load_file(REFERENCE / "tiny_gpt2.safetensors")
    name = next(k for k in state if k.endswith("h.0.attn.c_attn.weight"))
    start = name.removesuffix("h.0.attn.c_attn.weight")
    parts: list[list[Tensor]] = [[], [], [], []]
    for layer in range(3):
        fused = state[f"{start}h.{layer}.attn.c_attn.weight"]
        for kept, weight in zip(parts, fused.chunk(3, 1), strict=False):
            kept.append(weight.unflatten(1, (4, 8)).transpose(0, 1))
        parts[3].append(state[f"{start}h.{layer}.attn.c_proj.weight"].unflatten(0, (4, 8)))
    W_E = state[f"{start}wte.weight"]
    return anatomy(*parts, W_E=W_E, W_U=W_E.mT.clone())


def attention_only() -> Anatomy:
    file = np.load(REFERENCE / "tl2_attn_only.npz")

    def weights(name: str) -> list[Tensor]:
        return [torch.tensor(file[f"param.blocks.{i}.attn.W_{name}"]) for i in range(2)]

    W_E, W_U = (torch.tensor(file[f"param.{k}"]) for k in ("embed.W_E", "unembed.W_U"))
    return anatomy(*map(weights, "QKVO"), W_E=W_E, W_U=W_U)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["tl2_attn_only", "tl4_gpt2"])
def test_composition_of_plain_weights_is_that_of_transformer_lens(name: str, kind: str) -> None:
    a = attention_only() if name == "tl2_attn_only" else split_gpt2()
    expected = torch.tensor(np.load(REFERENCE / f"{name}.npz")[f"composition.{kind}"])
    found = composition(a, kind, corrected=False, fold=False)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


# Subspaces.


def slow_overlap(a: Anatomy, kind: str, k: int, weighted: bool) -> Tensor:
    found = torch.zeros(a.n_layers, a.n_heads[0], a.n_layers, a.n_heads[0], dtype=torch.float64)
    for w in range(a.n_layers):
        for r in range(w + 1, a.n_layers):
            for i in range(a.n_heads[w]):
                for j in range(a.n_heads[r]):
                    A = dense(a, w, i)["V"]
                    read = torch.linalg.svd(getattr(a, f"W_{kind}")[r][j]).U[:, :k]
                    if weighted:
                        value = (A @ read).norm() ** 2 / A.norm() ** 2
                    else:
                        U = torch.linalg.svd(A).Vh[:k]
                        value = torch.linalg.svdvals(U @ read).square().mean()
                    found[w, i, r, j] = value
    return found


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_overlap_is_that_of_whole_matrices(kind: str, weighted: bool) -> None:
    a = random_anatomy()
    found = subspace_overlap(a, kind, k=2, weighted=weighted)
    torch.testing.assert_close(found, slow_overlap(a, kind, 2, weighted))


def test_the_hand_built_reader_reads_exactly_what_was_written() -> None:
    a = oracle_anatomy(Oracle(5.0))
    assert float(subspace_overlap(a, "K", k=40)[0, 0, 1, 0]) == pytest.approx(1.0, abs=1e-5)
    assert float(subspace_overlap(a, "Q", k=40)[0, 0, 1, 0]) == pytest.approx(0.0, abs=1e-5)
    together = principal_angles(a, Head(0, 0), Reader(Head(1, 0), "k"), k=40)
    apart = principal_angles(a, Head(0, 0), Reader(Head(1, 0), "v"), k=40)
    assert float(together.max()) < 1e-2
    assert float(apart.min()) == pytest.approx(math.pi / 2, abs=1e-3)


def test_principal_angles_make_up_the_overlap() -> None:
    a = random_anatomy()
    angles = principal_angles(a, Head(0, 1), Reader(Head(2, 0), "k"), k=3)
    assert torch.equal(angles, angles.sort().values)
    expected = subspace_overlap(a, "K", k=3)[0, 1, 2, 0]
    assert float(angles.cos().square().mean()) == pytest.approx(float(expected))


def test_energy_chooses_how_many_directions() -> None:
    d_model, spectrum = 12, torch.tensor([10.0, 3.0, 1.0, 0.1], dtype=torch.float64)

    def basis(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.linalg.qr(torch.randn(d_model, 4, generator=generator).double()).Q

    reading = [(basis(i) * spectrum)[None] for i in range(2)]
    moved = [basis(2 + i)[None] for i in range(2)]
    written = [(spectrum[:, None] * basis(4 + i).T)[None] for i in range(2)]
    a = anatomy(reading, reading, moved, written)
    assert [subspaces(a, "Q", energy=e).k for e in (0.9, 0.99, 1.0)] == [1, 2, 4]
    assert subspaces(a, "Q", k=2).energy == pytest.approx(109 / 110.01, abs=1e-6)


def test_a_head_of_low_rank_has_no_more_directions_than_that() -> None:
    a = random_anatomy()
    a.W_O[0][0, 1:] = 0
    found = float(subspace_overlap(a, "Q", k=3)[0, 0, 1, 0])
    A = dense(a, 0, 0)["V"]
    direction = torch.linalg.svd(A).Vh[:1]
    read = torch.linalg.svd(a.W_Q[1][0]).U[:, :3]
    assert found == pytest.approx(float((direction @ read).norm() ** 2 / 3), rel=1e-6)


def test_a_head_without_weights_has_no_subspace() -> None:
    a = random_anatomy()
    a.W_O[0][0] = 0
    found = subspace_overlap(a, "Q", k=2)
    assert found[0, 0, 1:].isnan().all()
    assert found[0, 1:].isfinite().all()


# Refusals.


@pytest.mark.parametrize(
    "wrong",
    [
        lambda a: composition(a, "OV"),
        lambda a: composition(a, form="norm"),
        lambda a: composition_z(a, rotations=1),
        lambda a: subspace_overlap(a, "O"),
        lambda a: subspace_overlap(a, energy=0.0),
        lambda a: subspace_overlap(a, k=9),
        lambda a: principal_angles(a, Head(3, 0), Reader(Head(1, 0), "q")),
    ],
)
def test_wrong_arguments_are_refused(wrong: Any) -> None:
    with pytest.raises(ArgumentError):
        wrong(random_anatomy())
