"""A folder on any filesystem that pyarrow can write: local paths, NFS, s3://, gs://."""

from __future__ import annotations

import errno
import glob
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from emoray.errors import StorageError

_STAGING, _OLD, _WRITING = HALF_DONE = (".staging-", ".old-", ".writing-")
"""How the names of files and folders begin that a writer hasn't finished."""
_PASSING = {
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ECONNRESET,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.EAGAIN,
}
_LASTING = ("ACCESS_DENIED", "NO_SUCH_BUCKET", "INVALID_ACCESS_KEY_ID", "SIGNATURE", "UNRECOGNIZED_CLIENT", "not found")


def is_uri(location: str) -> bool:
    """True for `s3://bucket/runs`, False for a path."""
    return "://" in location


def absolute(location: str) -> str:
    """Paths made absolute, URIs as they are: workers and other nodes don't share the driver's folder."""
    return location if is_uri(location) else str(Path(location).expanduser().resolve())


def split_options(location: str) -> tuple[str, str]:
    """The place itself, and a URI's options as pyarrow takes them, e.g. `?region=eu-west-1` (else nothing)."""
    place, mark, options = location.partition("?") if is_uri(location) else (location, "", "")
    return place.rstrip("/") or "/", mark + options


def below(location: str, name: str) -> str:
    """The place of that name in a folder."""
    place, options = split_options(location)
    return f"{place.rstrip('/')}/{name}{options}"


def split_name(location: str) -> tuple[str, str]:
    """The folder that a place is in, and its name there."""
    place, options = split_options(location)
    folder, _, name = place.rpartition("/")
    return (folder or "/") + options, name


def may_pass(error: Exception, remote: bool = False) -> bool:
    """Whether a failed operation may succeed a moment later.

    safetensors names the errno in its words alone; object stores name none, but a reason in capitals.
    """
    number = getattr(error, "errno", None)
    if number is None and (named := re.search(r"os error (\d+)", str(error))):
        number = int(named[1])
    if remote and number is None:
        return not any(reason in str(error) for reason in _LASTING)
    return number in _PASSING


