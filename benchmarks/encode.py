"""What the pipeline's encode stage costs beside the autoencoder: images/s of both on one batch.

    python -m benchmarks.encode [--gpu]

The stage decodes PNG, encodes, and brings float16 moments back; the other side is the network's
forward pass alone on the same pictures, already on the device. Both run in turn, in one process.
Memory: the peak of a process that encodes ten times as many units as another, over that one's.
"""

import io
import multiprocessing as mp
import resource
import time
from functools import partial

import numpy as np
import torch
from PIL import Image

from benchmarks.machine import record, spread
from jobs.console import make_parser
from pipelines.rows import Row, cut
from pipelines.stages.decode_batch import ahead, decode_batch
from pipelines.stages.encode_image import EncodeImage, PictureColumns, encode_moments
from tests.made import draw_pictures
from udiff.autoencoders.kl import KLAutoencoder
from udiff.autoencoders.ldm import LDMArchitecture, LDMAutoencoder
from udiff.autoencoders.pixels import to_pixels

BATCH_SIZE = 16
UNITS = 4


def main() -> None:
    """Measure, and record the ratio of each round."""
    parser = make_parser("benchmarks.encode", __doc__)
    parser.add_argument("--gpu", action="store_true", help="f16d32 at 256 pixels, on the GPU")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    device, size = ("cuda", 256) if options.gpu else ("cpu", 64)
    stage, autoencoder = _make(device, size)
    pictures = draw_pictures(BATCH_SIZE * options.batches, size)
    rows = [_row(picture) for picture in pictures]
    batches = [b.to(device) for b in torch.from_numpy(pictures).split(BATCH_SIZE)]
    _encode_bare(autoencoder, batches[:1]), _encode_staged(stage, rows[:BATCH_SIZE], size)
    rounds = [
        (
            _time(lambda: _encode_staged(stage, rows, size)),
            _time(lambda: _encode_bare(autoencoder, batches)),
        )
        for _ in range(options.rounds)
    ]
    small, large = (_measure_memory(device, size, units) for units in (UNITS, 10 * UNITS))
    figures = {
        "device": device,
        "size": size,
        "batch_size": BATCH_SIZE,
        "stage_images_per_s": spread([len(rows) / seconds for seconds, _ in rounds]),
        "bare_images_per_s": spread([len(rows) / seconds for _, seconds in rounds]),
        "ratio": spread([bare / staged for staged, bare in rounds]),
        "memory_ratio_of_ten_times_the_units": large / small,
    }
    record("encode", figures)


def _make(device: str, size: int) -> tuple[EncodeImage, KLAutoencoder]:
    torch.manual_seed(0)
    width = 128 if device == "cuda" else 32
    sizes = LDMArchitecture(width, (1, 1, 2, 2, 4), 2, 32, 32, (4,), (4,))
    autoencoder = KLAutoencoder(LDMAutoencoder(sizes)).eval().requires_grad_(False)
    columns = PictureColumns(
        ("latent_mean", "latent_logvar"),
        partial(encode_moments, autoencoder.to(device)),
        dtype="float16",
    )
    return EncodeImage([columns], device=device, precision="fp32"), autoencoder


def _row(picture: np.ndarray) -> Row:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return {"image": file.getvalue()}


def _encode_staged(stage: EncodeImage, rows: list[Row], size: int) -> None:
    decode = partial(decode_batch, size=(size, size), keep_image=False)
    stage(ahead(decode, cut(rows, BATCH_SIZE)))


@torch.inference_mode()
def _encode_bare(autoencoder: KLAutoencoder, batches: list[torch.Tensor]) -> None:
    for batch in batches:
        autoencoder.encode_moments(to_pixels(batch))
    if batches[0].is_cuda:
        torch.cuda.synchronize()


def _time(function) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def _measure_memory(device: str, size: int, units: int) -> int:
    """Return the peak bytes of a process of its own."""
    with mp.get_context("spawn").Pool(1) as pool:
        return pool.apply(_encode_units, (device, size, units))


def _encode_units(device: str, size: int, units: int) -> int:
    torch.set_num_threads(1)
    stage, _ = _make(device, size)
    for unit in range(units):
        pictures = draw_pictures(2 * BATCH_SIZE, size, seed=unit)
        _encode_staged(stage, [_row(picture) for picture in pictures], size)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
