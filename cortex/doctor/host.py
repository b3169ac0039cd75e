"""Disk space, the directory of sockets and the hub."""

import os
import shutil
import socket
import urllib.error
import urllib.request
from pathlib import Path

from huggingface_hub import constants

from cortex.core.config import TorchHarness
from cortex.doctor.findings import Finding, Level
from cortex.neuron.engine_client import SOCKET_NAME
from cortex.neuron.scratch import ScratchFolder

GIB = 1 << 30
# State is small; a model of a few billion parameters is some ten GiB.
STATE_FAIL_BYTES, STATE_WARN_BYTES = GIB // 16, GIB
CACHE_FAIL_BYTES, CACHE_WARN_BYTES = GIB, 20 * GIB
HUB_S = 5.0


def check_state_dir(path: Path) -> Finding:
    """Say whether state can be kept; without it a neuron makes it again at each start."""
    remedy = "make it writable for the user of the neuron, or set state_dir in neuron.toml"
    return _check_space("state", path, STATE_FAIL_BYTES, STATE_WARN_BYTES, "warn", remedy)


def check_cache(torch: TorchHarness) -> list[Finding]:
    """Say whether there is room for what is downloaded from the hub."""
    if not torch.hub:
        return []
    path = Path(torch.hf_cache or constants.HF_HUB_CACHE)
    remedy = "make room or writable, or set hf_cache in [harness.torch] (or HF_HOME)"
    return [_check_space("cache", path, CACHE_FAIL_BYTES, CACHE_WARN_BYTES, "fail", remedy)]


def _check_space(
    check: str, path: Path, fail_bytes: int, warn_bytes: int, unwritable: Level, remedy: str
) -> Finding:
    # What is not there yet is made below the first directory that is.
    there = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        message = f"{path}: {there} cannot be written by this user"
        return Finding(check=check, level=unwritable, message=message, remedy=remedy)
    free_bytes = shutil.disk_usage(there).free
    level: Level = "ok"
    if free_bytes < warn_bytes:
        level = "fail" if free_bytes < fail_bytes else "warn"
    return Finding(
        check=check,
        level=level,
        message=f"{path}: {free_bytes / GIB:.1f} GiB free",
        remedy=None if level == "ok" else remedy,
    )


def check_sockets() -> Finding:
    """Say whether a neuron can make the sockets that its engines connect to."""
    folder: ScratchFolder | None = None
    try:
        folder = ScratchFolder()
        path = folder.path / SOCKET_NAME
        with socket.socket(socket.AF_UNIX) as probe:
            probe.bind(str(path))
    except OSError as exc:
        return Finding(
            check="sockets",
            level="fail",
            message=f"no socket can be made for an engine: {exc}",
            remedy="set TMPDIR (or RuntimeDirectory in the unit) to a directory with a short path "
            "that the user of the neuron may write",
        )
    finally:
        if folder is not None:
            folder.close()
    return Finding(check="sockets", level="ok", message=f"can be made in {folder.path.parent}")


def check_hub(torch: TorchHarness) -> Finding:
    """Say whether the Hugging Face hub answers."""
    if not torch.hub:
        return Finding(check="hub", level="note", message="not used (hub = false)")
    if constants.HF_HUB_OFFLINE:
        message = "not asked: HF_HUB_OFFLINE is set, and only what is in the cache is served"
        return Finding(check="hub", level="note", message=message)
    endpoint = constants.ENDPOINT
    if not endpoint.startswith(("http://", "https://")):
        return Finding(
            check="hub",
            level="fail",
            message=f"HF_ENDPOINT is no address: {endpoint}",
            remedy="set it to an https:// URL, or unset it",
        )
    try:
        with urllib.request.urlopen(  # noqa: S310  the scheme is checked above
            f"{endpoint}/api/models?limit=1", timeout=HUB_S
        ):
            why = ""
    except urllib.error.HTTPError as exc:
        # It answers; what it thinks of this question does not matter.
        why = f"it answers with {exc.code}" if exc.code >= 500 else ""
    except OSError as exc:
        why = str(getattr(exc, "reason", exc))
    if not why:
        return Finding(check="hub", level="ok", message=f"{endpoint} answers")
    return Finding(
        check="hub",
        level="warn",
        message=f"{endpoint} cannot be reached: {why}",
        remedy="let this host through (HTTPS_PROXY, firewall), or set HF_HUB_OFFLINE=1: what is in "
        "the cache and in model_dirs is served in any case",
    )
