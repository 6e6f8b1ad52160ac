"""Locks of folders and stores, which fall with their process however it ends.

Where the file system has no `flock` (some shared ones), a marker file beside it takes its place, by the library
`filelock`: one that a process of this machine left is known to be stale, and one of another machine is taken for held.
"""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path
from typing import IO

from filelock import SoftFileLock, Timeout

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
PATIENCE_S = 60.0  # for a marker file, whose process may be gone on another machine


class LockedError(Exception):
    """Another process holds the lock."""


class Lock:
    """A lock that is held until `close`, or until the process ends.

    Args:
        path: made where it is not there.
        wait: for whoever holds it.

    Raises:
        LockedError: another process holds it, with `wait` a marker file for more than a minute.
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path, wait: bool = False) -> None:
        self._marker: SoftFileLock | None = None
        self._stream: IO[str] = path.open("a+")
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            self._stream.close()
            if error.errno not in NO_LOCKS:
                raise LockedError(f"another process holds {path}") from error
            marker = path.with_name(f"{path.name}.held")
            self._marker = SoftFileLock(marker, timeout=PATIENCE_S if wait else 0)
            try:
                self._marker.acquire()
            except Timeout as late:
                raise LockedError(f"another process holds {marker}; delete it if its machine is gone") from late

    def close(self) -> None:
        """Let go."""
        self._stream.close()
        if self._marker is not None:
            self._marker.release()


def is_held(path: Path) -> bool:
    """Whether a process holds a lock file."""
    if not path.exists():
        return False
    try:
        Lock(path).close()
    except (LockedError, OSError):
        return True
    return False
