"""Compare generated with real pictures: Frechet distances over features of a classifier.

    python -m jobs.evaluate --bundle runs/demo/ddt/bundle --reference runs/demo/held_out \\
        --real runs/demo/pictures --out evaluation.json

Beside the generated pictures' distance to the reference stand those of other real pictures (the
best that can be had at this number), of the same pictures through the autoencoder (the best that
its latents can give), and of noise. Compare only equal features, sizes and numbers of pictures.
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
from jobs.sample import label_names
from pipelines.features import extract_features
from pipelines.generate import generate
from udiff.autoencoders.pixels import to_pixels
from udiff.data.manifest import read_manifest
from udiff.data.read import read_column
from udiff.data.storage import open_folder
from udiff.evaluation.frechet import Projection, frechet_distance, principal_components
from udiff.generate import Generator


@dataclass(frozen=True)
class Evaluation:
    """Frechet distances to the reference, and what they are a function of."""

    frechet_generated: float
    frechet_real: float
    frechet_reconstructed: float
    frechet_noise: float
    features: str
    feature_size: int
    components: int
    """Principal components of the reference's features; 0 for all features."""
    num_reference: int
    num_pictures: int


def evaluate(
    bundle: str,
    *,
    reference: str,
    real: str,
    num_reference: int = 2000,
    num_pictures: int = 1000,
    components: int = 64,
    features: str = "efficientnet_lite0",
    feature_size: int = 64,
    workers: int = 1,
    seed: int = 10_000,
) -> Evaluation:
    """Measure a bundle against two caches of pictures of different samples."""
    connect()
    references = _read_pictures(reference, num_reference)
    reals = _read_pictures(real, num_pictures)
    generator = Generator(bundle)
    count = len(label_names(generator.recipe))
    requests = [{"label": k % count, "seed": seed + k} for k in range(num_pictures)]
    sets = {
        "generated": generate(str(Path(bundle).absolute()), requests, workers=workers).pictures,
        "real": reals,
        "reconstructed": generator.reconstruct(to_pixels(torch.from_numpy(reals))).numpy(),
        "noise": np.random.default_rng(seed).integers(0, 256, reals.shape, np.uint8),
    }

    def extract(pictures: np.ndarray) -> torch.Tensor:
        return extract_features(pictures, name=features, size=feature_size)

    of_reference = extract(references)
    project = principal_components(of_reference, components) if components else None
    distances = {
        f"frechet_{name}": _distance(extract(pictures), of_reference, project)
        for name, pictures in sets.items()
    }
    return Evaluation(
        **distances,
        features=features,
        feature_size=feature_size,
        components=components,
        num_reference=num_reference,
        num_pictures=num_pictures,
    )


def _distance(a: torch.Tensor, b: torch.Tensor, project: Projection | None) -> float:
    return frechet_distance(project(a), project(b)) if project else frechet_distance(a, b)


def _read_pictures(location: str, num_rows: int) -> np.ndarray:
    cache = open_folder(location)
    manifest = read_manifest(cache)
    if manifest.kind != "pictures":
        raise ValueError(f"{location} is a cache of {manifest.kind}, pictures are wanted")
    return np.asarray(read_column(cache, manifest, "image", num_rows=num_rows))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    options = vars(_parser().parse_args(arguments))
    return run_job(lambda: _run(options))


def _run(options: dict[str, Any]) -> None:
    out = options.pop("out")
    text = json.dumps(asdict(evaluate(options.pop("bundle"), **options)), indent=1)
    print(text)
    if out:
        out.write_text(text + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("jobs.evaluate", __doc__)
    add = parser.add_argument
    add("--bundle", required=True, help="folder of the bundle")
    add("--reference", required=True, help="pictures cache: held-out pictures")
    add("--real", required=True, help="pictures cache of other real pictures")
    add("--num-reference", type=int, default=2000, help="(default: %(default)s)")
    add("--num-pictures", type=int, default=1000, help="(default: %(default)s)")
    add("--components", type=int, default=64, help="principal components; 0: all (default: 64)")
    add("--features", default="efficientnet_lite0", help="(default: %(default)s)")
    add("--feature-size", type=int, default=64, help="pixels (default: %(default)s)")
    add("--workers", type=int, default=1, help="(default: %(default)s)")
    add("--seed", type=int, default=10_000, help="(default: %(default)s)")
    add("--out", type=Path, help="JSON file to write")
    return parser


if __name__ == "__main__":
    sys.exit(main())
