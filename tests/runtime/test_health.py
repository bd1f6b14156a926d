"""Test the decisions on the health of ranks: dead, silent, hung, suspended and slow ones."""

from __future__ import annotations

import queue
import socket
import threading
import time
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest

from megatron_slm.runtime.health import member as member_module
from megatron_slm.runtime.health import stragglers
from megatron_slm.runtime.health.channel import Channel
from megatron_slm.runtime.health.member import MemberThread
from megatron_slm.runtime.health.monitor import Limits, Member, Monitor, Roll, Verdict
from megatron_slm.runtime.health.progress import Progress
from megatron_slm.runtime.health.ranks import (
    Beat,
    Identity,
    Witness,
    describe_dead,
    describe_hang,
    find_suspects,
    format_ranks,
)
from megatron_slm.runtime.health.stacks import Stack, main_stack
from megatron_slm.runtime.health.stragglers import StragglerTable, slow_ranks

LIMITS = Limits(hang=45.0, slow=540.0)
BEAT = Beat("training", 7, 20, idle=0.0, limit=45.0, waiting=0.0, steps=6, seconds_loading=0.0, seconds_forward=6.0)
WAITING = Stack("torch/distributed/distributed_c10d.py:10 all_reduce", True, "...")


def identity(rank: int, stage: int = 0) -> Identity:
    return Identity(rank, f"node{rank // 2}", 100 + rank, 0.0, stage)


def roll(beats: list[Beat], heard: float = 0.0) -> Roll:
    found = Roll(LIMITS)
    for rank, beat in enumerate(beats):
        found.members[rank] = Member(identity(rank), mock.Mock(), heard, beat)
    return found


def test_dead_rank_ends_the_run_and_an_ended_one_does_not() -> None:
    ranks = roll([BEAT] * 3)
    ranks.members[1].has_ended = True
    assert ranks.verdict(1.0) is None
    ranks.members[2].lost = 1.0
    assert ranks.verdict(1.1) is None, "other ranks of the node may follow"
    verdict = ranks.verdict(2.0)
    assert verdict is not None and verdict.message.startswith("rank 2 on node1 (process 102) died without a message")
    assert "Its last message, 1.0 s before: step 7, training." in verdict.message


@pytest.mark.parametrize(
    ("beat", "silent", "stuck"),
    [
        (BEAT, 46.0, 46.0),
        (replace(BEAT, idle=40.0), 46.0, 6.0),
        (replace(BEAT, limit=300.0), 301.0, 301.0),  # slow steps so far
        (replace(BEAT, limit=None, phase="saving a checkpoint", idle=1e6), 541.0, None),
        (replace(BEAT, limit=None, waiting=541.0), 541.0, 0.0),  # in a collective that will fail
    ],
)
def test_silence_and_lack_of_progress(beat: Beat, silent: float, stuck: float | None) -> None:
    ranks = roll([BEAT, beat])
    ranks.members[0].heard = 1e9
    assert ranks.verdict(silent - 2) is None
    verdict = ranks.verdict(silent)
    assert verdict is not None and verdict.message.startswith("rank 1 on node0 (process 101) has not responded for")
    assert [each.rank for each in verdict.kill] == [1]
    assert ranks.is_stuck(silent) == (stuck is not None)
    if stuck:
        assert not ranks.is_stuck(stuck - 2)


def test_suspended_process_counts_no_time() -> None:
    ranks = roll([BEAT, BEAT])
    ranks.forgive(1000.0)
    assert ranks.verdict(1040.0) is None and ranks.verdict(1050.0) is not None
    progress = Progress(is_limited=True)
    progress.ticked -= 1000.0
    progress.forgive(1000.0)
    progress.tick()
    assert progress.longest < 1.0


def test_first_occurrences_of_a_phase_are_not_limited() -> None:
    progress = Progress()
    limits = []
    for phase in ("training", "training", "evaluating", "training", "evaluating"):
        progress.enter(phase, 3)
        limits.append(progress.limit(45.0))
    for _ in range(4):
        progress.enter("saving", slow=True)
    assert limits == [None, None, None, 45.0, None] and progress.limit(45.0) is None
    progress.enter("training")
    progress.ticked -= 60.0
    progress.tick()
    assert progress.limit(45.0) == pytest.approx(300.0, rel=0.01), "steps that take a minute are no hang"


@pytest.mark.parametrize(("seconds", "limit"), [((600.0, 5.0), 45.0), ((600.0, 60.0), 300.0)])
def test_second_step_shows_how_slow_steps_are(seconds: tuple[float, ...], limit: float) -> None:
    progress = Progress()
    for each in seconds:
        progress.enter("training")
        progress.ticked -= each
    progress.enter("training")
    assert progress.limit(45.0) == pytest.approx(limit, rel=0.01)


def test_ranks_wait_for_one_that_works_in_a_slow_phase() -> None:
    waits, works = replace(BEAT, idle=50.0, waiting=40.0), replace(BEAT, limit=None, phase="profiling", idle=50.0)
    assert not roll([waits, works]).is_stuck(0.0)
    assert roll([waits, replace(works, waiting=40.0)]).is_stuck(0.0), "all wait"
    assert roll([replace(waits, waiting=0.0), works]).is_stuck(0.0), "waits for no rank"
    assert roll([replace(waits, waiting=541.0), works]).is_stuck(0.0)
    gone = roll([waits, works])
    gone.members[1].heard = -50.0
    assert gone.is_stuck(0.0), "stopped"


def witness(rank: int, stack: Stack | None = WAITING, **changes: Any) -> Witness:
    return Witness(identity(rank), replace(BEAT, idle=50.0, **changes), stack)


LOADING = Stack("data/batches.py:150 _sample", False, '  File "batches.py", line 150, in _sample')


