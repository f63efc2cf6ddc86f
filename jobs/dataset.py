"""Make a dataset from a list of URLs, all the way to what training reads.

    python -m jobs.dataset --urls URLS.parquet --output DATASET pictures.size=256 \\
        pictures.filters.max_watermark=0.5 recaption.model=CAPTIONER latents.autoencoder=VAE

Steps: download -> pictures -> dedup -> recaption -> latents, each into the folder of its name below
--output. A key `<step>.<setting>=<value>` changes a setting of a step (`--help` of `jobs.download`
and `jobs.prepare` lists them); --settings takes the same keys from a YAML file. Pictures are
captioned where there is a `recaption.model`, and encoded where there are keys of `latents`;
`dedup=false` keeps duplicates. Killed at any moment and started again with the same arguments, it
goes on where it was. Exit status: 0 done, 1 some units failed (start again to retry them), 2 wrong
arguments or input.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from jobs.console import UserError, make_parser, one_line, run_job
from jobs.download import download
from jobs.prepare import prepare_dedup, prepare_latents, prepare_pictures, prepare_recaption
from pipelines.dedup import DedupSettings
from pipelines.download import DownloadSettings
from pipelines.latents_settings import LatentsSettings
from pipelines.pictures import PicturesSettings
from pipelines.recaption import RecaptionSettings
from pipelines.schedule import FailedUnitsError, PrepareReport
from udiff.recipe import merge_keys, parse_override
from udiff.settings import Settings


@dataclass(frozen=True)
class _Kind:
    settings: type[Settings]
    run: Callable[[Any], PrepareReport]


_KINDS = {
    "download": _Kind(DownloadSettings, download),
    "pictures": _Kind(PicturesSettings, prepare_pictures),
    "dedup": _Kind(DedupSettings, prepare_dedup),
    "recaption": _Kind(RecaptionSettings, prepare_recaption),
    "latents": _Kind(LatentsSettings, prepare_latents),
}
_WITHOUT_KEYS = ("download", "pictures", "dedup")
"""Steps that are taken even where nothing is said of them."""


@dataclass(frozen=True)
class Step:
    """One job of the chain, and all of its settings."""

    name: str
    settings: Settings

    def run(self) -> PrepareReport:
        """Do what is left of it."""
        return _KINDS[self.name].run(self.settings)


def plan_dataset(urls: str, output: str, keys: Mapping[str, Any]) -> list[Step]:
    """Check the settings of all steps before the first begins.

    Args:
        urls: list of URLs, or folder of lists.
        output: folder or bucket URI, with a folder for each step.
        keys: settings of each step, by its name; false leaves a step out.

    Raises:
        UserError: a step or a setting that there is not, or a value that is not allowed.
    """
    if unknown := sorted(set(keys) - set(_KINDS)):
        raise UserError(f"{unknown[0]} is no step; the steps are {', '.join(_KINDS)}")
    steps: list[Step] = []
    source = urls
    for name in _KINDS:
        wanted = keys.get(name, {} if name in _WITHOUT_KEYS else False)
        if wanted is False:
            continue
        steps.append(Step(name, _settings(name, wanted, source, _below(output, name))))
        source = _below(output, name)
    return steps


def run_dataset(steps: Sequence[Step]) -> dict[str, PrepareReport]:
    """Run the steps, each on what the one before it made.

    Raises:
        FailedUnitsError: a step could not make all of its units; later ones were not begun.
    """
    return {step.name: step.run() for step in steps}


def _settings(name: str, keys: Any, source: str, output: str) -> Settings:
    if not isinstance(keys, Mapping):
        raise UserError(f"{name} must be settings or false, got {keys!r}")
    if taken := sorted({"input", "output"} & set(keys)):
        raise UserError(f"{name}.{taken[0]} follows from --urls and --output")
    try:
        return _KINDS[name].settings.model_validate({**keys, "input": source, "output": output})
    except ValidationError as error:
        raise UserError(f"{name}: {one_line(error)}") from None


def _below(location: str, name: str) -> str:
    """Name a folder below a folder or bucket URI, whose options stay at the end."""
    path, mark, options = location.partition("?")
    return f"{path.rstrip('/')}/{name}{mark}{options}"


def _read_keys(file: Path | None, overrides: Sequence[str]) -> dict[str, Any]:
    keys = yaml.safe_load(file.read_text()) if file else {}
    if not isinstance(keys, dict):
        raise UserError(f"{file} must hold the steps and their settings")
    return reduce(merge_keys, map(parse_override, overrides), keys)


def _print(reports: Mapping[str, PrepareReport]) -> None:
    table = Table("step", "rows in", "out", "rejected", "units", "seconds", "why rejected")
    for name, report in reports.items():
        manifest = report.manifest
        reasons = ", ".join(f"{count} {reason}" for reason, count in manifest.rejected.items())
        rejected = sum(manifest.rejected.values())
        counts = (manifest.images_in, manifest.num_rows, rejected, report.units_done)
        table.add_row(name, *map(str, counts), f"{report.wall_s:.1f}", reasons)
    Console().print(table)


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and make the dataset."""
    options = _parser().parse_args(arguments)

    def job() -> None:
        keys = _read_keys(options.settings, options.keys)
        _print(run_dataset(plan_dataset(options.urls, options.output, keys)))

    return run_job(job, failures=(FailedUnitsError,))


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("jobs.dataset", __doc__)
    add = parser.add_argument
    add("--urls", required=True, help="list of URLs, or folder of lists; path or bucket URI")
    add("--output", required=True, help="folder or bucket URI of the dataset")
    add("--settings", type=Path, help="YAML file with the settings of the steps")
    add("keys", nargs="*", metavar="STEP.KEY=VALUE", help="settings of the steps")
    return parser


if __name__ == "__main__":
    sys.exit(main())
