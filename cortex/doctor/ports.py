"""Whether what a service listens on is free, and who has it if not."""

import errno
import http.client
import os
import socket
from pathlib import Path

import msgspec

from cortex.doctor.findings import LIMIT_S, Check, Finding

ASK_S = 3.0
MAX_ANSWER_BYTES = 64 << 10
_LISTENING = "0A"


def check_port(name: str, host: str, port: int, commands: frozenset[str]) -> Finding:
    """Say whether an address can be listened on.

    Args:
        name: what will listen there.
        commands: subcommands of `cortex` that may have it already: the service runs.
    """
    where = f"{host}:{port} ({name})"
    if port == 0:
        return Finding(check="port", level="ok", message=f"{where}: a free one is taken")
    error = _bind_error(host, port)
    if error is None:
        return Finding(check="port", level="ok", message=f"{where}: free")
    if error.errno != errno.EADDRINUSE:
        return Finding(
            check="port",
            level="fail",
            message=f"{where}: cannot be listened on: {error.strerror or error}",
            remedy="choose an address of this host, and a port above 1023",
        )
    holder = find_holder(port)
    if holder is not None and _is_cortex(holder[1], commands):
        return Finding(check="port", level="ok", message=f"{where}: held by {_told(holder)}")
    if holder is None and _answers_as_cortex(host, port):
        return Finding(check="port", level="ok", message=f"{where}: a Cortex service answers there")
    if holder is None:
        message, more = f"{where}: in use", "; run this as root to see whose it is"
    else:
        message, more = f"{where}: held by {_told(holder)}", ""
    remedy = f"stop what listens there or choose another port{more}"
    return Finding(check="port", level="fail", message=message, remedy=remedy)


def port_check(name: str, host: str, port: int, commands: frozenset[str]) -> Check:
    """Return the check of a port; `commands` are those that listen on it."""
    return Check(
        name="port",
        look=lambda: [check_port(name, host, port, commands)],
        limit_s=LIMIT_S,
        if_it_hangs=f"the name {host} cannot be looked up: write an address",
    )


def find_holder(port: int, proc: Path = Path("/proc")) -> tuple[int, list[str]] | None:
    """Return pid and command line of who listens on a TCP port, as far as this user may see."""
    links = {f"socket:[{inode}]" for inode in _listening_inodes(port, proc)}
    for folder in proc.glob("[0-9]*"):
        try:
            if any(str(link.readlink()) in links for link in (folder / "fd").iterdir()):
                command = (folder / "cmdline").read_bytes().decode(errors="replace")
                return int(folder.name), command.strip("\0").split("\0")
        except OSError:
            continue  # of another user, or gone
    return None


def _listening_inodes(port: int, proc: Path) -> set[str]:
    found = set()
    for table in ("tcp", "tcp6"):
        try:
            rows = (proc / "net" / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for row in rows:
            columns = row.split()
            if columns[3] == _LISTENING and int(columns[1].rpartition(":")[2], 16) == port:
                found.add(columns[9])
    return found


def _bind_error(host: str, port: int) -> OSError | None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As the services do it; one that does not listen troubles nobody.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as exc:
            return exc
    return None


def _is_cortex(command: list[str], commands: frozenset[str]) -> bool:
    names = [os.path.basename(word) for word in command]  # noqa: PTH119  words, not all are paths
    return "cortex" in names and bool(commands & set(names))


def _told(holder: tuple[int, list[str]]) -> str:
    pid, command = holder
    return f"pid {pid} ({' '.join(command)[:120]})"


def _answers_as_cortex(host: str, port: int) -> bool:
    """Whether what listens, of another user, answers `/health` as gateways and neurons do."""
    here = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  a comparison
    connection = http.client.HTTPConnection(here, port, timeout=ASK_S)
    try:
        connection.request("GET", "/health")
        answer = msgspec.json.decode(connection.getresponse().read(MAX_ANSWER_BYTES))
    except (OSError, http.client.HTTPException, msgspec.DecodeError):
        return False
    finally:
        connection.close()
    return isinstance(answer, dict) and "status" in answer
