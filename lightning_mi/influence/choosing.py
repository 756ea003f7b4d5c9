"""Solvers by name."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import ArgumentError
from .direct import Direct
from .factors import EKFAC, KFAC
from .krylov import Arnoldi, LiSSA
from .projected import TRAK, DataInf, LoGra
from .solvers import CG, Solver

__all__ = ["as_solver", "damping_of"]


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


def damping_of(solver: Solver, damping: float) -> tuple[float, str]:
    """Return the damping that a solver really uses, and what it is a multiple of.

    Args:
        solver: A solver; some have a relative damping of their own.
        damping: λ of the call.

    Returns:
        The number, and its unit.

    Example:
        >>> damping_of(EKFAC(relative_damping=0.1), 0.01)
        (0.1, 'mean eigenvalue of each block')
    """
    own = getattr(solver, "relative_damping", None)
    if own is None:
        return damping, "mean curvature"
    if isinstance(solver, DataInf):
        return float(own), "mean squared gradient of each block over its size"
    return float(own), "mean eigenvalue of each block"
