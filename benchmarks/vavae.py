"""What the debug VA-VAE learns of photographs, all losses on: figures, seconds, and a picture.

    python -m benchmarks.vavae --picture docs/vavae.png

Trains `vavae/debug` as it is (2,000 crops of 32 pixels of eighty photographs) in this process, and
judges it on 200 crops of twenty others, against its random start. About two minutes on 2 CPU cores.
"""

import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from benchmarks.machine import record
from jobs.console import make_parser
from jobs.fetch_weights import fetch_lpips
from jobs.picture_grid import draw_grid
from tests.made import write_pictures
from tests.photographs import crops_to_train_on, held_out_crops
from udiff.autoencoders.kl import KLAutoencoder
from udiff.autoencoders.perceptual import load_lpips
from udiff.autoencoders.pixels import to_pixels, to_uint8
from udiff.bundle import load_autoencoder
from udiff.evaluation.reconstruction import psnr, ssim
from udiff.fit import fit
from udiff.models.vavae.recipe import Recipe
from udiff.recipe import load_recipe
from udiff.resolve import resolve
from udiff.training.run import local_run

SIZE = 32
COLUMNS = 10


def main() -> None:
    """Train, judge and record."""
    parser = make_parser("benchmarks.vavae", __doc__)
    parser.add_argument("--picture", type=Path, help="originals above reconstructions")
    options = parser.parse_args()
    with TemporaryDirectory() as name:
        autoencoder, start, train_s = _train(Path(name))
    images = torch.from_numpy(held_out_crops(10, size=SIZE))
    figures = {"start": _judge(start, images), "end": _judge(autoencoder, images)}
    record("vavae", {"train_s": train_s, **figures})
    if options.picture:
        shown = images[:: len(images) // COLUMNS]
        both = np.concatenate([shown.numpy(), to_uint8(_reconstruct(autoencoder, shown)).numpy()])
        grid = draw_grid(both, ("original", "reconstructed"), columns=COLUMNS, zoom=2)
        grid.quantize(256).save(options.picture, optimize=True)


def _train(folder: Path) -> tuple[KLAutoencoder, KLAutoencoder, float]:
    write_pictures(folder / "pictures", crops_to_train_on(50, size=SIZE))
    paths = [f"data.cache={folder / 'pictures'}", f"objective.perceptual_path={fetch_lpips()}"]
    recipe = load_recipe("vavae/debug", paths)
    assert isinstance(recipe, Recipe)
    torch.manual_seed(recipe.train.seed)
    start, began = recipe.build_autoencoder(), time.perf_counter()
    with local_run() as run:
        report = fit(resolve(recipe), folder=folder / "run", run=run)
    return load_autoencoder(report.bundle), start, time.perf_counter() - began


@torch.inference_mode()
def _judge(autoencoder: KLAutoencoder, images: torch.Tensor) -> dict[str, float]:
    pixels, made = to_pixels(images), _reconstruct(autoencoder, images)
    found = {
        "psnr": psnr(images, to_uint8(made)),
        "ssim": ssim(pixels, made),
        "lpips": load_lpips(fetch_lpips())(pixels, made),
    }
    return {name: values.mean().item() for name, values in found.items()}


@torch.inference_mode()
def _reconstruct(autoencoder: KLAutoencoder, images: torch.Tensor) -> torch.Tensor:
    latent = autoencoder.normalize(autoencoder.encode_moments(to_pixels(images)).mean)
    return autoencoder.decode(latent)


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
