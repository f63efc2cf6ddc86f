"""Download pictures from lists of URLs into web shards, in img2dataset's layout.

    python -m jobs.download --input URLS.parquet --output SHARDS
    python -m jobs.prepare pictures --input SHARDS --output PICTURES --size 256

Lists are parquet, CSV, TSV, JSON lines or plain text, on local disk or in a bucket. Columns of
LAION, Re-LAION, COYO, DataComp and CC12M are found by themselves. Every URL ends as a picture or as
a row with the reason why there is none. Killed at any moment and started again with the same
arguments, it goes on where it was.
Exit status: 0 done, 1 some shards failed (start again to retry them), 2 wrong arguments or input.
"""

import argparse
import sys
from typing import Any

from jobs.cluster import connect
from jobs.console import make_parser, run_job
from pipelines.download import DownloadSettings, make_shards, plan_download
from pipelines.schedule import FailedUnitsError, PrepareReport
from pipelines.stages.fetch import FetchSettings
from pipelines.url_list import Columns
from udiff.settings import Settings


def download(settings: DownloadSettings) -> PrepareReport:
    """Download, or finish a download, on the running Ray or one of its own."""
    plan = plan_download(settings)
    connect()
    return make_shards(settings, plan)


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and download."""
    options = vars(_parser().parse_args(arguments))
    return run_job(lambda: _print(download(_settings(options))), failures=(FailedUnitsError,))


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("jobs.download", __doc__)
    add = parser.add_argument
    add("--input", required=True, help="list of URLs, or folder of lists; path or bucket URI")
    add("--output", required=True, help="folder or bucket URI of the shards")
    add("--url-column", default="", help="where it is none of the known names")
    add("--caption-column", default="", help="where it is none of the known names")
    add("--sha256-column", default="", help="refuse pictures whose hash is not the listed one")
    add("--keep", metavar="A,B", type=_words, help="other columns that go along (default: all)")
    add("--shard-rows", type=int, help=_default(DownloadSettings, "shard_rows", "URLs of a shard"))
    add("--workers", type=int, help="processes (default: as many as there are CPUs)")
    for name, kind, about in _FETCH:
        option = f"--{name.replace('_', '-')}"
        add(option, type=kind, metavar="X", help=_default(FetchSettings, name, about))
    return parser


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


_FETCH: tuple[tuple[str, Any, str], ...] = (
    ("timeout_s", float, "seconds for one try of one picture"),
    ("retries", int, "tries after the first, where a failure may pass"),
    ("pause_s", float, "seconds before the first retry, then doubled"),
    ("deadline_s", float, "seconds for a shard; what is not there by then has failed"),
    ("connections", int, "at a time, of one worker"),
    ("connections_per_host", int, "at a time, of one worker to one host"),
    ("max_bytes", int, "of one picture"),
    ("user_agent", str, "what hosts are told"),
    ("agent_name", str, "whose directives in X-Robots-Tag count beside those for all"),
    ("opt_outs", _words, "directives in X-Robots-Tag that forbid the use of a picture"),
    ("allowed_networks", _words, "not public, but allowed: 10.0.0.0/8,..."),
)


def _default(settings: type[Settings], name: str, about: str) -> str:
    default = settings.model_fields[name].default
    shown = ",".join(default) or "none" if isinstance(default, tuple) else default
    return f"{about} (default: {shown})"


def _settings(options: dict[str, Any]) -> DownloadSettings:
    """Sort the options that were given into the groups of settings; the others keep defaults."""
    given = {name: value for name, value in options.items() if value is not None}
    fetch = {name: given.pop(name) for name, _, _ in _FETCH if name in given}
    columns = {name: given.pop(f"{name}_column") for name in ("url", "caption", "sha256")}
    if "keep" in given:
        columns["keep"] = given.pop("keep")
    return DownloadSettings(**given, columns=Columns(**columns), fetch=FetchSettings(**fetch))


def _print(report: PrepareReport) -> None:
    manifest = report.manifest
    failed = ", ".join(f"{count} {reason}" for reason, count in manifest.rejected.items())
    print(
        f"{manifest.images_in} URLs, {manifest.num_rows} downloaded into {len(manifest.files)} "
        f"shards, {sum(manifest.rejected.values())} failed ({failed or 'none'}); "
        f"{report.units_done} shards in {report.wall_s:.1f} s, {report.images_per_s:.0f} URLs/s"
    )


if __name__ == "__main__":
    sys.exit(main())
