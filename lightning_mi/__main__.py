"""The command line, ``lightning-mi``: one small class for each subcommand."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from .cli_influence import Influence
from .cli_workspace import WandbWorkspace
from .errors import LightningMIError

__all__ = ["COMMANDS", "Command", "Report", "main"]


class Command(Protocol):
    """A subcommand: its name, its help, its arguments and what it does."""

    name: str
    help: str

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments.

        Args:
            parser: The subcommand's own parser.
        """

    def run(self, given: argparse.Namespace) -> None:
        """Do it.

        Args:
            given: The parsed arguments.
        """


class Report:
    """Write the HTML report of a run."""

    name = "report"
    help = "write the HTML report of a run, or of several compared: one file, no network"

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments.

        Args:
            parser: The subcommand's own parser.
        """
        parser.add_argument(
            "run",
            metavar="RUN",
            type=Path,
            nargs="+",
            help="run folder, for example lightning_logs/version_0/mi; others are compared with it",
        )
        parser.add_argument(
            "--out",
            metavar="FILE",
            type=Path,
            help="where to (default: report.html in the first run's folder)",
        )

    def run(self, given: argparse.Namespace) -> None:
        """Write the report and print where it lies.

        Args:
            given: ``run`` and ``out``.
        """
        from .report import write_report
        from .runs import Run

        print(write_report([Run.open(folder) for folder in given.run], given.out))


COMMANDS: tuple[Command, ...] = (
    Report(),
    Influence(),
    WandbWorkspace(),
)
"""Every subcommand; a new one is a class in this file or beside it, and an entry here."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; None takes those of the process.

    Returns:
        0, or 2 after an error of ours, which is printed without a traceback.
    """
    parser = argparse.ArgumentParser(prog="lightning-mi", description=_purpose())
    subcommands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        own = subcommands.add_parser(command.name, help=command.help, description=command.help)
        command.arguments(own)
        own.set_defaults(run_command=command.run)
    given = parser.parse_args(argv)
    try:
        given.run_command(given)
    except LightningMIError as error:
        print(f"lightning-mi: {error}", file=sys.stderr)
        return 2
    return 0


def _purpose() -> str:
    return "See why a model does what it does, and when it learned to."


if __name__ == "__main__":
    sys.exit(main())
