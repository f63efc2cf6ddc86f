"""`train.compile`: every block as one graph, which serves whatever number of tokens is kept."""

import subprocess
import sys

import pytest

# In a process of its own: the shape checks of tests can't be compiled.
COMPILE = """
import sys
import torch
from torch._dynamo.utils import counters
from udiff.recipe import load_recipe
family, *kept = sys.argv[1:]
encoder = ["network.num_encoder_blocks=4"] if family == "lightningdit" else []
torch.manual_seed(0)
system = load_recipe(f"{family}/debug", ["train.compile=true", *encoder]).build()
network = system.modules["denoiser"]
for parameter in network.parameters():
    torch.nn.init.normal_(parameter, std=0.05)
given = torch.randn(2, 4, 8, 8), torch.tensor([0.25, 0.5])
keeps = [None, *(torch.rand(2, 16).argsort(1)[:, :number] for number in map(int, kept))]

def run(keep):
    network.zero_grad()
    output = network(*given, label=torch.tensor([1, 10]), keep=keep).output
    output.square().sum().backward()
    return output.detach(), network.blocks_grad()

type(network).blocks_grad = lambda self: torch.cat(
    [p.grad.flatten() for p in self.parameters() if p.grad is not None]
)
plain = [run(keep) for keep in keeps]
for unit in system.shard_units:
    unit.compile(fullgraph=True, backend="aot_eager")
for number, (keep, expected) in enumerate(zip(keeps, plain)):
    torch.testing.assert_close(run(keep), expected, rtol=1e-4, atol=1e-4)
    if number == 2:
        graphs = counters["stats"]["unique_graphs"]
assert counters["stats"]["unique_graphs"] == graphs, (graphs, counters["stats"])
"""


@pytest.mark.long
@pytest.mark.parametrize("family", ["ddt", "lightningdit", "mdtv2"])
def test_blocks_compile_whole_and_not_for_every_number_of_tokens(family: str) -> None:
    command = [sys.executable, "-c", COMPILE, family, "11", "9", "8", "10", "7"]
    subprocess.run(command, check=True, timeout=280)
