"""Which torch function follows which rule of AttnLRP; what has none is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "ADDENDS",
    "DETACHED",
    "DIVIDED",
    "ELEMENTWISE",
    "LINEAR",
    "NORMED",
    "PICKING",
    "POWERS",
    "PRODUCTS",
    "RATIO",
    "REFLECTED",
    "SCALING",
    "TAYLOR",
    "TIMES",
]

Functions = frozenset[Callable[..., Any]]


def _named(names: str) -> Functions:
    """Return every function of these names that torch, its tensors or ``functional`` have."""
    places = (torch, Tensor, F)
    found = (getattr(place, name, None) for name in names.split() for place in places)
    return frozenset(f for f in found if callable(f))


def _read(names: str) -> Functions:
    return frozenset(getattr(Tensor, name).__get__ for name in names.split())


TIMES = _named("mul mul_ multiply __mul__ __rmul__ __imul__")
"""Elementwise products."""

ADDENDS = {
    **dict.fromkeys(_named("linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d"), 2),
    **dict.fromkeys(_named("addmm baddbmm addbmm addmv"), 0),
}
"""Products with an addend -> its slot, where there is one."""

PRODUCTS = (
    _named("matmul mm bmm mv dot inner outer einsum __matmul__ __rmatmul__")
    | TIMES
    | frozenset(ADDENDS)
)
"""Linear in each factor: relevance is split evenly among those that depend on the inputs."""

DIVIDED = _named("div divide true_divide __truediv__ __itruediv__ div_")
"""Linear in what is divided; what it is divided by is held fixed."""

REFLECTED = _named("__rtruediv__ __rdiv__")
"""A number divided by a tensor."""

POWERS = _named("pow __pow__ square float_power")

RATIO = _named(
    "relu relu_ relu6 leaky_relu elu selu celu gelu silu mish tanh tanh_ hardtanh hardswish erf "
    "softshrink hardshrink tanhshrink softsign prelu rrelu abs sin sinh asinh atan expm1 log1p "
    "normalize"
)
"""f(0) = 0: y = x · (f(x)/x), the factor held fixed."""

TAYLOR = _named(
    "softmax log_softmax sigmoid hardsigmoid exp log softplus logsigmoid cos erfc "
    "clamp clamp_min clamp_max clip logsumexp amax amin max_pool1d max_pool2d max_pool3d "
    "adaptive_max_pool1d adaptive_max_pool2d"
) | frozenset({torch.special.softmax, torch.special.log_softmax})
"""First-order Taylor series at the point; the rest is relevance that no input gets."""

NORMED = _named("layer_norm rms_norm")
"""Scale held fixed."""

PICKING = _named("max min topk sort kthvalue")
"""Relevance goes to what was picked; which that is does not change."""

DETACHED = _named("sqrt rsqrt reciprocal var std var_mean std_mean norm") | frozenset(
    {torch.linalg.vector_norm, torch.linalg.norm}
)
"""Scales: held fixed wherever they are used."""

LINEAR = _named(
    "add add_ sub sub_ subtract rsub neg negative positive __add__ __radd__ __iadd__ __sub__ "
    "__rsub__ __isub__ __neg__ __pos__ sum mean cumsum cat concat concatenate stack hstack "
    "vstack dstack view view_as reshape reshape_as flatten unflatten transpose transpose_ "
    "permute movedim moveaxis swapaxes swapdims t contiguous clone expand expand_as "
    "broadcast_to repeat repeat_interleave tile squeeze unsqueeze chunk split "
    "split_with_sizes tensor_split unbind narrow select index_select gather take_along_dim "
    "masked_select masked_fill masked_fill_ masked_scatter index_add index_add_ index_copy "
    "index_put index_put_ index_fill scatter scatter_ scatter_add scatter_add_ copy_ "
    "where __getitem__ __setitem__ __iter__ __len__ to type type_as float double half "
    "bfloat16 cpu cuda dropout dropout1d dropout2d alpha_dropout feature_dropout pad "
    "constant_pad_nd roll flip fliplr rot90 tril triu diagonal diag diag_embed lerp "
    "nan_to_num avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "interpolate upsample unfold fold pixel_shuffle pixel_unshuffle embedding batch_norm "
    "as_strided unsafe_chunk unsafe_split zero_ addcmul retain_grad"
) | _read("T mT H mH")
"""Linear, or affine, in what depends on the inputs: the gradient itself."""

SCALING = TIMES | DIVIDED | _named("neg negative __neg__")
"""With a number as the other operand, a multiple of the tensor."""

ELEMENTWISE = (
    SCALING
    | POWERS
    | (RATIO - _named("normalize"))
    | _named("add sub rsub __add__ __radd__ __sub__ __rsub__ sigmoid hardsigmoid exp softplus")
    | _named("logsigmoid cos erfc")
)
"""With a number as the other operand, a function of each entry alone."""
