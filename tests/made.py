"""Small caches and bundles for tests, written by the code that writes real ones."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from diffusers import AutoencoderKL
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from pipelines.rows import Rows
from pipelines.shards import Unit
from pipelines.stages.write import WriteUnit
from udiff.autoencoders.optimus_text import train_optimus_tokenizer
from udiff.bundle import load_autoencoder, save_bundle
from udiff.data.manifest import Manifest, Plan, finish, start_plan
from udiff.data.schema import SAMPLE, pictures_schema, tensor_field
from udiff.data.storage import open_folder
from udiff.encoders.clip import openai_tokenizer
from udiff.recipe import load_recipe
from udiff.system import FamilyRecipe

LATENT = (4, 8, 8)
WORDS = (
    "a", "an", "the", "red", "green", "blue", "cat", "dog", "bus", "tree", "on", "in", "under",
    "of", "what", "is", "color", "Q:", "A:",
)  # fmt: skip


def save_random_bundle(path: Path, recipe: FamilyRecipe, *, seed: int) -> None:
    """Save a bundle whose every weight is random: layers that start at zero would hide mistakes."""
    torch.manual_seed(seed)
    modules = nn.ModuleDict(recipe.build().modules)
    for parameter in modules.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    save_bundle(path, recipe, modules.state_dict(), about="random weights, for tests\n")


def save_autoencoder(path: Path, *, seed: int = 1) -> None:
    """Save a bundle of the debug autoencoder."""
    save_random_bundle(path, load_recipe("kl_autoencoder/debug"), seed=seed)


def write_latents(
    path: Path,
    *,
    autoencoder: Path,
    rows: int = 400,
    rows_per_file: int = 150,
    row_group_size: int = 64,
    seed: int = 0,
) -> Manifest:
    """Write a cache of random latents, whose class shows in their mean."""
    draw = np.random.default_rng(seed)
    folder = open_folder(path)
    plan = Plan(
        kind="latents",
        identity={"latent": {"autoencoder": load_autoencoder(str(autoencoder)).fingerprint()}},
        options={},
        inputs={"seed": seed, "rows": rows},
        shapes={"latent_mean": LATENT, "latent_logvar": LATENT},
        class_names=tuple(f"class {k}" for k in range(10)),
    )
    start_plan(folder, plan)
    write = WriteUnit(
        folder,
        schema=pa.schema([*SAMPLE, *(tensor_field(name, LATENT) for name in plan.shapes)]),
        plan=plan.fingerprint,
        row_group_size=row_group_size,
    )
    names = []
    for start in range(0, rows, rows_per_file):
        count = min(rows_per_file, rows - start)
        unit = Unit(f"{start:05d}", "made", num_samples=count)
        write(unit, Rows(kept=[_latent_row(start + k, draw) for k in range(count)]))
        names.append(unit.name)
    return finish(folder, plan, names)


def write_pictures(
    path: Path,
    pictures: np.ndarray,
    *,
    rows_per_file: int = 150,
    captions: Sequence[str] = ("a picture that was made",),
) -> Manifest:
    """Write a cache of pictures, uint8 (rows, size, size, 3); captions come again and again."""
    folder, size = open_folder(path), pictures.shape[1]
    plan = Plan(
        kind="pictures",
        identity={"image": {"made": len(pictures)}},
        options={},
        inputs={"rows": len(pictures)},
        shapes={"image": (size, size, 3)},
        class_names=("made",),
    )
    start_plan(folder, plan)
    schema = pictures_schema((size, size))
    write = WriteUnit(folder, schema=schema, plan=plan.fingerprint, row_group_size=64)
    names = []
    for start in range(0, len(pictures), rows_per_file):
        part = pictures[start : start + rows_per_file]
        unit = Unit(f"{start:05d}", "made", num_samples=len(part))
        rows = [
            _picture_row(start + k, picture, captions[(start + k) % len(captions)])
            for k, picture in enumerate(part)
        ]
        write(unit, Rows(kept=rows))
        names.append(unit.name)
    return finish(folder, plan, names)


def draw_pictures(num_pictures: int, size: int, *, seed: int = 0) -> np.ndarray:
    """Draw smooth colored pictures: a few random waves each, uint8 (pictures, size, size, 3)."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size] / size
    down, right, phase = draw.uniform(0, 8, (3, num_pictures, 3, 1, 1))
    waves = np.sin(down * y + right * x + phase)
    return ((waves + 1) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1)


def _picture_row(key: int, picture: np.ndarray, caption: str) -> dict:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    height, width = picture.shape[:2]
    return {
        "key": f"{key:09d}",
        "label": 0,
        "caption": caption,
        "width": width,
        "height": height,
        "source": "made",
        "image": file.getvalue(),
    }


def _latent_row(key: int, draw: np.random.Generator) -> dict:
    label = key % 10
    mean = draw.normal(label / 5 - 1, 1, LATENT).astype(np.float16)
    return {
        "key": f"{key:09d}",
        "label": label,
        "caption": f"a picture of class {label}",
        "width": 32,
        "height": 32,
        "source": "made",
        "latent_mean": mean,
        "latent_logvar": np.full(LATENT, -4, np.float16),
    }


def save_diffusers_autoencoder(path: Path, *, seed: int = 5) -> None:
    """Save a tiny random autoencoder as a diffusers folder: 4 channels, 4 pixels to an element."""
    torch.manual_seed(seed)
    AutoencoderKL(
        block_out_channels=(8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
        mid_block_add_attention=False,
    ).save_pretrained(path)  # fmt: skip


def save_t5(path: Path, *, width: int = 24, words: Sequence[str] = WORDS, seed: int = 4) -> None:
    """Save a tiny random T5 encoder, and a tokenizer of whole words: pad 0, end 1, unknown 2."""
    vocabulary = ["<pad>", "</s>", "<unk>", *words, "<extra_id_0>"]
    tokenizer = Tokenizer(WordLevel({w: k for k, w in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(path)
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=len(vocabulary), d_model=width, d_kv=8, d_ff=40, num_layers=2, num_heads=3,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    T5EncoderModel(config).save_pretrained(path)


def save_clip(path: Path, *, width: int = 24, seed: int = 6) -> None:
    """Save a tiny random CLIP with the real byte pairs: 9 tokens of 32-pixel pictures."""
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "projection_dim": width,
    }  # fmt: skip
    config = CLIPConfig(
        text_config={**sizes, "vocab_size": 49408, "max_position_embeddings": 20},
        vision_config={**sizes, "image_size": 24, "patch_size": 8},
        projection_dim=width,
    )
    CLIPModel(config).save_pretrained(path)
    openai_tokenizer().save_pretrained(path)


def save_optimus(path: Path, texts: Sequence[str], *, seed: int = 7) -> None:
    """Save a bundle of a tiny random Optimus, and beside it vocabularies learned from texts."""
    tokenizers = path.parent / f"{path.name}-tokenizers"
    tokenizer = train_optimus_tokenizer(texts, num_tokens=300)
    tokenizer.save(tokenizers)
    half = "dim: 16, depth: 1, num_heads: 2, hidden_dim: 32, num_positions: 40"
    overrides = [
        f"tokenizers.path={tokenizers}",
        f"network.encoder={{vocab_size: {len(tokenizer.pieces)}, {half}}}",
        f"network.decoder={{vocab_size: {tokenizer.pad_id + 3}, {half}}}",
        "network.latent_dim=20",
    ]
    save_random_bundle(path, load_recipe("optimus/debug", overrides), seed=seed)
