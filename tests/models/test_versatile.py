"""Versatile Diffusion: layouts, the order of blocks, flows, and modalities from elsewhere."""

import hashlib
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from udiff.models.versatile.checkpoint import convert_in, convert_out
from udiff.models.versatile.layouts import to_current, to_first_release, to_unet
from udiff.models.versatile.network import (
    Context,
    ContextLayers,
    ImageLayers,
    TextLayers,
    VersatileNetwork,
)
from udiff.models.versatile.places import infer_plan
from udiff.models.versatile.plan import Level, Plan
from udiff.models.versatile.sampler import Sampler
from udiff.models.versatile.schedule import make_schedule, sampling_timesteps
from udiff.recipe import load_recipe, parse_recipe
from udiff.samplers.ticks import drive
from udiff.system import Guidance, Sampling
from udiff.weights import WeightsError, strip_prefix

PLAN = Plan(32, (Level(32, 1, True), Level(64, 2, False)))
CONTEXT = ContextLayers(context_dim=12)


def _network(plan: Plan = PLAN) -> VersatileNetwork:
    torch.manual_seed(0)
    network = VersatileNetwork(
        plan,
        data={"image": ImageLayers(), "text": TextLayers(20, 20, positions=4)},
        contexts={"image": CONTEXT, "text": CONTEXT},
    )
    for parameter in network.parameters():  # layers that start at zero would hide mistakes
        nn.init.normal_(parameter, std=0.1)
    return network.eval()


def _digest(tensors: Mapping[str, Tensor]) -> str:
    lines = "\n".join(f"{key} {list(t.shape)}" for key, t in sorted(tensors.items()))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


# ---------------------------------------------------------------- layouts


@pytest.mark.parametrize(
    ("recipe", "layout", "digest"),
    [
        # Of all keys and shapes of the published files, the 12 schedule tables among them.
        ("four_flow_512", "current", "8233f4943ef017ca"),
        ("four_flow_256", "first_release", "b190e982ba3d3b9e"),
        ("dual_flow_256", "unet", "0c048cb51ccbb8df"),
        ("single_flow_256", "unet", "176a1a5807ec1f5d"),
    ],
)
def test_published_sizes_have_the_published_keys(recipe, layout, digest):
    loaded = load_recipe(f"versatile/{recipe}")
    with torch.device("meta"):
        modules = nn.ModuleDict(loaded.build().modules)
    official = convert_out(loaded, modules.state_dict(), layout=layout)
    assert _digest(official) == digest
    contexts = [name for name in ("text", "image") if f"_{name}" in str(loaded.flows)]
    keys, weights = convert_in(official, {"contexts": ["image"]} if len(contexts) < 2 else None)
    assert _digest(weights) == _digest(modules.state_dict())
    found = parse_recipe(keys, source="converted")
    assert (found.network, found.flows) == (loaded.network, loaded.flows)


@given(
    levels=st.lists(
        st.tuples(st.sampled_from([1, 2]), st.integers(1, 3), st.booleans()), min_size=1, max_size=3
    )
)
@settings(max_examples=8, deadline=None)
def test_both_layouts_tell_the_order_of_blocks(levels):
    plan = Plan(32, tuple(Level(32 * width, count, has) for width, count, has in levels))
    with torch.device("meta"):
        weights = _network(plan).state_dict()
    nested = strip_prefix(to_first_release(weights, plan), "model.diffusion_model.unet_text.")
    assert infer_plan(nested) == plan
    found = infer_plan(strip_prefix(weights, "diffuser.image."))
    assert [level[:2] for level in found.levels] == [level[:2] for level in plan.levels]
    assert [s.channels_in for s in found.steps if s.kind == "context"] == [
        s.channels_in for s in plan.steps if s.kind == "context"
    ]


def test_first_release_and_back_is_bit_exact():
    weights = _network().state_dict()
    back = to_current(to_first_release(weights, PLAN))
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], weights[key]) for key in weights)


def test_float16_files_load_into_float32():
    halves = {key: t.half() for key, t in _network().state_dict().items()}
    assert all(t.dtype == torch.float32 for t in to_current(halves).values())


def test_averaged_stable_diffusion_keys_get_their_dots_back():
    loaded = load_recipe("versatile/single_flow_256")
    with torch.device("meta"):
        weights = loaded.build().modules["denoiser"].state_dict()
    unet = to_unet(weights, loaded.network.plan)
    prefix = "diffusion_model."
    names = [key.removeprefix("model.").removeprefix(prefix) for key in unet]
    averaged = {prefix + name.replace(".", ""): unet[f"model.{prefix}{name}"] for name in names}
    averaged |= {"decay": torch.tensor(0.99), "num_updates": torch.tensor(7)}
    converted = convert_in(averaged, {"contexts": ["image"]})
    assert strip_prefix(converted.weights, "denoiser.").keys() == weights.keys()


def test_other_checkpoints_are_refused():
    with pytest.raises(WeightsError, match="no diffuser"):
        convert_in({"encoder.weight": torch.zeros(1)}, None)


