"""The one progress bar."""

from __future__ import annotations

import io
import sys

import pytest

from lightning_mi import track
from lightning_mi.progress import quiet


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def a_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Take the place of stderr; not a fixture, whose change pytest's own capture would undo."""
    fake = Terminal()
    monkeypatch.setattr(sys, "stderr", fake)
    monkeypatch.setenv("TERM", "xterm")
    return fake


def test_silent_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(range(3), "counting")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = a_terminal(monkeypatch)
    assert list(track(iter("ab"), "counting letters", total=2)) == ["a", "b"]
    assert "counting letters" in terminal.getvalue()
    assert "2/2" in terminal.getvalue()


def test_silent_inside_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = a_terminal(monkeypatch)
    with quiet():
        assert list(track(range(3), "counting")) == [0, 1, 2]
    assert terminal.getvalue() == ""


def test_a_bar_inside_a_bar_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = a_terminal(monkeypatch)
    for _ in track(range(2), "outer"):
        list(track(range(2), "inner"))
    assert "outer" in terminal.getvalue()
    assert "inner" not in terminal.getvalue()
    list(track(range(2), "afterwards"))
    assert "afterwards" in terminal.getvalue()


def test_leaving_early_ends_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = a_terminal(monkeypatch)

    def first() -> int:
        for item in track(range(5), "first"):
            return item
        return -1

    assert first() == 0
    with pytest.raises(ZeroDivisionError):
        sum(1 // item for item in track(range(2), "second"))
    list(track(range(2), "third"))
    assert "third" in terminal.getvalue()
