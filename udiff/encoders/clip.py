"""CLIP (arXiv 2103.00020) by transformers: a state for every token of a text or a picture.

Other than CLIP's own embeddings these are sequences: every token goes through the projection, and
all are divided by the length of the one that CLIP would take (arXiv 2211.08332, section 3.3). The
pooled token so has length 1, the others have not.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate

from udiff.settings import EncoderSettings
from udiff.weights import hash_module

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Of the pictures that CLIP was trained on, in [0, 1]."""

Pixels = Float[Tensor, "images 3 size size"]


class CLIPContexts(nn.Module):
    """Texts and pictures -> states of their tokens."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        """Wrap transformers' `CLIPModel` and `CLIPTokenizer`, neither of which has types."""
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer

    @property
    def width(self) -> int:
        """Length of a token's state, of texts and pictures alike."""
        return self.model.config.projection_dim

    @property
    def max_tokens(self) -> int:
        """Tokens of a text, filled up."""
        return self.model.config.text_config.max_position_embeddings

    @property
    def num_image_tokens(self) -> int:
        """Tokens of a picture: the class token and the patches."""
        vision = self.model.config.vision_config
        return 1 + (vision.image_size // vision.patch_size) ** 2

    # ------------------------------------------------------------ texts

    def tokenize(
        self, texts: Sequence[str], max_tokens: int
    ) -> Int64[Tensor, "texts {max_tokens}"]:
        """Cut texts into a start token, tokens and an end token; fills up with end tokens."""
        found = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=max_tokens
        )
        return torch.tensor(found.input_ids, dtype=torch.int64).view(len(texts), max_tokens)

    def count_tokens(self, ids: Int64[Tensor, "texts tokens"]) -> Int64[Tensor, " texts"]:
        """Count each text's tokens up to its first end token, and that one."""
        is_end = ids == self.tokenizer.eos_token_id
        return torch.where(is_end.any(1), is_end.int().argmax(1) + 1, ids.shape[1])

    def encode(self, ids: Int64[Tensor, "texts tokens"]) -> Float[Tensor, "texts tokens width"]:
        """Find the states of a text's tokens; those that fill it up have states too.

        They are divided by the length of the end token's, the first with the highest id.
        """
        hidden = self.encode_hidden(ids)
        projected = self.model.text_projection(hidden)
        pooled = projected[torch.arange(len(ids)), ids.argmax(1)]
        return projected / pooled.norm(dim=-1)[:, None, None]

    def encode_hidden(
        self, ids: Int64[Tensor, "texts tokens"]
    ) -> Float[Tensor, "texts tokens hidden"]:
        """Find the states of a text's tokens before the projection."""
        return self.model.text_model(input_ids=ids).last_hidden_state

    # ------------------------------------------------------------ pictures

    @property
    def image_size(self) -> int:
        """Pixels along each side that the encoder takes."""
        return self.model.config.vision_config.image_size

    def prepare(self, images: Sequence[Image.Image]) -> Pixels:
        """Resize (shortest side, bicubic), crop the center, and normalize; by PIL, as CLIP did."""
        return torch.stack([self._prepare(image) for image in images])

    def prepare_batch(self, images: UInt8[Tensor, "images height width 3"]) -> Pixels:
        """Do the same on the pictures' device; bicubic up to one level of 8 bits like PIL's."""
        pixels = images.permute(0, 3, 1, 2).float()
        height, width = pixels.shape[2:]
        if min(height, width) != self.image_size:
            pixels = interpolate(
                pixels,
                _scaled_size(height, width, self.image_size),
                mode="bicubic",
                antialias=True,
            )
            pixels = pixels.round().clamp(0, 255)
        top, left = (
            (pixels.shape[-2] - self.image_size) // 2,
            (pixels.shape[-1] - self.image_size) // 2,
        )
        cropped = pixels[..., top : top + self.image_size, left : left + self.image_size]
        return _normalize(cropped / 255)

    def encode_image(
        self, pixels: Pixels, mask: Float[Tensor, "images 1 height width"] | None = None
    ) -> Float[Tensor, "images tokens width"]:
        """Find the states of a picture's tokens, the class token first.

        Args:
            pixels: prepared.
            mask: 1 keeps, 0 removes, in between weakens; brought to the encoder's size. A token's
                embedding and its state are multiplied by how much of its patch (of the picture, for
                the class token) is kept.
        """
        vision = self.model.vision_model
        hidden = vision.embeddings(pixels)
        weights = None if mask is None else self._token_weights(mask)
        if weights is not None:
            hidden = hidden * weights
        hidden = vision.encoder(inputs_embeds=vision.pre_layrnorm(hidden)).last_hidden_state
        projected = self.model.visual_projection(vision.post_layernorm(hidden))
        states = projected / projected[:, :1].norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return states if weights is None else states * weights

    # ------------------------------------------------------------ the whole

    def fingerprint(self) -> str:
        """Hash what the states depend on: tokens, configuration and weights."""
        config = self.model.config
        about = {
            f"{part}.{name}": getattr(getattr(config, part), name)
            for part in ("text_config", "vision_config")
            for name in ("num_attention_heads", "hidden_act", "layer_norm_eps")
        }
        vocabulary = sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        return hash_module(self.model, {**about, "tokens": vocabulary})

    def _prepare(self, image: Image.Image) -> Tensor:
        size = self.image_size
        image = image.convert("RGB")
        height, width = _scaled_size(image.height, image.width, size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        top, left = (height - size) // 2, (width - size) // 2
        image = image.crop((left, top, left + size, top + size))
        levels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return _normalize(levels.view(size, size, 3).permute(2, 0, 1).float() / 255)

    def _token_weights(self, mask: Tensor) -> Float[Tensor, "images tokens 1"]:
        size = (self.image_size, self.image_size)
        kept = interpolate(mask.clamp(0, 1), size, mode="bilinear")
        patches = avg_pool2d(kept, self.model.config.vision_config.patch_size).flatten(1)
        return torch.cat([kept.mean((2, 3)), patches], dim=1)[:, :, None]


def load_clip(settings: EncoderSettings) -> CLIPContexts:
    """Load a model of transformers and its tokenizer, in evaluation mode.

    Raises:
        FileNotFoundError: there is none at the path, and none on the hub that can be reached.
    """
    from transformers import CLIPModel, CLIPTokenizer

    try:
        model = CLIPModel.from_pretrained(settings.path, use_safetensors=True)
        tokenizer = CLIPTokenizer.from_pretrained(settings.path)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"clip.path {settings.path!r} is neither a local folder with a CLIP model "
            "(config.json, safetensors weights) and its tokenizer, nor one of the hub that can be "
            f"reached: {error}"
        ) from error
    return CLIPContexts(model, tokenizer).eval().requires_grad_(False)


def openai_tokenizer() -> Any:
    """Make the tokenizer that all published CLIP models share, from the copy in open_clip.

    For models that are made, not loaded: a folder of transformers holds its own.
    """
    import open_clip.tokenizer
    from transformers import CLIPTokenizer

    known = open_clip.tokenizer.SimpleTokenizer()
    vocabulary = {
        token.replace("<start_of_text>", "<|startoftext|>").replace(
            "<end_of_text>", "<|endoftext|>"
        ): number
        for token, number in known.encoder.items()
    }
    return CLIPTokenizer(vocab=vocabulary, merges=list(known.bpe_ranks))


def _scaled_size(height: int, width: int, shortest: int) -> tuple[int, int]:
    if height <= width:
        return shortest, int(shortest * width / height)
    return int(shortest * height / width), shortest


def _normalize(pixels: Float[Tensor, "*images 3 height width"]) -> Tensor:
    mean, std = (torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in (MEAN, STD))
    return (pixels - mean) / std
