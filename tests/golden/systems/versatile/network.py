"""Reference cases of the networks: forwards, training losses, tables of time."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tests.golden.case import Case, Outputs
from udiff.models.versatile.checkpoint import network_from_official
from udiff.models.versatile.layouts import to_current
from udiff.models.versatile.network import Context, VersatileNetwork
from udiff.nn.timestep import timestep_features

FLOWS = {
    "t2i": ("image", "text"),
    "i2i": ("image", "image"),
    "i2t": ("text", "image"),
    "t2t": ("text", "text"),
}
"""What is generated, and from what."""


def build_network(case: Case) -> VersatileNetwork:
    """Load a case's weights; it may leave out whole parts that it does not use."""
    network = network_from_official(case.config)
    weights = to_current(case.weights)
    parts = {key.partition("_blocks.")[0] for key in set(network.state_dict()) - set(weights)}
    halves = [key for key in weights if key.partition("_blocks.")[0] in parts]
    assert not halves, f"parts of {sorted(parts)} are missing"
    result = network.load_state_dict(weights, strict=False)
    assert not result.unexpected_keys
    return network.eval()


def flows_of(case: Case, prefix: str) -> list[str]:
    """List the flows that a case has an output for."""
    return [flow for flow in FLOWS if f"{prefix}{flow}" in case.outputs]


def forward(case: Case) -> Outputs:
    network, given = build_network(case), case.inputs
    found: dict[str, Tensor] = {"time_emb": network.embed_time(given["t"], torch.float32)}
    for flow in flows_of(case, "eps_"):
        data, kind = FLOWS[flow]
        trace: list[Tensor] = []
        handles = [block.register_forward_hook(_keep(trace)) for block in network.all_blocks]
        x = given[f"x_{data}"] if f"x_{data}" in given else given["x"]
        contexts = [Context(kind, given[f"c_{kind}"])]
        found[f"eps_{flow}"] = network(x, given["t"], data=data, contexts=contexts).output
        found[f"trace_{flow}"] = torch.stack(trace)
        for handle in handles:
            handle.remove()
    for mix in ("dual", "triple"):
        if f"ratio_{mix}" in given:
            found[f"eps_{mix}"] = _mixed(network, case, given[f"ratio_{mix}"].tolist())
    return found


def _mixed(network: VersatileNetwork, case: Case, ratios: Sequence[float]) -> Tensor:
    given = case.inputs
    tokens = [("text", "c_text"), ("image", "c_image"), ("image", "c_image2")]
    contexts = [
        Context(kind, given[name], ratio)
        for (kind, name), ratio in zip(tokens, ratios, strict=False)
    ]
    return network(given["x_image"], given["t"], data="image", contexts=contexts).output


def _keep(trace: list[Tensor]):
    def hook(_module: nn.Module, _inputs: tuple, output: Tensor) -> None:
        trace.append(torch.stack([output.mean(), output.std()]))

    return hook


def forward_text_context(case: Case) -> Outputs:
    network, given = build_network(case), case.inputs
    contexts = [Context("text", given["c"])]
    later = (given["t"] + 100) % 1000
    return {
        "eps": network(given["x"], given["t"], data="image", contexts=contexts).output,
        "eps_t_plus_100": network(given["x"], later, data="image", contexts=contexts).output,
    }


def dual_context(case: Case) -> Outputs:
    network, given = build_network(case), case.inputs
    share = case.config["mix_weight_text"]
    text, image = (
        Context("text", given["c_text"], share),
        Context("image", given["c_image"], 1 - share),
    )

    def ask(*contexts: Context) -> Tensor:
        return network(given["x"], given["t"], data="image", contexts=contexts).output

    return {"eps_text": ask(text), "eps_image": ask(image), "eps_mixed": ask(text, image)}


def first_release(case: Case) -> Outputs:
    network, given = build_network(case), case.inputs
    share = case.config["dual_image_ratio"]
    contexts = [
        Context("image", given["c_image"], share),
        Context("text", given["c_text"], 1 - share),
    ]
    dual = network(given["x_image"], given["t"], data="image", contexts=contexts).output
    return {**forward(case), "eps_dual": dual}


def timestep_embedding(case: Case) -> Outputs:
    t, period = case.inputs["t"], float(case.config["max_period"])
    found = {}
    for name in case.outputs:
        dim = int(name.rpartition("_")[2])
        repeats = "repeat" in name
        found[name] = (
            t[:, None].repeat(1, dim) if repeats else timestep_features(t, dim, max_period=period)
        )
    return found
