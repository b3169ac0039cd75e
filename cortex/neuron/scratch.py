"""Private folders for sockets and for files of one run.

They lie in the service's runtime directory where systemd gave one, else in the temporary one.

A neuron that is killed cannot remove its own, so the next one does. Each folder is locked by the
process that made it, and the kernel drops the lock when that process ends, however it ends.
"""

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from cortex.core.config import runtime_dir

PREFIX = "cortex-neuron-"
# Another process may sweep a folder away between its making and its locking.
MAX_ATTEMPTS = 5


class ScratchFolder:
    """A folder that only this user may enter (mode 0700); `close` removes it.

    Raises:
        OSError: none can be made.
    """

    def __init__(self) -> None:
        for _ in range(MAX_ATTEMPTS):
            self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=runtime_dir()))
            locked = _lock(self.path)
            if locked is not None:
                self._lock = locked
                return
        raise FileNotFoundError(f"{self.path} is removed as soon as it is made")

    def close(self) -> None:
        """Remove the folder and what is in it; harmless when it is closed already."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def sweep() -> None:
    """Remove the folders of processes that have ended without doing so."""
    for folder in Path(runtime_dir() or tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):
            locked = _lock(folder)
            if locked is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(locked)


def _lock(folder: Path) -> int | None:
    """Return a descriptor that holds a folder's lock, None where another process holds it.

    Raises:
        OSError: the folder is gone, no folder, or of another user.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        status = os.fstat(descriptor)
        if status.st_uid != os.geteuid():
            raise PermissionError(f"{folder} belongs to another user")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever had the lock before may have removed the folder with it.
        if os.path.samestat(status, folder.stat()):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None
