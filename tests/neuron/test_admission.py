import asyncio

import pytest

from cortex.core.errors import EngineDiedError, QueueFullError
from cortex.neuron.admission import Admission


def make(*, seats=2, queue=2, wait_s=60.0):
    return Admission("m", max_in_flight=seats, max_queue_depth=queue, max_wait_s=wait_s)


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_ticket_is_given_at_once_while_seats_are_free():
    admission = make(seats=2)
    await admission.acquire()
    await admission.acquire()
    assert admission.in_flight == 2


async def test_a_released_seat_goes_to_the_first_who_waits():
    admission = make(seats=1)
    first = await admission.acquire()
    order = []

    async def use(name):
        with await admission.acquire():
            order.append(name)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(use("second"))
        await settle()
        tasks.create_task(use("third"))
        await settle()
        assert admission.queue_depth == 2
        first.release()
    assert order == ["second", "third"]
    assert (admission.in_flight, admission.queue_depth) == (0, 0)


async def test_releasing_a_ticket_twice_frees_its_seat_once():
    admission = make(seats=2)
    ticket = await admission.acquire()
    await admission.acquire()
    ticket.release()
    ticket.release()
    assert admission.in_flight == 1


async def test_a_full_queue_refuses_and_says_when_to_come_back():
    admission = make(seats=1, queue=1)
    await admission.acquire()
    async with asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(admission.acquire())
        await settle()
        with pytest.raises(QueueFullError) as caught:
            await admission.acquire()
        waiting.cancel()
    assert caught.value.retry_after_s == 4
    assert caught.value.status == 503
    assert admission.rejected_queue_full == 1


async def test_the_time_to_come_back_is_at_most_two_minutes():
    admission = make(seats=1, queue=100)
    await admission.acquire()
    async with asyncio.TaskGroup() as tasks:
        waiting = [tasks.create_task(admission.acquire()) for _ in range(100)]
        await settle()
        with pytest.raises(QueueFullError) as caught:
            await admission.acquire()
        for each in waiting:
            each.cancel()
    assert caught.value.retry_after_s == 120


async def test_a_wait_that_is_too_long_ends_in_a_refusal_and_leaves_the_queue():
    admission = make(seats=1, wait_s=0.01)
    await admission.acquire()
    with pytest.raises(QueueFullError, match=r"no seat came free within 0\.01 s"):
        await admission.acquire()
    assert (admission.queue_depth, admission.rejected_timeout, admission.in_flight) == (0, 1, 1)


async def test_a_cancelled_waiter_leaves_the_queue():
    admission = make(seats=1)
    await admission.acquire()
    async with asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(admission.acquire())
        await settle()
        waiting.cancel()
    assert admission.queue_depth == 0


async def test_a_waiter_cancelled_in_the_moment_it_is_seated_gives_the_seat_back():
    admission = make(seats=1)
    ticket = await admission.acquire()
    async with asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(admission.acquire())
        await settle()
        ticket.release()
        assert admission.in_flight == 1
        waiting.cancel()
    assert admission.in_flight == 0
    await admission.wait_idle()


async def test_a_wide_request_waits_for_all_its_seats_and_is_not_overtaken():
    admission = make(seats=4, queue=4)
    narrow = await admission.acquire(2)
    async with asyncio.TaskGroup() as tasks:
        wide = tasks.create_task(admission.acquire(4))
        await settle()
        late = tasks.create_task(admission.acquire(1))
        await settle()
        assert admission.queue_depth == 2
        narrow.release()
        (await wide).release()
        (await late).release()
    assert admission.in_flight == 0


async def test_a_request_wider_than_the_model_takes_all_seats():
    admission = make(seats=2)
    ticket = await admission.acquire(8)
    assert ticket.seats == 2


async def test_the_departure_of_a_wide_waiter_lets_narrow_ones_through():
    admission = make(seats=2, queue=4)
    held = await admission.acquire(1)
    async with asyncio.TaskGroup() as tasks:
        wide = tasks.create_task(admission.acquire(2))
        await settle()
        narrow = tasks.create_task(admission.acquire(1))
        await settle()
        wide.cancel()
        (await narrow).release()
    held.release()
    assert admission.in_flight == 0


async def test_closing_refuses_those_who_wait_and_those_who_come():
    admission = make(seats=1)
    ticket = await admission.acquire()
    error = EngineDiedError("gone")

    async def wait():
        with pytest.raises(EngineDiedError):
            await admission.acquire()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(wait())
        await settle()
        admission.close(error)
    with pytest.raises(EngineDiedError):
        await admission.acquire()
    ticket.release()
    await admission.wait_idle()


async def test_a_paused_queue_keeps_who_waits_and_goes_on_where_it_stopped():
    admission = make(seats=2, queue=2)
    admission.pause()
    async with asyncio.TaskGroup() as tasks:
        waiting = [tasks.create_task(admission.acquire()) for _ in range(2)]
        await settle()
        assert (admission.in_flight, admission.queue_depth) == (0, 2)
        with pytest.raises(QueueFullError):
            admission.check()
        admission.resume()
        await settle()
        assert all(each.done() for each in waiting)
    assert admission.in_flight == 2


async def test_seats_that_come_free_in_a_pause_are_given_to_nobody():
    admission = make(seats=1)
    ticket = await admission.acquire()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(admission.acquire())
        await settle()
        admission.pause()
        ticket.release()
        await settle()
        assert (admission.in_flight, admission.queue_depth) == (0, 1)
        admission.resume()


async def test_the_last_seat_given_back_is_told():
    told = []
    admission = Admission(
        "m",
        max_in_flight=2,
        max_queue_depth=0,
        max_wait_s=1.0,
        on_idle=lambda: told.append(admission.in_flight),
    )
    tickets = [await admission.acquire() for _ in range(2)]
    tickets[0].release()
    assert told == []
    tickets[1].release()
    assert told == [0]
