"""Classes from file names, `ClassID_ImgID.jpg` anywhere below a folder, as ADM reads them."""

from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif")


def list_pictures(paths: Iterable[str]) -> list[str]:
    """Select the pictures, in the order of a recursive listing with sorted entries."""
    pictures = (path for path in paths if path.lower().endswith(_SUFFIXES))
    return sorted(pictures, key=lambda path: PurePosixPath(path).parts)


def class_of(path: str) -> str:
    """Read the class: the file's name up to its first underscore, or all of it."""
    return PurePosixPath(path).name.split("_")[0]


def number_classes(paths: Sequence[str]) -> list[int]:
    """Number each picture's class among the sorted classes; sorted as text, "10" before "2"."""
    classes = sorted({class_of(path) for path in paths})
    return [classes.index(class_of(path)) for path in paths]
