"""`Anatomy`: layers, heads, weights and the residual graph of a transformer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..task import Task
from .parts import Norm, Note, ReaderInput, Writer

__all__ = ["Anatomy"]


@dataclass(frozen=True, eq=False)
class Anatomy:
    """What a transformer is made of.

    A layer is a self-attention, in the order of execution. Rows are vectors: a head computes
    ``q = x W_Q + b_Q``, its logits are ``scale · q · k``, and it writes ``z W_O``, where x is what
    the attention is handed (after a norm, where there is one). All values are detached, in single
    precision at least, on the model's device.

    Args:
        n_layers: Number of self-attentions.
        n_heads: Query heads of each layer.
        n_kv_heads: Key-value heads of each layer.
        d_head: Width of queries and keys of each layer.
        d_model: Width of the residual stream.
        modules: Dotted name of the module in which the attention of each layer runs.
        W_Q: For each layer ``[head, d_model, d_head]``; before a norm of queries.
        W_K: For each layer ``[kv_head, d_model, d_head]``; before a norm of keys.
        W_V: For each layer ``[kv_head, d_model, d_head]``.
        W_O: For each layer ``[head, d_head, d_model]``; before a sandwich norm.
        b_Q: For each layer ``[head, d_head]``, zeros where there is none.
        b_K: For each layer ``[kv_head, d_head]``.
        b_V: For each layer ``[kv_head, d_head]``.
        b_O: For each layer ``[d_model]``.
        scale: For each layer what reproduces the attention logits,
            ``(x W_Q + b_Q) · (x W_K + b_K) · scale``, before rotary embedding and soft-cap.
        W_E: Embedding ``[token, d_model]``, or None if unknown.
        W_pos: Position embedding ``[position, d_model]``, or None.
        W_U: Unembedding ``[d_model, token]``, or None if unknown.
        b_U: Its bias ``[token]``, or None.
        attention_norms: For each layer the norm before the attention, or None.
        mlp_norms: For each layer the norm before the MLP, or None.
        final_norm: The norm before the unembedding, or None.
        query_norms: For each layer the norm of queries, or None.
        key_norms: For each layer the norm of keys, or None.
        parallel: For each layer whether attention and MLP read the same stream.
        logit_softcap: c where the model's logits are c·tanh(·/c), else None.
        softcap: For each layer c where attention logits are c·tanh(·/c), else None.
        writers: What writes to the stream, in the order of writing.
        readers: What reads from it, in the order of reading.
        notes: What is approximate or unknown, where, and why.
    """

    n_layers: int
    n_heads: tuple[int, ...]
    n_kv_heads: tuple[int, ...]
    d_head: tuple[int, ...]
    d_model: int
    modules: tuple[str, ...]
    W_Q: tuple[Tensor, ...]
    W_K: tuple[Tensor, ...]
    W_V: tuple[Tensor, ...]
    W_O: tuple[Tensor, ...]
    b_Q: tuple[Tensor, ...]
    b_K: tuple[Tensor, ...]
    b_V: tuple[Tensor, ...]
    b_O: tuple[Tensor, ...]
    scale: tuple[float, ...]
    W_E: Tensor | None = None
    W_pos: Tensor | None = None
    W_U: Tensor | None = None
    b_U: Tensor | None = None
    attention_norms: tuple[Norm | None, ...] = ()
    mlp_norms: tuple[Norm | None, ...] = ()
    final_norm: Norm | None = None
    query_norms: tuple[Norm | None, ...] = ()
    key_norms: tuple[Norm | None, ...] = ()
    parallel: tuple[bool, ...] = ()
    logit_softcap: float | None = None
    softcap: tuple[float | None, ...] = ()
    writers: tuple[Writer, ...] = ()
    readers: tuple[ReaderInput, ...] = ()
    notes: tuple[Note, ...] = ()

    @classmethod
    def of(cls, model: nn.Module, example: Any = None, *, task: Task | None = None) -> Anatomy:
        """Find out what a model is made of, by asking it.

        The model runs once on two short sequences while the additions that make its residual
        stream are watched, and once on basis vectors in place of what attentions read and of what
        heads write; differences of the answers are the weights, whatever their storage layout.
        It is left exactly as it was.

        Args:
            model: The user's model: compiled or not, a LightningModule or not, in any precision.
            example: A batch it can be run on; a few examples are enough. None for a model that
                reads token ids.
            task: How a batch becomes outputs; None if the model can simply be called.

        Returns:
            The anatomy. What could not be established is named in ``notes``.

        Raises:
            NoAttentionError: If the model computes no self-attention that can be observed, as a
                state-space model or an MLP-mixer.
            ArgumentError: If the model is none, or cannot be run on the example.
            ModelError: If no attention reads from a residual stream and writes to it.
        """
        from .build import anatomy_of

        return anatomy_of(model, example, task)

    def kv_head(self, layer: int) -> Tensor:
        """Return which key-value head serves each query head.

        Args:
            layer: The layer.

        Returns:
            Long ``[head]``.

        Raises:
            ArgumentError: If there is no such layer.
        """
        self.module_of(layer)
        group = self.n_heads[layer] // self.n_kv_heads[layer]
        return torch.arange(self.n_heads[layer], device=self.W_Q[layer].device) // group

    def grouped(self, layer: int, which: Literal["K", "V"] = "K") -> Tensor:
        """Return W_K or W_V with one matrix for each query head.

        Args:
            layer: The layer.
            which: Keys or values.

        Returns:
            Shape ``[head, d_model, d_head]``.

        Raises:
            ArgumentError: If there is no such layer, or ``which`` is neither.
        """
        if which not in ("K", "V"):
            raise ArgumentError.of(
                "which", expected="'K' or 'V'", got=repr(which), do="W_Q has one for each head."
            )
        weight = (self.W_K if which == "K" else self.W_V)[layer]
        return weight[self.kv_head(layer)]

    def folded(self) -> Anatomy:
        """Return a copy in which the gains of norms are part of the weights that read after them.

        Gains (and for LayerNorm the subtraction of the mean) go into W_Q, W_K, W_V and W_U, biases
        of norms into b_Q, b_K, b_V and b_U, so that these matrices read the stream divided by its
        scale. The model and this anatomy stay as they are.

        Returns:
            The copy; its norms before attentions and the final norm have neither gain nor bias.
        """
        W: dict[str, list[Tensor]] = {"Q": [], "K": [], "V": []}
        b: dict[str, list[Tensor]] = {"Q": [], "K": [], "V": []}
        for layer, norm in enumerate(self.attention_norms):
            for name in W:
                weight = getattr(self, f"W_{name}")[layer]
                bias = getattr(self, f"b_{name}")[layer]
                folded, more = _folded(norm, weight)
                W[name].append(folded)
                b[name].append(bias if more is None else bias + more)
        W_U, b_U = self.W_U, self.b_U
        if W_U is not None:
            W_U, more = _folded(self.final_norm, W_U)
            b_U = b_U if more is None else more if b_U is None else b_U + more
        return dataclasses.replace(
            self,
            W_Q=tuple(W["Q"]),
            W_K=tuple(W["K"]),
            W_V=tuple(W["V"]),
            b_Q=tuple(b["Q"]),
            b_K=tuple(b["K"]),
            b_V=tuple(b["V"]),
            W_U=W_U,
            b_U=b_U,
            attention_norms=tuple(_plain(n) for n in self.attention_norms),
            final_norm=_plain(self.final_norm),
        )

    @property
    def mlp_layers(self) -> tuple[int, ...]:
        """The layers with an MLP that a module returns, in order."""
        found = {w.layer for w in self.writers if w.kind == "mlp" and w.module}
        return tuple(sorted(found))

    def approximate(
        self, layer: int | None = None, circuit: Literal["QK", "OV", "heads"] | None = None
    ) -> list[str]:
        """Return why scores that rest on this anatomy are approximate.

        Args:
            layer: Only what concerns this layer (and the whole model); None for everything.
            circuit: Only what concerns where heads look (``"QK"``), what they move (``"OV"``) or
                both (``"heads"``); None for embedding and unembedding as well.

        Returns:
            Sentences, empty where everything is exact.
        """
        other = {"QK": ("W_V", "W_O"), "OV": ("W_Q", "W_K")}.get(circuit or "", ())
        ends = () if circuit is None else ("W_E", "W_pos", "W_U")
        return [
            str(note)
            for note in self.notes
            if note.kind in ("approximate", "unknown")
            and (layer is None or note.layer in (None, layer))
            and note.part not in ends
            # An unknown W_Q is that of a head of which nothing is known.
            and not (note.kind == "approximate" and note.part in other)
        ]

    def module_of(self, layer: int) -> str:
        """Return the dotted name of the attention module of a layer.

        Args:
            layer: The layer.

        Returns:
            The name.

        Raises:
            ArgumentError: If there is no such layer.
        """
        if not 0 <= layer < self.n_layers:
            raise ArgumentError.of(
                "layer",
                expected=f"0 to {self.n_layers - 1}",
                got=layer,
                do="Layers are self-attentions, counted in the order in which they run.",
            )
        return self.modules[layer]


def _folded(norm: Norm | None, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    if norm is None or norm.kind == "other":
        return weight, None
    more = None if norm.bias is None else norm.bias.to(weight) @ weight
    return norm.folded(weight), more


def _plain(norm: Norm | None) -> Norm | None:
    return norm if norm is None else dataclasses.replace(norm, weight=None, bias=None)
