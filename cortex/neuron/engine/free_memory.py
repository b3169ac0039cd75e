"""How much memory this process may still allocate on a device."""

from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
_OWN_CGROUP = Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")


def free_memory_bytes(device: torch.device) -> int:
    """Return the free bytes of a CUDA device, or of RAM within this process's cgroup."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free_bytes = _available_ram_bytes()
    for group in _own_cgroups():
        limit_bytes = _read_number(group / "memory.max")
        used_bytes = _read_number(group / "memory.current")
        if limit_bytes is not None and used_bytes is not None:
            # Cached file pages count as used and go when they are needed.
            reclaimable_bytes = _read_fields(group / "memory.stat").get("inactive_file", 0)
            free_bytes = min(free_bytes, limit_bytes - used_bytes + reclaimable_bytes)
    return max(free_bytes, 0)


def _available_ram_bytes() -> int:
    # The file exists on every Linux since 2014; engines run on nothing else.
    return _read_fields(_MEMINFO)["MemAvailable:"] * 1024


def _own_cgroups() -> list[Path]:
    """Return this process's cgroup (version 2) and those above it."""
    for line in _read_text(_OWN_CGROUP).splitlines():
        if line.startswith("0::/"):
            group = _CGROUPS / line.removeprefix("0::/")
            return [p for p in (group, *group.parents) if p.is_relative_to(_CGROUPS)]
    return []


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return ""


def _read_number(path: Path) -> int | None:
    text = _read_text(path).strip()
    return int(text) if text.isdigit() else None  # "max" is no limit


def _read_fields(path: Path) -> dict[str, int]:
    rows = [line.split() for line in _read_text(path).splitlines()]
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}
