"""Judge any autoencoder on pictures: distances, latent statistics, speed, memory.

    python -m jobs.evaluate_autoencoder --autoencoder runs/vavae/bundle --pictures HELD_OUT \\
        --lpips .testdata/lpips_vgg16.safetensors --out runs/vavae/evaluation

Pictures are a cache, or web shards and whatever else `jobs.prepare` takes, with `--size`: the
shorter side is scaled to it, antialiased, and the middle cut out, as published evaluations do.

An autoencoder is a hub id or folder of diffusers, a bundle, or an official checkpoint. Latents are
sampled, as in the published evaluations. LPIPS and SSIM see the reconstruction as it is, PSNR and
the Frechet distance (rFID, with Inception's weights as `--features`) see it as uint8. The folder
`--out` gets `evaluation.json` and `reconstructions.png`, originals above reconstructions.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs.cluster import connect
from jobs.console import make_parser, run_job
from jobs.picture_grid import draw_grid
from pipelines.reconstruct import Reconstructions, ReconstructSettings, reconstruct_pictures
from udiff.evaluation.frechet import frechet_distance


@dataclass(frozen=True)
class AutoencoderEvaluation:
    """What an autoencoder is judged by."""

    psnr: float
    """Decibels, mean over pictures."""
    ssim: float
    lpips: float
    frechet: float
    """Between pictures and reconstructions; compare only equal features and numbers."""
    latent_mean: tuple[float, ...]
    """Of each channel of raw sampled latents."""
    latent_std: tuple[float, ...]
    encode_images_per_s: float
    """In the network, one worker."""
    decode_images_per_s: float
    peak_gib: float
    """Largest memory of a worker."""
    features: str
    feature_size: int
    num_pictures: int
    num_rejected: int
    """Rows that are no pictures; they are left out."""


def evaluate_autoencoder(
    settings: ReconstructSettings, *, workers: int = 1, gpus: float = 0
) -> tuple[AutoencoderEvaluation, Reconstructions]:
    """Measure an autoencoder on the running Ray or one of its own."""
    connect()
    found = reconstruct_pictures(settings, workers=workers, gpus=gpus)
    mean, square = found.latent_mean.mean(0), found.latent_square.mean(0)
    encode_s, decode_s, num_timed, _, num_rows = found.timing.sum(0)
    distance = frechet_distance(
        torch.from_numpy(found.features), torch.from_numpy(found.reconstructed_features)
    )
    evaluation = AutoencoderEvaluation(
        psnr=float(found.psnr.mean()),
        ssim=float(found.ssim.mean()),
        lpips=float(found.lpips.mean()),
        frechet=distance,
        latent_mean=tuple(mean.tolist()),
        latent_std=tuple(np.sqrt(square - mean**2).tolist()),
        encode_images_per_s=float(num_timed / encode_s),
        decode_images_per_s=float(num_timed / decode_s),
        peak_gib=float(found.timing[:, 3].max() / 2**30),
        features=settings.features,
        feature_size=settings.feature_size,
        num_pictures=len(found.psnr),
        num_rejected=int(num_rows) - len(found.psnr),
    )
    return evaluation, found


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    options = vars(_parser().parse_args(arguments))
    return run_job(lambda: _run(options))


def _run(options: dict[str, Any]) -> None:
    out: Path | None = options.pop("out")
    placement = {name: options.pop(name) for name in ("workers", "gpus")}
    evaluation, found = evaluate_autoencoder(ReconstructSettings(**options), **placement)
    text = json.dumps(asdict(evaluation), indent=1)
    print(text)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "evaluation.json").write_text(text + "\n")
        rows = np.concatenate([found.original, found.reconstruction])
        labels = ("original", "reconstructed")
        grid = draw_grid(
            rows, labels, columns=len(found.original), zoom=max(1, 64 // rows.shape[1])
        )
        grid.save(out / "reconstructions.png")


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("jobs.evaluate_autoencoder", __doc__)
    add, defaults = parser.add_argument, ReconstructSettings.model_fields
    add("--autoencoder", required=True, help="hub id, folder, checkpoint or bundle")
    add("--pictures", required=True, help="pictures cache, web shards or folder")
    add("--size", type=int, help="side to which pictures of no cache are cropped")
    add("--num-pictures", type=int, help="the first so many (default: all)")
    add("--lpips", help="file of LPIPS weights (default: torchvision and the package lpips)")
    add("--sliced", action="store_true", help="run one picture at a time")
    add("--tile", type=int, help="run larger pictures in squares of this side")
    for name, about in (
        ("num_examples", "pictures shown"),
        ("feature_size", "pixels"),
        ("batch_size", "pictures per network call"),
        ("seed", "of the posterior's noise"),
    ):
        default = defaults[name].default
        flag = f"--{name.replace('_', '-')}"
        add(flag, type=int, default=default, help=f"{about} (default: %(default)s)")
    add("--features", default=defaults["features"].default, help="(default: %(default)s)")
    add("--workers", type=int, default=1, help="(default: %(default)s)")
    add("--gpus", type=float, default=0, help="GPUs of a worker (default: %(default)s)")
    add("--out", type=Path, help="folder for evaluation.json and reconstructions.png")
    return parser


if __name__ == "__main__":
    sys.exit(main())
