"""The work queue: no key is lost, none runs twice at a time, none holds up another."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from lora_operator.errors import UnavailableError
from lora_operator.kube.kinds import Kind
from lora_operator.reconcile.queue import LONGEST_BACKOFF, WorkQueue, backoff
from lora_operator.reconcile.store import Key

DEADLINE = 10.0


def key(name: str) -> Key:
    """Some key."""
    return Key(Kind.LORA_ADAPTER, "team-a", name)


@asynccontextmanager
async def running(
    handler: Callable[[Key], Awaitable[float | None]], *, workers: int = 16, time_limit: float = 600
) -> AsyncIterator[WorkQueue]:
    """A queue that works inside the block."""
    queue = WorkQueue(handler, workers=workers, time_limit=time_limit)
    task = asyncio.create_task(queue.run())
    try:
        yield queue
    finally:
        task.cancel()
        await asyncio.wait([task])


async def idle(queue: WorkQueue) -> None:
    """Waits until nothing is due."""
    await asyncio.wait_for(queue.wait_idle(), DEADLINE)


async def until(met: Callable[..., bool]) -> None:
    """Waits until a condition holds that nothing signals."""
    async with asyncio.timeout(DEADLINE):
        while not met():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_a_key_that_is_added_often_runs_once() -> None:
    seen: list[Key] = []

    async def handler(found: Key) -> None:
        seen.append(found)

    async with running(handler) as queue:
        for _ in range(5):
            queue.add(key("a"))
        queue.add(key("b"))
        await idle(queue)
    assert seen == [key("a"), key("b")]


async def test_keys_that_are_added_before_the_start_are_kept() -> None:
    seen: list[Key] = []

    async def handler(found: Key) -> None:
        seen.append(found)

    queue = WorkQueue(handler)
    queue.add(key("a"))
    assert not queue.idle()
    task = asyncio.create_task(queue.run())
    await idle(queue)
    task.cancel()
    assert seen == [key("a")]


async def test_a_key_that_is_added_while_it_runs_runs_again_afterwards() -> None:
    started, go_on = asyncio.Event(), asyncio.Event()
    at_a_time, runs, most = 0, 0, 0

    async def handler(_: Key) -> None:
        nonlocal at_a_time, runs, most
        at_a_time, runs = at_a_time + 1, runs + 1
        most = max(most, at_a_time)
        started.set()
        await go_on.wait()
        at_a_time -= 1

    async with running(handler) as queue:
        queue.add(key("a"))
        await asyncio.wait_for(started.wait(), DEADLINE)
        queue.add(key("a"))
        queue.add(key("a"), after=600)
        go_on.set()
        await idle(queue)
    assert (runs, most) == (2, 1)


async def test_the_earlier_of_two_times_counts() -> None:
    async def handler(_: Key) -> None:
        return None

    queue = WorkQueue(handler)
    queue.add(key("a"), after=100)
    queue.add(key("a"), after=200)
    due = queue.due_in(key("a"))
    assert due is not None
    assert 99 < due <= 100
    queue.add(key("a"))
    assert queue.due_in(key("a")) == 0
    assert len(queue) == 1


async def test_a_run_is_followed_by_another_after_the_returned_seconds() -> None:
    async def handler(_: Key) -> float:
        return 30.0

    async with running(handler) as queue:
        queue.add(key("a"))
        await idle(queue)
        due = queue.due_in(key("a"))
    assert due is not None
    assert 29 < due <= 30


async def test_a_short_requeue_runs_by_itself() -> None:
    runs = 0

    async def handler(_: Key) -> float | None:
        nonlocal runs
        runs += 1
        return 0.01 if runs < 4 else None

    async with running(handler) as queue:
        queue.add(key("a"))
        await until(lambda: runs == 4)
    assert runs == 4


async def test_failures_back_off_and_a_success_forgets_them() -> None:
    fail = True

    async def handler(_: Key) -> None:
        if fail:
            raise UnavailableError("list pods: no answer")

    async with running(handler) as queue:
        queue.add(key("a"))
        await idle(queue)
        first = queue.due_in(key("a"))
        await until(lambda: queue.failures(key("a")) >= 3)
        third = queue.due_in(key("a"))
        assert first is not None
        assert third is not None
        assert 0 < first <= 0.2 < third <= 0.8
        fail = False
        queue.add(key("a"))
        await idle(queue)
        assert queue.failures(key("a")) == 0
        assert queue.due_in(key("a")) is None


def test_back_off_grows_to_a_minute_and_no_further() -> None:
    assert 0.15 <= backoff(1) <= 0.2
    assert 1.2 <= backoff(4) <= 1.6
    for failures in (10, 50, 5000):
        assert 0.75 * LONGEST_BACKOFF <= backoff(failures) <= LONGEST_BACKOFF


async def test_news_during_a_failing_run_cut_the_back_off_short_but_not_to_nothing() -> None:
    started, go_on = asyncio.Event(), asyncio.Event()

    async def handler(_: Key) -> None:
        started.set()
        await go_on.wait()
        raise UnavailableError("no answer")

    async with running(handler) as queue:
        queue._failures[key("a")] = (20, "")
        queue.add(key("a"))
        await asyncio.wait_for(started.wait(), DEADLINE)
        queue.add(key("a"))
        go_on.set()
        await idle(queue)
        due = queue.due_in(key("a"))
    assert due is not None
    assert 0 < due <= 0.2


async def test_the_same_failure_is_logged_once_with_its_key(caplog: pytest.LogCaptureFixture) -> None:
    async def handler(_: Key) -> None:
        raise UnavailableError("no answer")

    with caplog.at_level(logging.INFO):
        async with running(handler) as queue:
            for attempt in range(1, 4):
                queue.add(key("a"))
                await until(lambda wanted=attempt: queue.failures(key("a")) >= wanted)
    assert len(caplog.records) == 1
    assert "LoRAAdapter team-a/a: UnavailableError: no answer" in caplog.text
    assert caplog.records[0].exc_info is None, "an expected failure needs no traceback"


async def test_an_unexpected_failure_is_logged_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    async def handler(_: Key) -> None:
        raise ZeroDivisionError

    async with running(handler) as queue:
        queue.add(key("a"))
        await idle(queue)
    assert "Traceback" in caplog.text


async def test_a_key_that_hangs_or_fails_does_not_delay_another() -> None:
    done = asyncio.Event()

    async def handler(found: Key) -> None:
        match found.name:
            case "hangs":
                await asyncio.Event().wait()
            case "fails":
                raise UnavailableError("no answer")
            case _:
                done.set()

    async with running(handler, workers=2) as queue:
        for name in ("hangs", "fails", "works"):
            queue.add(key(name))
        await asyncio.wait_for(done.wait(), DEADLINE)
        longest = queue.longest_run()
    assert longest is not None
    assert longest[0] == key("hangs")


async def test_a_run_that_hangs_is_ended_and_tried_again() -> None:
    async def handler(_: Key) -> None:
        await asyncio.Event().wait()

    async with running(handler, time_limit=0.01) as queue:
        queue.add(key("a"))
        await until(lambda: queue.failures(key("a")) >= 1)
        assert queue.due_in(key("a")) is not None


async def test_a_busy_key_does_not_starve_others() -> None:
    order: list[str] = []

    async def handler(found: Key) -> float | None:
        order.append(found.name)
        return 0 if found.name == "busy" and len(order) < 50 else None

    async with running(handler, workers=1) as queue:
        queue.add(key("busy"))
        for n in range(10):
            queue.add(key(f"k{n}"))
        await idle(queue)
    assert order.index("k9") <= 12


async def test_no_more_than_the_workers_run_at_a_time() -> None:
    now, most = 0, 0

    async def handler(_: Key) -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        for _turn in range(3):
            await asyncio.sleep(0)
        now -= 1

    async with running(handler, workers=4) as queue:
        for n in range(100):
            queue.add(key(f"k{n}"))
        await idle(queue)
    assert most == 4


async def test_a_run_that_is_cancelled_from_within_counts_as_failed_and_costs_no_worker() -> None:
    async def handler(found: Key) -> None:
        if found.name == "a":
            raise asyncio.CancelledError

    async with running(handler, workers=1) as queue:
        queue.add(key("a"))
        queue.add(key("b"))
        await idle(queue)
        assert queue.failures(key("a")) == 1


async def test_cancelling_the_queue_cancels_its_runs() -> None:
    started, ended = asyncio.Event(), asyncio.Event()

    async def handler(_: Key) -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with running(handler) as queue:
        queue.add(key("a"))
        await asyncio.wait_for(started.wait(), DEADLINE)
    assert ended.is_set()


async def test_what_breaks_in_the_queue_itself_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def handler(_: Key) -> None:
        raise UnavailableError("no answer")

    def broken(*_: object) -> float:
        raise ZeroDivisionError

    queue = WorkQueue(handler)
    monkeypatch.setattr(queue, "_failed", broken)
    queue.add(key("a"))
    with pytest.raises(ExceptionGroup) as caught:
        await asyncio.wait_for(queue.run(), DEADLINE)
    assert caught.value.subgroup(ZeroDivisionError) is not None


async def test_five_thousand_keys_run_in_seconds() -> None:
    seen: set[Key] = set()

    async def handler(found: Key) -> None:
        seen.add(found)

    async with running(handler) as queue:
        for n in range(5000):
            queue.add(key(f"k{n}"))
        await idle(queue)
    assert len(seen) == 5000
