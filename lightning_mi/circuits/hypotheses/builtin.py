"""Circuits that were described before: induction, and indirect objects."""

from __future__ import annotations

from ...behaviors import RepeatedTokens
from .connections import Carries, Composes
from .cuts import Removes
from .expectations import Attends, Copies, Looks
from .hypothesis import CircuitHypothesis, Step
from .subject import Cut

__all__ = ["InductionCircuit", "IOICircuit"]


def InductionCircuit(  # noqa: N802
    *,
    margin: float = 0.3,
    share: float = 0.5,
    cut: Cut = "mean",
    tokens: RepeatedTokens | None = None,
) -> CircuitHypothesis:
    """Return the induction circuit as Elhage et al. (2021) and Olsson et al. (2022) describe it.

    *Previous token*: heads that look one back and tell each position what stood before it.
    *Induction*: heads that look for where their own token was told, read the token there and copy
    it; their keys read what the first step wrote.

    Args:
        margin: By how much patterns and copying must exceed their nulls.
        share: Share of the effect that the loss of either step must remove; the edges between them
            half of it.
        cut: What is put in the place of the heads; see `Removes`. The corrupted run's value shows
            the first step only under a corruption that changes it (``"trigger"`` or ``"block"`` of
            `lightning_mi.behaviors.RepeatedTokens`).
        tokens: The protocol of head scores; None takes the default one.

    Returns:
        The hypothesis.

    Example:
        >>> [step.name for step in InductionCircuit().steps]
        ['previous token', 'induction']
    """
    before = Step(
        "previous token",
        prior=(Looks("previous_token", margin),),
        posterior=(Removes(share, cut),),
    )
    match = Step(
        "induction",
        prior=(Looks("induction", margin), Copies(margin)),
        posterior=(Removes(share, cut),),
        connection=(
            Composes("previous token", "K"),
            Carries("previous token", "K", share / 2),
        ),
    )
    return CircuitHypothesis("induction circuit", (before, match), tokens)


def IOICircuit(  # noqa: N802
    *, margin: float = 0.1, share: float = 0.1, cut: Cut = "corrupted"
) -> CircuitHypothesis:
    """Return the core of the circuit for indirect objects as Wang et al. (2022) describe it.

    *Duplicate token*: heads that look from the repeated name to where it stood first.
    *S-inhibition*: heads that look from the end to the repeated name, read what the first step
    wrote there, and tell the end which name not to attend to. *Name mover*: heads whose queries
    read that, look from the end to the other name and copy it. Previous-token, induction, negative
    and backup heads, which they describe as well, are left out.

    Made for `lightning_mi.behaviors.IndirectObject`.

    Args:
        margin: By how much attention and copying must exceed their nulls.
        share: Share of the effect that the loss of each step must remove; the edges between steps
            a fifth of it.
        cut: What is put in the place of the heads; see `Removes`.

    Returns:
        The hypothesis.
    """
    duplicate = Step(
        "duplicate token",
        prior=(Attends("subject", "wrong", "answer", margin),),
        posterior=(Removes(share, cut),),
    )
    inhibition = Step(
        "S-inhibition",
        prior=(Attends("last", "subject", margin=margin),),
        posterior=(Removes(share, cut),),
        connection=(
            Composes("duplicate token", "V"),
            Carries("duplicate token", "V", share / 5, cut),
        ),
    )
    mover = Step(
        "name mover",
        prior=(Attends("last", "answer", "wrong", margin), Copies(margin)),
        posterior=(Removes(share, cut),),
        connection=(
            Composes("S-inhibition", "Q"),
            Carries("S-inhibition", "Q", share / 5, cut),
        ),
    )
    return CircuitHypothesis("indirect-object circuit", (duplicate, inhibition, mover))
