"""Division of the reference model's forward passes among the pipeline bubbles of a step; imports no torch.

The division is computed from the layout and from FLOPs, not from times, so that it is equal on all ranks that share
collective operations.
"""

from __future__ import annotations

BEFORE_BACKWARD, AFTER_BACKWARD, NEXT_STEP = range(3)  # parts of a step
Plan = list[tuple[int, int, int]]  # by stage: micro-batches scored at the end of each part


def plan_bubbles(stages: int, micro_batches: int, *, reference: float, backward: float) -> Plan:
    """Return the plan in which no stage delays the training model.

    Args:
        reference: time of the reference model's forward pass of a micro-batch, relative to the training model's.
        backward: time of the training model's backward pass, relative to its forward pass.
    """
    if micro_batches < stages:  # the bubbles have another form
        return [(0, 0, micro_batches)] * stages
    idle = [backward * stage for stage in range(stages)]
    before = _fill(idle[::-1], [0] * stages, micro_batches, reference, is_first=True)
    after = _fill(idle, before, micro_batches, reference, is_first=False)
    return [(first, last, micro_batches) for first, last in zip(before, after, strict=True)]


def _fill(idle: list[float], begins: list[int], micro_batches: int, duration: float, *, is_first: bool) -> list[int]:
    """Return the number of scored micro-batches of each stage after a bubble.

    Args:
        idle: length of each stage's bubble.
        begins: micro-batches that each stage has scored before.
        is_first: the bubbles of all stages start at the same time; otherwise they end at the same time.
    """
    ends: list[int] = []
    finished: dict[int, float] = {}  # time at which the previous stage finishes a micro-batch in its bubble
    limit = micro_batches
    for length, begin in zip(idle, begins, strict=True):
        start, stop = (0.0, length) if is_first else (-length, 0.0)
        times: dict[int, float] = {}
        for index in range(begin, limit):
            start = max(start, finished.get(index, start)) + duration
            if start > stop + 1e-6:
                break
            times[index] = start
        limit, finished = begin + len(times), times
        ends.append(limit)
    return ends
