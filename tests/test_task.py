"""How a batch becomes outputs and losses, given or inferred."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_mi import (
    ArgumentError,
    Classification,
    ModelError,
    NextToken,
    Regression,
    Task,
    infer_task,
)
from lightning_mi.calling import run_model
from lightning_mi.influence import Objective, influence_scores
from lightning_mi.task import IGNORED

V, T = 11, 6
IDS = torch.randint(0, V, (3, T), generator=torch.Generator().manual_seed(2))


class Language(nn.Module):
    """Embeddings with a limit of positions, in one of the usual ways to have one."""

    def __init__(self, limit: int = T, how: str = "embedding") -> None:
        super().__init__()
        self.how = how
        self.token, self.position = nn.Embedding(V, 8), nn.Embedding(limit, 8)
        self.head = nn.Linear(8, V)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        if self.how == "assert":
            assert length <= len(self.position.weight), "too long"
        if self.how == "slice":
            position = self.position.weight[:length]
        else:
            position = self.position(torch.arange(length))
        hidden: Tensor = self.head((self.token(x) + position).cumsum(1))
        return hidden


def gpt2(**options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=V, n_positions=32, n_embd=8, n_layer=2, n_head=2, pad_token_id=0, **options
    )
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config).eval()


# -------------------------------------------------------------------- inference


@pytest.mark.parametrize("batch", [IDS, [IDS], (IDS, IDS), {"x": IDS}, (IDS, IDS.roll(-1, 1))])
def test_ids_and_outputs_over_tokens_mean_next_token(batch: Any) -> None:
    assert infer_task(Language(), batch) == NextToken()


@pytest.mark.parametrize("how", ["embedding", "slice", "assert"])
def test_a_window_of_one_token_too_many(how: str) -> None:
    model = Language(T - 1, how)
    task = infer_task(model, IDS)
    assert task == NextToken(drop_last_input=True)
    outputs = task.outputs(model, IDS)
    assert torch.equal(outputs, model(IDS[:, :-1]))
    assert torch.equal(task.labels(IDS), IDS[:, 1:])
    expected = F.cross_entropy(outputs.flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(task.loss(outputs, IDS).mean(), expected)
    other = task.with_inputs(IDS, IDS[:, :-1].flip(1))
    assert torch.equal(other, torch.cat([IDS[:, :-1].flip(1), IDS[:, -1:]], 1))


def test_two_tokens_too_many_are_refused_with_the_models_own_words() -> None:
    with pytest.raises(ModelError, match=r"Language to run .*\(3, 6\) int64, got AssertionError"):
        infer_task(Language(T - 2, "assert"), IDS)


def test_ids_beyond_the_vocabulary_are_refused_before_the_kernel() -> None:
    with pytest.raises(ModelError, match=f"index {V} in an embedding of {V} rows"):
        infer_task(Language(), torch.full_like(IDS, V))


def test_a_hugging_face_batch_of_one_token_too_many() -> None:
    model = gpt2()
    ids = torch.randint(1, V, (2, 33))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    task = infer_task(model, batch)
    assert task == NextToken(drop_last_input=True)
    assert torch.equal(task.outputs(model, batch), model(ids[:, :-1]).logits)


def test_hugging_face_dictionary_with_labels() -> None:
    model = gpt2()
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}
    task = infer_task(model, batch)
    assert task == NextToken()
    outputs = task.outputs(model, batch)
    torch.testing.assert_close(task.loss(outputs, batch).mean(), model(**batch).loss)


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_integer_labels_mean_classification(classes: int) -> None:
    labels = torch.tensor([0, min(classes, 1), 1, 0])
    assert infer_task(nn.Linear(5, classes), (torch.randn(4, 5), labels)) == Classification()


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_float_labels_mean_regression(shape: tuple[int, ...]) -> None:
    assert infer_task(nn.Linear(5, 1), (torch.randn(4, 5), torch.randn(shape))) == Regression()


@pytest.mark.parametrize(
    ("model", "batch", "seen"),
    [
        (nn.Linear(5, 3), torch.randn(4, 5), "labels none"),
        (nn.Linear(5, 3), (torch.randn(4, 5), torch.randn(4)), r"labels \(4,\) float32"),
        (nn.Linear(5, 3), (torch.randn(4, 5), torch.tensor([0, 1, 2, 3])), r"outputs \(4, 3\)"),
        (nn.Linear(5, 1), (torch.randn(4, 5), torch.tensor([0, 1, 2, 3])), r"labels \(4,\) int64"),
        (nn.Conv2d(1, 2, 1), (torch.randn(4, 1, 3, 3), torch.zeros(4).long()), r"\(4, 2, 3, 3\)"),
    ],
)
def test_what_does_not_fit_is_named(model: nn.Module, batch: Any, seen: str) -> None:
    with pytest.raises(ArgumentError, match=f"task: expected ids and outputs.*{seen}"):
        infer_task(model, batch)


def test_outputs_at_other_positions_are_not_next_tokens() -> None:
    class LastOnly(Language):  # as nanoGPT answers when it is given no targets
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[:, [-1]]

    with pytest.raises(ArgumentError, match=r"inputs \(3, 6\) int64, outputs \(3, 1, 11\)"):
        infer_task(LastOnly(), IDS)


def test_inference_leaves_no_trace() -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Dropout())
    mean, chance = model[1].running_mean.clone(), torch.get_rng_state()
    infer_task(model, (torch.randn(4, 5, generator=torch.Generator()), torch.zeros(4).long()))
    assert torch.equal(model[1].running_mean, mean)
    assert torch.equal(torch.get_rng_state(), chance)
    assert model.training


class Bare(pl.LightningModule):
    """A LightningModule without forward, as its training_step calls self.net."""

    def __init__(self, **networks: nn.Module) -> None:
        super().__init__()
        for name, network in networks.items():
            setattr(self, name, network)
        self.criterion = nn.CrossEntropyLoss()


def test_the_only_network_of_a_module_without_forward() -> None:
    model = Bare(net=Language())
    task = infer_task(model, IDS)
    assert task == NextToken("net")
    assert torch.equal(task.outputs(model, IDS), model.net(IDS))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_module_without_forward() -> None:
    assert infer_task(torch.compile(Bare(net=Language()), backend="eager"), IDS).module == "net"


def test_two_networks_without_forward_are_named() -> None:
    with pytest.raises(ModelError, match=r"Bare without one .*\['encoder', 'decoder'\].*module="):
        infer_task(Bare(encoder=Language(), decoder=Language()), IDS)


def test_a_forward_set_on_the_instance_counts() -> None:
    model = Bare(a=Language(), b=Language())
    model.forward = model.a.forward
    assert infer_task(model, IDS) == NextToken()


def test_a_wrong_module_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"module: expected one of \['net', 'criterion'\]"):
        Task(module="nett").outputs(Bare(net=Language()), IDS)


# -------------------------------------------------------------------- losses


def test_the_base_knows_no_loss() -> None:
    with pytest.raises(NotImplementedError, match="define loss"):
        Task().loss(torch.zeros(1), IDS)


def test_classification_losses_are_cross_entropies() -> None:
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    loss = Classification().loss(logits, (None, labels[:, None]))
    torch.testing.assert_close(loss, -logits.log_softmax(1)[torch.arange(5), labels])
    single, binary = torch.randn(4), torch.tensor([0, 1, 1, 0])
    expected = torch.where(binary == 1, -F.logsigmoid(single), -F.logsigmoid(-single))
    for outputs in (single, single[:, None]):
        torch.testing.assert_close(Classification().loss(outputs, (None, binary)), expected)


def test_regression_losses_are_squared_errors() -> None:
    outputs, labels = torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([[0, 2], [3, 0]])
    assert Regression().loss(outputs, (None, labels)).tolist() == [0.5, 8.0]
    assert Regression().loss(outputs[:, :1], (None, labels[:, 0])).tolist() == [1.0, 0.0]


def test_missing_labels_are_named() -> None:
    for task in (Classification(), Regression()):
        with pytest.raises(ArgumentError, match="batch: expected labels beside the inputs"):
            task.loss(torch.zeros(3, 2), torch.zeros(3, 2))


def test_next_token_loss_is_the_usual_mean() -> None:
    logits = torch.randn(3, T, V)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    for batch in (IDS, (IDS, IDS), {"x": IDS}, {"input_ids": IDS, "labels": IDS}):
        torch.testing.assert_close(NextToken().loss(logits, batch).mean(), expected)
    shifted = F.cross_entropy(logits.flatten(0, 1), IDS.roll(-1, 1).flatten())
    for pair in ((IDS, IDS.roll(-1, 1)), {"x": IDS, "y": IDS.roll(-1, 1)}):
        torch.testing.assert_close(NextToken().loss(logits, pair).mean(), shifted)


def test_an_example_without_labels_loses_nothing() -> None:
    batch = {"input_ids": IDS, "labels": IDS.index_fill(0, torch.tensor(1), IGNORED)}
    loss = NextToken().loss(torch.randn(3, T, V), batch)
    assert loss[1] == 0
    assert loss[0] > 0


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ([1, 1, 1, 1], [6, 7, 8, IGNORED]),
        ([0, 0, 1, 1], [IGNORED, IGNORED, 8, IGNORED]),
        ([1, 1, 0, 0], [6, IGNORED, IGNORED, IGNORED]),
        ([0, 1, 1, 0], [IGNORED, 7, IGNORED, IGNORED]),
        ([0, 0, 0, 0], [IGNORED] * 4),
    ],
)
@pytest.mark.parametrize("labelled", [False, True])
def test_padding_is_never_predicted_nor_predicts(
    mask: list[int], expected: list[int], labelled: bool
) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    batch = {"input_ids": ids, "attention_mask": torch.tensor([mask])}
    batch |= {"labels": ids} if labelled else {}
    assert NextToken().labels(batch).tolist() == [expected]
    assert NextToken(drop_last_input=True).labels(batch).tolist() == [expected[:-1]]


def test_given_labels_keep_their_holes() -> None:
    labels = torch.tensor([[IGNORED, 6, IGNORED, 8]])
    batch = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "labels": labels}
    assert NextToken().labels(batch).tolist() == [[6, IGNORED, 8, IGNORED]]


# -------------------------------------------------------------------- calling


class Spy(nn.Module):
    """Remembers how it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.seen: dict[str, Any] = {}


