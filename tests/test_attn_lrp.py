"""AttnLRP: rules written out layer by layer, its authors' own numbers, and conservation."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import Network
from oracle import Oracle
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lightning_mi as mi
from lightning_mi.attribution import AttnLRP, attn_lrp, evaluate, input_x_gradient
from lightning_mi.errors import ArgumentError, ModelError, TapError

REFERENCE = Path(__file__).parent / "reference"
IDS = torch.tensor([[3, 5, 3, 7, 11, 5], [2, 2, 9, 4, 1, 8]])


def close(a: Tensor, b: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0, check_dtype=False)


# -- the rules, written out as relevance of one layer after another ------------------------------


class Tiny(nn.Module):
    """One block by hand: causal attention, a gated MLP, norms with gain and bias, biases."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.e, self.p = nn.Embedding(12, 6), nn.Embedding(8, 6)
        self.n1, self.n2 = nn.LayerNorm(6), nn.LayerNorm(6)
        self.q, self.k, self.v = (nn.Linear(6, 4, bias=bias) for _ in range(3))
        self.o = nn.Linear(4, 6, bias=bias)
        self.gate, self.up = nn.Linear(6, 5, bias=bias), nn.Linear(6, 5, bias=bias)
        self.down, self.head = nn.Linear(5, 6, bias=bias), nn.Linear(6, 12, bias=bias)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.6)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.e(ids) + self.p(torch.arange(ids.shape[1]))
        y = self.n1(x)
        q, k, v = (m(y).unflatten(2, (2, 2)).transpose(1, 2) for m in (self.q, self.k, self.v))
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(z.transpose(1, 2).flatten(2))
        y = self.n2(x)
        return self.head(x + self.down(F.silu(self.gate(y)) * self.up(y)))


def back_linear(layer: nn.Linear, x: Tensor, R: Tensor, epsilon: float) -> Tensor:
    """Hand relevance through a linear layer of one position by the ε rule."""
    z = layer(x)
    found = torch.zeros_like(x)
    for i in range(len(x)):
        for j in range(len(z)):
            found[i] += x[i] * layer.weight[j, i] * R[j] / (z[j] + epsilon * z[j].sign())
    return found


def back_norm(norm: nn.LayerNorm, x: Tensor, R: Tensor) -> Tensor:
    """Hand relevance through y = γ·(x − mean)·s + β with s held fixed."""
    y = norm(x)
    s = 1 / math.sqrt(float(x.var(unbiased=False)) + norm.eps)
    found = torch.zeros_like(x)
    for i in range(len(x)):
        for j in range(len(x)):
            share = (float(i == j) - 1 / len(x)) * x[i] * s * norm.weight[j]
            found[i] += share * R[j] / y[j]
    return found


def back_attention(q: Tensor, k: Tensor, v: Tensor, R: Tensor, epsilon: float) -> list[Tensor]:
    """Hand relevance of one head's z to q, k and v: products by halves, softmax by Taylor."""
    T = len(q)
    scale = 1 / math.sqrt(q.shape[1])
    Rq, Rk, Rv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for t in range(T):
        logits = q[t] @ k[: t + 1].T * scale
        a = logits.softmax(0)
        z = a @ v[: t + 1]
        share = R[t] / (z + epsilon * z.sign())
        Ra = torch.zeros(t + 1, dtype=q.dtype)
        for s in range(t + 1):
            Rv[s] += 0.5 * a[s] * v[s] * share
            Ra[s] = 0.5 * (a[s] * v[s] * share).sum()
        Rl = logits * (Ra - a * Ra.sum())
        for s in range(t + 1):
            raw = q[t] @ k[s]
            part = 0.5 * q[t] * k[s] * Rl[s] / (raw + epsilon * raw.sign())
            Rq[t] += part
            Rk[s] += part
    return [Rq, Rk, Rv]


