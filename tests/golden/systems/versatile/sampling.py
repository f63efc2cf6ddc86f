"""Reference cases of the schedule and of sampling."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat

import torch
from torch import Tensor

from tests.golden.case import Case, Outputs
from tests.golden.systems.versatile.network import FLOWS, build_network, flows_of
from udiff.models.versatile.flows import DataNetwork
from udiff.models.versatile.sampler import Sampler
from udiff.models.versatile.schedule import (
    bound_weights,
    make_betas,
    make_schedule,
    official_buffers,
    sampling_timesteps,
)
from udiff.samplers.ticks import drive
from udiff.system import Guidance, Sampling, Steps


def _schedule(case: Case):
    config = case.config.get("vd", case.config)
    betas = config["beta_linear_start"], config["beta_linear_end"]
    return make_schedule(betas, num_timesteps=config["timesteps"])


def schedules(case: Case) -> Outputs:
    config, schedule = case.config, _schedule(case)
    found = {**official_buffers(schedule), "lvlb_weights": bound_weights(schedule).float()}
    ends = {"first": config["beta_linear_start"], "last": config["beta_linear_end"]}
    for name in case.outputs:
        if name.startswith("betas64_"):
            rule = name.removeprefix("betas64_").replace("vd", "linear")
            found[name] = make_betas(rule, config["betas64_n"], **ends)
    for steps, eta in config["ddim_runs"]:
        tables = _tables(Sampler(schedule, steps, eta=eta))
        found |= {f"ddim_{name}_{steps}_{eta}": table for name, table in tables.items()}
    quadratic = sampling_timesteps(config["quad_steps"], "quadratic", num_timesteps=len(schedule))
    return found | {"ddim_t_quad": torch.tensor(quadratic)}


def _tables(sampler: Sampler) -> dict[str, Tensor]:
    bar = sampler.schedule.alpha_bar[sampler.timesteps]
    previous = torch.cat([sampler.schedule.alpha_bar[:1], bar[:-1]])
    sigma = sampler.eta * ((1 - previous) / (1 - bar) * (1 - bar / previous)).sqrt()
    return {
        "t": torch.tensor(sampler.timesteps),
        "alphas": bar,
        "alphas_prev": previous,
        "sigmas": sigma,
        "sqrt_one_minus_alphas": (1 - bar).sqrt(),
    }


class _Run:
    """A batch of samplings, recorded."""

    def __init__(self, case: Case, data: str, sampler: Sampler) -> None:
        self.network = DataNetwork(build_network(case), data)
        self.sampler = sampler
        self.states: list[list[Tensor]] = []
        self.data_preds: list[list[Tensor]] = []

    def __call__(
        self,
        starts: Sequence[Steps],
        conditions: Mapping[str, Tensor],
        nulls: Mapping[str, Tensor],
        scale: float,
    ) -> Outputs:
        """Sample row by row; conditions without an axis are the same for all."""
        samplings = []
        for row, steps in enumerate(starts):
            pick = {
                kind: {name: value[row] if value.ndim else value for name, value in given.items()}
                for kind, given in (("conditional", conditions), ("null", nulls))
            }
            samplings.append(
                Sampling(
                    self._record(steps), pick["conditional"], pick["null"], Guidance(scale=scale)
                )
            )
        final = torch.stack(drive(self.network, samplings))
        stacked = [torch.stack([torch.stack(r) for r in rows], 1) for rows in
                   (self.states, self.data_preds)]  # fmt: skip
        return {"sample": final, "xt": stacked[0], "x0": stacked[1]}

    def _record(self, steps: Steps) -> Steps:
        states: list[Tensor] = []
        data_preds: list[Tensor] = []
        self.states.append(states)
        self.data_preds.append(data_preds)
        query = next(steps)
        while True:
            answer = yield query
            bar = self.sampler.schedule.alpha_bar[int(query.t)]
            data_preds.append((query.x - (1 - bar).sqrt() * answer) / bar.sqrt())
            try:
                query = steps.send(answer)
            except StopIteration as end:
                states.append(end.value)
                return end.value
            states.append(query.x)


def flows(case: Case) -> Outputs:
    config, given = case.config, case.inputs
    sampler = Sampler(_schedule(case), config["steps"], eta=config["eta"])
    found: dict[str, Tensor] = {"timesteps": torch.tensor(sampler.timesteps)}
    for flow in flows_of(case, "sample_"):
        data, kind = FLOWS[flow]
        null = given.get(f"u_{kind}", torch.zeros_like(given[f"c_{kind}"]))
        starts = [sampler.from_noise(x, repeat(x)) for x in given[f"xT_{flow}"]]
        result = _Run(case, data, sampler)(
            starts,
            {kind: given[f"c_{kind}"]},
            {kind: null},
            config["unconditional_guidance_scale"],
        )
        found |= {f"{name}_{flow}": value for name, value in result.items()}
    return found


def options(case: Case) -> Outputs:
    given = case.inputs
    found: dict[str, Tensor] = {}
    for tag, run in case.config["runs"].items():
        kind = run["context"]
        sampler = Sampler(
            _schedule(case), run["steps"], eta=run["eta"], temperature=run["temperature"]
        )
        # Officially the unconditional context of a picture is zeros here.
        nulls = {"text": given["u_text"], "image": torch.zeros_like(given["c_image"])}
        starts = _starts(sampler, given, tag, run["x0_forward_timesteps"])
        result = _Run(case, run["data"], sampler)(
            starts, {kind: given[f"c_{kind}"]}, {kind: nulls[kind]}, run["guidance"]
        )
        found |= {f"{tag}_{name}": value for name, value in result.items()}
        found[f"{tag}_timesteps"] = torch.tensor(sampler.timesteps)
    return found


def _starts(
    sampler: Sampler, given: Mapping[str, Tensor], tag: str, steps: int | None
) -> list[Steps]:
    first = given[f"{tag}_x0" if steps is not None else f"{tag}_xT"]
    normals = [_rows(given.get(f"{tag}_step_noise"), row) for row in range(len(first))]
    if steps is None:
        return [sampler.from_noise(x, n) for x, n in zip(first, normals, strict=True)]
    noised = zip(first, given[f"{tag}_q_noise"], normals, strict=True)
    return [sampler.from_data(x, noise, steps, n) for x, noise, n in noised]


def _rows(noise: Tensor | None, row: int) -> Iterator[Tensor]:
    return iter(()) if noise is None else iter(noise[:, row])


def multi_context(case: Case) -> Outputs:
    config, given = case.config, case.inputs
    schedule = _schedule(case)
    plain = Sampler(schedule, config["steps"])
    noisy = Sampler(schedule, config["steps"], eta=config["eta_for_dual_eta"])
    strengths = config["image_strengths"]
    joined = torch.cat(
        [s * given[f"c_image_{n}"] for s, n in zip(strengths, "abcd", strict=False)], dim=1
    )
    dual = _mix(given, given["c_image_a"], config["text_ratio"])
    blend = _mix(given, joined, config["blend_text_ratio"])
    image_only = {"image": joined}, {"image": torch.zeros_like(joined)}

    def run(sampler: Sampler, starts: list[Steps], contexts) -> Outputs:
        return _Run(case, "image", sampler)(starts, *contexts, config["guidance"])

    rows = range(len(given["xT"]))
    start = [plain.from_noise(given["xT"][row], repeat(given["xT"])) for row in rows]
    noise = given["dual_eta_step_noise"]
    results = {
        "dual": run(plain, start, dual),
        "dual_eta": run(
            noisy, [noisy.from_noise(given["xT"][r], _rows(noise, r)) for r in rows], dual
        ),
        "dual_edit": run(
            plain,
            [
                plain.from_data(
                    given["x0"][r], given["q_noise"][r], config["x0_forward_timesteps"], iter(())
                )
                for r in rows
            ],
            dual,
        ),
    }
    start = [plain.from_noise(given["xT"][row], repeat(given["xT"])) for row in rows]
    results["blend"] = run(plain, start, blend)
    start = [plain.from_noise(given["xT"][row], repeat(given["xT"])) for row in rows]
    results["imageonly"] = run(plain, start, image_only)
    return {
        f"{tag}_{name}": value for tag, found in results.items() for name, value in found.items()
    }


def _mix(given: Mapping[str, Tensor], image: Tensor, share: float):
    ratios = {"text_ratio": torch.tensor(share), "image_ratio": torch.tensor(1 - share)}
    conditions = {"text": given["c_text"], "image": image, **ratios}
    return conditions, {"text": given["u_text"], "image": torch.zeros_like(image), **ratios}