class Named(Spy):
    def forward(self, input_ids: Tensor, attention_mask: Any = None, use_cache: Any = None) -> Any:
        self.seen = {"mask": attention_mask, "use_cache": use_cache}
        return {"loss": torch.tensor(1), "hidden": input_ids * 2.0, "logits": input_ids * 1.0}


class HandsOn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Named()

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)


class Whole(Spy):
    def forward(self, batch: Any) -> Any:
        self.seen = {"batch": batch}
        return batch["input_ids"] * 1.0 if isinstance(batch, Mapping) else batch[0] * 1.0


class Two(Spy):
    def forward(self, a: Tensor, b: Tensor) -> Any:
        return None, a * 1, a + b * 1.0


def test_only_what_forward_takes_is_passed() -> None:
    model, mask = Named(), torch.ones_like(IDS)
    batch = {"input_ids": IDS, "attention_mask": mask, "labels": IDS, "text": ["a"] * 3}
    assert torch.equal(run_model(model, batch), IDS * 1.0)
    assert model.seen == {"mask": mask, "use_cache": False}
    outer = HandsOn()
    assert torch.equal(run_model(outer, batch), IDS * 1.0)
    assert outer.model.seen == {"mask": mask, "use_cache": False}


def test_a_network_that_takes_the_batch_gets_it() -> None:
    for batch in ({"input_ids": IDS, "labels": IDS}, (IDS, IDS)):
        model = Whole()
        run_model(model, batch)
        assert model.seen["batch"] is batch