def twin(model: Tiny, ids: Tensor, token: int, epsilon: float) -> Tensor:
    """Return relevance of each token of one sequence."""
    T = len(ids)
    words = model.e(ids)
    x0 = words + model.p(torch.arange(T))
    y1 = model.n1(x0)
    q, k, v = model.q(y1), model.k(y1), model.v(y1)
    mask = torch.ones(T, T).tril().bool()
    z = torch.cat(
        [
            (q[:, h] @ k[:, h].T / math.sqrt(2)).masked_fill(~mask, -math.inf).softmax(1) @ v[:, h]
            for h in (slice(0, 2), slice(2, 4))
        ],
        1,
    )
    a = model.o(z)
    x1 = x0 + a
    y2 = model.n2(x1)
    gate, up = F.silu(model.gate(y2)), model.up(y2)
    inner = gate * up
    m = model.down(inner)
    x2 = x1 + m
    logits = model.head(x2)

    R = torch.zeros_like(logits)
    R[-1, token] = logits[-1, token]
    Rx2 = torch.stack([back_linear(model.head, x2[t], R[t], epsilon) for t in range(T)])
    Rx1, Rm = Rx2 * x1 / x2, Rx2 * m / x2
    for t in range(T):
        Rinner = back_linear(model.down, inner[t], Rm[t], epsilon)
        Ry2 = back_linear(model.gate, y2[t], Rinner / 2, epsilon)
        Ry2 = Ry2 + back_linear(model.up, y2[t], Rinner / 2, epsilon)
        Rx1[t] = Rx1[t] + back_norm(model.n2, x1[t], Ry2)
    Rx0, Ra = Rx1 * x0 / x1, Rx1 * a / x1
    Rz = torch.stack([back_linear(model.o, z[t], Ra[t], epsilon) for t in range(T)])
    heads = [
        back_attention(q[:, h], k[:, h], v[:, h], Rz[:, h], epsilon)
        for h in (slice(0, 2), slice(2, 4))
    ]
    for t in range(T):
        Ry1 = torch.zeros_like(x0[t])
        for layer, parts in zip((model.q, model.k, model.v), zip(*heads, strict=True), strict=True):
            Ry1 = Ry1 + back_linear(layer, y1[t], torch.cat(parts, 1)[t], epsilon)
        Rx0[t] = Rx0[t] + back_norm(model.n1, x0[t], Ry1)
    return (Rx0 * words / x0).sum(1).detach()


@pytest.mark.parametrize("epsilon", [0.0, 0.05])
@pytest.mark.parametrize("bias", [True, False])
def test_relevance_is_that_of_the_rules_written_out(epsilon: float, bias: bool) -> None:
    model = Tiny(bias).double()
    found = attn_lrp(model, IDS, 4, epsilon=epsilon)
    with torch.no_grad():
        slow = torch.stack([twin(model, ids, 4, epsilon) for ids in IDS])
    assert slow.abs().max() > 0.01
    close(found.values, slow, 1e-9)
    close(found.gap, torch.zeros(2), 1e-9)
    if not epsilon:
        return
    assert (found.values - attn_lrp(model, IDS, 4).values).abs().max() > 1e-3


# -- the authors' own numbers, and captum's ------------------------------------------------------


def rebuilt(name: str, kernel: str) -> nn.Module:
    import transformers as hf
    from safetensors.torch import load_file

    options: dict[str, Any] = {"attn_implementation": kernel, "bos_token_id": 1, "eos_token_id": 2}
    if name == "gpt2":
        config = hf.GPT2Config(
            vocab_size=53, n_embd=32, n_layer=3, n_head=4, n_positions=64, **options
        )
        model = hf.GPT2LMHeadModel(config)
        model.load_state_dict(load_file(REFERENCE / "tiny_gpt2.safetensors"), strict=False)
        return model
    model = hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=23,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            **options,
        )
    )
    stored = np.load(REFERENCE / "lxt_llama.npz")
    weights = {k[6:]: torch.from_numpy(stored[k]) for k in stored if k.startswith("param.")}
    model.load_state_dict(weights)
    return model


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_values_of_the_authors_implementation(name: str, kernel: str) -> None:
    stored = {k: torch.from_numpy(v) for k, v in np.load(REFERENCE / f"lxt_{name}.npz").items()}
    found = attn_lrp(rebuilt(name, kernel).eval(), stored["ids"], stored["target"])
    assert stored["relevance"].abs().max() > 0.3
    close(found.values, stored["relevance"], 3e-6)
    assert found.converged is not None
    assert bool(found.converged.all())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(4, 3, 3),
            nn.ReLU(),
        )
        self.out = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layers(x).flatten(1))


