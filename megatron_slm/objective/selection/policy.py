"""Selection policies: scores that rank tokens, and combinations of selections.

The grammar of ``--slm-score``, loosest first; ``and`` binds tighter than ``or``::

    policy := both ("or" both)*        both := term ("and" term)*
    term   := NAME [":" RATIO] | "(" policy ")"

A NAME is one of :data:`SCORES`, or ``stochastic-NAME`` for Gumbel top-k by that score. A term without a ratio uses
the run's. Each term is a separate top-k over the full scope; ``and`` intersects selections, ``or`` unites them
(Rho-1, appendix H: the intersection of the two self-reference scores did best).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeGuard

from megatron_slm.runtime.errors import ConfigError

RETROSPECTIVE = "retrospective-excess"
SCORES = ("excess", RETROSPECTIVE, "token-loss", "token-entropy", "reference-loss", "reference-entropy", "random")
LOWEST_FIRST = ("reference-loss", "reference-entropy")
OFFSET_LOSS = ("excess", "token-loss")  # token loss − offset, known before the forward pass
STOCHASTIC = "stochastic-"
MOST_WORDS = 200  # of an expression; parsing is recursive


@dataclass(frozen=True)
class TopK:
    """Represent one top-k: a score, its ratio (None: the run's), and whether Gumbel noise is added."""

    score: str
    ratio: float | None = None
    stochastic: bool = False

    @property
    def sign(self) -> int:
        """Return +1 if the highest scores are selected, -1 if the lowest."""
        return -1 if self.score in LOWEST_FIRST else 1


@dataclass(frozen=True)
class BooleanOp:
    """Combine two selections by "and" or "or"."""

    operator: str
    left: Policy
    right: Policy


Policy = TopK | BooleanOp
_Parser = Callable[[list[str], str], tuple[Policy, list[str]]]  # policy and the remaining words


def top_ks(policy: Policy) -> Iterator[TopK]:
    """Yield the top-ks of a policy, from left to right."""
    if isinstance(policy, TopK):
        yield policy
    else:
        yield from top_ks(policy.left)
        yield from top_ks(policy.right)


def has_own_ratios(policy: Policy) -> bool:
    """Return whether every top-k has a ratio, so that the run's is not used."""
    return all(top_k.ratio is not None for top_k in top_ks(policy))


def needs_reference_loss(policy: Policy) -> bool:
    """Return whether the reference model's token losses are needed."""
    return any(top_k.score in ("excess", RETROSPECTIVE, "reference-loss") for top_k in top_ks(policy))


def needs_reference_entropy(policy: Policy) -> bool:
    """Return whether the reference model's entropies are needed."""
    return any(top_k.score == "reference-entropy" for top_k in top_ks(policy))


def needs_reference(policy: Policy) -> bool:
    """Return whether the reference model's token losses or entropies are needed."""
    return needs_reference_loss(policy) or needs_reference_entropy(policy)


def needs_token_entropy(policy: Policy) -> bool:
    """Return whether the entropies of the training model are needed."""
    return any(top_k.score == "token-entropy" for top_k in top_ks(policy))


def selects_everything(policy: Policy, ratio: float) -> bool:
    """Return whether every valid token is selected, whatever its scores."""
    return all((top_k.ratio or ratio) >= 1 for top_k in top_ks(policy))


def largest_share(policy: Policy, ratio: float) -> float:
    """Return the largest share of the valid tokens that can be selected if the run's ratio is ``ratio``."""
    if isinstance(policy, TopK):
        return policy.ratio or ratio
    shares = largest_share(policy.left, ratio), largest_share(policy.right, ratio)
    return min(shares) if policy.operator == "and" else min(sum(shares), 1.0)


def ranks_by_token_loss(policy: Policy) -> TypeGuard[TopK]:
    """Return whether the policy is one score of the form token loss − offset, with an offset known beforehand."""
    return isinstance(policy, TopK) and policy.score in OFFSET_LOSS and not policy.stochastic


def parse_policy(text: str) -> Policy:
    """Read the expression of ``--slm-score``.

    Raises:
        ConfigError: unknown score, ratio outside (0, 1], a misplaced token, or too many of them; the message shows the
            expected syntax.
    """
    words = re.findall(r"[()]|[^\s()]+", text)
    if len(words) > MOST_WORDS:
        raise _error(f"{text[:40]}...", f"it has {len(words):,} words, and at most {MOST_WORDS} are supported")
    policy, remaining = _parse_or(words, text)
    if remaining:
        raise _error(text, f"{remaining[0]!r} is not expected here")
    return policy


def _parse_or(words: list[str], text: str) -> tuple[Policy, list[str]]:
    return _parse_chain("or", _parse_and, words, text)


def _parse_and(words: list[str], text: str) -> tuple[Policy, list[str]]:
    return _parse_chain("and", _parse_term, words, text)


def _parse_chain(operator: str, parse_operand: _Parser, words: list[str], text: str) -> tuple[Policy, list[str]]:
    policy, words = parse_operand(words, text)
    while words and words[0] == operator:
        right, words = parse_operand(words[1:], text)
        policy = BooleanOp(operator, policy, right)
    return policy, words


def _parse_term(words: list[str], text: str) -> tuple[Policy, list[str]]:
    if not words:
        raise _error(text, "a score is missing at the end")
    if words[0] == "(":
        policy, remaining = _parse_or(words[1:], text)
        if not remaining or remaining[0] != ")":
            raise _error(text, "a closing parenthesis is missing")
        return policy, remaining[1:]
    name, colon, ratio_text = words[0].partition(":")
    stochastic = name.startswith(STOCHASTIC)
    score = name.removeprefix(STOCHASTIC)
    if score not in SCORES:
        raise _error(text, f"{words[0]!r} is not a score")
    return TopK(score, _ratio(ratio_text, text) if colon else None, stochastic), words[1:]


def _ratio(ratio_text: str, text: str) -> float:
    try:
        ratio = float(ratio_text)
    except ValueError:
        ratio = math.nan
    if not 0 < ratio <= 1:
        raise _error(text, f"the ratio {ratio_text!r} is not a number in (0, 1]")
    return ratio


def _error(text: str, problem: str) -> ConfigError:
    return ConfigError(
        f"--slm-score {text!r}: {problem}. Scores are {', '.join(SCORES)}, each also as {STOCHASTIC}NAME, with a "
        "ratio as NAME:0.7, joined by 'and', 'or' and parentheses."
    )
