"""Patching and interventions against a forward pass that is written out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from grouped import GROUP, HEADS, KV, Grouped, one, prompts, written_out
from torch import Tensor

from lightning_mi import Behavior, LogitDifference
from lightning_mi.anatomy import Anatomy
from lightning_mi.circuits import (
    At,
    Residual,
    activation_patching,
    attribution_patching,
    from_run,
    intervene,
    path_patching,
    value,
)
from lightning_mi.nodes import MLP, Embedding, Head, Logits, Reader

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "capped": {"cap": 2.0},
    "parallel": {"parallel": True},
    "half": {},
}
ASKED = LogitDifference(2, other=6)


class Case:
    """A variant, its anatomy and its prompts."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.half = name == "half"
        self.model = Grouped(**VARIANTS[name]).eval()
        if self.half:
            self.model = self.model.bfloat16()
        # The hand-written pass is always in double precision, from the same (rounded) weights.
        self.exact = Grouped(**VARIANTS[name]).eval().double()
        self.exact.load_state_dict({k: v.double() for k, v in self.model.state_dict().items()})
        clean, corrupted = prompts(seed=2)
        self.pair = Behavior(clean, corrupted, target=ASKED)
        self.anatomy = Anatomy.of(self.model, clean)
        self.clean, self.corrupted = clean, corrupted

    def run(self, ids: Tensor, puts: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
        logits, seen = written_out(self.exact, ids, puts)
        return (logits[:, -1, 2] - logits[:, -1, 6]).detach(), seen

    def check(self, share: Tensor, metric: Tensor, about: dict[str, Any]) -> None:
        """Compare the metric that a share under noising comes to with that of a hand-made run."""
        base, donor = (
            float(self.run(self.clean)[0].mean()),
            float(self.run(self.corrupted)[0].mean()),
        )
        clean, corrupted, near = about["clean"], about["corrupted"], self.near
        assert clean == pytest.approx(base, abs=near)
        found = float(share) * (corrupted - clean) + clean
        assert found == pytest.approx(float(metric.mean()), abs=near)
        assert abs(donor - base) > 4 * near

    @property
    def near(self) -> float:
        return 0.06 if self.half else 2e-4


@pytest.fixture(scope="module", params=list(VARIANTS))
def case(request: Any) -> Case:
    return Case(request.param)


def test_the_hand_written_pass_is_the_model(case: Case) -> None:
    logits, _ = written_out(case.exact, case.clean)
    assert torch.allclose(case.exact(case.clean), logits, atol=1e-6)


@pytest.mark.parametrize("what", ["z", "q", "k", "v", "pattern", "mlp", "residual"])
def test_every_part_is_patched_as_by_hand(case: Case, what: Any) -> None:
    found = activation_patching(
        case.model, case.pair, what=what, direction="noise", positions="all", anatomy=case.anatomy
    )
    counts = {"k": KV, "v": KV, "mlp": 1, "residual": 1}
    _, donor = case.run(case.corrupted)
    name = "resid" if what == "residual" else what
    for layer in range(2):
        for head in range(counts.get(what, HEADS)):
            index = head if what not in ("mlp", "residual") else None
            twin, _ = case.run(case.clean, one(f"{name}{layer}", index, donor[f"{name}{layer}"]))
            own = found.values[layer] if index is None else found.values[layer, head]
            case.check(own, twin, dict(found.convention))


@pytest.mark.parametrize("what", ["q", "k", "v", "z", "mlp"])
def test_gradients_are_those_of_the_hand_written_pass(case: Case, what: Any) -> None:
    found = attribution_patching(
        case.model, case.pair, what=what, direction="noise", positions="all", verify=0,
        anatomy=case.anatomy,
    )  # fmt: skip
    _, donor = case.run(case.corrupted)
    base, _ = case.run(case.clean)
    whole = float((case.run(case.corrupted)[0] - base).mean())
    for layer in range(2):
        name, leaf = f"{what}{layer}", list[Tensor]()

        def put(old: Tensor, leaf: list[Tensor] = leaf) -> Tensor:
            leaf.append(old.detach().requires_grad_())
            return leaf[0]

        logits, _ = written_out(case.exact, case.clean, {name: put})
        (g,) = torch.autograd.grad((logits[:, -1, 2] - logits[:, -1, 6]).sum(), leaf)
        parts = (donor[name] - leaf[0]).detach() * g
        twin = parts.sum((-1, -2)).mean(0) / whole
        assert torch.allclose(found.values[layer].double(), twin, atol=2 * case.near)


@pytest.mark.parametrize(
    ("part", "name", "index"),
    [
        (Head(0, 3), "z0", 3),
        (Reader(Head(1, 2), "q"), "q1", 2),
        (Reader(Head(0, 1), "k"), "k0", 1),
        (Reader(Head(1, 0), "v"), "v1", 0),
        (At(Head(1, 1), "pattern"), "pattern1", 1),
        (MLP(0), "mlp0", None),
        (Residual(1), "resid1", None),
    ],
)
def test_interventions_put_in_what_is_put_in_by_hand(
    case: Case, part: Any, name: str, index: int | None
) -> None:
    _, donor = case.run(case.corrupted)
    twin, _ = written_out(case.exact, case.clean, one(name, index, donor[name]))
    made = {"anatomy": case.anatomy, "example": case.clean}
    with intervene(case.model, {part: from_run(case.corrupted)}, **made), torch.no_grad():
        found = case.model(case.clean)
    size = float(twin.detach().abs().max())
    assert torch.allclose(found.double(), twin, atol=0.08 * size if case.half else 1e-4)
    given = donor[name] if index is None else donor[name][:, index]
    with intervene(case.model, {part: value(given)}, **made), torch.no_grad():
        assert torch.allclose(case.model(case.clean), found, atol=0.08 * size)


RECEIVERS = [
    (Reader(Head(1, 2), "q"), {"q1": 2}),
    (Reader(Head(1, 1), "k"), {"k1": 1}),
    (Reader(Head(1, 0), "v"), {"v1": 0}),
    (Head(1, 3), {"q1": 3, "k1": 3 // GROUP, "v1": 3 // GROUP}),
    (MLP(1), {"mlp1": None}),
    (Logits(), {}),
]
SOME = [("L1H2.q", "L0H1"), ("L1H1.k", "MLP0"), ("L1H0.v", "embed"), ("MLP1", "L0H1")]
SENDERS = [(Head(0, 1), "z0", 1), (MLP(0), "mlp0", None), (Embedding(), "embed", None)]


@pytest.mark.parametrize("mlps", ["frozen", "recomputed"])
@pytest.mark.parametrize(("receiver", "reads"), RECEIVERS, ids=lambda v: str(v)[:8])
@pytest.mark.parametrize(("sender", "name", "index"), SENDERS, ids=lambda v: str(v)[:5])
def test_paths_are_patched_as_by_hand(
    case: Case, mlps: Any, receiver: Any, reads: Any, sender: Any, name: str, index: int | None
) -> None:
    if case.name != "plain" and (str(receiver), str(sender)) not in SOME:
        pytest.skip("all combinations are asked of the plain variant only")
    found = path_patching(
        case.model, case.pair, sender=sender, receivers=receiver, mlps=mlps, direction="noise",
        anatomy=case.anatomy,
    )  # fmt: skip
    base, donor = case.run(case.clean)[1], case.run(case.corrupted)[1]
    held = ["z0", "z1", *(["mlp0", "mlp1"] if mlps == "frozen" else [])]
    first: Any = {n: (lambda old, n=n: base[n]) for n in held}
    own = one(name, index, donor[name])[name]
    first[name] = (lambda old: own(base[name])) if name != "embed" else own
    twin, seen = case.run(case.clean, first)
    if reads:
        second: Any = {}
        for n, head in reads.items():
            second.update(one(n, head, seen[n]))
        twin, _ = case.run(case.clean, second)
    case.check(found.values, twin, dict(found.convention))
