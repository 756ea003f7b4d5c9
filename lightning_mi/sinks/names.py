"""How names of methods are written for people."""

from __future__ import annotations

__all__ = ["spelled"]

WRITTEN = {
    "attn_lrp": "AttnLRP",
    "grad_cam": "Grad-CAM",
    "layer_grad_cam": "layer Grad-CAM",
    "input_x_gradient": "input × gradient",
    "smooth_grad": "SmoothGrad",
    "smooth_grad_squared": "SmoothGrad²",
    "var_grad": "VarGrad",
    "idgi": "IDGI",
    "discretized_integrated_gradients": "discretised integrated gradients",
}
"""Names that their papers write in a way of their own."""


def spelled(name: str) -> str:
    """Return the name of a method or of a panel as people write it.

    Args:
        name: As in records.

    Returns:
        Words.

    Example:
        >>> spelled("integrated_gradients"), spelled("grad_cam")
        ('integrated gradients', 'Grad-CAM')
    """
    return WRITTEN.get(name, name.replace("_", " "))