# ---------------------------------------------------------------- flows


class _SoundLayers:
    """Blocks of a made-up modality: waves (batch, 1, samples)."""

    def stem(self, channels: int) -> nn.Module:
        return nn.Sequential(nn.Conv1d(1, channels, 4, stride=4), nn.Unflatten(2, (-1, 1)))

    def residual(self, channels_in: int, channels_out: int, time_dim: int) -> nn.Module:
        return _SoundBlock(channels_in, channels_out, time_dim)

    def down(self, channels: int) -> nn.Module:
        return nn.AvgPool2d((2, 1))

    def up(self, channels: int) -> nn.Module:
        return nn.Upsample(scale_factor=(2, 1))

    def head(self, channels: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(2), nn.ConvTranspose1d(channels, 1, 4, stride=4))


class _SoundBlock(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, time_dim: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(channels_in, channels_out, (3, 1), padding=(1, 0))
        self.time = nn.Linear(time_dim, channels_out)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.mix(x).tanh() + self.time(time)[:, :, None, None]


def test_a_modality_from_elsewhere_joins_all_flows():
    network = VersatileNetwork(
        PLAN,
        data={"image": ImageLayers(), "sound": _SoundLayers()},
        contexts={"text": CONTEXT, "sound": ContextLayers(context_dim=5)},
    )
    t = torch.tensor([3, 700])
    text = Context("text", torch.randn(2, 4, 12), 0.4)
    sound = Context("sound", torch.randn(2, 9, 5), 0.6)
    wave, image = torch.randn(2, 1, 32), torch.randn(2, 4, 8, 8)
    assert network(wave, t, data="sound", contexts=[text]).output.shape == wave.shape
    assert network(wave, t, data="sound", contexts=[text, sound]).output.shape == wave.shape
    mixed = network(image, t, data="image", contexts=[text, sound]).output
    mixed.square().mean().backward()
    assert network.layer_groups["sound_context"][0][0].proj_in.weight.grad is not None


def test_a_context_of_ratio_one_is_that_flow():
    network, t = _network(), torch.tensor([5, 500])
    image, text = torch.randn(2, 6, 12), torch.randn(2, 4, 12)
    x = torch.randn(2, 4, 8, 8)
    alone = network(x, t, data="image", contexts=[Context("text", text)]).output
    mixed = [Context("text", text, torch.tensor([1.0, 0.0])),
             Context("image", image, torch.tensor([0.0, 1.0]))]  # fmt: skip
    per_sample = network(x, t, data="image", contexts=mixed).output
    torch.testing.assert_close(per_sample[0], alone[0], rtol=1e-4, atol=1e-4)
    other = network(x, t, data="image", contexts=[Context("image", image)]).output
    torch.testing.assert_close(per_sample[1], other[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("data", "contexts"), [("sound", ["text"]), ("image", ["sound"]), ("image", [])]
)
def test_layers_that_are_not_there_are_named(data, contexts):
    tokens = torch.zeros(1, 2, 12)
    with pytest.raises(ValueError, match="image"):
        _network()(
            torch.zeros(1, 4, 8, 8),
            torch.zeros(1),
            data=data,
            contexts=[Context(kind, tokens) for kind in contexts],
        )


# ---------------------------------------------------------------- sampling


def test_every_step_count_gives_timesteps_of_the_schedule():
    for count in range(1, 1001):
        steps = sampling_timesteps(count)
        assert steps == sorted(set(steps))
        assert steps[0] == 1
        assert steps[-1] <= 999
        assert len(steps) >= count - 1
    assert sampling_timesteps(50) == list(range(1, 1000, 20))


@pytest.mark.parametrize("num_steps", [1, 3, 9, 50, 1000])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_known_distribution_is_reached_or_approached(num_steps, eta):
    """Data of standard deviation s: the best prediction of the noise is known, too."""
    std, schedule = 0.5, make_schedule()

    class Optimal(nn.Module):
        def forward(self, x: Tensor, t: Tensor):
            from udiff.system import Prediction

            bar = schedule.alpha_bar[t.long()].float()[:, None]
            return Prediction((1 - bar).sqrt() * x / (bar * std**2 + 1 - bar))

    generator = torch.Generator().manual_seed(0)

    def normals():
        while True:
            yield torch.randn(4000, generator=generator)

    draws = normals()
    sampler = Sampler(schedule, num_steps, eta=eta)
    [sample] = drive(
        Optimal(), [Sampling(sampler.from_noise(next(draws), draws), {}, {}, Guidance())]
    )
    assert sample.isfinite().all()
    if num_steps == 1000 or (num_steps == 50 and not eta):
        assert abs(sample.std().item() - std) < 0.03


def test_sampling_from_data_needs_a_step_that_is_visited():
    sampler, x = Sampler(make_schedule(), 10), torch.zeros(3)
    with pytest.raises(ValueError, match=r"1\.\.9"):
        sampler.from_data(x, x, 10, iter(()))
