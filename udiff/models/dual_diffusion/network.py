"""Dual Diffusion's transformer (arXiv 2501.00289): SD3's MM-DiT with a second head for text."""

import math
from typing import Any

import torch
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.normalization import AdaLayerNormContinuous
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from udiff.system import Prediction

NUM_NULL_TOKENS = 8
TIMESTEP_SCALE = 1000
"""The network is told the noise level, 0 = data and 1 = noise, times this."""


class DualDiffusion(SD3Transformer2DModel):
    """Velocity of an image latent given a text's states, and logits of a text given a latent.

    Attribute names are the official keys. Differs from SD3 (arXiv 2403.03206) in four parts: time
    alone modulates the blocks, the last block keeps its text stream, the head is called
    `image_*`, and `text_*` is the second head.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        in_channels: int = 16,
        patch_size: int = 2,
        depth: int = 24,
        num_heads: int = 24,
        head_dim: int = 64,
        text_dim: int = 4096,
        base_size: int = 128,
        max_size: int = 192,
    ) -> None:
        """Make the network with PyTorch's initial weights, as officially.

        Args:
            vocab_size: tokens that logits are given for.
            in_channels: of latents.
            patch_size: latent elements along a side of a token.
            depth: number of joint blocks.
            num_heads: of attention.
            head_dim: of attention; the width is num_heads x head_dim.
            text_dim: width of the text encoder's states.
            base_size: latent elements along a side over which positions are as far apart as in SD3.
            max_size: most tokens along a side; smaller grids take the table's middle.
        """
        dim = num_heads * head_dim
        super().__init__(
            sample_size=base_size,
            patch_size=patch_size,
            in_channels=in_channels,
            num_layers=depth,
            attention_head_dim=head_dim,
            num_attention_heads=num_heads,
            joint_attention_dim=text_dim,
            caption_projection_dim=dim,
            pooled_projection_dim=1,  # of a part that is replaced below
            out_channels=in_channels,
            pos_embed_max_size=max_size,
        )
        self.patch_size = patch_size
        del self.norm_out, self.proj_out
        self.time_text_embed = TimeEmbedding(dim)  # type: ignore[assignment]
        self.transformer_blocks[-1] = JointTransformerBlock(dim, num_heads, head_dim)
        self.image_norm_out = AdaLayerNormContinuous(dim, dim, elementwise_affine=False, eps=1e-6)
        self.image_proj_out = nn.Linear(dim, patch_size**2 * in_channels)
        self.text_norm_out = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.text_proj_out = nn.Linear(dim, vocab_size)
        self.null_image_embd = nn.Parameter(torch.randn(1, NUM_NULL_TOKENS, dim) / math.sqrt(dim))

    def forward(
        self,
        x_t: Float[Tensor, "batch channels height width"] | None,
        t: Float[Tensor, " batch"],
        *,
        text: Float[Tensor, "batch tokens text_dim"],
        logits_at: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Prediction:
        """Predict a velocity, or the logits of chosen tokens.

        Args:
            x_t: latent; where there is none, learned tokens stand in for it.
            t: 1000 x noise level (1000 = noise), 0 for logits.
            text: states of all tokens; none is masked in the attention.
            logits_at: tokens whose logits are wanted, (chosen, vocab_size) in row-major order;
                none: the velocity (noise minus data) is.

        Raises:
            ValueError: a velocity is asked for without a latent.
        """
        if x_t is None and logits_at is None:
            raise ValueError("a velocity needs a latent x_t")
        dtype = self.context_embedder.weight.dtype
        image = self._embed_image(x_t, num_rows=len(text))
        temb = self.time_text_embed(t, dtype)
        context = self.context_embedder(text.to(dtype))
        for block in self.transformer_blocks:
            context, image = self._run(block, image, context, temb)
        if logits_at is not None:
            return Prediction(self.text_proj_out(self.text_norm_out(context[logits_at])))
        assert x_t is not None
        tokens = self.image_proj_out(self.image_norm_out(image, temb))
        return Prediction(self._unpatchify(tokens, x_t))

    def _embed_image(self, x_t: Tensor | None, *, num_rows: int) -> Tensor:
        if x_t is None:
            return self.null_image_embd.expand(num_rows, -1, -1)
        return self.pos_embed(x_t.to(self.context_embedder.weight.dtype)).contiguous()

    def _run(
        self, block: nn.Module, image: Tensor, context: Tensor, temb: Tensor
    ) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled() and self.gradient_checkpointing:  # diffusers' own switch
            return checkpoint(block, image, context, temb, use_reentrant=False)
        return block(hidden_states=image, encoder_hidden_states=context, temb=temb)

    def _unpatchify(self, tokens: Tensor, like: Tensor) -> Tensor:
        patch = self.patch_size
        return rearrange(
            tokens,
            "batch (h w) (p q channels) -> batch channels (h p) (w q)",
            h=like.shape[2] // patch,
            p=patch,
            q=patch,
        )


class TimeEmbedding(nn.Module):
    """Embed timesteps on the scale 0..1000; the sinusoid is float32 whatever the weights are."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.timestep_embedder = TimestepEmbedding(256, dim)

    def forward(self, t: Float[Tensor, " batch"], dtype: Any) -> Float[Tensor, "batch dim"]:
        """Embed each time."""
        return self.timestep_embedder(self.time_proj(t).to(dtype))


class MaskRow(nn.Module):
    """The text encoder's row for masked tokens: aligned to them, where its own means nothing.

    A buffer, so that it goes wherever the weights go; a parameter while it is being learned.
    """

    def __init__(self, text_dim: int, *, is_learned: bool = False) -> None:
        super().__init__()
        # Standard normal, as T5 initializes its table.
        weight = torch.randn(text_dim)
        if is_learned:
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer("weight", weight)

    def forward(
        self,
        embedded: Float[Tensor, "batch tokens text_dim"],
        is_masked: Bool[Tensor, "batch tokens"],
    ) -> Float[Tensor, "batch tokens text_dim"]:
        """Put the row in place of masked tokens'."""
        return torch.where(is_masked[..., None], self.weight.to(embedded.dtype), embedded)
