"""Source: picture files in folders, with a class by folder or by name, and maybe captions.

ImageNet's layout is a folder per class; ADM's is `ClassID_ImgID.jpg` anywhere below a folder. The
caption of `a.jpg` is `a.txt` beside it.
"""

import hashlib
import posixpath
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from pyarrow import fs

from pipelines.class_names import class_of
from pipelines.rows import Reason, Refusal, Row
from pipelines.shards import Unit
from pipelines.sources.listed import read_picture
from pipelines.stages.read_shard import PICTURES, encodable
from udiff.data.storage import Folder

_HERE = "."
Sizes = dict[str, int]


@dataclass(frozen=True)
class Files:
    """Pictures below a folder; a unit is a slice of the sorted listing of one of its folders."""

    folder: Folder
    classes: Literal["folders", "names"] = "folders"
    """Where the class is read: the folder right below `folder`, or the file's name up to `_`."""
    class_names: tuple[str, ...] = ()
    _last: dict[str, tuple[list[str], Sizes]] = field(default_factory=dict, compare=False)
    """Pictures of the folder that was listed last, and what is beside them."""

    @classmethod
    def below(cls, folder: Folder, classes: Literal["folders", "names"]) -> "Files":
        """Find the classes of a folder.

        Raises:
            FileNotFoundError: there is no such folder, or no picture in it.
        """
        if not folder.exists():
            raise FileNotFoundError(f"there is no input folder {folder}")
        if classes == "folders":
            return cls(folder, classes, tuple(_folders(folder)))
        pictures = _pictures(_sizes(folder, _HERE))
        return cls(folder, classes, tuple(sorted({class_of(path) for path in pictures})))

    def fingerprints(self) -> dict[str, str]:
        """Tell the listing of each folder, with sizes, from another."""
        by_folder = self.classes == "folders" and self.class_names
        parts = self.class_names if by_folder else (_HERE,)
        listings = {part: _sizes(self.folder, part) for part in parts}
        found = {part: _fingerprint(sizes) for part, sizes in listings.items() if sizes}
        if not any(_pictures(sizes) for sizes in listings.values()):
            raise FileNotFoundError(f"there are no pictures below {self.folder}")
        return found

    def cut(self, output: Folder, name: str, fingerprint: str, num_rows: int) -> list[Unit]:
        """Cut the listing of a folder."""
        sizes = _sizes(self.folder, name)
        if _fingerprint(sizes) != fingerprint:
            raise ValueError(f"the files below {self.folder}/{name} have just changed")
        count = len(_pictures(sizes))
        stem = "files" if name == _HERE else name
        return [
            Unit(
                name=f"{stem}-{number:05d}",
                source=name,
                num_samples=min(num_rows, count - start),
                start=start,
                stop=min(start + num_rows, count),
            )
            for number, start in enumerate(range(0, count, num_rows))
        ]

    def read(self, unit: Unit) -> Iterator[Row]:
        """Name the pictures of a unit.

        Writes: key and source (path of the picture), path, text (path of its caption, or None).
        """
        if unit.source not in self._last:  # the next unit is often of the same folder
            self._last.clear()
            sizes = _sizes(self.folder, unit.source)
            self._last[unit.source] = _pictures(sizes), sizes
        pictures, sizes = self._last[unit.source]
        paths = pictures[unit.start : unit.stop]
        if len(paths) != unit.num_samples:
            raise ValueError(f"files below {self.folder}/{unit.source} are gone since it began")
        for path in paths:
            text = f"{posixpath.splitext(path)[0]}.txt"
            name = path.encode("utf-8", "backslashreplace").decode()
            row = {"key": posixpath.splitext(name)[0], "source": name}
            yield {**row, "path": path, "text": text if text in sizes else None}

    def take(self, row: Row) -> Row:
        """Read a picture and its caption, and number its class.

        Reads: path, text.
        Writes: file; caption; label, or None where there are no classes.
        Refuses: files that are gone, empty, or no text.
        """
        path = row["path"]
        name = path.split("/")[0] if self.classes == "folders" else class_of(path)
        return {
            "key": row["key"],
            "source": row["source"],
            "file": read_picture(self.folder, path),
            "caption": _caption(self.folder, row["text"]),
            "label": self.class_names.index(name) if name in self.class_names else None,
        }


def holds_files(folder: Folder) -> bool:
    """Tell whether there is anything below a folder."""
    return bool(folder.filesystem.get_file_info(fs.FileSelector(folder.path)))


def _caption(folder: Folder, path: str | None) -> str:
    if path is None:
        return ""
    try:
        return encodable(folder.read(path).decode("utf-8-sig")).strip()
    except UnicodeDecodeError as error:
        raise Refusal(Reason.BAD_TEXT, error) from error


def _folders(folder: Folder) -> list[str]:
    infos = folder.filesystem.get_file_info(fs.FileSelector(folder.path))
    return sorted(info.base_name for info in infos if info.type == fs.FileType.Directory)


def _sizes(folder: Folder, name: str) -> Sizes:
    """List the files below a folder by their paths relative to `folder`, with their sizes."""
    place = folder if name == _HERE else folder / name
    selector = fs.FileSelector(place.path, recursive=True)
    infos = folder.filesystem.get_file_info(selector)
    start = len(folder.path) + 1
    return {info.path[start:]: info.size for info in infos if info.type == fs.FileType.File}


def _pictures(paths: Iterable[str]) -> list[str]:
    """Select the pictures, in the order of a recursive listing with sorted entries."""
    pictures = (path for path in paths if path.rpartition(".")[2].lower() in PICTURES)
    return sorted(pictures, key=lambda path: path.split("/"))


def _fingerprint(sizes: Sizes) -> str:
    listing = "\n".join(f"{path}\t{size}" for path, size in sorted(sizes.items()))
    return hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()