class Storage:
    """A folder, by path or URI, with the few operations that a run needs.

    Files appear whole or not at all: on a local filesystem through a rename, on object stores by nature.

    Args:
        location: absolute path or URI of the folder; it needn't exist.

    Raises:
        StorageError: for URIs that pyarrow doesn't know, and for every failed operation.
    """

    def __init__(self, location: str) -> None:
        from pyarrow import fs

        self.location = "".join(split_options(location))
        if is_uri(location) and ":" in location.partition("://")[2].partition("/")[0].rpartition("@")[0]:
            raise StorageError(
                f"{location.partition('://')[0]}://...: holds a password, which would be kept with every model, and "
                "in logs: name it by the environment (AWS_ACCESS_KEY_ID, ...), a profile or a role"
            )
        try:
            if is_uri(location):
                self._fs, self._root = fs.FileSystem.from_uri(self.location)
            else:
                self._fs, self._root = fs.LocalFileSystem(), self.location
        except (ValueError, OSError, NotImplementedError) as error:
            raise StorageError(f"{location}: pyarrow can't open this storage ({error})") from None
        self.local_path = Path(self._root) if isinstance(self._fs, fs.LocalFileSystem) else None
        """The folder as a local path; None on object stores."""

    def __repr__(self) -> str:
        return f"Storage({self.location!r})"

    def __truediv__(self, name: str) -> Storage:
        return Storage(below(self.location, name))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    @contextmanager
    def _errors(self, name: str, doing: str) -> Iterator[None]:
        """Failures of the filesystem, told as one sentence with the place."""
        place = below(self.location, name) if name else self.location
        try:
            yield
        except FileNotFoundError:
            raise StorageError(f"{place}: no such file") from None
        except OSError as error:
            passing = may_pass(error, self.local_path is None)
            raise StorageError(f"{place}: can't be {doing}: {error}", passing) from error

    def exists(self, name: str = "") -> bool:
        from pyarrow import fs

        with self._errors(name, "looked up"):
            return bool(self._fs.get_file_info(self._path(name)).type != fs.FileType.NotFound)

    def is_file(self, name: str = "") -> bool:
        from pyarrow import fs

        with self._errors(name, "looked up"):
            return bool(self._fs.get_file_info(self._path(name)).type == fs.FileType.File)

    def names(self, folder: str = "") -> list[str]:
        """Names in a folder, sorted; empty where there is no such folder."""
        from pyarrow import fs

        with self._errors(folder, "listed"):
            infos = self._fs.get_file_info(fs.FileSelector(self._path(folder), allow_not_found=True))
            return sorted(info.base_name for info in infos)

    def files(self, folder: str = "") -> dict[str, int]:
        """All files below a folder: path relative to it -> size in bytes."""
        from pyarrow import fs

        base = self._path(folder)
        with self._errors(folder, "listed"):
            infos = self._fs.get_file_info(fs.FileSelector(base, allow_not_found=True, recursive=True))
        return {info.path[len(base) :].lstrip("/"): info.size for info in infos if info.type == fs.FileType.File}

    def read(self, name: str) -> bytes:
        with self._errors(name, "read"), self._fs.open_input_stream(self._path(name), compression=None) as stream:
            return bytes(stream.read())

    def read_text(self, name: str) -> str:
        return self.read(name).decode("utf-8")

    @contextmanager
    def opened(self, name: str = "") -> Iterator[Any]:
        """A file to read from any place in it; what is read may fail as the other operations do."""
        with self._errors(name, "read"), self._fs.open_input_file(self._path(name)) as stream:
            yield stream

    @contextmanager
    def growing(self, name: str) -> Iterator[Any]:
        """A stream into a file of any size, which appears whole at the end, or not at all where an error comes."""
        if self.local_path is None:
            with self._errors(name, "written"):
                self._fs.create_dir(os.path.dirname(self._path(name)), recursive=True)
            opened = False
            try:
                with self._errors(name, "written"), self._fs.open_output_stream(self._path(name), None) as stream:
                    opened = True
                    yield stream
            except BaseException:
                if opened:  # closing it has made what was written so far visible; else what was there is there still
                    with suppress(StorageError):
                        self.delete(name)
                raise
            return
        path = self.local_path / name
        temporary = path.parent / f"{_WRITING}{path.name[:100]}-{uuid.uuid4().hex}"
        try:
            with self._errors(name, "written"):
                path.parent.mkdir(parents=True, exist_ok=True)
                with temporary.open("xb") as stream:
                    yield stream
                    stream.flush()
                    os.fsync(stream.fileno())
                os.replace(temporary, path)
        finally:
            with suppress(OSError):  # mostly, that it is in its place
                temporary.unlink()

    def write(self, name: str, content: bytes | str, *, exclusive: bool = False) -> None:
        """Write a small file whole.

        Args:
            exclusive: fail where the file exists. Atomic on local filesystems only.

        Raises:
            FileExistsError: where `exclusive` found one.
        """
        data = content.encode("utf-8") if isinstance(content, str) else content
        if exclusive and self.local_path is not None:
            with self._errors(name, "written"):
                written = _write_new(self.local_path / name, data)
            if not written:  # an answer, not a failure of the filesystem
                raise FileExistsError(name)
            return
        if exclusive and self.exists(name):
            raise FileExistsError(name)
        with self.growing(name) as stream:
            stream.write(data)

    def must_be_writable(self) -> None:
        """Find out before work starts whether the folder can be made and written; nothing is left there.

        Raises:
            StorageError: with what is in the way.
        """
        if self.local_path is None:
            probe = f".writable-{uuid.uuid4().hex}"
            self.write(probe, b"")
            self.delete(probe)
            return
        for place in (self.local_path, *self.local_path.parents):
            if place.exists() or place.is_symlink():
                break
        if not place.is_dir():
            raise StorageError(f"{self.location}: can't be written: {place} is not a folder; choose another place")
        if not os.access(place, os.W_OK | os.X_OK):
            raise StorageError(f"{self.location}: can't be written: you may not write in {place}; choose another place")

    def delete(self, folder: str) -> None:
        """Remove a folder or file with all it holds; nothing happens where there is none."""
        from pyarrow import fs

        with self._errors(folder, "deleted"):
            kind = self._fs.get_file_info(self._path(folder)).type
            if kind == fs.FileType.Directory:
                self._fs.delete_dir(self._path(folder))
            elif kind == fs.FileType.File:
                self._fs.delete_file(self._path(folder))

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """An empty local folder to fill before `publish`; on the same filesystem where that is local."""
        with self._errors("", "written"):
            parent = Path(tempfile.gettempdir()) if self.local_path is None else self.local_path
            stage = parent / f"{_STAGING}{uuid.uuid4().hex}"  # not mkdtemp, whose folders only their owner can read
            stage.mkdir(parents=True)
        try:
            yield stage
        finally:
            shutil.rmtree(stage, ignore_errors=True)

    def sweep(self) -> None:
        """Remove what a writer that was killed left half done."""
        if self.local_path is None:
            return
        for pattern in HALF_DONE:
            for path in self.local_path.glob(f"{pattern}*"):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)

    def sync(self, stage: Path) -> None:
        """Have all of a staged folder on disk, so that a power cut can't tear it. Object stores need no such thing."""
        if self.local_path is not None:
            with self._errors("", "written"):
                for path in (*stage.rglob("*"), stage):
                    _sync(path)

    def sweep_file(self, name: str) -> None:
        """As `sweep`, for one file that `growing` was to write, in a folder that is not ours alone."""
        if self.local_path is not None:
            for path in self.local_path.glob(f"{_WRITING}{glob.escape(name[:100])}-*"):
                path.unlink(missing_ok=True)

    def publish(self, stage: Path, name: str, last: str) -> None:
        """Make a staged folder visible as `name`; an existing one is replaced. Call `sync` before.

        On object stores the files go up one by one, `last` at the end, so its presence means completeness.
        """
        with self._errors(name, "written"):
            if self.local_path is not None:
                target = self.local_path / name
                target.parent.mkdir(parents=True, exist_ok=True)
                if target.exists():
                    old = Path(tempfile.mkdtemp(prefix=_OLD, dir=self.local_path))
                    target.rename(old / "folder")
                    stage.rename(target)
                    shutil.rmtree(old, ignore_errors=True)
                else:
                    stage.rename(target)
                _sync(target.parent)
                return
            self.delete(name)  # files that only the old one had would stay
            paths = sorted(p.relative_to(stage).as_posix() for p in stage.rglob("*") if p.is_file())
            for path in sorted(paths, key=lambda p: p == last):
                with (stage / path).open("rb") as reader, self.growing(f"{name}/{path}") as stream:
                    shutil.copyfileobj(reader, stream, 1 << 20)

    def download(self, target: Path) -> None:
        """Copy the whole folder to a local one."""
        for name in self.files():
            with self._errors(name, "read"), self._fs.open_input_stream(self._path(name), compression=None) as stream:
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                with (target / name).open("wb") as writer:
                    shutil.copyfileobj(stream, writer, 1 << 20)


def _write_new(path: Path, data: bytes) -> bool:
    """Write a file through a temporary one beside it; False where there is one in its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{_WRITING}{uuid.uuid4().hex}"  # not mkstemp, whose files only their owner can read
    try:
        with temporary.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        try:
            os.link(temporary, path)  # fails where the path exists, unlike a rename
        except FileExistsError:
            return False
        except OSError:  # SMB, exFAT and some FUSE filesystems have no hard links
            try:
                path.open("xb").close()
            except FileExistsError:
                return False
            os.replace(temporary, path)
        return True
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Ask the kernel to bring a file or folder to disk, so that a power cut can't tear it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
