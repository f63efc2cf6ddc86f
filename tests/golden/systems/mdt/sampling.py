"""Reference cases of DDPM and DDIM, step by step."""

import contextlib

import torch
from torch import Tensor, nn

from tests.golden.case import Case, Outputs
from tests.golden.systems.mdt.network import build_network, guidance_scale
from udiff.diffusion.gaussian import (
    NoiseSchedule,
    linear_betas,
    spaced_timesteps,
)
from udiff.diffusion.gaussian_reverse import (
    LearnedRange,
    NoisePrediction,
    ReverseProcess,
)
from udiff.samplers.ddim import ddim
from udiff.samplers.ddpm import ddpm
from udiff.samplers.ticks import drive
from udiff.system import Guidance, Query, Sampling, Steps

SCHEDULE = NoiseSchedule.of(linear_betas(1000))
PROCESS = ReverseProcess(SCHEDULE, NoisePrediction(), LearnedRange())


def sampler(case: Case) -> Outputs:
    """Sample the first half; the second, which the network never sees, follows its answers."""
    network, given, config = build_network(case), case.inputs, case.config["sampler"]
    is_guided = config["cfg"] is not None
    num_samples = len(given["y"]) // (2 if is_guided else 1)
    process = PROCESS.spaced(spaced_timesteps(1000, config["respacing"]))
    assert torch.equal(process.schedule.timesteps, given["timestep_map"].sort().values)
    guidance = Guidance()
    if is_guided:
        schedule = guidance_scale(config["cfg"], config["pow"], 1000)
        guidance = Guidance(schedule=schedule, channels=3)
    trails = [_Trail(case, process, row) for row in range(len(given["y"]))]
    null_label = given["y"][num_samples:] if is_guided else given["y"]
    drive(
        network,
        [
            Sampling(
                trails[row].record(),
                {"label": given["y"][row]},
                {"label": null_label[row]},
                guidance,
            )
            for row in range(num_samples)
        ],
    )
    for row, trail in enumerate(trails[num_samples:]):
        trail.follow(trails[row], network, null_label[row])
    found = {"final": torch.stack([trail.samples[-1] for trail in trails])}
    for step in range(len(process.schedule)):
        found[f"step{step}.sample"] = torch.stack([t.samples[step] for t in trails])
        found[f"step{step}.pred_xstart"] = torch.stack([t.data_preds[step] for t in trails])
    return found


class _Trail:
    """One sample on its way: what was answered, and where each step led."""

    def __init__(self, case: Case, process: ReverseProcess, row: int) -> None:
        config, given = case.config["sampler"], case.inputs
        self.clip = 1.0 if config["clip"] else None
        self.process = process
        self.seen: list[tuple[Query, Tensor]] = []
        self.samples: list[Tensor] = []
        self.data_preds: list[Tensor] = []
        eta = {"eta": float(config["eta"])} if config["kind"] == "ddim" else {}
        sampler = {"ddpm": ddpm, "ddim": ddim}[config["kind"]]
        normals = iter(given["step_noise"][:, row])
        self.steps = sampler(given["z"][row], process, normals=normals, clip=self.clip, **eta)

    def record(self) -> Steps:
        query = next(self.steps)
        for step in reversed(range(len(self.process.schedule))):
            answer = yield query
            self.seen.append((query, answer))
            reverse = self.process(answer, query.x, step, clip=self.clip)
            self.data_preds.append(reverse.data_pred)
            try:
                query = self.steps.send(answer)
            except StopIteration as end:
                self.samples.append(end.value)
                return end.value
            self.samples.append(query.x)
        raise AssertionError("the sampler asks for more than one answer a step")

    @torch.inference_mode()
    def follow(self, leader: "_Trail", network: nn.Module, label: Tensor) -> None:
        """Take another sample's guided channels; the others are its own, without the label."""
        steps = self.record()
        next(steps)
        with contextlib.suppress(StopIteration):
            for query, answer in leader.seen:
                t = torch.tensor([query.t])
                null = network(query.x[None], t, label=label[None]).output[0]
                steps.send(torch.cat([answer[:3], null[3:]]))
