"""A training step of each family against diffusers' DiT of the same size.

    python -m benchmarks.train_step --size debug mid --rounds 5

In each round every network makes some steps (forward, squared error, backward, AdamW), in turn,
and the machine's matrix rate is measured; no Ray is needed. `share` is the work that torch counts
in matrix products, over time and rate; on a GPU `mfu` is that over the nominal bfloat16 rate.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.machine import record, spread
from benchmarks.memory import peak_memory
from benchmarks.networks import NUM_CLASSES, SIZES, Contestant, Size, contestants
from jobs.console import make_parser
from udiff.training.shard import checkpoint_activations

NOMINAL_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
"""Dense bfloat16, by what the device's name holds."""


def main() -> None:
    """Measure, and record each size."""
    parser = make_parser("benchmarks.train_step", __doc__)
    parser.add_argument("--size", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--batch", type=int, help="default: 64 (debug), 8 (mid); 128 on a GPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="of a round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="compile every block of each side")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("highest")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    default = {"debug": 64, "mid": 8} if device.type == "cpu" else dict.fromkeys(SIZES, 128)
    for name in options.size:
        batch = options.batch or default[name]
        figures = compare(SIZES[name], batch, device, options)
        settings = {"threads": options.threads, "batch": batch, "compile": options.compile}
        record(f"train_step_{name}", {**SIZES[name]._asdict(), **settings, **figures})


def compare(
    size: Size, batch: int, device: torch.device, options: argparse.Namespace
) -> dict[str, Any]:
    """Measure all networks of one size, in turn."""
    made = contestants(size, device)
    if options.compile:
        for block in (block for contestant in made for block in contestant.blocks):
            block.compile()
    steps = {contestant.name: make_step(contestant, size, batch, device) for contestant in made}
    flops = {name: count_flops(step) for name, step in steps.items()}
    rates, seconds = [], {name: [] for name in steps}
    for _ in range(options.rounds):
        rates.append(matrix_rate(device))
        for name, step in steps.items():
            seconds[name].append(time_steps(step, options.steps, device))
    rate = max(rates)
    figures = {
        name: {
            "images_per_s": spread([batch / s for s in seconds[name]]),
            "gflop_per_image": flops[name] / batch / 1e9,
            "share": spread([flops[name] / s / rate for s in seconds[name]]),
            **_mfu(flops[name] / min(seconds[name]), device),
        }
        for name in steps
    }
    for contestant in made:  # last: activation checkpointing stays on
        step, kept = steps[contestant.name], list(contestant.network.parameters())
        figures[contestant.name]["peak_mb"] = peak_memory(step, kept, device)
        for block in contestant.blocks:
            checkpoint_activations(block)
        figures[contestant.name]["peak_mb_checkpointed"] = peak_memory(step, kept, device)
    return {"matrix_tflops": spread([r / 1e12 for r in rates]), "networks": figures}


def make_step(
    contestant: Contestant, size: Size, batch: int, device: torch.device
) -> Callable[[], None]:
    """Make one training step, always on the same batch."""
    network = contestant.network.train()
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    x = torch.randn(batch, 4, size.latent, size.latent, device=device, dtype=trained[0].dtype)
    t, label = torch.rand(batch, device=device), torch.arange(batch, device=device) % NUM_CLASSES

    def step() -> None:
        contestant.predict(x, t, label).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    return step


def count_flops(step: Callable[[], None]) -> int:
    """Count the operations of a step's matrix products."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def time_steps(step: Callable[[], None], num_steps: int, device: torch.device) -> float:
    """Time a step, in seconds; a first one warms up."""
    step()
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(num_steps):
        step()
    _synchronize(device)
    return (time.perf_counter() - start) / num_steps


def matrix_rate(device: torch.device) -> float:
    """Measure the operations per second of a large matrix product, the best of a few."""
    side, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1536, torch.float32)
    a = torch.randn(side, side, device=device, dtype=dtype)

    def product() -> None:
        a @ a

    return 2 * side**3 / min(time_steps(product, 3, device) for _ in range(3))


def _mfu(flops_per_s: float, device: torch.device) -> dict[str, float]:
    if device.type != "cuda":
        return {}
    name = torch.cuda.get_device_name(device)
    rates = [rate for key, rate in NOMINAL_FLOPS.items() if key in name]
    return {"mfu": flops_per_s / rates[0]} if rates else {}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