@pytest.mark.filterwarnings("ignore")
def test_captums_lrp_of_a_small_convolutional_network() -> None:
    from captum.attr import LRP

    model, x = Net().double().eval(), torch.randn(3, 1, 8, 8, dtype=torch.float64)
    expected = LRP(model).attribute(x, target=2)
    found = attn_lrp(model, x, 2, epsilon=1e-9)
    assert expected.abs().max() > 1e-3
    close(found.values, expected.detach(), 1e-8)


# -- what must hold of any model -----------------------------------------------------------------


def test_a_linear_network_gives_input_times_gradient() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()
    x = torch.randn(6, 5, dtype=torch.float64)
    found = attn_lrp(model, x, 1)
    close(found.values, input_x_gradient(model, x, 1).values)
    close(found.output_change, (model(x) - model(x * 0))[:, 1].detach())


class Unbiased(nn.Module):
    """No bias anywhere, and no softmax: everything that is put out comes from the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.e = nn.Embedding(12, 6)
        self.q, self.k, self.v, self.o = (nn.Linear(6, 6, bias=False) for _ in range(4))
        self.norm = nn.RMSNorm(6)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.e(ids))
        weights = self.q(x) @ self.k(x).mT
        return self.o(F.gelu(x + weights.tril() @ self.v(x)))


def test_a_network_without_biases_conserves_the_target_itself() -> None:
    found = attn_lrp(Unbiased(), IDS, 4)
    close(found.output_change, found.target, 1e-5)
    close(found.values.sum(1), found.target, 1e-5)
    assert found.target.abs().min() > 1e-4


def test_softmax_alone_is_its_taylor_series() -> None:
    class Softmax(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.softmax(-1)

    x = torch.randn(4, 5, dtype=torch.float64)
    s = x.softmax(1)
    own = torch.zeros_like(s)
    own[:, 2] = s[:, 2]
    found = attn_lrp(Softmax(), x, 2)
    close(found.values, x * (own - s * own.sum(1, keepdim=True)))
    close(found.output_change, found.values.sum(1))


def activations() -> list[Callable[[Tensor], Tensor]]:
    gelu_tanh = math.sqrt(2 / math.pi)
    return [
        torch.relu,
        F.gelu,
        F.silu,
        torch.tanh,
        F.mish,
        lambda x: x * torch.sigmoid(x),
        lambda x: torch.sigmoid(1.702 * x) * x,
        lambda x: 0.5 * x * (1 + torch.tanh(gelu_tanh * (x + 0.044715 * torch.pow(x, 3)))),
        lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
        lambda x: x.pow(2),
        lambda x: x * x,
        torch.square,
    ]


class Applied(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize("number", range(12))
def test_elementwise_functions_pass_relevance_unchanged(number: int) -> None:
    function, x = activations()[number], torch.randn(3, 4, dtype=torch.float64)
    found = attn_lrp(Applied(function), x, lambda o, b: o.sum(1))
    close(found.values, function(x), 1e-12)


def test_products_are_split_evenly_and_changes_in_place_are_seen() -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    other = torch.randn(4, 4, dtype=torch.float64)

    def rewritten(x: Tensor) -> Tensor:
        y = 2 * x
        y += x @ other  # No longer a multiple of x.
        return y * x

    def plain(x: Tensor) -> Tensor:
        return (2 * x + x @ other) * x

    expected = attn_lrp(Applied(plain), x, lambda o, b: o.sum(1)).values
    close(attn_lrp(Applied(rewritten), x, lambda o, b: o.sum(1)).values, expected)
    left = 2 * x + x @ other
    by_hand = left * x / 2 + x * x + x * (0.5 * x @ other.T)
    close(expected, by_hand)


FUNCTIONS: list[Callable[[Tensor], Tensor]] = [
    lambda x: F.layer_norm(x, (6,)),
    lambda x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-5).sqrt(),
    lambda x: F.rms_norm(x, (6,)),
    lambda x: F.group_norm(x, 2),
    lambda x: F.normalize(x, dim=-1),
    lambda x: x.clamp(-0.5, 0.5),
    lambda x: torch.maximum(x, x.flip(1)),
    lambda x: torch.einsum("bi,bj->bi", x, x.sigmoid()),
    lambda x: x.max(1, keepdim=True).values * x,
    lambda x: x.topk(3).values,
    lambda x: x.logsumexp(1, keepdim=True) + x,
    lambda x: F.glu(x),
    lambda x: x * 3 if float(x.detach().square().sum()) > 1e-6 else x.sin(),
    lambda x: torch.where(x > 0, x, 2 * x),
    lambda x: 1.0 / (1.0 + torch.exp(-x)),
    lambda x: F.softplus(x).sum(1, keepdim=True) * x,
    lambda x: torch.cat(x.chunk(2, 1)[::-1], 1)[:, 1:4],
    lambda x: F.dropout(x, 0.5, training=False).masked_fill(torch.arange(6) > 3, -1.0),
]


@pytest.mark.parametrize("number", range(len(FUNCTIONS)))
@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_relevance_is_conserved_whatever_the_function(number: int, epsilon: float) -> None:
    torch.manual_seed(number)
    model = nn.Sequential(nn.Linear(6, 6), Applied(FUNCTIONS[number])).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    found = attn_lrp(model, x, lambda o, b: o.square().sum(1), epsilon=epsilon)
    close(found.values.sum(1), found.output_change, 1e-9)
    close(found.gap, torch.zeros(3), 1e-9)


def test_relevance_of_a_target_that_is_not_linear() -> None:
    model, x = nn.Linear(5, 3).double(), torch.randn(4, 5, dtype=torch.float64)
    found = attn_lrp(model, x, mi.LogProbability(token=1))
    outputs = model(x).detach().requires_grad_()
    (slope,) = torch.autograd.grad(outputs.log_softmax(1)[:, 1].sum(), outputs)
    close(found.values, x * (slope @ model.weight).detach())
    close(found.target, outputs.log_softmax(1)[:, 1].detach())


# -- architectures -------------------------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.e = nn.Embedding(12, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **options)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(8, 3)

    def forward(self, ids: Tensor, padding: Tensor | None = None) -> Tensor:
        hidden = None if padding is None else ~padding.bool()
        x = self.layers(self.e(ids), src_key_padding_mask=hidden)
        return self.out(x[:, 0])


def of_transformers(name: str) -> nn.Module:
    import transformers as hf

    shape: dict[str, Any] = {
        "vocab_size": 12,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 16,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.3,
    }
    groups = {"num_key_value_heads": 2, "head_dim": 4}
    made: dict[str, Callable[[], nn.Module]] = {
        "Bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**shape)),
        "GPTNeoX": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**shape)),
        "Gemma2": lambda: hf.Gemma2ForCausalLM(
            hf.Gemma2Config(**shape, **groups, attn_implementation="eager")
        ),
        "Qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**shape, **groups)),
        "ViT": lambda: hf.ViTForImageClassification(
            hf.ViTConfig(**{**shape, "image_size": 8, "patch_size": 4, "num_labels": 3})
        ),
    }
    return made[name]()


@pytest.mark.parametrize(
    "make",
    [
        Network,
        Encoder,
        lambda: Encoder(norm_first=True, activation="gelu"),
        *(lambda name=name: of_transformers(name) for name in ("Bert", "GPTNeoX", "Gemma2")),
        *(lambda name=name: of_transformers(name) for name in ("Qwen3", "ViT")),
    ],
    ids=["own", "encoder", "pre-norm", "Bert", "GPTNeoX", "Gemma2", "Qwen3", "ViT"],
)
def test_architectures_are_served_without_conversion(make: Callable[[], nn.Module]) -> None:
    model = make().eval()
    image = "ViT" in type(model).__name__
    inputs = torch.randn(2, 3, 8, 8) if image else IDS
    found = attn_lrp(model, inputs, 1)
    assert found.values.shape == inputs.shape
    assert found.values.abs().max() > 1e-6
    close(found.gap, torch.zeros(2), 1e-4)
    model.double()
    exact = attn_lrp(model, inputs.double() if image else inputs, 1)
    close(found.values, exact.values, 1e-4 * float(exact.values.abs().max()) + 1e-7)
    # Norms in single precision are part of some models.
    close(exact.gap, torch.zeros(2), 1e-5)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Encoder(dropout=0.0)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids, attention_mask)


def test_a_padded_batch_gives_what_its_examples_give() -> None:
    model = Named().eval()
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    both = attn_lrp(model, {"input_ids": IDS, "attention_mask": mask}, 1)
    for row, size in enumerate((4, 6)):
        cut = {"input_ids": IDS[row : row + 1, :size], "attention_mask": mask[row : row + 1, :size]}
        alone = attn_lrp(model, cut, 1)
        close(both.values[row, :size], alone.values[0], 1e-6)
        close(both.output_change[row], alone.output_change[0], 1e-6)
    assert (both.values[0, 4:] == 0).all()


class Table(Oracle):
    """The induction model with its one-hot lookup in an ``nn.Embedding``."""

    def __init__(self, beta: float) -> None:
        super().__init__(beta, 12, 9)
        self.words = nn.Embedding.from_pretrained(torch.eye(12))

    def embed(self, ids: Tensor) -> Tensor:
        own = super().embed(ids)
        return torch.cat([self.words(ids), own[..., self.V :]], 2)


@pytest.mark.parametrize("beta", [4.0, 30.0])
def test_induction_gives_the_relevance_to_the_token_that_is_copied(beta: float) -> None:
    ids = torch.tensor([[4, 7, 1, 9, 3, 7]])  # After 7 came 1.
    found = attn_lrp(Table(beta), ids, 1)
    assert int(found.values[0].argmax()) == 2
    assert found.values[0, 2] > 0.4 * found.target
    close(found.gap, torch.zeros(1), 1e-5)


def test_deleting_what_is_relevant_hurts_a_trained_model_more_than_at_random() -> None:
    torch.manual_seed(3)
    model = Encoder(dropout=0.0)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)

    def batch() -> tuple[Tensor, Tensor]:
        ids = torch.randint(4, 12, (64, 8))
        labels = torch.randint(0, 3, (64,))
        ids[torch.arange(64), torch.randint(1, 8, (64,))] = labels + 1
        return ids, labels  # Which of 1, 2, 3 is anywhere in it?

    for _ in range(150):
        ids, labels = batch()
        optimizer.zero_grad()
        F.cross_entropy(model(ids), labels).backward()
        optimizer.step()
    ids, labels = batch()
    assert float((model(ids).argmax(1) == labels).float().mean()) > 0.9
    found = attn_lrp(model.eval(), ids, labels)
    ours = evaluate.deletion(model, (ids, labels), found, target=labels, baseline=0)
    assert ours.random is not None
    assert ours.values.mean() < 0.7 * ours.random.mean()


# -- numbers, wrappers, harm ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = Encoder(dropout=0.0).eval()
    exact = attn_lrp(model, IDS, 1).values
    half = attn_lrp(model.to(dtype), IDS, 1)
    assert half.values.dtype == dtype
    close(half.values.float() / exact.abs().max(), exact / exact.abs().max(), 0.1)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.e, self.layer = nn.Embedding(12, 6), nn.Linear(6, 6)
        self.reentrant = reentrant

    def inner(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x)) * x

    def forward(self, ids: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.inner(self.e(ids))
        return checkpoint(self.inner, self.e(ids), use_reentrant=self.reentrant)


@pytest.mark.filterwarnings("ignore:None of the inputs")
def test_activation_checkpointing_changes_nothing() -> None:
    model = Checkpointed(None)
    expected = attn_lrp(model, IDS, 1).values
    model.reentrant = False
    close(attn_lrp(model, IDS, 1).values, expected)
    model.reentrant = True
    with pytest.raises(ModelError, match="CheckpointFunction"):
        attn_lrp(model, IDS, 1)


def test_compiled_models_and_autocast() -> None:
    model = Network(0.0).eval()
    expected = attn_lrp(model, IDS, 1).values
    close(attn_lrp(torch.compile(model, backend="eager"), IDS, 1).values, expected, 1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        found = attn_lrp(model, IDS, 1)
    close(found.values / expected.abs().max(), expected / expected.abs().max(), 0.05)
    model.blocks[0].compile(backend="eager")
    close(attn_lrp(model, IDS, 1).values, expected, 1e-6)


def test_the_model_is_left_as_it_was() -> None:
    model = Network().train()
    model.frozen.eval()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    model.tokens.weight.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    hooks = [len(m._forward_hooks) for m in model.modules()]
    random, fast = torch.get_rng_state(), torch.backends.mha.get_fastpath_enabled()
    attn_lrp(model, IDS, 1)
    failing = Applied(lambda x: x.cumprod(1))
    model.drop = failing
    with pytest.raises(ModelError, match="cumprod"):
        attn_lrp(model, IDS, 1)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert [m.training for m in model.modules() if m is not failing] == modes[:-2] + modes[-1:]
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert [p.grad is None for p in model.parameters()].count(False) == 1
    assert not model.tokens.weight.requires_grad
    assert torch.ones(2).square().sum() == 2  # No mode is left behind.


# -- refusals ------------------------------------------------------------------------------------


class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 2


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0][:, -1]


class Forgetful(nn.Module):
    """Takes another way from its third call on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * 2 if self.calls < 3 else x.sin()


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda x: torch.fft.fft(x).real, "fft"),
        (lambda x: x.cumprod(1), "cumprod"),
        (Own.apply, "Own"),
        (lambda x: F.batch_norm(x, None, None, training=True), "batch_norm"),
        (lambda x: x.clone().mul_(x), "mul_"),
        (lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5), "dropout"),
    ],
)
def test_what_has_no_rule_is_refused_by_name(function: Any, name: str) -> None:
    with pytest.raises(ModelError, match=name):
        attn_lrp(Applied(function), torch.randn(2, 3), 1)


