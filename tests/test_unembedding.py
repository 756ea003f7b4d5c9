"""Only the position that is read is unembedded, and only where that changes nothing."""

from __future__ import annotations

from typing import Any

import cases
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_mi as mi
from lightning_mi.attribution import integrated_gradients, layer_integrated_gradients
from lightning_mi.errors import ArgumentError


class Language(nn.Module):
    """Causal mean of embeddings, a nonlinear layer, and a head tied to the embedding."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.words, self.layer = nn.Embedding(13, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 13, bias=False)
        if tied:
            self.head.weight = self.words.weight
        self.asked: list[int] = []
        self.head.register_forward_pre_hook(lambda _, args: self.asked.append(args[0].shape[1]))

    def hidden(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        vectors = torch.tanh(self.words(ids))
        mask = torch.ones_like(ids) if mask is None else mask
        count = mask.cumsum(1).clamp(min=1)
        mean = (vectors * mask[..., None]).cumsum(1) / count[..., None]
        return torch.tanh(self.layer(mean))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return self.head(self.hidden(input_ids, attention_mask))


class Capped(Language):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return torch.tanh(super().forward(input_ids, attention_mask))


class WithLoss(Language):
    """Goes on with all of its logits, so that one position is not enough for it."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        logits = super().forward(input_ids, attention_mask)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
        return {"logits": logits, "loss": loss}


class Smoothed(Language):
    """Adds the mean over positions to what the head puts out, in place."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        logits = super().forward(input_ids, attention_mask)
        return logits.add_(logits.mean(1, keepdim=True))


BATCH = {
    "input_ids": torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
}


def slow(model: Any, batch: dict[str, Tensor], token: int, steps: int) -> Tensor:
    """All logits at every node; the target is read from them."""
    from lightning_mi.attribution.rules import nodes

    ids, mask = batch["input_ids"], batch["attention_mask"]
    vectors = model.words(ids).detach()
    moved = vectors * mask[..., None]
    total = torch.zeros_like(vectors)
    last = mask.sum(1) - 1
    for alpha, weight in zip(*nodes("gauss-legendre", steps), strict=True):
        point = (vectors - (1 - alpha) * moved).requires_grad_()
        handle = model.words.register_forward_hook(lambda m, a, o, p=point: p)
        out = model(ids, mask)
        handle.remove()
        logits = out["logits"] if isinstance(out, dict) else out
        value = logits[torch.arange(len(ids)), last, token].sum()
        total += weight * torch.autograd.grad(value, point)[0]
    scores: Tensor = (total * moved).sum(-1)
    return scores


@pytest.mark.parametrize("kind", [Language, Capped, WithLoss, Smoothed])
@pytest.mark.parametrize("tied", [True, False])
def test_slow_twin(kind: type[Language], tied: bool) -> None:
    model = kind(tied).double()
    found = integrated_gradients(model, BATCH, 3, steps=6)
    torch.testing.assert_close(found.values, slow(model, BATCH, 3, 6), atol=1e-12, rtol=0)
    assert len(model.head._forward_pre_hooks) == 1


def test_one_position_is_unembedded() -> None:
    model = Language().double()
    integrated_gradients(model, BATCH, 3, steps=6)
    # The hook of the model itself comes first and sees what the model handed over: count rows.
    sizes = []
    model.head.register_forward_hook(lambda m, a, out: sizes.append(out.shape[1]))
    integrated_gradients(model, BATCH, 3, steps=6)
    assert sizes[0] == 5
    assert set(sizes[1:]) == {1}


def test_targets_that_read_more_get_all() -> None:
    model = Language().double()

    def last_two(outputs: Tensor, batch: Any) -> Tensor:
        assert outputs.shape[1] == 5
        return outputs[:, -2:, 3].sum(1)

    found = integrated_gradients(model, BATCH["input_ids"], last_two, steps=6)
    assert float(found.gap.abs().max()) < 0.01  # type: ignore[union-attr]


def test_layers_are_narrowed_too() -> None:
    model = Language().double()
    found = layer_integrated_gradients(model, BATCH, 3, layer="layer", channels="sum", steps=8)
    sizes: list[int] = []
    model.head.register_forward_hook(lambda m, a, out: sizes.append(out.shape[1]))
    layer_integrated_gradients(model, BATCH, 3, layer="layer", steps=8)
    assert sizes[-1] == 1
    # Behind the layer positions do not mix: only the last real one counts.
    assert found.values[0, :-1].abs().max() == 0
    assert float(found.values[0, -1]) != 0


def test_the_head_itself_as_the_layer() -> None:
    model = Language().double()
    found = layer_integrated_gradients(model, BATCH, 3, layer="head", steps=4)
    torch.testing.assert_close(found.values.sum((1, 2)), found.output_change)
    assert found.values[0, -1].count_nonzero() == 1


def test_a_method_that_needs_a_layer_says_so() -> None:
    pytest.importorskip("lightning")
    from lightning_mi.callbacks import SaliencyMonitor

    with pytest.raises(ArgumentError, match="layer"):
        SaliencyMonitor(method="layer_integrated_gradients")
    SaliencyMonitor(method="layer_integrated_gradients", layer="layer")
    SaliencyMonitor(method="idgi", options={"steps": 4})


def test_path_methods_run_while_a_model_trains(tmp_path: Any) -> None:
    from lightning_mi.callbacks import SaliencyMonitor

    names = ["expected_gradients", "idgi", "discretized_integrated_gradients"]
    monitors = [SaliencyMonitor(method=name, examples=2) for name in names]
    trainer = cases.trainer(callbacks=monitors, default_root_dir=tmp_path, max_steps=2)
    trainer.fit(cases.language_model(), *cases.loaders())
    run = mi.Run.open(tmp_path)
    for name in names:
        assert run.dataset(name)["values"].dims == ("step", "example", "position")
        assert "gap" in run.dataset(name)
