"""Masked text diffusion: logits where they are needed against logits of all tokens, and batches.

    python -m benchmarks.text_diffusion --depth 6 --heads 6

A training step of the text loss, and the captioning of pictures, on a transformer of Dual
Diffusion's layout with the vocabulary of T5 and random states in place of T5's. Each pair is
measured in one run, in turn; the other side computes and keeps the logits of every token.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.machine import record, spread
from jobs.console import make_parser
from udiff.diffusion.masked_text import MaskedText, MaskTimes
from udiff.models.dual_diffusion.network import DualDiffusion
from udiff.samplers.ticks import drive
from udiff.samplers.unmask import unmask
from udiff.system import Batch, Guidance, Prediction, Rng, Sampling

VOCABULARY, MASK, TEXT_DIM = 32_100, 32_099, 256


class Everywhere(nn.Module):
    """The network with logits of all tokens, of which the wanted ones are then taken."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_t: Tensor, t: Tensor, *, text: Tensor, logits_at: Tensor) -> Prediction:
        everywhere = torch.ones_like(logits_at)
        logits = self.network(x_t, t, text=text, logits_at=everywhere).output
        return Prediction(logits.float().log_softmax(-1)[logits_at.flatten()])


class Writer(nn.Module):
    """The network as samplers of text ask it, with a table in place of T5."""

    def __init__(self, network: nn.Module, table: nn.Embedding) -> None:
        super().__init__()
        self.network, self.table = network, table

    def forward(self, x_t: Tensor, t: Tensor, *, latent: Tensor) -> Prediction:
        masked = x_t == MASK
        logits = self.network(latent, t * 0, text=self.table(x_t), logits_at=masked).output
        answer = logits.new_zeros(*x_t.shape, VOCABULARY)
        answer[masked] = logits
        return Prediction(answer)


def main() -> None:
    """Measure, and record."""
    parser = make_parser("benchmarks.text_diffusion", __doc__)
    for name, default in (
        ("depth", 6), ("heads", 6), ("rows", 4), ("tokens", 128), ("side", 16), ("steps", 16),
        ("rounds", 5), ("threads", 1),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default, help="(default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = DualDiffusion(
        vocab_size=VOCABULARY, depth=options.depth, num_heads=options.heads, text_dim=TEXT_DIM
    ).to(device)
    table = nn.Embedding(VOCABULARY, TEXT_DIM).to(device)
    figures: dict[str, Any] = {
        "training_step_s": _steps(network, table, options, device),
        "captions_s": _captions(network, table, options, device),
    }
    record("text_diffusion", {**vars(options), **figures})


def _steps(
    network: DualDiffusion, table: nn.Embedding, options: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Time forward and backward of the text loss."""

    def ask(net: nn.Module, batch: Batch) -> Callable[..., Prediction]:
        t = torch.zeros(options.rows, device=device)
        return lambda ids, masked: net(batch["latent"], t, text=table(ids), logits_at=masked)

    objective = MaskedText(ask, mask_id=MASK, column="text", times=MaskTimes())
    latent = torch.randn(options.rows, 16, options.side, options.side, device=device)
    ids = torch.randint(3, 32_000, (options.rows, options.tokens), device=device)
    batch = {"latent": latent, "text_tokens": ids}
    draws = objective.draw(batch, Rng(0, device=device).at(0))

    def step(net: nn.Module) -> None:
        objective(net, batch, draws).total.backward()
        network.zero_grad()

    runs = {"masked": partial(step, network), "all": partial(step, Everywhere(network))}
    return _compare(runs, options.rounds, device)


def _captions(
    network: DualDiffusion, table: nn.Embedding, options: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Time captions of all pictures, side by side and one after another."""
    writer = Writer(network, table).eval()
    latents = torch.randn(options.rows, 16, options.side, options.side, device=device)

    def sampling(number: int) -> Sampling:
        generator = torch.Generator().manual_seed(number)
        steps = unmask(
            torch.zeros(options.tokens, dtype=torch.long, device=device),
            torch.zeros(options.tokens, dtype=torch.bool, device=device),
            mask_id=MASK,
            num_steps=options.steps,
            race=lambda m: torch.rand(int(m.sum()), VOCABULARY, generator=generator).to(device),
        )
        return Sampling(steps, {"latent": latents[number]}, {}, Guidance())

    def together() -> None:
        drive(writer, [sampling(number) for number in range(options.rows)])

    def alone() -> None:
        for number in range(options.rows):
            drive(writer, [sampling(number)])

    return _compare({"together": together, "one_by_one": alone}, options.rounds, device)


def _compare(
    runs: dict[str, Callable[[], None]], rounds: int, device: torch.device
) -> dict[str, Any]:
    """Time each, in turn; on a CPU by the processor's time, which others do not slow."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            started = clock()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(clock() - started)
    found: dict[str, Any] = {name: spread(values[1:]) for name, values in times.items()}
    (_, ours), (_, other) = ((name, found[name]["median"]) for name in runs)
    return {**found, "speedup": other / ours}


if __name__ == "__main__":
    main()
