"""The process between a neuron and an external engine; a script of its own, standard library only.

    keeper.py GRACE_S PROGRAM [ARGUMENT ...]

It runs the program in a session of its own and is the reaper of whatever that starts, so that
nothing of an engine is left behind, wherever its children have gone. The neuron holds the other
end of its standard input: `t` asks for an orderly end (SIGTERM, GRACE_S seconds, SIGKILL), `k`
for one at once, and the end of the file, which is the end of the neuron, is a `t` too.
It ends as the program did: with its exit code, or 128 plus the number of the signal.
"""

import ctypes
import os
import select
import signal
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
# A process in the middle of a device call takes a moment to die.
KILL_S = 10.0
SWEEP_S = 0.01
NO_PROGRAM = 127

_libc = ctypes.CDLL(None, use_errno=True)


def main(arguments: list[str]) -> int:
    """Run the program and return what to exit with."""
    grace_s, command = float(arguments[0]), arguments[1:]
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # The neuron says when; signals to its terminal or its service are for the neuron.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    wake = _wake_on_child()
    program = _start(command)
    status = _watch(program, wake, grace_s)
    _sweep()
    return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def _wake_on_child() -> int:
    """Return a descriptor that becomes readable when a child ends."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    return reader


def _start(command: list[str]) -> int:
    keeper = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    # Were the keeper itself killed, nobody else could end the program.
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != keeper:
        os._exit(NO_PROGRAM)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        os.execvp(command[0], command)  # noqa: S606  this is what it is for
    except OSError as exc:
        os.write(2, f"cannot run {command[0]}: {exc.strerror}\n".encode())
    os._exit(NO_PROGRAM)


def _watch(program: int, wake: int, grace_s: float) -> int:
    """Return the program's wait status once it has ended, which it may be made to do."""
    inputs = [wake, 0]
    deadline_s: float | None = None
    while True:
        limit_s = None if deadline_s is None else max(0.0, deadline_s - time.monotonic())
        ready, _, _ = select.select(inputs, [], [], limit_s)
        if wake in ready:
            os.read(wake, 4096)
        status = _reap(program)
        if status is not None:
            return status
        asked = b""
        if 0 in ready:
            asked = os.read(0, 1)
            if not asked:
                inputs.remove(0)
            if deadline_s is None and asked != b"k":
                deadline_s = time.monotonic() + grace_s
                _signal(program, signal.SIGTERM)
        if asked == b"k" or (deadline_s is not None and time.monotonic() >= deadline_s):
            _signal(program, signal.SIGKILL)
            return os.waitpid(program, 0)[1]


def _signal(program: int, number: signal.Signals) -> None:
    """Signal the program's group, or the program where it has none yet."""
    try:
        os.killpg(program, number)
    except ProcessLookupError:
        os.kill(program, number)


def _reap(program: int) -> int | None:
    """Collect every child that has ended; return the program's status if it is among them."""
    found = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == 0:
            return found
        if pid == program:
            found = status


def _sweep() -> None:
    """Kill everything that is left of the program, for KILL_S at most."""
    deadline_s = time.monotonic() + KILL_S
    while time.monotonic() < deadline_s:
        for pid in _descendants():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(SWEEP_S)


def _descendants() -> list[int]:
    """Return the processes below this one, by their parents in /proc."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # The name in parentheses may hold anything; the parent is the second field after it.
            parent = (entry / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()[1]
        except (OSError, IndexError):
            continue
        children.setdefault(int(parent), []).append(int(entry.name))
    found: list[int] = []
    waiting = [os.getpid()]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
