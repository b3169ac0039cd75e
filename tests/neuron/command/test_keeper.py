import os
import signal
import subprocess
import sys
import time

import pytest

from cortex.neuron.command.process import KEEPER

PYTHON = [sys.executable, "-c"]
# A process in a session of its own that ignores SIGTERM, and its number on a line.
ORPHAN = (
    "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', "
    "'import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); "
    "time.sleep(100)'], start_new_session=True, stdout=subprocess.PIPE); p.stdout.readline(); "
    "print(p.pid, flush=True); "
)


def keeper(*command, grace_s=5.0):
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(KEEPER), str(grace_s), *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def is_gone(pid):
    deadline = time.monotonic() + 10
    while is_alive(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.mark.parametrize(
    ("code", "ends_with"),
    [("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137), ("pass", 0)],
)
def test_it_ends_as_the_program_did(code, ends_with):
    with keeper(*PYTHON, code) as it:
        assert it.wait(20) == ends_with


def test_a_program_that_is_not_there_is_said(capfd):
    with keeper("/not/here") as it:
        assert it.wait(20) == 127
    assert "cannot run /not/here: No such file or directory" in capfd.readouterr().err


def test_t_asks_for_an_orderly_end():
    code = (
        "import signal, sys, time\n"
        "signal.signal(15, lambda *_: sys.exit(5))\n"
        "print(1, flush=True)\n"
        "time.sleep(100)"
    )
    with keeper(*PYTHON, code) as it:
        it.stdout.readline()
        it.stdin.write("t")
        it.stdin.flush()
        assert it.wait(20) == 5


def test_who_ignores_sigterm_is_killed_after_the_grace():
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print(1); time.sleep(100)"
    with keeper(sys.executable, "-uc", code, grace_s=0.2) as it:
        it.stdout.readline()
        it.stdin.write("t")
        it.stdin.flush()
        assert it.wait(20) == 137


def test_k_ends_it_at_once_and_whatever_it_started_wherever_that_went():
    with keeper(*PYTHON, ORPHAN + "import time; time.sleep(100)", grace_s=100) as it:
        orphan = int(it.stdout.readline())
        it.stdin.write("k")
        it.stdin.flush()
        assert it.wait(20) == 137
        assert is_gone(orphan)


def test_what_outlives_a_program_that_ends_by_itself_is_ended_too():
    with keeper(*PYTHON, ORPHAN) as it:
        orphan = int(it.stdout.readline())
        assert it.wait(20) == 0
        assert is_gone(orphan)


def test_the_end_of_the_neuron_ends_the_program_and_all_below_it():
    with keeper(*PYTHON, ORPHAN + "import time; time.sleep(100)", grace_s=0.2) as it:
        orphan = int(it.stdout.readline())
        it.stdin.close()
        assert it.wait(20) == 143
        assert is_gone(orphan)


def test_signals_for_the_neuron_are_not_for_the_engine():
    code = "import time; print(1, flush=True); time.sleep(0.3)"
    with keeper(*PYTHON, code) as it:
        it.stdout.readline()
        os.killpg(it.pid, signal.SIGINT)
        os.killpg(it.pid, signal.SIGTERM)
        assert it.wait(20) == 0


def test_a_killed_keeper_takes_its_program_along():
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(100)"
    with keeper(*PYTHON, code) as it:
        program = int(it.stdout.readline())
        it.kill()
        it.wait(20)
        assert is_gone(program)
