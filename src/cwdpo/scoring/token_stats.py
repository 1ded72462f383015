"""The table of token statistics: what can be read off the distribution that predicts a token.

An objective names the ones that it uses (``Objective.token_stats``), probes and metrics ask for theirs by name. To
add one for everybody, add a line to :data:`TOKEN_STATS`; an objective of your own may bring its function along.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from cwdpo.objectives.base import TokenStat


def uniform(logp: Tensor, token: Tensor) -> Tensor:
    """[M] mean over the vocabulary of the log-probability, in nats (for label smoothing); carries the gradient."""
    return logp.mean(-1)


def collision(logp: Tensor, token: Tensor) -> Tensor:
    """[M] ``log sum over the vocabulary of p^2``, in nats: how likely two draws agree (WPO)."""
    return (2 * logp.detach()).logsumexp(-1)


def entropy(logp: Tensor, token: Tensor) -> Tensor:
    """[M] entropy in nats."""
    fixed = logp.detach()
    return -(fixed.exp() * fixed).sum(-1)


def top1(logp: Tensor, token: Tensor) -> Tensor:
    """[M] the largest probability."""
    return logp.detach().amax(-1).exp()


def correct(logp: Tensor, token: Tensor) -> Tensor:
    """[M] 1 where the likeliest token is the one that stands there, else 0."""
    return (logp.argmax(-1) == token).to(logp.dtype)


TOKEN_STATS: dict[str, TokenStat] = {
    stat.__name__: stat for stat in (uniform, collision, entropy, top1, correct)
}
"""By name: functions of log-probabilities over the vocabulary [M, V] and the tokens [M], giving [M]."""

DETAILS = ("entropy", "top1", "correct")
"""What probes and calibration metrics read of every token."""


def resolve(stats: Iterable[str | TokenStat]) -> dict[str, TokenStat]:
    """Statistics by name; a function that is not of the table goes by its own name.

    Raises:
        KeyError: a name that is not in the table.
    """
    return {
        (stat if isinstance(stat, str) else stat.__name__): TOKEN_STATS[stat]
        if isinstance(stat, str)
        else stat
        for stat in stats
    }
