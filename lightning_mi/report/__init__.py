"""One HTML file that shows a run: `write_report`.

``data`` turns records into plain JSON, ``words`` says in sentences what they show, ``checks`` lists
what supports it, ``page`` joins both with the style sheets and scripts beside it.
"""

from __future__ import annotations

from .write import write_report

__all__ = ["write_report"]
