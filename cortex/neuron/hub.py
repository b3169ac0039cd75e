"""Checkpoints from the Hugging Face hub, downloaded once into its cache.

The library blocks and cannot be interrupted, so a download runs in a thread that gives up at
its next piece of data once nobody wants it any more. Offline (`HF_HUB_OFFLINE`, or no network)
what the cache holds complete is served.
"""

import asyncio
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import errors as hub_errors
from tqdm import tqdm  # type: ignore[import-untyped]

from cortex.core.errors import (
    BadRequestError,
    CheckpointError,
    CortexError,
    LoadFailedError,
    ModelNotFoundError,
)

FIRST_RETRY_S = 10.0
MAX_RETRY_S = 300.0
# Repositories fetched at the same time; more wait for their turn.
MAX_DOWNLOADS = 4
# What the library raises: its own errors, those of its HTTP client and of the disk, and
# RuntimeError from its transfer extension.
_LIBRARY_ERRORS = (
    # Of whichever HTTP client it uses.
    hub_errors.HTTPError,  # type: ignore[attr-defined]
    OSError,
    ValueError,
    RuntimeError,
)
# Files beside each other at the top of a repository; other formats are left where they are. Of
# folders, the numbered ones of sentence-transformers are of use, and their settings alone.
_ALLOWED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja"]
_IGNORED = ["[!0-9]*/*", "*/*/*", "*/*.safetensors", "*/*.safetensors.index.json", "onnx*"]
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")

OnBytes = Callable[[int, int], None]  # done, total so far known


class HubUnreachableError(CortexError):
    """The hub does not answer and the cache does not hold the repository."""

    status = 502
    code = "hub_unreachable"
    retryable = True


class _CancelledError(Exception):
    """Ends the downloading thread when nobody waits for it any more."""


# The part of huggingface_hub.snapshot_download that is used: returns a directory, blocks.
Snapshot = Callable[..., str]


def _snapshot_download(repo_id: str, **options: Any) -> str:
    return str(huggingface_hub.snapshot_download(repo_id, **options))


def is_repo_id(text: str) -> bool:
    """Return whether a text has the form `org/name`."""
    return _REPO_ID.fullmatch(text) is not None and ".." not in text and "--" not in text


def parse_source(source: str) -> str:
    """Return the repository id of a `source`, which is `org/name` or `hf:org/name`.

    Raises:
        BadRequestError: another scheme, or not a repository id.
    """
    scheme, colon, rest = source.partition(":")
    if colon and scheme != "hf":
        raise BadRequestError(
            f"source '{source}': the only known scheme is hf, as in hf:org/name", param="source"
        )
    repo_id = rest if colon else source
    if not is_repo_id(repo_id):
        raise BadRequestError(
            f"source '{source}' is not a repository id; write org/name", param="source"
        )
    return repo_id


def retry_pause_s(attempt: int) -> float:
    """Return how long to wait after failed attempt 0, 1, 2, ...: 10, 20, 40 ... at most 300 s."""
    return min(FIRST_RETRY_S * 2.0 ** min(attempt, 16), MAX_RETRY_S)


class Hub:
    """Fetches repositories into the hub's cache."""

    def __init__(self, *, cache_dir: str | None, snapshot: Snapshot = _snapshot_download) -> None:
        self._cache_dir = cache_dir
        self._snapshot = snapshot
        self._threads = ThreadPoolExecutor(MAX_DOWNLOADS, thread_name_prefix="hub")

    async def fetch(self, repo_id: str, *, on_bytes: OnBytes) -> Path:
        """Return the directory of a repository's checkpoint, downloading what is missing.

        Args:
            on_bytes: called in the event loop as data comes.

        Raises:
            ModelNotFoundError: there is no such repository, or it is not open to this host.
            HubUnreachableError: no network and not in the cache.
            CheckpointError: the repository holds no checkpoint this engine can read.
            LoadFailedError: the disk is full or not writable.
        """
        loop = asyncio.get_running_loop()
        is_cancelled = threading.Event()

        def report(done: int, total: int) -> None:
            if is_cancelled.is_set():
                raise _CancelledError
            loop.call_soon_threadsafe(on_bytes, done, total)

        try:
            return await loop.run_in_executor(self._threads, self._download, repo_id, report)
        except _LIBRARY_ERRORS as exc:
            raise _mapped(repo_id, exc) from exc
        finally:
            is_cancelled.set()

    def close(self) -> None:
        """Let the threads end."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _download(self, repo_id: str, report: OnBytes) -> Path:
        path = Path(
            self._snapshot(
                repo_id,
                cache_dir=self._cache_dir,
                allow_patterns=_ALLOWED,
                ignore_patterns=_IGNORED,
                tqdm_class=_reporting_bar(report),
            )
        )
        if not (path / "config.json").is_file() or not any(path.glob("*.safetensors")):
            raise CheckpointError(
                f"'{repo_id}' on the hub has no config.json with safetensors weights; "
                "put a GGUF file into a directory of model_dirs instead"
            )
        return path


def _reporting_bar(report: OnBytes) -> type[Any]:
    class Bar(tqdm):  # type: ignore[misc]
        """Draws nothing; tells of bytes that came."""

        monitor_interval = 0

        def display(self, *_: Any, **__: Any) -> bool:
            return True

        def update(self, n: float | None = 1) -> bool | None:
            shown: bool | None = super().update(n)
            # The hub counts bytes from the network in a second bar, which a cache distorts.
            if self.unit == "B" and not str(self.desc).startswith("Downloading bytes"):
                report(int(self.n), int(self.total or 0))
            return shown

    return Bar


def _mapped(repo_id: str, exc: Exception) -> CortexError:
    match exc:
        case hub_errors.GatedRepoError():
            return ModelNotFoundError(
                f"'{repo_id}' is gated on the hub: accept its terms there and set HF_TOKEN"
            )
        case hub_errors.RepositoryNotFoundError() | hub_errors.RevisionNotFoundError():
            return ModelNotFoundError(
                f"there is no repository '{repo_id}' on the hub, or it is private (set HF_TOKEN)"
            )
        case hub_errors.HFValidationError():
            return ModelNotFoundError(f"'{repo_id}' is not a valid repository id")
        case hub_errors.OfflineModeIsEnabled():
            return HubUnreachableError(
                f"'{repo_id}' is not in the cache and HF_HUB_OFFLINE forbids to fetch it"
            )
        case hub_errors.LocalEntryNotFoundError() | hub_errors.IncompleteSnapshotError():
            return HubUnreachableError(
                f"'{repo_id}' is not complete in the cache and the hub cannot be reached: "
                f"{_first_line(exc)}"
            )
        case hub_errors.HfHubHTTPError():
            return HubUnreachableError(f"the hub refused '{repo_id}': {_first_line(exc)}")
        case OSError() if exc.filename is not None:
            return LoadFailedError(f"'{repo_id}' cannot be stored: {exc}")
        case _:
            return HubUnreachableError(f"'{repo_id}' cannot be fetched: {_first_line(exc)}")


def _first_line(exc: Exception) -> str:
    return next(iter(str(exc).splitlines()), type(exc).__name__)[:300]
