"""Sampling speed of each family against diffusers' DiT, and what encoder reuse gives and costs.

    python -m benchmarks.sample --size mid --bundle runs/demo/ddt/bundle

Both sides take equal numbers of Euler (or DDIM) steps with guidance at every one, so that both call
their networks with two rows a picture. Reuse is measured on a trained bundle of DDT, whose pictures
mean something: the distance is |latents - those of the full sampler| / |those|, averaged.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import record, spread
from benchmarks.networks import NUM_CLASSES, SIZES, Contestant, Size, contestants, make_recipe
from jobs.console import make_parser
from udiff.bundle import load_bundle
from udiff.recipe import update_recipe
from udiff.samplers.ticks import drive
from udiff.system import FamilyRecipe, Task

DYNAMIC = range(2, 9)
GUIDED = {
    "ddt": ("sampling.guidance_interval=null",),
    "lightningdit": ("sampling.guidance_interval=[0.0, 1.0]",),
    "mdtv2": ("sampling.sampler=ddim", "sampling.guidance_power=0.01"),
}
"""What has each family guide at every step."""


def main() -> None:
    """Measure, and record."""
    parser = make_parser("benchmarks.sample", __doc__)
    parser.add_argument("--size", choices=SIZES, default="mid")
    parser.add_argument("--bundle", type=Path, help="trained DDT, for reuse of the encoder")
    parser.add_argument("--pictures", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures: dict[str, Any] = {"images_per_s": compare(SIZES[options.size], device, options)}
    if options.bundle:
        figures["reuse"] = measure_reuse(options.bundle, device, options)
    record("sample", {**vars(options), "bundle": str(options.bundle), **figures})


def compare(size: Size, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """Sample with each network, in turn."""
    runs: dict[str, Callable[[], object]] = {}
    for contestant in contestants(size, device):
        name = contestant.name
        if name in GUIDED:
            recipe = make_recipe(name, size, *GUIDED[name], f"sampling.num_steps={options.steps}")
            runs[name] = _ours(recipe, contestant, device, options.pictures)
        else:
            runs[name] = _plain_loop(contestant, size, device, options)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, run in runs.items():
            seconds[name].append(_time(run, device))
    return {name: spread([options.pictures / s for s in times]) for name, times in seconds.items()}


def measure_reuse(
    bundle: Path, device: torch.device, options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Compare samplers that reuse the encoder's state with the full one, on a trained network."""
    loaded = load_bundle(bundle)
    weights = loaded.system.modules["denoiser"].state_dict()

    def sample(reuse: dict[str, Any] | None) -> tuple[Tensor, float]:
        recipe = update_recipe(loaded.recipe, {"sampling": {"reuse": reuse}})
        task = recipe.build().tasks["class_to_image"]
        task.network.load_state_dict(weights)
        task.network.to(device).eval()
        run = _sampler(task, device, options.pictures)
        run()  # the search for the steps is made once, and not counted
        times = [_time(run, device) for _ in range(options.rounds)]
        return run(), options.pictures / min(times)

    full, full_speed = sample(None)
    kinds = [("fixed", every) for every in range(1, 9)] + [("dynamic", n) for n in DYNAMIC]
    figures = {}
    for choice, every in kinds:
        latents, speed = sample({"choice": choice, "every": every})
        error = (latents - full).flatten(1).norm(dim=1) / full.flatten(1).norm(dim=1)
        figures[f"{choice} {every}"] = {
            "distance": error.mean().item(),
            "images_per_s": speed,
            "speedup": speed / full_speed,
        }
    return figures


def _ours(
    recipe: FamilyRecipe, contestant: Contestant, device: torch.device, pictures: int
) -> Callable[[], Tensor]:
    task = recipe.build().tasks["class_to_image"]
    task = Task(task.name, task.request, task.start, contestant.network.eval())
    return _sampler(task, device, pictures)


def _sampler(task: Task, device: torch.device, pictures: int) -> Callable[[], Tensor]:
    requests = [task.request(label=k % NUM_CLASSES, seed=k) for k in range(pictures)]
    dtype = next(task.network.parameters()).dtype

    def run() -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            samplings = [task.start(request, device=device) for request in requests]
            return torch.stack(drive(task.network, samplings))

    return run


def _plain_loop(
    contestant: Contestant, size: Size, device: torch.device, options: argparse.Namespace
) -> Callable[[], Tensor]:
    contestant.network.eval()
    dtype = next(contestant.network.parameters()).dtype
    label = torch.arange(options.pictures, device=device) % NUM_CLASSES
    labels = torch.cat([label, torch.full_like(label, NUM_CLASSES)])

    @torch.inference_mode()
    def run() -> Tensor:
        x = torch.randn(options.pictures, 4, size.latent, size.latent, device=device)
        for step in range(options.steps):
            t = torch.full((len(labels),), step / options.steps, device=device)
            answer = contestant.predict(torch.cat([x, x]).to(dtype), t, labels)[:, :4].float()
            conditional, null = answer.chunk(2)
            x = x + (null + 2 * (conditional - null)) / options.steps
        return x

    return run


def _time(run: Callable[[], object], device: torch.device) -> float:
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
