"""The table of token statistics: numbers computed from the distribution that predicts a token.

An objective names the ones that it uses in ``Objective.token_stats``; probes and metrics request theirs by name. To
add one for all users, add a line to :data:`TOKEN_STATS`. An objective outside the package may pass a function.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from cwdpo.objectives.base import TokenStat


def uniform(logp: Tensor, token: Tensor) -> Tensor:
    """[M] mean over the vocabulary of the log-probability, in nats (for label smoothing); carries the gradient."""
    return logp.mean(-1)


def collision(logp: Tensor, token: Tensor) -> Tensor:
    """[M] ``log sum over the vocabulary of p^2``, in nats: the log-probability that two samples agree (for WPO)."""
    return (2 * logp.detach()).logsumexp(-1)


def entropy(logp: Tensor, token: Tensor) -> Tensor:
    """[M] entropy of the distribution, in nats."""
    fixed = logp.detach()
    return -(fixed.exp() * fixed).sum(-1)


def top1(logp: Tensor, token: Tensor) -> Tensor:
    """[M] the largest probability."""
    return logp.detach().amax(-1).exp()


def correct(logp: Tensor, token: Tensor) -> Tensor:
    """[M] 1 where the most likely token is the completion's token, else 0."""
    return (logp.argmax(-1) == token).to(logp.dtype)


TOKEN_STATS: dict[str, TokenStat] = {
    stat.__name__: stat for stat in (uniform, collision, entropy, top1, correct)
}
"""Functions by name; each maps log-probabilities over the vocabulary [M, V] and the token ids [M] to [M]."""

DETAILS = ("entropy", "top1", "correct")
"""The statistics that probes and the calibration metrics use."""


def resolve(stats: Iterable[str | TokenStat]) -> dict[str, TokenStat]:
    """Statistics by name; a function that is not in the table is listed under its ``__name__``.

    Raises:
        KeyError: a name that is not in the table.
    """
    return {
        (stat if isinstance(stat, str) else stat.__name__): TOKEN_STATS[stat]
        if isinstance(stat, str)
        else stat
        for stat in stats
    }
