"""Folders on a local disk or in a bucket, through pyarrow: nothing half-written is ever visible."""

import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import pyarrow as pa
from pyarrow import fs

_TEMPORARY_SUFFIX = ".tmp"

Content: TypeAlias = bytes | pa.Buffer | Path
"""What a file is to hold: itself, or a file of this machine of which it is a copy."""


@dataclass(frozen=True)
class Folder:
    """A folder and the filesystem that it is on; small enough to be sent to every actor."""

    filesystem: fs.FileSystem
    path: str
    options: str = ""
    """Query of the URI it was opened by."""

    def __truediv__(self, name: str) -> "Folder":
        return Folder(self.filesystem, f"{self.path}/{name}", self.options)

    def __str__(self) -> str:
        """Give the absolute path, or the URI without credentials; `open_folder` takes both."""
        if self._is_local:
            return self.path
        scheme = {"gcs": "gs"}.get(self.filesystem.type_name, self.filesystem.type_name)
        return f"{scheme}://{self.path}{self.options and '?'}{self.options}"

    @property
    def _is_local(self) -> bool:
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def exists(self, name: str = "") -> bool:
        """Tell whether there is a file or folder `name` in here, or this folder itself."""
        info = self.filesystem.get_file_info(f"{self.path}/{name}".rstrip("/"))
        return info.type != fs.FileType.NotFound

    def size(self, name: str) -> int:
        """Give the bytes of a file; 0 where there is none."""
        return self.filesystem.get_file_info(f"{self.path}/{name}").size or 0

    def names(self) -> tuple[str, ...]:
        """List the files of this folder by name, in order; none where it does not exist."""
        return tuple(name for name in self._all_names() if not _is_temporary(name))

    def _all_names(self) -> list[str]:
        selector = fs.FileSelector(self.path, allow_not_found=True)
        infos = self.filesystem.get_file_info(selector)
        return sorted(info.base_name for info in infos if info.type == fs.FileType.File)

    def open(self, name: str) -> pa.NativeFile:
        """Open a file for reading at any place."""
        return self.filesystem.open_input_file(f"{self.path}/{name}")

    def read(self, name: str) -> bytes:
        """Read a whole file."""
        with self.open(name) as file:
            return file.read()

    def write(self, name: str, data: bytes | pa.Buffer) -> None:
        """Write a whole file, which then has its new content or, after any failure, its old one.

        Several may write it at once: it is one of theirs, whole.
        """
        if self._is_local:
            _replace_local(Path(self.path, name), data)
            return
        # A stream that fails half-way publishes what it has, so everything goes in one call.
        with self.filesystem.open_output_stream(f"{self.path}/{name}") as stream:
            stream.write(data)

    def publish(self, files: Mapping[str, Content]) -> bool:
        """Write files that belong together, the last of which is their commit.

        On a local disk the first of several writers wins, whole: what it commits is never mixed
        with what another wrote. In a bucket, where pyarrow can put no file on the condition that
        there is none, the last wins: whoever has begun writes all its files, in the same order. The
        largest comes first: only from writers that are less apart than the others take can files
        be mixed.

        Returns:
            False where the commit was there already, and nothing was written.
        """
        commit = list(files)[-1]
        if self._is_local:
            return _publish_local(Path(self.path), files, commit)
        if self.exists(commit):
            return False
        for name, data in files.items():
            if isinstance(data, Path):
                with pa.memory_map(str(data)) as mapped:
                    self.write(name, mapped.read_buffer())
            else:
                self.write(name, data)
        return True

    def remove(self, name: str) -> None:
        """Delete a file, where there is one."""
        if self.exists(name):
            self.filesystem.delete_file(f"{self.path}/{name}")

    def remove_temporaries(self) -> None:
        """Delete what killed writers left here.

        Only for a folder in which everything wanted is written: a writer whose file vanishes under
        it writes it again.
        """
        for name in filter(_is_temporary, self._all_names()):
            with suppress(FileNotFoundError):  # its writer, or another job, has done it
                self.filesystem.delete_file(f"{self.path}/{name}")


def open_folder(location: str | Path) -> Folder:
    """Open a local path, or the URI of a bucket (`s3://`, `gs://`), which need not exist yet.

    Options go into the URI's query, as pyarrow reads them:
    `s3://bucket/cache?endpoint_override=127.0.0.1:9000&scheme=http`.
    """
    if "://" in str(location):
        filesystem, path = fs.FileSystem.from_uri(str(location))
        return Folder(filesystem, path.rstrip("/"), str(location).partition("?")[2])
    return Folder(fs.LocalFileSystem(), str(Path(location).expanduser().absolute()))


def open_file_or_folder(location: str) -> tuple[Folder, str]:
    """Open a folder, or the folder of a file together with the file's name; "" for a folder.

    Raises:
        FileNotFoundError: there is nothing.
    """
    there = open_folder(location)
    kind = there.filesystem.get_file_info(there.path).type
    if kind == fs.FileType.NotFound:
        raise FileNotFoundError(f"there is nothing at {there}")
    if kind != fs.FileType.File:
        return there, ""
    parent, _, name = there.path.rpartition("/")
    return Folder(there.filesystem, parent, there.options), name


def _replace_local(path: Path, data: bytes | pa.Buffer) -> None:
    temporary = _write_temporary(path, data)
    try:
        temporary.replace(path)
    except FileNotFoundError:  # another job, which found all done, has taken it away
        _replace_local(path, data)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _publish_local(folder: Path, files: Mapping[str, Content], commit: str) -> bool:
    written: dict[Path, Path] = {}
    try:
        for name, data in files.items():
            written[folder / name] = _write_temporary(folder / name, data)
        with _locked(folder):
            if (folder / commit).exists():
                return False
            for path, temporary in written.items():
                temporary.replace(path)
                _sync_folder(path.parent)
        return True
    finally:
        for temporary in written.values():
            temporary.unlink(missing_ok=True)


def _write_temporary(path: Path, data: Content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Workers of a killed job live on for a while, so two processes may write the same file.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{_TEMPORARY_SUFFIX}")
    try:
        with temporary.open("xb") as file:
            if isinstance(data, Path):
                with data.open("rb") as source:
                    shutil.copyfileobj(source, file)
            else:
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes out; a lock ends with the process that has it."""
    with (folder / f".lock{_TEMPORARY_SUFFIX}").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_temporary(name: str) -> bool:
    return name.startswith(".") and name.endswith(_TEMPORARY_SUFFIX)
