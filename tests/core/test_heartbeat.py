"""What processes agree on, and how they tell who is dead, who hangs, and why they end."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch.distributed as dist
from pool import Pool

from vtp_core import distributed, heartbeat
from vtp_core.errors import DataFault, Fault, NonFinite
from vtp_core.heartbeat import Heart
from vtp_core.peers import PULSE, PeerFault
from vtp_core.stopping import Interrupted, Stopping, handled
from vtp_core.together import Together

SLIDES = DataFault("data: slide 7 is torn")


def agreed(asked: list[int | None], failing: int | None = None) -> tuple[str, str, int]:
    """Kind, words and exit code of the verdict where each process was asked something else, and one may fail."""
    rank = dist.get_rank()
    found = distributed.verdict(asked[rank], SLIDES if rank == failing else None)
    if isinstance(found, Fault):
        return type(found).__name__, str(found), found.code
    return "signal", str(found), 0


def test_nobody_stops_where_nobody_asks(two: Pool) -> None:
    assert two(agreed, [None, None]) == [("signal", "None", 0)] * 2


def test_a_signal_to_one_is_a_signal_to_all_and_an_interrupt_outweighs_others(two: Pool) -> None:
    assert two(agreed, [None, int(signal.SIGUSR1)])[0] == ("signal", str(int(signal.SIGTERM)), 0)
    both = two(agreed, [int(signal.SIGINT), int(signal.SIGTERM)])
    assert {words for _, words, _ in both} == {str(int(signal.SIGINT))}


def test_a_fault_outweighs_signals_and_keeps_its_code(two: Pool) -> None:
    first, second = two(agreed, [int(signal.SIGTERM), None], 1)
    assert second == ("DataFault", "data: slide 7 is torn", 4)
    assert first == ("PeerFault", "process 1 failed: data: slide 7 is torn", 4)


def stopped_together() -> tuple[int | None, bool]:
    stopping = Stopping(alone=False)
    heart = Heart(60.0)
    together = Together(heart, stopping, lambda error: None)
    try:
        together.agree()
        assert not together.united
        if dist.get_rank() == 1:
            stopping(signal.SIGTERM)
        together(lambda: None)
    except Interrupted:
        return stopping.asked, together.united
    finally:
        heart.stop()
    return None, together.united


def test_work_is_done_together_and_signals_are_heard_after_it(two: Pool) -> None:
    assert two(stopped_together) == [(signal.SIGTERM, True)] * 2


def fell_out(where: str) -> str:
    """One process raises what the other cannot know of."""
    heart = Heart(60.0)
    try:
        with heart.guarding():
            if dist.get_rank() == 1:
                raise NonFinite("step 3: sick") if where == "fault" else RuntimeError("a bug")
            time.sleep(1.5)
            raise RuntimeError("[/gloo/transport/tcp/pair.cc:545] Connection closed by peer")
    except (Fault, RuntimeError) as error:
        return f"{type(error).__name__} {getattr(error, 'code', 1)}: {error}"
    finally:
        heart.stop()
    return ""


@pytest.mark.parametrize(
    ("where", "first", "second"),
    [
        ("fault", "PeerFault 5: process 1 failed: step 3: sick", "NonFinite 5: step 3: sick"),
        ("bug", "PeerFault 1: process 1 failed: unexpected RuntimeError: a bug", "RuntimeError 1: a bug"),
    ],
)
def test_why_one_process_goes_is_known_to_the_others(two: Pool, where: str, first: str, second: str) -> None:
    assert two(fell_out, where) == [first, second]


def looked_for() -> str:
    """What the first process finds out about the second, which does not come."""
    heart = Heart(60.0)
    PULSE.now("in step 7", limited=True)
    found = ""
    if dist.get_rank() == 1:
        PULSE.now("waiting for the data of step 7")
        time.sleep(heartbeat.STALE + 3 * heartbeat.BEAT)
    else:
        PULSE.collectives += 1  # it has entered one that the other has not
        time.sleep(2 * heartbeat.BEAT)
        found = heart.diagnosis()
    distributed.agreed(False)
    PULSE.collectives = 0
    heart.stop()
    return found


def test_a_process_that_gives_signs_of_life_and_lags_behind_hangs(two: Pool) -> None:
    found, _ = two(looked_for)
    who = f"process 1 ({os.uname().nodename}) hangs and the others wait for it"
    assert found.startswith(f"{who}; it is waiting for the data of step 7 for ")


def asked_while(doing: tuple[str, str], seconds: float) -> str:
    """A signal comes to both processes; one works, the other waits for it, longer than a step may take then."""
    before = heartbeat.GRACE, heartbeat.STALE
    heartbeat.GRACE, heartbeat.STALE = 0.5, 0.1
    heart, stopping = Heart(60.0), Stopping(alone=False)
    try:
        with handled(stopping):
            mine, step = doing[dist.get_rank()], doing[dist.get_rank()] == "in step 7"
            PULSE.now(mine, limited=step, brief=step)
            time.sleep(1.2 * heartbeat.BEAT)  # until the next sign of life tells it
            PULSE.now(mine, limited=step, brief=step)
            PULSE.longest = 0.0
            os.kill(os.getpid(), signal.SIGTERM)
            if dist.get_rank() == 0:
                time.sleep(seconds)
            distributed.agreed(False)
            return PULSE.doing
    finally:
        heartbeat.GRACE, heartbeat.STALE = before
        PULSE.collectives = 0
        PULSE.now("starting")
        heart.stop()


@pytest.mark.parametrize("other", ["saving step 6", "in step 7"])
def test_a_save_is_waited_for_after_a_signal(two: Pool, other: str) -> None:
    assert two(asked_while, ("saving step 6", other), 1.5) == ["saving step 6", other]


def test_one_process_needs_no_heart() -> None:
    heart = Heart(60.0)
    fault = NonFinite("step 3: sick")
    assert heart.explained(fault, fault) is fault
    assert heart.explained(RuntimeError("gloo/"), None) is None
    assert not heart._threads
    heart.stop()


def test_signals_are_noted_among_several_processes_and_an_echo_is_no_haste() -> None:
    stopping = Stopping(alone=False)
    with stopping.resting():
        stopping(signal.SIGINT)  # from the terminal
        stopping(signal.SIGINT)  # and from the launcher, which got it from the terminal too
    stopping.check()
    assert (stopping.asked, stopping.twice) == (signal.SIGINT, False)
    stopping._since -= 2.0
    with pytest.raises(Interrupted):
        stopping(signal.SIGINT)
    assert stopping.twice


@pytest.mark.parametrize(
    ("error", "ours"),
    [
        (
            RuntimeError("[/x/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 5000ms for recv"),
            True,
        ),
        (dist.DistNetworkError("Connection reset by peer"), True),
        (dist.DistBackendError("NCCL error"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (ValueError("gloo/"), False),
    ],
)
def test_failures_of_collectives_are_told_from_others(error: Exception, ours: bool) -> None:
    assert distributed.of_collective(error) is ours


def test_faults_of_peers_have_their_code() -> None:
    assert PeerFault("process 1 failed: x", 4).code == 4
