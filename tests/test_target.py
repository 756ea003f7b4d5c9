"""The scalar that a question is asked about."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_mi import (
    ArgumentError,
    Classification,
    Logit,
    LogitDifference,
    LogProbability,
    Loss,
    Margin,
    NextToken,
    Regression,
    Target,
    as_target,
)

LOGITS = torch.tensor([[1.0, 2, 4], [0, 3, -1]])
X = torch.zeros(2, 5)
LABELS = torch.tensor([0, 2])
BATCH = (X, LABELS)

SEQUENCE = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(3))
IDS = torch.tensor([[1, 2, 3, 4], [5, 4, 3, 2]])


def value(target: Any, outputs: Tensor = LOGITS, batch: Any = BATCH) -> list[float]:
    found = as_target(target, Classification())(outputs, batch)
    assert found.shape == (2,)
    return [round(v, 5) for v in found.tolist()]


def test_closed_forms() -> None:
    p = LOGITS.double().softmax(1)
    rows = torch.arange(2)
    at = p[rows, LABELS]
    assert value(Logit()) == value(None) == [1, -1]
    assert value(Logit(1)) == value(1) == [2, 3]
    assert value(torch.tensor([1, 0])) == [2, 0]
    assert value(LogProbability()) == [round(v, 5) for v in at.log().tolist()]
    assert value(Margin()) == [round(v, 5) for v in (at / (1 - at)).log().tolist()]
    assert value(LogitDifference(0, other=1)) == [-1, -3]
    assert value(LogitDifference(0, other=torch.tensor([2, 1]))) == [-3, -3]
    assert value(Loss()) == [round(-v, 5) for v in at.log().tolist()]


def test_the_runner_up_is_the_best_of_the_others() -> None:
    assert value(LogitDifference()) == [1 - 4, -1 - 3]
    assert value(LogitDifference(torch.tensor([2, 1]))) == [4 - 2, 3 - 0]


def test_without_a_label_the_models_own_answer_is_meant() -> None:
    assert value(None, batch=X) == [4, 3]
    assert as_target(None)(LOGITS, BATCH).tolist() == [4, 3]  # no task, no labels


@pytest.mark.parametrize("target", [Logit(), LogProbability(), Margin(), LogitDifference(), Loss()])
def test_targets_are_differentiable(target: Any) -> None:
    outputs = LOGITS.clone().requires_grad_()
    as_target(target, Classification())(outputs, BATCH).sum().backward()
    assert outputs.grad is not None
    assert outputs.grad.abs().sum(1).gt(0).all()


def test_which_way_is_better() -> None:
    for target in (Logit(), LogProbability(), Margin(), LogitDifference()):
        assert target.higher_is_better
        assert isinstance(target, Target)
    assert not Loss().higher_is_better


@pytest.mark.parametrize("shape", [(2,), (2, 1)])
def test_one_output_is_the_logit_of_class_one(shape: tuple[int, ...]) -> None:
    outputs, batch = torch.tensor([0.7, -1.2]).reshape(shape), (X, torch.tensor([1, 0]))
    log_odds = [0.7, 1.2]
    assert value(Logit(), outputs, batch) == [0.7, -1.2]
    assert value(Margin(), outputs, batch) == log_odds
    assert value(LogitDifference(), outputs, batch) == log_odds
    assert value(LogProbability(1), outputs, batch) == [
        round(v, 5) for v in torch.nn.functional.logsigmoid(outputs.reshape(-1)).tolist()
    ]
    loss = Classification().loss(outputs, batch)
    torch.testing.assert_close(as_target(LogProbability(), Classification())(outputs, batch), -loss)


def test_regression_explains_its_output() -> None:
    outputs, batch = torch.tensor([[0.5], [2.0]]), (X, torch.tensor([1.0, 1.0]))
    assert as_target(None, Regression())(outputs, batch).tolist() == [0.5, 2.0]
    assert as_target(Loss(), Regression())(outputs, batch).tolist() == [0.25, 1.0]


# -------------------------------------------------------------------- sequences


def test_the_default_is_the_true_next_token_at_the_last_known_position() -> None:
    found = as_target(None, NextToken())(SEQUENCE, IDS)
    assert torch.equal(found, torch.stack([SEQUENCE[0, 2, 4], SEQUENCE[1, 2, 2]]))
    earlier = as_target(Logit(position=-2), NextToken())(SEQUENCE, IDS)
    assert torch.equal(earlier, torch.stack([SEQUENCE[0, 1, 3], SEQUENCE[1, 1, 3]]))
    first = as_target(Logit(position=0), NextToken())(SEQUENCE, IDS)
    assert torch.equal(first, torch.stack([SEQUENCE[0, 0, 2], SEQUENCE[1, 0, 4]]))


def test_a_chosen_token_is_read_at_the_last_position() -> None:
    assert torch.equal(as_target(5, NextToken())(SEQUENCE, IDS), SEQUENCE[:, 3, 5])


@pytest.mark.parametrize(
    ("mask", "last"), [([0, 1, 1, 1], 3), ([1, 1, 1, 0], 2), ([1, 1, 0, 0], 1)]
)
def test_positions_count_from_the_last_that_is_not_padding(mask: list[int], last: int) -> None:
    batch = {"input_ids": IDS, "attention_mask": torch.tensor([mask, [1, 1, 1, 1]])}
    assert torch.equal(
        as_target(5, NextToken())(SEQUENCE, batch),
        torch.stack([SEQUENCE[0, last, 5], SEQUENCE[1, 3, 5]]),
    )
    assert as_target(None, NextToken())(SEQUENCE, batch)[0] == SEQUENCE[0, last - 1, IDS[0, last]]


def test_where_no_next_token_is_known_the_models_answer_is_meant() -> None:
    one = IDS[:, :1]
    found = as_target(None, NextToken())(SEQUENCE[:, :1], one)
    assert torch.equal(found, SEQUENCE[:, 0].amax(1))
    at_end = as_target(Logit(position=3), NextToken())(SEQUENCE, IDS)
    assert torch.equal(at_end, SEQUENCE[:, 3].amax(1))


def test_mixed_known_and_unknown() -> None:
    batch = {"input_ids": IDS, "labels": torch.tensor([[-100] * 4, [5, 4, 3, 2]])}
    found = as_target(None, NextToken())(SEQUENCE, batch)
    assert found.tolist() == [SEQUENCE[0, 3].max(), SEQUENCE[1, 2, 2]]


# -------------------------------------------------------------------- refusals


@pytest.mark.parametrize("position", [4, -5, 100])
def test_positions_outside_are_refused(position: int) -> None:
    with pytest.raises(ArgumentError, match=f"position: .*inside the 4 .*got {position}"):
        Logit(5, position=position)(SEQUENCE, IDS)


@pytest.mark.parametrize("token", [3, -1, torch.tensor([0, 7])])
def test_tokens_outside_are_refused(token: Any) -> None:
    with pytest.raises(ArgumentError, match="target: expected an index from 0 to 2, got"):
        as_target(token)(LOGITS, BATCH)
    with pytest.raises(ArgumentError, match="other: expected an index from 0 to 2, got"):
        LogitDifference(0, other=token)(LOGITS, BATCH)


@pytest.mark.parametrize("token", [torch.tensor([0, 1, 2]), torch.tensor([0.5, 1]), 1.5])
def test_tokens_of_another_shape_or_kind_are_refused(token: Any) -> None:
    with pytest.raises(ArgumentError, match="target: expected one index, or one for each of the 2"):
        Logit(token)(LOGITS, BATCH)


@pytest.mark.parametrize("bad", ["3", 1.5, True, torch.tensor([1.5]), [1, 2], Margin, Loss])
def test_what_is_no_target_is_refused(bad: Any) -> None:
    with pytest.raises(ArgumentError, match="target: expected an int, a tensor of ints"):
        as_target(bad)


def test_a_loss_needs_a_task() -> None:
    with pytest.raises(ArgumentError, match="target: expected a task whose loss is meant"):
        Loss()(LOGITS, BATCH)


# -------------------------------------------------------------------- functions


def test_a_function_serves_as_a_target() -> None:
    target = as_target(lambda outputs, batch: outputs[:, 0] * batch[1])
    assert target(LOGITS, BATCH).tolist() == [0, 0]
    assert target.higher_is_better


def test_a_function_may_say_which_way_is_better() -> None:
    class Entropy:
        higher_is_better = False

        def __call__(self, outputs: Tensor, batch: Any) -> Tensor:
            return torch.distributions.Categorical(logits=outputs).entropy()

    assert not as_target(Entropy()).higher_is_better


@pytest.mark.parametrize("bad", [lambda o, b: o.sum(), lambda o, b: o, lambda o, b: 1.0])
def test_a_function_returns_one_number_an_example(bad: Any) -> None:
    with pytest.raises(ArgumentError, match=r"target: .*returns a tensor of shape \(2,\)"):
        as_target(bad)(LOGITS, BATCH)


def test_a_target_keeps_its_own_task() -> None:
    own = NextToken()
    assert as_target(Loss(own), Classification()).task is own
    assert as_target(Margin(2), own) == Margin(2)
