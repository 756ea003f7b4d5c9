"""``lightning-mi wandb-workspace``: a ready dashboard for a project of Weights & Biases."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .errors import ArgumentError, LightningMIError
from .sinks.wandb import build_workspace

__all__ = ["WandbWorkspace"]


class WandbWorkspace:
    """Save a dashboard into a project."""

    name = "wandb-workspace"
    help = "save a ready dashboard into a project of Weights & Biases"

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments.

        Args:
            parser: The subcommand's own parser.
        """
        add = parser.add_argument
        add("project", metavar="ENTITY/PROJECT", help="user or team, and the project")
        add("--run", metavar="RUN", type=Path, help="run folder whose keys are shown")
        add("--beside", metavar="KEY", nargs="+", default=[], help="your own scalars (train_loss)")
        add("--name", default="lightning_mi", help="name of the view (lightning_mi)")

    def run(self, given: argparse.Namespace) -> None:
        """Build and save; W&B says where.

        Args:
            given: The arguments.

        Raises:
            ArgumentError: If the project is not named by entity and project.
            LightningMIError: If the extra is not installed, or W&B does not take the view.
        """
        entity, _, project = given.project.partition("/")
        if not entity or not project or "/" in project:
            raise ArgumentError.of(
                "ENTITY/PROJECT",
                expected="a user or team, a slash and a project",
                got=repr(given.project),
                do="Take them from https://wandb.ai/<entity>/<project>.",
            )
        workspace: Any = build_workspace(
            entity, project, run=given.run, beside=given.beside, name=given.name
        )
        try:
            workspace.save()
        except Exception as error:  # of W&B or of the network, each of its own class
            raise LightningMIError(
                f"wandb-workspace: expected W&B to save the view, got {type(error).__name__}: "
                f"{error} Check that you are logged in (wandb login) and may write to "
                f"{given.project!r}."
            ) from error
