"""Laws of DDPM and DDIM sampling."""

import pytest
import torch
from torch import Tensor

from udiff.diffusion.gaussian import (
    NoiseSchedule,
    cosine_betas,
    linear_betas,
    spaced_timesteps,
)
from udiff.diffusion.gaussian_reverse import FixedSmall, NoisePrediction, ReverseProcess
from udiff.models.mdtv2.guidance import PowerCosine
from udiff.samplers.ddim import ddim
from udiff.samplers.ddpm import ddpm
from udiff.system import Steps

SCHEDULE = NoiseSchedule.of(linear_betas(1000))
SHAPE = (4, 2, 2)


def _process(spacing: str) -> ReverseProcess:
    process = ReverseProcess(SCHEDULE, NoisePrediction(), FixedSmall())
    return process.spaced(spaced_timesteps(1000, spacing))


def _normals(seed: int):
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(SHAPE, generator=generator)


def _run(steps: Steps, answer) -> tuple[Tensor, list[float]]:
    timesteps = []
    query = next(steps)
    while True:
        timesteps.append(query.t)
        try:
            query = steps.send(answer(query))
        except StopIteration as end:
            return end.value, timesteps


def _guess(query):
    return 0.3 * query.x + query.t / 1000


def test_the_network_is_asked_once_a_step_with_timesteps_of_the_training() -> None:
    normals = _normals(0)
    _, timesteps = _run(ddpm(next(normals), _process("10"), normals=normals), _guess)
    assert timesteps == [float(t) for t in reversed(spaced_timesteps(1000, "10"))]


def test_ddim_with_eta_1_is_ddpm() -> None:
    first = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))
    ancestral, _ = _run(ddpm(first, _process("20"), normals=_normals(1)), _guess)
    implicit, _ = _run(ddim(first, _process("20"), normals=_normals(1), eta=1.0), _guess)
    torch.testing.assert_close(implicit, ancestral, rtol=1e-4, atol=1e-4)


def test_ddim_finds_the_data_whose_noise_is_predicted() -> None:
    data, noise = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(2))
    process = _process("ddim20")
    at = process.schedule.at(len(process.schedule) - 1, noise)
    start = (at.alpha * data + at.sigma * noise).float()
    found, _ = _run(ddim(start, process, normals=iter(())), lambda _: noise)
    torch.testing.assert_close(found, data, rtol=1e-4, atol=1e-4)


def test_without_eta_ddim_needs_no_noise_and_ddpm_needs_it_but_for_the_last_step() -> None:
    first = torch.zeros(SHAPE)
    _run(ddim(first, _process("5"), normals=iter(())), _guess)
    _run(ddpm(first, _process("5"), normals=iter([first] * 4)), _guess)


@pytest.mark.parametrize("betas", [linear_betas(1000), cosine_betas(1000)])
@pytest.mark.parametrize("spacing", ["7", "10,20,30", "ddim25", ""])
def test_a_spaced_schedule_noises_as_much(betas: Tensor, spacing: str) -> None:
    schedule = NoiseSchedule.of(betas)
    kept = spaced_timesteps(1000, spacing)
    torch.testing.assert_close(schedule.spaced(kept).alpha_bar, schedule.alpha_bar[kept])


def test_spacing_names_what_it_cannot_give() -> None:
    with pytest.raises(ValueError, match="asks for 600 steps out of 500"):
        spaced_timesteps(1000, "600,10")
    with pytest.raises(ValueError, match="exactly 7 of 10"):
        spaced_timesteps(10, "ddim7")


def test_power_cosine_guidance_rises_from_none_to_all() -> None:
    scale = PowerCosine(3.8, 4.0, 1000)
    scales = [scale(float(t)) for t in range(1000, -1, -100)]
    assert scales[0] == 1
    assert scales[-1] == pytest.approx(3.8)
    assert scales == sorted(scales)