def test_several_inputs_in_a_row() -> None:
    assert torch.equal(run_model(Two(), (IDS, IDS, torch.zeros(3))), IDS * 2.0)


def test_an_output_without_a_tensor_is_refused() -> None:
    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return {"text": "none"}

    with pytest.raises(ModelError, match="holds a tensor, got dict"):
        run_model(Nothing(), IDS)


@pytest.mark.parametrize("pads", [0, 1, 3, 8])
@pytest.mark.parametrize("handed_on", [False, True])
def test_left_padding_does_not_change_the_logits(pads: int, handed_on: bool) -> None:
    model = gpt2()

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, **inputs: Any) -> Any:
            return self.model(**inputs)

    ids = F.pad(IDS, (pads, 0))
    mask = F.pad(torch.ones_like(IDS), (pads, 0))
    batch = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        expected = model(IDS).logits
        found = run_model(Outer() if handed_on else model, batch)[:, pads:]
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
        if pads:  # the model's own answer is another one, or this test could not fail
            assert (model(**batch).logits[:, pads:] - expected).abs().max() > 1e-4


def test_losses_do_not_depend_on_padding() -> None:
    model, task = gpt2(), NextToken()
    expected = task.loss(task.outputs(model, IDS), IDS)
    for sides in ((3, 0), (0, 3)):
        mask = F.pad(torch.ones_like(IDS), sides)
        batch = {"input_ids": F.pad(IDS, sides), "attention_mask": mask}
        torch.testing.assert_close(task.loss(task.outputs(model, batch), batch), expected)


def test_labels_that_are_no_classes_are_refused() -> None:
    model, batch = nn.Linear(5, 3), (torch.randn(4, 5), torch.rand(4, 3))
    message = r"batch: expected one class for each of the 4 examples .* shape \(4, 3\)"
    with pytest.raises(ArgumentError, match=message):
        Classification().loss(model(batch[0]), batch)
    data = TensorDataset(*batch)
    for solver in ("exact", "ekfac"):
        with pytest.raises(ArgumentError, match="one class for each"):
            influence_scores(model, Objective(Classification()), data, data, solver=solver)
