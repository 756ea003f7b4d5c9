"""One callback class for both Lightning packages.

``pytorch_lightning`` and ``lightning.pytorch`` are two packages with two ``Callback`` classes, and
each Trainer only accepts its own. A class that derives from every one that can be imported works
in both. For type checkers there is one base; users of the other package may have to cast a list of
callbacks.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ..errors import LightningMIError

if TYPE_CHECKING:
    from pytorch_lightning import Callback, LightningModule, Trainer
else:
    LightningModule = Trainer = Any

    def _callback_classes() -> tuple[type, ...]:
        """Return the Callback class of every Lightning package that can be imported."""
        found = []
        for package in ("pytorch_lightning", "lightning.pytorch"):
            try:
                found.append(importlib.import_module(package).Callback)
            except ImportError:
                continue
        if not found:
            raise LightningMIError(
                "lightning_mi.callbacks: expected pytorch-lightning or lightning to be installed, "
                "got neither. Run: pip install pytorch-lightning"
            )
        return tuple(dict.fromkeys(found))

    Callback = type("Callback", _callback_classes(), {})

__all__ = ["Callback", "LightningModule", "Trainer", "class_names"]


def class_names(thing: object) -> set[str]:
    """Return the names of all classes of an object.

    Things of Lightning are recognised by name, because each of its packages has its own classes.

    Args:
        thing: Any object.

    Returns:
        Names of its class and of all base classes.
    """
    return {cls.__name__ for cls in type(thing).__mro__}
