"""Build hook: records which commit a build came from, for `GET /version`."""

import datetime
import json
import os
import subprocess
from pathlib import Path

from setuptools import setup

_ROOT = Path(__file__).parent


def _git(*args: str) -> str:
    try:
        done = subprocess.run(
            ["git", *args], cwd=_ROOT, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _record_build() -> None:
    sha = _git("rev-parse", "HEAD")
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    built = (
        datetime.datetime.fromtimestamp(int(epoch), datetime.UTC)
        if epoch
        else datetime.datetime.now(datetime.UTC)
    )
    info = {
        "git_sha_long": sha or "unknown",
        "git_dirty": bool(sha and _git("status", "--porcelain", "--untracked-files=no")),
        "build_timestamp": built.isoformat(timespec="seconds"),
    }
    (_ROOT / "cortex/core/build_info.json").write_text(json.dumps(info) + "\n")


_record_build()
setup()
