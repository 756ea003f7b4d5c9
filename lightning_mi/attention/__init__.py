"""The attention tap: heads of any model, without conversion.

`tap` watches every attention that a model computes, whether it runs through
``scaled_dot_product_attention``, a softmax between two products (written by hand, or Hugging
Face's "eager" attention) or ``nn.MultiheadAttention``, and can replace the output of any head.
"""

from __future__ import annotations

from .site import Site
from .tap import Tap, tap

__all__ = ["Site", "Tap", "tap"]
