"""Reference cases of the training losses."""

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from tests.golden.case import Case, Outputs
from tests.golden.systems.versatile.network import FLOWS, build_network
from tests.golden.systems.versatile.sampling import _schedule
from udiff.models.versatile.flows import Flow
from udiff.models.versatile.objective import FlowObjective


def losses(case: Case) -> Outputs:
    network, schedule = build_network(case).train(), _schedule(case)
    found: dict[str, Tensor] = {}
    for flow in [flow for flow in FLOWS if f"loss_{flow}" in case.outputs]:
        batch, draws = _given(case, flow)
        base = FlowObjective(Flow(*FLOWS[flow]), schedule)
        options = {
            "": base,
            "_l1": FlowObjective(base.flow, schedule, error="l1"),
            "_x0param": FlowObjective(base.flow, schedule, predicts="data"),
        }
        for name, objective in options.items():
            found[f"loss_{flow}{name}"] = objective(network, batch, draws).total
        result = base(network, batch, draws)
        found[f"loss_vlb_{flow}"] = result.terms["bound"]
        network.zero_grad()
        result.total.backward()
        grads = {key: p.grad for key, p in network.named_parameters() if p.grad is not None}
        found[f"grad_norm_{flow}"] = get_total_norm(list(grads.values())).double()
        found |= {f"grad_{flow}/{key}": grad for key, grad in grads.items()}
        data = batch[f"{base.flow.data}_latent"]
        found[f"x_noisy_{base.flow.data}_{flow}"] = schedule.add_noise(
            data, draws["noise"], draws["timestep"]
        )
    return found


def _given(case: Case, flow: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    given = case.inputs
    data, kind = FLOWS[flow]
    tokens = given[f"c_{kind}"]
    batch = {
        f"{data}_latent": given[f"x0_{data}"],
        f"{kind}_context": tokens,
        f"{kind}_null_for_{data}": torch.zeros_like(tokens[0]),
    }
    draws = {
        "timestep": given[f"t_{flow}"],
        "noise": given[f"noise_{data}"],
        "is_dropped": torch.zeros(len(tokens), dtype=torch.bool),
    }
    return batch, draws
