"""The memory that models were seen to take, kept on disk for the next placement.

A cache is made as large as there is room for; so what is kept of a model is its peak without the
cache, to which the next placement adds the cache that it wants.
"""

import logging
import os
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

import msgspec

# Models, each on a kind of device, that are remembered; the ones seen longest ago go first.
MAX_PEAKS = 512
MAX_FILE_BYTES = 1 << 20
# A peak that grew by less than this is not worth another write.
STEP_BYTES = 16 << 20

_logger = logging.getLogger(__name__)


class PeakKey(msgspec.Struct, kw_only=True, frozen=True):
    """What a peak was seen of: a model, as it was loaded, on a kind of device."""

    model_id: str
    dtype: str
    max_model_len: int | None
    device: str


class Peak(msgspec.Struct, kw_only=True, frozen=True):
    """The most that was seen, in bytes, without the cache."""

    key: PeakKey
    base_bytes: int


class _File(msgspec.Struct, kw_only=True, frozen=True):
    version: int
    peaks: list[Peak]


_VERSION = 1
_decoder = msgspec.json.Decoder(_File)
_encoder = msgspec.json.Encoder()


class Peaks:
    """The peaks known, and their file. `load` and `save` block: call them in a thread.

    A file that cannot be read is replaced, one that cannot be written costs a warning.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._peaks: dict[PeakKey, int] = {}
        self._lock = threading.Lock()
        self._is_failing = False

    def base_bytes(self, key: PeakKey) -> int:
        """Return what a model took beside its cache, 0 if it was never seen."""
        return self._peaks.get(key, 0)

    def note(self, key: PeakKey, base_bytes: int) -> bool:
        """Take note of what a model takes just now; return whether that is worth a save."""
        known = self._peaks.get(key, 0)
        if base_bytes < known + STEP_BYTES:
            return False
        with self._lock:
            self._peaks.pop(key, None)
            self._peaks[key] = base_bytes
            while len(self._peaks) > MAX_PEAKS:
                del self._peaks[next(iter(self._peaks))]
        return True

    def load(self) -> None:
        """Read the file, if there is one."""
        try:
            with self._path.open("rb") as file:
                raw = file.read(MAX_FILE_BYTES + 1)
            if len(raw) > MAX_FILE_BYTES:
                raise ValueError(f"it is over {MAX_FILE_BYTES} bytes")
            found = _decoder.decode(raw)
            if found.version != _VERSION:
                raise ValueError(f"it is of version {found.version}")
        except FileNotFoundError:
            return
        except (OSError, ValueError) as exc:
            _logger.warning(
                "learned memory peaks cannot be read and begin anew",
                extra={"file": str(self._path), "cause": str(exc)},
            )
            return
        with self._lock:
            self._peaks = {each.key: each.base_bytes for each in found.peaks[-MAX_PEAKS:]}

    def save(self) -> None:
        """Write the file, whole or not at all."""
        with self._lock:
            peaks = [Peak(key=key, base_bytes=value) for key, value in self._peaks.items()]
        body = _encoder.encode(_File(version=_VERSION, peaks=peaks))
        try:
            _replace(self._path, body)
        except OSError as exc:
            if not self._is_failing:
                _logger.warning(
                    "learned memory peaks cannot be written; they last until the neuron ends",
                    extra={"file": str(self._path), "cause": str(exc)},
                )
            self._is_failing = True
        else:
            self._is_failing = False


def _replace(path: Path, body: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        with suppress(OSError):
            Path(temporary).unlink()
        raise
