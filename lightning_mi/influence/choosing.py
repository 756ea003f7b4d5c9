"""Solvers by name."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import ArgumentError
from .direct import Direct
from .factors import EKFAC, KFAC
from .krylov import Arnoldi, LiSSA
from .projected import TRAK, DataInf, LoGra
from .solvers import CG, Solver

__all__ = ["as_solver"]


def named_solvers() -> Mapping[str, Solver]:
    """Return the solvers that have a name, with their default arguments."""
    return {
        "cg": CG(),
        "direct": Direct(),
        "exact": Direct(),
        "lissa": LiSSA(),
        "arnoldi": Arnoldi(),
        "datainf": DataInf(),
        "logra": LoGra(),
        "trak": TRAK(),
        "ekfac": EKFAC(),
        "kfac": KFAC(),
    }


def as_solver(solver: object) -> Solver:
    """Return a solver by name, or the solver itself.

    Args:
        solver: A name, or a `Solver`.

    Returns:
        The solver.

    Raises:
        ArgumentError: If it is none of these.
    """
    named = named_solvers()
    if isinstance(solver, str) and solver in named:
        return named[solver]
    if isinstance(solver, Solver) and not isinstance(solver, type):
        return solver
    raise ArgumentError.of(
        "solver",
        expected=f"one of {sorted(named)}, a Solver such as CG(rtol=1e-8), or an object "
        "with influences(train_idxs, test_idxs)",
        got=repr(solver)[:60],
        do='For example solver="cg".',
    )