@pytest.mark.parametrize(
    ("witnesses", "suspects"),
    [
        ([witness(0), witness(1, LOADING, transitions=19), witness(2)], [1]),
        ([witness(0), witness(1, LOADING), witness(2)], [1]),
        ([witness(0), witness(1, transitions=19), witness(2)], [1]),
        ([witness(0), witness(1, replace(WAITING, place="p2p_communication.py:5 wait")), witness(2)], [1]),
        ([witness(0), witness(1), witness(2)], []),
        ([witness(0, transitions=21), witness(1, LOADING), witness(2)], [1]),
    ],
)
def test_suspects_of_a_hang(witnesses: list[Witness], suspects: list[int]) -> None:
    assert [found.identity.rank for found in find_suspects(witnesses)] == suspects
    text = describe_hang(witnesses)
    for rank in suspects:
        assert text.startswith(f"rank {rank} on node0 (process {100 + rank}) hangs: no progress for 50 s in step 7")
    assert suspects or text.startswith("no rank has made progress for 50 s")
    assert (
        "ranks 0, 2: step 7, training" in text
        or len({found.beat.transitions for found in witnesses}) > 1
        or not suspects
    )


def test_many_dead_ranks_are_summarized() -> None:
    text = describe_dead([(identity(rank), None, 0.0) for rank in range(9)])
    assert text.count("died without a message") == 4 and "ranks 4-8 on node2, node3, node4" in text
    assert format_ranks([5, 0, 1, 2]) == "ranks 0-2, 5" and format_ranks([3]) == "rank 3"


def test_stack_of_a_waiting_main_thread() -> None:
    stacks: queue.Queue[Stack] = queue.Queue()
    event = threading.Event()
    thread = threading.Thread(target=lambda: (time.sleep(0.1), stacks.put(main_stack()), event.set()))
    thread.start()
    event.wait()
    stack = stacks.get()
    assert "threading.py" in stack.place and not stack.is_waiting, "an event is no collective"
    assert "test_stack_of_a_waiting_main_thread" in stack.text


def test_slow_ranks_are_compared_within_their_stage() -> None:
    """Stage 1 has twice the work; rank 3 is slow, and loads slowly."""
    table = StragglerTable()
    with mock.patch.object(stragglers, "MIN_SECONDS", 0.0):
        ranks = [identity(rank, stage=rank // 4) for rank in range(8)]
        assert table.update([(each, BEAT) for each in ranks]) is None
        later = []
        for each in ranks:
            forward, loading = (10.0 * (1 + each.stage), 0.0) if each.rank != 3 else (15.0, 10.0)
            beat = replace(BEAT, steps=16, seconds_forward=6.0 + forward, seconds_loading=loading)
            later.append((each, beat))
        found = table.update(later)
        assert found is not None and found[0].identity.rank == 3 and found[0].ratio == pytest.approx(2.5)
        assert [rank.identity.rank for rank in slow_ranks(found, 1.5)] == [3] and slow_ranks(found, 3.0) == []
        assert "rank 3 on node1 (process 103): 2.50 s of work per step, 1.00 s of it loading batches" in str(found[0])
        assert table.update(later) is None, "no new steps"


def connected(monitor: Monitor, rank: int, limits: Limits, progress: Progress) -> MemberThread:
    return MemberThread(
        Channel(socket.create_connection(("127.0.0.1", monitor.port))),
        identity(rank),
        identity(0),
        token=monitor.token,
        limits=limits,
        world_size=2,
        progress=progress,
        is_reporter=True,
    )


def test_monitor_and_members_over_sockets() -> None:
    """A stranger is ignored; a hung member sends its stack; the end reaches all members."""
    verdicts: queue.Queue[Verdict] = queue.Queue()
    ends: queue.Queue[tuple[int, str | None]] = queue.Queue()
    limits = Limits(hang=0.4, slow=60.0)
    with mock.patch.object(member_module, "end_process", lambda code, message, prints: ends.put((code, message))):
        monitor = Monitor(2, limits, verdicts.put)
        stranger = socket.create_connection(("127.0.0.1", monitor.port))
        stranger.sendall(b'{"hello": 1}\nnot json\n')
        moving, hung = Progress(is_limited=True), Progress(is_limited=True, phase="loading a batch", step=3)
        moving.transitions = 1
        members = [connected(monitor, 0, limits, moving), connected(monitor, 1, limits, hung)]
        end = time.monotonic() + 20
        while verdicts.empty():
            moving.ticked = time.monotonic()
            assert time.monotonic() < end
            time.sleep(0.02)
        verdict = verdicts.get()
        assert verdict.message.startswith("rank 1 on node0 (process 101) hangs: no progress for")
        assert "in step 3, loading a batch" in verdict.message and "test_monitor_and_members" in verdict.message
        assert ends.get(timeout=20) == (4, verdict.message)
        for each in members:
            each.close()
        stranger.close()
        monitor.close()


def test_goodbye_ends_monitoring_and_a_failure_limits_the_others() -> None:
    verdicts: queue.Queue[Verdict] = queue.Queue()
    ends: queue.Queue[tuple[int, str | None]] = queue.Queue()
    with (
        mock.patch.object(member_module, "end_process", lambda code, message, prints: ends.put((code, message))),
        mock.patch.object(member_module, "SECONDS_AFTER_FAILURE", 0.1),
    ):
        monitor = Monitor(2, LIMITS, verdicts.put)
        members = [connected(monitor, rank, LIMITS, Progress()) for rank in (0, 1)]
        members[1].say_goodbye(2)
        assert ends.get(timeout=20) == (2, None)
        members[1].close()
        members[0].say_goodbye(0)
        members[0].close()
        monitor.close()
    assert verdicts.empty()
