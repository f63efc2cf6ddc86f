"""Make the caches that training reads.

    python -m jobs.prepare pictures --input SHARDS --output PICTURES --size 256
    python -m jobs.prepare dedup --input PICTURES --output DEDUPED
    python -m jobs.prepare recaption --input DEDUPED --output RECAPTIONED --model CAPTIONER
    python -m jobs.prepare latents --input PICTURES --output LATENTS --autoencoder VAE

Killed at any moment and started again with the same arguments, it goes on where it was.
Exit status: 0 done, 1 some units failed (start again to retry them), 2 wrong arguments or input.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from jobs.cluster import plan_and_make
from jobs.console import make_parser, run_job
from jobs.options import adder, take
from pipelines.dedup import DedupSettings, make_deduped, plan_dedup
from pipelines.latents import make_latents, plan_latents
from pipelines.latents_settings import FeatureSettings, LatentsSettings, TextSettings
from pipelines.pictures import PicturesSettings, make_pictures, plan_pictures
from pipelines.recaption import RecaptionSettings, make_recaptioned, plan_recaption
from pipelines.schedule import FailedUnitsError, PrepareReport
from pipelines.source import Kind
from pipelines.stages.filter import Filters, ScoreSettings
from udiff.data.packing import PACKED_DTYPES


def prepare_pictures(settings: PicturesSettings) -> PrepareReport:
    """Make, or finish, a cache of pictures, on the running Ray or one of its own."""
    return plan_and_make(settings, plan_pictures, make_pictures)


def prepare_dedup(settings: DedupSettings) -> PrepareReport:
    """Make, or finish, a cache of pictures without duplicates."""
    return plan_and_make(settings, plan_dedup, make_deduped)


def prepare_recaption(settings: RecaptionSettings) -> PrepareReport:
    """Make, or finish, a cache of pictures with captions of a model."""
    return plan_and_make(settings, plan_recaption, make_recaptioned)


def prepare_latents(settings: LatentsSettings) -> PrepareReport:
    """Make, or finish, a cache of latents, on the running Ray or one of its own."""
    return plan_and_make(settings, plan_latents, make_latents)


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and make the cache."""
    options = vars(_parser().parse_args(arguments))

    def job() -> None:
        kind = options.pop("kind")
        if kind == "latents":
            _print(prepare_latents(_latents_settings(options)))
        elif kind == "dedup":
            _print(prepare_dedup(DedupSettings(**options)))
        elif kind == "recaption":
            _print(prepare_recaption(RecaptionSettings(**options)))
        else:
            _print(prepare_pictures(_pictures_settings(options)))

    return run_job(job, failures=(FailedUnitsError,))


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("jobs.prepare", __doc__)
    kinds = parser.add_subparsers(
        dest="kind", required=True, metavar="{pictures,dedup,recaption,latents}"
    )
    _add_pictures(_command(kinds, "pictures", "web shards -> square pictures"))
    _add_dedup(_command(kinds, "dedup", "pictures -> the same without duplicates"))
    _add_recaption(_command(kinds, "recaption", "pictures -> the same with a model's captions"))
    _add_latents(_command(kinds, "latents", "pictures -> latents of an autoencoder"))
    return parser


def _command(kinds: Any, name: str, about: str) -> argparse.ArgumentParser:
    return kinds.add_parser(name, help=about, description=about)


def _add_pictures(parser: argparse.ArgumentParser) -> None:
    add = adder(parser, PicturesSettings)
    add("input", "shards (*.tar with *_stats.json), a JSON list, parquet files, or a folder")
    add("source", "what --input is; None looks what is there", choices=get_args(Kind))
    add("pictures", "folder that the paths in a JSON list are relative to, if not its own")
    add("output", "folder or bucket URI of the cache")
    add("size", "side of the square in pixels", type=int)
    add("buckets", "HEIGHTxWIDTH of several sizes, in place of --size", nargs="*")
    add("fit", "crop scales and cuts, pad puts black around", choices=["crop", "pad"])
    add("captions", "whether a picture needs one", choices=["required", "optional"])
    add("conversations", "take LLaVA's conversations, or questions", action="store_true")
    parser.add_argument("--class-names", help="JSON list of the names of the labels, in order")
    add("background", "color behind transparent pictures: a name of CSS, or #rrggbb")
    add("jpeg", "draft decodes large JPEGs at a fraction of their size", choices=["full", "draft"])
    _add_filters(parser)
    add("update", "after the input changed, make only the units that did", action="store_true")
    add("max-pixels", "most pixels of a picture that is decoded", type=int)
    add("unit-rows", "samples done in one go", type=int)
    _add_workers(add)


def _add_filters(parser: argparse.ArgumentParser) -> None:
    add = adder(parser, Filters)
    add("min-side", "shortest side of a picture that is taken, in pixels", type=int)
    add("max-aspect", "longer side over shorter side, at most", type=float)
    add("max-watermark", "highest pwatermark of the list", type=float)
    add("max-unsafe", "highest punsafe (or NSFW: UNLIKELY 0, UNSURE 0.5, NSFW 1)", type=float)
    add("min-similarity", "lowest similarity of the list", type=float)
    add("unscored", "rows without such a score in the list", choices=["keep", "drop"])
    add("languages", "codes of the languages of captions, such as en", nargs="*")
    add = adder(parser, ScoreSettings)
    add("clip", "open_clip's NAME:WEIGHTS, hf-hub:ID or local-dir:FOLDER; scores every picture")
    add("aesthetic-head", "file of an aesthetic head for that model")
    add("min-clip-score", "lowest cosine of picture and caption", type=float)
    add("min-aesthetic", "lowest aesthetic score", type=float)
    add("score-batch-size", "pictures scored together", type=int)


