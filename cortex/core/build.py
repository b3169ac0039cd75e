"""Which build this is."""

import importlib.metadata
import platform
import sys
from functools import cache
from pathlib import Path

import msgspec

from cortex.core.neuron_api import Version

_BUILD_INFO = Path(__file__).with_name("build_info.json")


class _BuildInfo(msgspec.Struct, kw_only=True, frozen=True):
    """What setup.py recorded."""

    git_sha_long: str = "unknown"
    git_dirty: bool = False
    build_timestamp: str = "unknown"


@cache
def version() -> Version:
    """Return the package version and, where the build recorded them, commit and time."""
    try:
        info = msgspec.json.decode(_BUILD_INFO.read_bytes(), type=_BuildInfo)
    except (OSError, msgspec.DecodeError):
        info = _BuildInfo()
    return Version(
        package_version=_distribution_version("cortex"),
        git_sha=info.git_sha_long[:8],
        git_sha_long=info.git_sha_long,
        git_dirty=info.git_dirty,
        build_timestamp=info.build_timestamp,
        python_version=platform.python_version(),
        torch_version=_distribution_version("torch"),
        target=f"{platform.machine()}-{sys.platform}",
    )


def _distribution_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
