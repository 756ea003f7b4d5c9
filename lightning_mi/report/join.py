"""Make one script of small modules: `joined_modules`.

The browser opens the report from a disk, where modules cannot be loaded from files of their own. So
every module becomes a function that returns what the module exports, called once, after those of
the modules that it imports. What this asks of a module: named imports, none renamed; one name in
each exported declaration; nothing exported that changes later.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping, Sequence

from ..errors import ArgumentError

__all__ = ["imports_of", "joined_modules"]

IMPORT = re.compile(r'^import (\{[^}]*\}) from "(\.[^"]*)";$', re.MULTILINE)
EXPORT = re.compile(r"^export ((?:async )?(?:function|const|class) (\$|\w+))", re.MULTILINE)


def joined_modules(scripts: Mapping[str, str], entry: str) -> str:
    r"""Return one script that runs every module, ``entry`` last.

    Args:
        scripts: Source by path, ``"core/dom.js"``.
        entry: The module that begins; all others come before it, each after what it imports.

    Returns:
        The body of an async function.

    Raises:
        ArgumentError: If a module imports what is not there, or imports itself by way of others.

    Example:
        >>> a, b = 'import { b } from "./b.js";\na(b);\n', "export const b = 1;\n"
        >>> print(joined_modules({"a.js": a, "b.js": b}, "a.js"), end="")
        const b_js = await (async () => {
        const b = 1;
        return { b };
        })();
        const a_js = await (async () => {
        const { b } = b_js;
        a(b);
        return {  };
        })();
    """
    order: list[str] = []
    for path in [*(p for p in sorted(scripts) if p != entry), entry]:
        _visit(path, scripts, order, ())
    return "".join(_function(path, scripts[path]) for path in order)


def _visit(path: str, scripts: Mapping[str, str], order: list[str], above: Sequence[str]) -> None:
    """Append a module after all that it imports."""
    if path in order:
        return
    if path not in scripts or path in above:
        raise ArgumentError.of(
            "scripts",
            expected=f"a module {path!r} for {above[-1]!r} that does not need that one itself",
            got="a circle" if path in above else f"{sorted(scripts)}",
            do="Correct the import, or move what both need into a third module.",
        )
    for other in imports_of(path, scripts[path]):
        _visit(other, scripts, order, (*above, path))
    order.append(path)


def _function(path: str, source: str) -> str:
    body = IMPORT.sub(lambda m: f"const {m[1]} = {_name(_resolved(path, m[2]))};", source)
    exported = ", ".join(name for _, name in EXPORT.findall(source))
    body = EXPORT.sub(r"\1", body)
    return f"const {_name(path)} = await (async () => {{\n{body}return {{ {exported} }};\n}})();\n"


def imports_of(path: str, source: str) -> list[str]:
    r"""Return the paths of the modules that a module imports.

    Args:
        path: Its own path.
        source: Its text.

    Returns:
        Paths as in ``scripts``.

    Example:
        >>> imports_of("charts/x.js", 'import { h } from "../core/dom.js";\n')
        ['core/dom.js']
    """
    return [_resolved(path, found) for _, found in IMPORT.findall(source)]


def _resolved(path: str, relative: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), relative))


def _name(path: str) -> str:
    """A name for what a module exports: ``core/dom.js`` is ``core_dom_js``."""
    return re.sub(r"\W", "_", path)
