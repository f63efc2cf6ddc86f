"""Reference cases of DDT."""

from torch import nn

from tests.golden.case import Case, Outputs
from udiff.models.ddt.checkpoint import network_from_official
from udiff.weights import load_strictly


def tolerance(case: Case, output: str) -> float:
    return 1e-5


def _network(case: Case) -> nn.Module:
    network = network_from_official(case.config)
    load_strictly(network, case.weights, source=case.name)
    return network.eval()


def _forward(case: Case) -> Outputs:
    network, given = _network(case), case.inputs
    seen: dict = {}
    for index, block in enumerate(network.blocks):
        block.register_forward_hook(
            lambda _m, _a, out, i=index: seen.__setitem__(f"block_{i}", out)
        )
    for name in ("t_embedder", "y_embedder"):
        key = f"{name[0]}_emb"
        getattr(network, name).register_forward_hook(
            lambda _m, _a, out, key=key: seen.__setitem__(key, out[:, 0])
        )
    mask = given["mask"].bool() if "mask" in given else None
    prediction = network(given["x"], given["t"], label=given["y"], mask=mask)
    return {**seen, "v": prediction.output, "state": prediction.state}


def _state_reuse(case: Case) -> Outputs:
    network, given = _network(case), case.inputs
    label = given["y"]
    first = network(given["x0"], given["t0"], label=label)
    fresh = network(given["x1"], given["t1"], label=label)
    reused = network(given["x1"], given["t1"], label=label, state=first.state)
    return {
        "state0": first.state,
        "v_reused": reused.output,
        "v_fresh": fresh.output,
        "state_fresh": fresh.state,
    }


RUNNERS = {
    "ddt_forward_mask": _forward,
    "ddt_forward_rect": _forward,
    "ddt_forward_square": _forward,
    "ddt_forward_state_reuse": _state_reuse,
}
