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

from jobs.cluster import plan_and_make
from jobs.console import make_parser, run_job
from jobs.options import adder, take
from pipelines.download import DownloadSettings, make_shards, plan_download
from pipelines.schedule import FailedUnitsError, PrepareReport
from pipelines.stages.fetch import FetchSettings
from pipelines.url_list import Columns


def download(settings: DownloadSettings) -> PrepareReport:
    """Download, or finish a download, on the running Ray or one of its own."""
    return plan_and_make(settings, plan_download, make_shards)


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and download."""
    options = vars(_parser().parse_args(arguments))
    return run_job(lambda: _print(download(_settings(options))), failures=(FailedUnitsError,))


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("jobs.download", __doc__)
    add = adder(parser, DownloadSettings)
    add("input", "list of URLs, or folder of lists; path or bucket URI")
    add("output", "folder or bucket URI of the shards")
    for name, about in _COLUMNS.items():
        parser.add_argument(f"--{name}-column", default="", help=about)
    keep = "other columns that go along; None for all"
    adder(parser, Columns)("keep", keep, metavar="A,B", type=_words)
    add("shard-rows", "URLs of a shard", type=int)
    add("workers", "processes; None for as many as the cluster has CPUs", type=int)
    add = adder(parser, FetchSettings)
    add("timeout-s", "seconds for one try of one picture", type=float)
    add("retries", "tries after the first, where a failure may pass", type=int)
    add("pause-s", "seconds before the first retry, then doubled", type=float)
    add("deadline-s", "seconds for a shard; what is not there by then has failed", type=float)
    add("connections", "at a time, of one worker", type=int)
    add("connections-per-host", "at a time, of one worker to one host", type=int)
    add("max-bytes", "of one picture", type=int)
    add("user-agent", "what hosts are told")
    add("agent-name", "whose directives in X-Robots-Tag count beside those for all")
    opt_outs = "directives in X-Robots-Tag that forbid the use of a picture"
    add("opt-outs", opt_outs, metavar="A,B", type=_words)
    networks = "not public, but allowed: 10.0.0.0/8,..."
    add("allowed-networks", networks, metavar="A,B", type=_words)
    return parser


_COLUMNS = {
    "url": "where it is none of the known names",
    "caption": "where it is none of the known names",
    "sha256": "refuse pictures whose hash is not the listed one",
}


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _settings(options: dict[str, Any]) -> DownloadSettings:
    for name in _COLUMNS:
        options[name] = options.pop(f"{name}_column")
    columns, fetch = take(options, Columns), take(options, FetchSettings)
    return DownloadSettings(**options, columns=columns, fetch=fetch)


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
