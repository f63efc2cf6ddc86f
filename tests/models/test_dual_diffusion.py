"""Dual Diffusion: what is not in the reference vectors."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer, T5EncoderModel

from jobs.convert import to_bundle, to_official
from tests.made import WORDS, draw_pictures, save_diffusers_autoencoder, save_random_bundle, save_t5
from udiff.bundle import load_autoencoder, load_bundle, save_bundle
from udiff.fit import initialize
from udiff.generate import Generator
from udiff.models.dual_diffusion.checkpoint import (
    from_sd3,
    network_arguments,
    network_from_official,
)
from udiff.models.dual_diffusion.network import DualDiffusion
from udiff.recipe import RecipeError, load_recipe
from udiff.samplers.unmask import unmask
from udiff.system import FamilyRecipe, Query, Rng, Steps, System
from udiff.training.optimizer import make_optimizer
from udiff.training.shard import checkpoint_activations
from udiff.weights import WeightsError, load_strictly

VOCABULARY = len(WORDS) + 4
MASK = VOCABULARY - 1
SMALL = (
    f"network={{depth: 2, num_heads: 2, head_dim: 8, text_dim: 24, vocab_size: {VOCABULARY}}}",
    f"text={{max_tokens: 12, mask_id: {MASK}}}",
    "sampling.image={num_steps: 3, guidance_scale: 2}",
    "sampling.text={caption_steps: 6, answer_steps: 4}",
)
ONLY_TEXT = "objective.image.weight=0"
ONLY_IMAGE = "objective.text.weight=0"


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    save_t5(folder / "t5")
    save_diffusers_autoencoder(folder / "vae")
    return folder


@pytest.fixture
def recipe(encoders):
    def load(*overrides: str, name: str = "dual_diffusion/debug") -> FamilyRecipe:
        paths = [
            f"autoencoder={{path: {encoders / 'vae'}}}",
            f"text_encoder={{path: {encoders / 't5'}, pad: end}}",
        ]
        return load_recipe(name, [*SMALL, *paths, *overrides])

    return load


def _batch(rows: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    batch: dict[str, torch.Tensor] = {}
    for part in ("image", "text"):
        batch[f"{part}.latent_mean"] = torch.randn(rows, 4, 8, 8, generator=generator)
        batch[f"{part}.caption"] = torch.randn(rows, 12, 24, generator=generator)
        batch[f"{part}.latent_logvar"] = torch.full((rows, 4, 8, 8), -4.0)
        for name in ("caption", "recaption", "conversation"):
            ids = torch.randint(3, MASK, (rows, 12), generator=generator).int()
            ids[:, 8:] = 1
            batch[f"{part}.{name}_tokens"] = ids
    batch["text.conversation_learned"] = (torch.arange(12) >= 4).int().expand(rows, 12)
    return batch


def _losses(system: System, batch=None, step: int = 0):
    [phase] = system.phases
    batch = batch or _batch()
    columns = {name: batch[name] for name in system.columns}
    return phase.loss(columns, phase.draw(columns, Rng(0).at(step)))


# ---------------------------------------------------------------- training


@pytest.mark.parametrize(
    ("overrides", "terms"),
    [
        ((), {"image_data_mse", "text_masked_nll"}),
        (("objective.text.source=conversation",), {"image_data_mse", "text_masked_nll"}),
        ((ONLY_TEXT,), {"text_masked_nll"}),
        ((ONLY_IMAGE, "objective.image.recaption_prob=0.5"), {"image_data_mse"}),
        (("objective.text.is_antithetic=false",), {"image_data_mse", "text_masked_nll"}),
        (("objective.text.padding=ignored",), {"image_data_mse", "text_masked_nll"}),
        (("objective.text.times=importance",), {"image_data_mse", "text_masked_nll"}),
        ((ONLY_IMAGE, "objective.image.states=cached"), {"image_data_mse"}),
        ((ONLY_IMAGE, "objective.image.gradient=unit"), {"image_data_mse"}),
        (("lora={rank: 2}",), {"image_data_mse", "text_masked_nll"}),
        ((ONLY_TEXT, "lora={rank: 2}"), {"text_masked_nll"}),
    ],
)
def test_what_learns_has_gradients_and_gets_better(recipe, overrides, terms):
    torch.manual_seed(0)
    system = recipe(*overrides).build()
    [phase] = system.phases
    assert set(_losses(system).terms) == terms
    optimizer = make_optimizer([system.modules[name] for name in phase.modules], phase.optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 3e-3
    values = []
    for _ in range(12):
        total = _losses(system).total
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        values.append(total.item())
    idle = [
        key
        for name in phase.modules
        for key, p in system.modules[name].named_parameters()
        if p.requires_grad and p.grad is None
    ]
    assert not idle
    assert values[-1] < 0.99 * values[0]


def test_alignment_trains_the_row_of_the_mask_and_what_is_named(recipe):
    torch.manual_seed(0)
    system = recipe(ONLY_TEXT, "objective.learned=[mask_row, denoiser.text_proj_out]").build()
    _losses(system).total.backward()
    learned = {
        f"{name}.{key}"
        for name, module in system.modules.items()
        for key, p in module.named_parameters()
        if p.grad is not None and p.grad.abs().max() > 0
    }
    assert learned == {
        "mask_row.weight", "denoiser.text_proj_out.weight", "denoiser.text_proj_out.bias",
    }  # fmt: skip
    plain = recipe().build()
    assert set(plain.modules["mask_row"].state_dict()) == {"weight"}
    assert not list(plain.modules["mask_row"].parameters())


def test_activation_checkpointing_changes_no_gradient(recipe):
    def gradients(prepare) -> torch.Tensor:
        torch.manual_seed(0)
        system = recipe().build()
        prepare(system)
        _losses(system).total.backward()
        grads = [p.grad for p in system.modules["denoiser"].parameters() if p.grad is not None]
        return torch.cat([grad.flatten() for grad in grads])

    def ours(system: System) -> None:
        for unit in system.shard_units:
            checkpoint_activations(unit)

    plain = gradients(lambda _: None)
    assert torch.equal(gradients(ours), plain)
    of_diffusers = gradients(lambda s: s.modules["denoiser"].enable_gradient_checkpointing())
    assert torch.equal(of_diffusers, plain)


def test_logits_where_they_are_wanted_are_those_of_all(recipe):
    network = recipe().build().modules["denoiser"]
    latent, t, text = torch.randn(2, 4, 8, 8), torch.zeros(2), torch.randn(2, 12, 24)
    everywhere = torch.ones(2, 12, dtype=torch.bool)
    some = torch.rand(2, 12) < 0.4
    logits = network(latent, t, text=text, logits_at=everywhere).output
    torch.testing.assert_close(
        network(latent, t, text=text, logits_at=some).output, logits[some.flatten()]
    )
    with pytest.raises(ValueError, match="needs a latent"):
        network(None, t, text=text)


def test_a_lora_run_begins_from_the_bundle_of_a_whole_one(recipe, tmp_path):
    save_random_bundle(tmp_path / "base", recipe(), seed=1)
    base = load_bundle(tmp_path / "base").system
    adapted = recipe("lora={rank: 2}").build()
    initialize(adapted, str(tmp_path / "base"))
    x, t, text = torch.randn(2, 4, 8, 8), torch.full((2,), 500.0), torch.randn(2, 12, 24)
    ours, theirs = (s.modules["denoiser"](x, t, text=text).output for s in (adapted, base))
    torch.testing.assert_close(ours, theirs)  # adapters begin as nothing
    learning = [key for key, p in adapted.modules["denoiser"].named_parameters() if p.requires_grad]
    assert learning
    assert all("lora_" in key for key in learning)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["text.mask_id=99"], "text.mask_id 99 must be below"),
        (["text.end_id=99"], "text.end_id 99 must be below"),
        (["text.max_tokens=1"], "text.max_tokens: .*greater than or equal to 2"),
        ([ONLY_TEXT, ONLY_IMAGE], "are both 0"),
        (["latent.height=null"], "give both or neither"),
        (["latent.height=7"], "latent.height 7 must be a multiple of network.patch_size 2"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(recipe, overrides, message):
    with pytest.raises(RecipeError, match=message):
        recipe(*overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective.learned=[mask_rw]"], "objective.learned 'mask_rw' is no parameter"),
        ([ONLY_TEXT, "objective.learned=[mask_row, denoiser.image_]"], "'denoiser.image_' is no"),
    ],
)
def test_what_is_to_learn_must_be_there_and_be_reached(recipe, overrides, message):
    with pytest.raises(ValueError, match=message):
        recipe(*overrides).build()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("network.text_dim=32", "network.text_dim must be 24 for text_encoder.path"),
        ("text.end_id=2", "text.end_id must be 1 for"),
    ],
)
def test_a_text_encoder_of_another_make_is_refused(recipe, override, message):
    with pytest.raises(ValueError, match=message):
        _losses(recipe(override).build())


# ---------------------------------------------------------------- sampling


def _run(steps: Steps, answer: torch.Tensor) -> tuple[list[Query], torch.Tensor]:
    queries = [next(steps)]
    while True:
        try:
            queries.append(steps.send(answer))
        except StopIteration as end:
            return queries, end.value


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.booleans(), min_size=1, max_size=10),
    st.integers(1, 12),
    st.sampled_from(["cached", "plain"]),
    st.integers(0, 2**32),
)
def test_fixed_tokens_stay_and_every_mask_goes(fixed, num_steps, method, seed):
    generator = torch.Generator().manual_seed(seed)
    is_fixed = torch.tensor(fixed)
    ids = torch.randint(0, 6, is_fixed.shape, generator=generator)
    logits = torch.randn(len(fixed), 7, generator=generator)
    steps = unmask(
        ids,
        is_fixed,
        mask_id=6,
        num_steps=num_steps,
        race=lambda masked: torch.rand(int(masked.sum()), 7, generator=generator),
        method=method,
    )
    queries, found = _run(steps, logits)
    seen = None
    assert torch.equal(found[is_fixed], ids[is_fixed])
    assert (found != 6).all()
    assert len(queries) == num_steps + 1 if method == "plain" else len(queries) <= num_steps + 1
    for query in queries:  # a token stays what it was found to be
        known = query.x != 6
        assert torch.equal(query.x[known], found[known])
        assert seen is None or (known | ~seen).all()
        seen = known


def test_a_task_moves_to_a_device_as_a_whole(recipe):
    task = recipe().build().tasks["image_to_text"]
    task.network.to("meta")
    assert all(tensor.is_meta for tensor in task.network.state_dict().values())
    assert "mask_row.weight" in task.network.state_dict()


@pytest.fixture
def bundle(recipe, tmp_path):
    save_random_bundle(tmp_path / "bundle", recipe(), seed=2)
    return tmp_path / "bundle"


def _picture(seed: int = 0, size: tuple[int, int] = (40, 36)) -> bytes:
    file = io.BytesIO()
    Image.fromarray(draw_pictures(1, 48, seed=seed)[0]).resize(size).save(file, "PNG")
    return file.getvalue()


def test_a_bundle_carries_its_encoders_and_answers_every_task(bundle, encoders):
    recipe = load_bundle(bundle).recipe
    assert recipe.text_encoder.path == str(bundle / "text_encoder")
    assert recipe.autoencoder.path == str(bundle / "autoencoder")
    generator = Generator(bundle)
    pictures = generator.generate(
        [
            {"prompt": "a red cat", "seed": 1},
            {"prompt": "a dog", "seed": 1, "width": 48, "height": 24, "num_steps": 2},
            {"prompt": "a dog", "guidance_scale": 1, "sigmas": [1.0, 0.5], "mu": 0.5},
        ],
        task="text_to_image",
    )
    assert [np.asarray(picture).shape for picture in pictures] == [
        (32, 32, 3), (24, 48, 3), (32, 32, 3),
    ]  # fmt: skip
    texts = generator.generate(
        [{"image": _picture(), "seed": 3}, {"image": _picture(), "num_tokens": 5, "num_steps": 2}],
        task="image_to_text",
    )
    answers = generator.generate(
        [{"image": _picture(seed), "question": "what is red", "seed": seed} for seed in range(3)],
        task="visual_question_answering",
    )
    assert all(isinstance(text, str) for text in texts + answers)


def test_a_text_is_its_seeds_whatever_it_is_sampled_beside(bundle):
    generator = Generator(bundle)
    requests = [{"image": _picture(seed), "seed": seed} for seed in range(3)]
    together = generator.generate(requests, task="image_to_text")
    alone = [generator.generate([each], task="image_to_text")[0] for each in requests]
    assert together == alone
    again = generator.generate([{**requests[0], "seed": 9}], task="image_to_text")
    assert again != together[:1]


def test_pictures_are_read_by_an_autoencoder_that_is_a_bundle(recipe, encoders, tmp_path):
    """The weights of a diffusers folder, in a bundle of ours, give the same texts."""
    sizes = "network={channels: [8, 8, 8], norm_num_groups: 4, mid_block_attention: false}"
    ours = load_recipe("kl_autoencoder/debug", [sizes])
    model = load_autoencoder(str(encoders / "vae"))
    weights = {f"autoencoder.{key}": t for key, t in model.state_dict().items()}
    save_bundle(tmp_path / "vae", ours, weights, about="for a test")
    answers = []
    for name, path in (("folder", encoders / "vae"), ("bundle", tmp_path / "vae")):
        known = f"autoencoder={{path: {path}, mean: [0, 0, 0, 0], std: [5, 5, 5, 5]}}"
        save_random_bundle(tmp_path / name, recipe(known), seed=2)
        requests = [{"image": _picture(seed), "question": "what is red"} for seed in range(2)]
        generator = Generator(tmp_path / name)
        answers.append(
            generator.generate(requests, task="visual_question_answering")
            + generator.generate([{"image": _picture()}], task="image_to_text")
        )
    assert answers[0] == answers[1]
    with pytest.raises(WeightsError, match="is no folder of diffusers"):
        to_official(tmp_path / "bundle", tmp_path / "released")


def test_a_template_is_filled_in(bundle):
    text = Generator(bundle).generate(
        [{"image": _picture(), "template": "a <extra_id_0> cat on <extra_id_0> bus"}],
        task="image_to_text",
    )[0]
    words = text.split()
    assert words[0] == "a"
    assert "<extra_id_0>" not in words


@pytest.mark.parametrize(
    ("task", "request_", "message"),
    [
        ("text_to_image", {"prompt": "a", "width": 30}, "width must be a multiple of 8"),
        ("text_to_image", {"prompt": "a", "height": 800}, "up to 192, got 800"),
        ("text_to_image", {"prompt": "a", "sigmas": [0.5, 0.9]}, "levels must fall"),
        ("image_to_text", {"image": b"no picture"}, "of no known format"),
        ("visual_question_answering", {"image": _picture()}, "question: Field required"),
    ],
)
def test_a_request_that_cannot_be_met_is_explained(bundle, task, request_, message):
    with pytest.raises(ValueError, match=message):
        Generator(bundle).generate([request_], task=task)


def test_the_published_network_has_its_published_size():
    with torch.device("meta"):
        network = DualDiffusion(vocab_size=32_100)
    assert sum(p.numel() for p in network.parameters()) == 2_102_856_100


# ---------------------------------------------------------------- checkpoints


def _official_config() -> dict:
    return {
        "vocab_size": VOCABULARY, "sample_size": 16, "patch_size": 2, "in_channels": 4,
        "out_channels": 4, "num_layers": 2, "attention_head_dim": 64, "num_attention_heads": 1,
        "joint_attention_dim": 24, "caption_projection_dim": 64, "pos_embed_max_size": 24,
        "dual_attention_layers": [], "qk_norm": None, "pooled_projection_dim": 8,
    }  # fmt: skip


@pytest.fixture
def released(encoders, tmp_path):
    """A folder as released ones are; the transformer's file is diffusers' own."""
    folder = tmp_path / "released"
    torch.manual_seed(7)
    network = network_from_official(_official_config())
    network.save_pretrained(folder / "transformer")
    (folder / "transformer" / "config.json").write_text(json.dumps(_official_config()))
    shutil.copytree(encoders / "vae", folder / "vae")
    T5EncoderModel.from_pretrained(encoders / "t5").save_pretrained(folder / "text_encoder")
    AutoTokenizer.from_pretrained(encoders / "t5").save_pretrained(folder / "tokenizer")
    return folder


def _bytes(folder: Path, *names: str) -> list[bytes]:
    return [(folder / name).read_bytes() for name in names]


def test_a_released_folder_comes_back_byte_by_byte(released, tmp_path):
    to_bundle("dual_diffusion", released, tmp_path / "bundle")
    to_official(tmp_path / "bundle", tmp_path / "back")
    files = (
        "transformer/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "tokenizer/tokenizer.json",
    )
    assert _bytes(tmp_path / "back", *files) == _bytes(released, *files)
    wanted, found = (
        json.loads((folder / "transformer/config.json").read_text())
        for folder in (released, tmp_path / "back")
    )
    ignored = {"pooled_projection_dim", "_class_name", "_diffusers_version"}
    assert {k: v for k, v in wanted.items() if k not in ignored} == {
        k: v for k, v in found.items() if k not in ignored
    }
    to_bundle("dual_diffusion", tmp_path / "back", tmp_path / "again")
    name = "weights.safetensors"
    assert _bytes(tmp_path / "again", name) == _bytes(tmp_path / "bundle", name)


def test_a_consolidated_checkpoint_comes_back(released, tmp_path):
    weights = load_file(released / "transformer/diffusion_pytorch_model.safetensors")
    torch.save(weights, tmp_path / "consolidated.00-of-01.pth")
    torch.save({"state_dict": weights}, tmp_path / "wrapped.pth")
    torch.save(torch.arange(24.0), tmp_path / "mask_token_emb.00-of-01.pth")
    config = tmp_path / "config.yaml"
    config.write_text(f"pretrained_mask_emb: {tmp_path / 'mask_token_emb.00-of-01.pth'}\n")
    for name in ("consolidated.00-of-01.pth", "wrapped.pth"):
        to_bundle("dual_diffusion", tmp_path / name, tmp_path / "bundle", config=config)
        to_official(tmp_path / "bundle", tmp_path / "back.safetensors")
        back = load_file(tmp_path / "back.safetensors")
        assert back.keys() == weights.keys()
        assert all(torch.equal(back[key], weights[key]) for key in weights)
        row = load_file(tmp_path / "bundle/weights.safetensors")["mask_row.weight"]
        assert torch.equal(row, torch.arange(24.0))
    with pytest.raises(WeightsError, match="name its file as pretrained_mask_emb"):
        to_bundle("dual_diffusion", tmp_path / name, tmp_path / "bundle")


def test_sd3_gives_all_that_it_has(released, tmp_path):
    official = {k: v for k, v in _official_config().items() if k != "vocab_size"}
    torch.manual_seed(8)
    sd3 = SD3Transformer2DModel(**official)
    ours = network_from_official(_official_config())
    weights = from_sd3(sd3.state_dict(), network_arguments(_official_config()))
    load_strictly(ours, weights, source="SD3")
    # Without what pooled texts add to the time, SD3 gives the velocity of what it became.
    pooled = sd3.time_text_embed.text_embedder
    for parameter in pooled.linear_2.parameters():
        parameter.data.zero_()
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([700.0, 30.0]), torch.randn(2, 5, 24)
    theirs = sd3(x, text, torch.zeros(2, 8), t).sample
    torch.testing.assert_close(ours(x, t, text=text).output, theirs, rtol=1e-5, atol=1e-5)
    assert weights.keys() == ours.state_dict().keys()


def test_the_keys_of_the_published_sizes_are_covered():
    config = {
        **_official_config(), "vocab_size": 32_100, "sample_size": 128, "in_channels": 16,
        "out_channels": 16, "num_layers": 24, "num_attention_heads": 24,
        "joint_attention_dim": 4096, "caption_projection_dim": 1536, "pos_embed_max_size": 192,
    }  # fmt: skip
    official = {k: v for k, v in config.items() if k not in ("vocab_size", "pooled_projection_dim")}
    with torch.device("meta"):
        sd3 = SD3Transformer2DModel(**official, pooled_projection_dim=2048)
        assert sum(p.numel() for p in sd3.parameters()) == 2_028_328_000
    with torch.device("meta"):
        weights = from_sd3(sd3.state_dict(), network_arguments(config))
    assert len(weights) == 688


def test_a_lora_is_merged_where_it_leaves(recipe, tmp_path):
    adapted = recipe("lora={rank: 2, alpha: 4}")
    save_random_bundle(tmp_path / "bundle", adapted, seed=3)
    to_official(tmp_path / "bundle", tmp_path / "out.safetensors")
    plain = recipe().build_network()
    load_strictly(plain, load_file(tmp_path / "out.safetensors"), source="merged")
    x, t, text = torch.randn(2, 4, 8, 8), torch.full((2,), 500.0), torch.randn(2, 12, 24)
    with_adapters = load_bundle(tmp_path / "bundle").system.modules["denoiser"]
    torch.testing.assert_close(
        plain(x, t, text=text).output, with_adapters(x, t, text=text).output, rtol=1e-4, atol=1e-5
    )
