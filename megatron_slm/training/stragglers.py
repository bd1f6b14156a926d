"""Ranks that slow down a run, in the log and in the metrics."""

from __future__ import annotations

import logging
import time
from typing import Any

from megatron_slm.config.schema import RunConfig
from megatron_slm.runtime.console import warn
from megatron_slm.runtime.health.session import find_stragglers
from megatron_slm.runtime.health.stragglers import Straggler, slow_ranks

SECONDS_BETWEEN_WARNINGS = 600.0  # about the same ranks

logger = logging.getLogger(__name__)


class StragglerLog:
    """Name ranks on rank 0 that are slow in two successive intervals."""

    def __init__(self, config: RunConfig) -> None:
        self._is_enabled = config.logging.log_straggler
        self._factor = config.logging.slm_straggler_factor
        self._slow: set[int] = set()  # in the last interval
        self._named: set[int] = set()
        self._warned = 0.0

    def update(self) -> dict[str, Any]:
        """Return the metrics of the slowest rank, if it was determined since the last call; warn of slow ranks."""
        ranks = find_stragglers() if self._is_enabled else None
        if not ranks:
            return {}
        slow = slow_ranks(ranks, self._factor)
        lasting = [rank for rank in slow if rank.identity.rank in self._slow]
        self._slow = {rank.identity.rank for rank in slow}
        self._warn(lasting)
        return {"slowest_rank": ranks[0].identity.rank, "slowest_rank_ratio": ranks[0].ratio}

    def _warn(self, slow: list[Straggler]) -> None:
        numbers, now = {rank.identity.rank for rank in slow}, time.monotonic()
        for rank in slow:
            logger.info("slow %s", rank)
        if slow and (numbers - self._named or now - self._warned > SECONDS_BETWEEN_WARNINGS):
            warn("slow ranks, for which the others wait:" + "".join(f"\n  {rank}" for rank in slow))
            self._named, self._warned = self._named | numbers, now
