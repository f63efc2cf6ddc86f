"""What pictures can be read from: a source gives units of work, and the rows of each."""

from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

from pipelines.rows import Row
from pipelines.shards import Unit
from pipelines.sources.files import Files, holds_files
from pipelines.sources.listed import Listed
from pipelines.sources.tables import Tables
from pipelines.sources.tars import Tars
from udiff.data.manifest import DATA, PLAN
from udiff.data.storage import Folder, open_file_or_folder, open_folder

Kind = Literal["tar", "json", "parquet", "folders", "names"]
"""Web shards; a list of files; tables of pictures; a folder per class; `ClassID_ImgID` names."""

_EXTENSIONS = {"json": (".json", ".jsonl"), "parquet": (".parquet",)}


class Source(Protocol):
    """Pictures with captions and labels; small enough to be sent to every actor."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the labels that the source itself gives; () where it gives none."""
        ...

    def fingerprints(self) -> dict[str, str]:
        """Per file of the input, in order, what tells its content from another's.

        Raises:
            FileNotFoundError: there is no input, or an incomplete one.
        """
        ...

    def cut(self, output: Folder, name: str, fingerprint: str, num_rows: int) -> list[Unit]:
        """Cut a file of the input into units of about `num_rows` rows; called in a Ray task.

        What it takes a pass over the file to know is kept in the output's index.

        Raises:
            ValueError: the file is damaged.
        """
        ...

    def read(self, unit: Unit) -> Iterator[Row]:
        """Give the rows of a unit, each with key, source and whatever `take` needs."""
        ...

    def take(self, row: Row) -> Row:
        """Stage.

        Writes: file (bytes of the picture); caption ("" for none); label as it is written, or None;
        metadata (mapping of what else is known of it), where there is any.
        Refuses: a missing or empty picture, text that cannot be read.
        """
        ...


def open_source(location: str, kind: Kind | None = None, *, pictures: str = "") -> Source:
    """Open what is at a path or bucket URI.

    Args:
        location: a folder, or the file of a list or table.
        kind: found by what is there where it is left open.
        pictures: folder that the paths in a list are relative to, if not the list's own.

    Raises:
        FileNotFoundError: there is nothing, or nothing of that kind.
        ValueError: a table without pictures, or a cache.
    """
    if not open_folder(location).exists():
        raise FileNotFoundError(f"there is no input folder {open_folder(location)}")
    folder, file = open_file_or_folder(location)
    names = (file,) if file else folder.names()
    kind = kind or _detect(folder, names)
    if file and kind not in _EXTENSIONS:
        raise ValueError(f"{location} is a file: give its folder")
    if kind == "tar":
        return Tars(folder)
    if kind in ("folders", "names"):
        return Files.below(folder, kind)
    found = [name for name in names if name.endswith(_EXTENSIONS[kind])]
    if not found:
        raise FileNotFoundError(f"{location} holds no {' or '.join(_EXTENSIONS[kind])}")
    if kind == "parquet":
        return Tables.of(folder, found)
    if len(found) > 1:
        raise ValueError(f"{location} holds {len(found)} lists ({', '.join(found)}): name one")
    return Listed(folder, found[0], open_folder(pictures) if pictures else folder)


def _detect(folder: Folder, names: Sequence[str]) -> Kind:
    """Guess: tars come with parquet files and JSON beside them, so they go first."""
    if any(name.endswith(".tar") for name in names):
        return "tar"
    if PLAN in names:
        raise ValueError(f"{folder} is a cache itself; its pictures are in {folder / DATA}")
    kinds: tuple[Kind, ...] = ("parquet", "json")
    for kind in kinds:
        if any(name.endswith(_EXTENSIONS[kind]) for name in names):
            return kind
    return "folders" if holds_files(folder) else "tar"