def _pictures_settings(options: dict[str, Any]) -> PicturesSettings:
    names = _class_names(options.pop("class_names"))
    filters, score = take(options, Filters), take(options, ScoreSettings)
    return PicturesSettings(**options, class_names=names, filters=filters, score=score)


def _add_dedup(parser: argparse.ArgumentParser) -> None:
    add = adder(parser, DedupSettings)
    _add_places(add)
    methods = ["exact", "perceptual", "embedding"]
    add("method", "compare all pixels, perceptual hashes, or CLIP embeddings", choices=methods)
    add("max-distance", "bits of 64 by which perceptual hashes may differ", type=int)
    add("min-cosine", "of the embeddings of duplicates, at least", type=float)
    add("clip", "for embedding: open_clip's NAME:WEIGHTS, hf-hub:ID or local-dir:FOLDER")
    add("batch-size", "pictures embedded together", type=int)
    add("part-rows", "signatures that one task holds in memory", type=int)
    _add_workers(add)


def _add_recaption(parser: argparse.ArgumentParser) -> None:
    add = adder(parser, RecaptionSettings)
    _add_places(add)
    add("update", "after pictures changed, caption only the files that did", action="store_true")
    add("model", "hub id or folder of an image-text-to-text model of transformers")
    add("prompts", "what the model is asked; each gives captions of its own", nargs="*")
    add("engine", "vllm needs that package", choices=["transformers", "vllm"])
    add("num-captions", "captions of each prompt", type=int)
    add("max-tokens", "of a caption", type=int)
    add("temperature", "of sampling; 0 takes the likeliest token", type=float)
    add("top-p", "share of the probability that is sampled from", type=float)
    add("seed", "of sampling", type=int)
    add("max-chars", "longest caption that is kept", type=int)
    add("min-captions", "sane captions that a row must get; 0 keeps all rows", type=int)
    _add_network(add)


def _add_latents(parser: argparse.ArgumentParser) -> None:
    add = adder(parser, LatentsSettings)
    _add_places(add)
    add("update", "after pictures changed, encode only the files that did", action="store_true")
    add("autoencoder", "hub id, diffusers folder, or bundle; None for no latents")
    add("latent", "means and log variances, or one draw of each", choices=["moments", "sample"])
    add("seed", "of the draws", type=int)
    add("dtype", "element type of the latents", choices=PACKED_DTYPES)
    add("sliced", "encode one picture at a time", action="store_true")
    add("tile", "encode larger pictures in overlapping squares of this side", type=int)
    add("flip", "encode mirrored pictures, too", action="store_true")
    for option, about, settings in (
        ("text", "encode texts; may be given again", TextSettings),
        ("feature", "encode pictures with a vision encoder; may be given again", FeatureSettings),
    ):
        parser.add_argument(
            f"--{option}",
            action="append",
            default=[],
            metavar="KEY=VALUE,...",
            help=f"{about}; keys: {', '.join(settings.model_fields)}",
        )
    add("keep-image", "carry the pictures along, for REPA's teacher", action="store_true")
    _add_network(add)
    decoders = (
        "CPUs of the cluster that decode the next units while workers encode; 0 has workers decode "
        "their own, None takes what workers with GPUs leave free, up to 4 for each"
    )
    add("decoders", decoders, type=int)


def _add_places(add: Callable[..., None]) -> None:
    add("input", "folder or bucket URI of a pictures cache")
    add("output", "folder or bucket URI of the cache")


def _add_network(add: Callable[..., None]) -> None:
    add("batch-size", "pictures or texts per network call", type=int)
    add("precision", "of the networks that look at pictures", choices=["fp32", "bf16"])
    add("threads", "CPU threads of a worker", type=int)
    _add_workers(add)


def _add_workers(add: Callable[..., None]) -> None:
    add("row-group-size", "rows of a parquet row group", type=int)
    add("gpus", "GPUs of a worker that runs networks; 0 runs them on the CPU", type=float)
    add("workers", "processes; None for as many as the cluster has room for", type=int)


def _latents_settings(options: dict[str, Any]) -> LatentsSettings:
    texts, features = (options.pop(name) for name in ("text", "feature"))
    return LatentsSettings(
        **options,
        texts=[_keys_and_values(text) for text in texts],
        features=[_keys_and_values(feature) for feature in features],
    )


def _keys_and_values(text: str) -> Any:
    """Read `key=value,key=value`."""
    pairs = [part.partition("=") for part in text.split(",")]
    if wrong := [key for key, equals, _ in pairs if not equals]:
        raise ValueError(f"{text!r} must be KEY=VALUE,KEY=VALUE; {wrong[0]!r} has no value")
    return {key: value for key, _, value in pairs}


def _class_names(path: str | None) -> tuple[str, ...]:
    if path is None:
        return ()
    names = json.loads(Path(path).read_text())
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or not names:
        raise ValueError(f"--class-names {path} must hold a JSON list of names")
    return tuple(names)


def _print(report: PrepareReport) -> None:
    manifest = report.manifest
    rejected = ", ".join(f"{count} {reason}" for reason, count in manifest.rejected.items())
    print(
        f"{manifest.images_in} pictures in, {manifest.num_rows} cached in {len(manifest.files)} "
        f"files, {sum(manifest.rejected.values())} rejected ({rejected or 'none'}); "
        f"{report.units_done} units in {report.wall_s:.1f} s, {report.images_per_s:.0f} pictures/s"
    )


if __name__ == "__main__":
    sys.exit(main())
