"""Which processes belong to which engine: an engine may be a process with many below it."""

from collections.abc import Collection
from pathlib import Path


def process_families(proc: Path, heads: Collection[int]) -> dict[int, int]:
    """Return each process that is one of `heads` or descends from one, with that head.

    Args:
        proc: where the process file system is mounted.
    """
    parents: dict[int, int] = {}
    for entry in proc.iterdir() if heads else ():
        if not entry.name.isdigit():
            continue
        try:
            # The name in parentheses may hold anything; the parent is the second field after it.
            fields = (entry / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()
            parents[int(entry.name)] = int(fields[1])
        except (OSError, IndexError, ValueError):
            continue
    found = {pid: pid for pid in heads}
    for pid in parents:
        above = _line(pid, parents)
        head = next((each for each in above if each in heads), None)
        if head is not None:
            found[pid] = head
    return found


def _line(pid: int, parents: dict[int, int]) -> list[int]:
    """Return a process and those above it; the listing is no snapshot and might go in circles."""
    line = [pid]
    while (above := parents.get(line[-1])) is not None and above not in line:
        line.append(above)
    return line