def test_further_refusals() -> None:
    with pytest.raises(ModelError, match="lstm"):
        attn_lrp(Recurrent(), torch.randn(2, 5, 4), 1)
    with pytest.raises(ModelError, match="carry no gradient"):
        attn_lrp(Applied(lambda x: x.detach() * 2), torch.randn(2, 3), 1)
    with pytest.raises(TapError, match="same functions"):
        attn_lrp(Forgetful(), torch.ones(2, 3), 1)
    with pytest.raises(ArgumentError, match="epsilon"):
        attn_lrp(nn.Linear(3, 2), torch.ones(1, 3), 1, epsilon=-1.0)
    with pytest.raises(ArgumentError, match="tolerance"):
        AttnLRP(tolerance="1 %")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"nn\.Embedding"):
        attn_lrp(Oracle(1.0), IDS, 1)


def test_the_measurement_records_what_the_function_returns() -> None:
    model = Network(0.0).eval()
    panels = {
        r.name: r.panel for r in mi.measure(model, [AttnLRP(target=3, examples=1)], batch=IDS)
    }
    values = panels["attn_lrp/values"]
    close(values.values, attn_lrp(model, IDS[:1], 3).values)
    assert values.axes == ("example", "position")
    assert values.convention["of"] == "word embedding"
    assert {f"attn_lrp/{n}" for n in ("gap", "delta", "output_change", "converged")} <= set(panels)
