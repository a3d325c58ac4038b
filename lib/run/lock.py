"""One runner at a time in an outputs folder. The lock is the system's: it dies with its holder, however that one
dies."""

import contextlib
import fcntl
import os
import time
from pathlib import Path

from lib.errors import MissingError, StudyError


@contextlib.contextmanager
def locked(root: Path):
    """One runner at a time in an outputs folder; the second learns who has it."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        file = open(root / ".lock", "a+")  # noqa: SIM115 (held for the whole run)
    except OSError as error:
        found = f"cannot write there ({error.strerror})"
        raise MissingError(str(root), found, "a folder this user can write to", f"chmod -R u+w {root}") from None
    with file:
        if not _taken(file, root):
            file.seek(0)
            found = f"another runner works here (process {file.read().strip() or 'unknown'})"
            raise StudyError(str(root), found, "one runner at a time", "wait for it, or look at ./run_all.sh status")
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _taken(file, root: Path) -> bool:
    """Take the lock; again and again while it is only shared, for `status` tests it by holding it so for a moment."""
    for _ in range(200):
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        if running(root):
            return False
        time.sleep(0.05)
    return False


def running(root: Path) -> bool:
    """Whether a runner works in this outputs folder: it holds the lock (`locked`), which dies with it."""
    try:
        with open(root / ".lock") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:
        return False
