"""Folders of this machine: emoray's cache, this user's own, and where Ray keeps its files."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from emoray.errors import StorageError


def cache_folder() -> Path:
    """Where this machine keeps what can be made again (tokens, exports): `$EMORAY_CACHE`, else `~/.cache/emoray`."""
    return Path(os.environ.get("EMORAY_CACHE") or Path.home() / ".cache" / "emoray")


def private_folder() -> Path:
    """A folder of this user's alone, where processes of this machine find one another; its path is short, for sockets.

    Raises:
        StorageError: someone else has made it.
    """
    folder = Path("/tmp") / f"emoray-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise StorageError(f"{folder}: must be a folder that its owner alone may enter, and be yours: remove it")
    return folder


def ray_temp() -> str:
    """The folder below which Ray keeps sessions, sockets and spilled data, by Ray's rule (`ray._common.utils`)."""
    return os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
