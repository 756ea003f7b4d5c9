"""Text to ids, by any tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from ..errors import ArgumentError

__all__ = ["Encode", "encoder", "loaded"]

Encode: TypeAlias = Callable[[str], list[int]]


def encoder(tokenizer: Any) -> Encode:
    """Return what turns text into ids, without special tokens.

    Args:
        tokenizer: A tokenizer of transformers or tokenizers; a function ``text -> ids``; a
            vocabulary (words in order, or word -> id) for text that is split at spaces; or where
            to find a tokenizer, see `loaded`.

    Returns:
        The function.

    Raises:
        ArgumentError: If it is none of these.

    Example:
        >>> encoder(["a", "b"])("b a b")
        [1, 0, 1]
    """
    tokenizer = loaded(tokenizer)
    if isinstance(tokenizer, Mapping | list | tuple):
        return _words(tokenizer)
    if hasattr(tokenizer, "encode"):
        return lambda text: _ids(tokenizer.encode(text, add_special_tokens=False))
    if callable(tokenizer):
        return lambda text: _ids(tokenizer(text))
    raise ArgumentError.of(
        "tokenizer",
        expected="a tokenizer with encode(), a function, a list of words or a mapping to ids",
        got=type(tokenizer).__name__,
        do="Pass the tokenizer that the model was trained with.",
    )


def loaded(tokenizer: Any) -> Any:
    """Return the tokenizer that a text names, so that a YAML file can name one.

    Args:
        tokenizer: A ``.json`` file of tokenizers, a ``.gguf`` file, or a folder or name that
            transformers finds on this machine; nothing is fetched. Anything else is returned.

    Returns:
        The tokenizer.

    Raises:
        ArgumentError: If there is none.
    """
    if not isinstance(tokenizer, str | Path):
        return tokenizer
    path = Path(tokenizer)
    try:
        if path.suffix == ".json":
            from tokenizers import Tokenizer

            return Tokenizer.from_file(str(path))
        from transformers import AutoTokenizer

        if path.suffix == ".gguf":
            return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        return AutoTokenizer.from_pretrained(str(tokenizer), local_files_only=True)
    except Exception as error:  # Whatever the loaders raise: many kinds, some of them bare.
        raise ArgumentError.of(
            "tokenizer",
            expected="a file, folder or name of a tokenizer on this machine",
            got=f"{str(tokenizer)!r} ({type(error).__name__})",
            do="Fetch it first, or pass the tokenizer itself. "
            "Names need the packages tokenizers and transformers.",
        ) from error


def _words(vocabulary: Mapping[str, int] | Sequence[str]) -> Encode:
    table = (
        dict(vocabulary)
        if isinstance(vocabulary, Mapping)
        else {word: i for i, word in enumerate(vocabulary)}
    )

    def encode(text: str) -> list[int]:
        unknown = [word for word in text.split() if word not in table]
        if unknown:
            raise ArgumentError.of(
                "tokenizer",
                expected="a vocabulary that has every word of the prompts",
                got=f"none of {unknown[:5]}",
                do="Add the words, or give the behavior words of your own.",
            )
        return [table[word] for word in text.split()]

    return encode


def _ids(encoded: Any) -> list[int]:
    found = getattr(encoded, "ids", encoded)
    if isinstance(found, Mapping):
        found = found["input_ids"]
    return [int(i) for i in found]
