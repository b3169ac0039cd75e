import pytest

from cortex.core.errors import LoadFailedError
from cortex.neuron.jobs import Job, seconds_left


class Clock:
    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s


def left(**changes):
    values = {
        "elapsed_s": 10.0,
        "phase_elapsed_s": 4.0,
        "bytes_done": 0,
        "bytes_total": 0,
        "last_load_s": None,
    }
    return seconds_left(**(values | changes))


def test_nothing_is_estimated_from_nothing():
    assert left() is None


def test_the_speed_of_the_phase_gives_the_rest():
    assert left(bytes_done=25, bytes_total=100) == 12.0


def test_the_last_load_counts_until_the_phase_says_something():
    assert left(bytes_done=1, bytes_total=100, last_load_s=30.0) == 20.0
    assert left(bytes_done=2, bytes_total=100, last_load_s=30.0) == 196.0


def test_a_load_that_takes_longer_than_the_last_one_has_no_negative_rest():
    assert left(last_load_s=3.0) == 0.0


def test_progress_follows_the_phases():
    clock = Clock()
    job = Job("m", clock=clock)
    clock.now_s = 5.0
    job.advance("weights", 0, 100)
    clock.now_s = 7.0
    job.advance("weights", 50, 100)
    progress = job.progress
    assert (progress.phase, progress.bytes_done, progress.seconds_left) == ("weights", 50, 2.0)


async def test_a_job_ends_once():
    clock = Clock()
    job = Job("m", clock=clock)
    clock.now_s = 3.0
    job.succeed()
    job.fail(LoadFailedError("too late"))
    await job.wait()
    assert job.load_s == 3.0


async def test_every_waiter_gets_the_error():
    job = Job("m", clock=Clock())
    job.fail(LoadFailedError("no"))
    for _ in range(2):
        with pytest.raises(LoadFailedError, match="no"):
            await job.wait()
