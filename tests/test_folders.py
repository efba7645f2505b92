"""Folders of this machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from emoray.errors import StorageError
from emoray.folders import private_folder


def test_the_private_folder_is_this_users_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    number = 4_000_000 + os.getpid()
    place = Path(f"/tmp/emoray-{number}")
    monkeypatch.setattr("emoray.folders.os.getuid", lambda: number)
    try:
        with pytest.raises(StorageError, match="be yours: remove it"):
            private_folder()  # made by the one who runs this test, who is somebody else
    finally:
        place.rmdir()
