"""Networks of DDT (Decoupled Diffusion Transformer, arXiv 2504.05741), and of its baseline.

Attribute names are the official checkpoints' keys. Times run from 0 (noise) to 1 (data).
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, addcmul, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from udiff.nn.features import pick_feature
from udiff.nn.feed_forward import SwiGLU
from udiff.nn.heads import rotary_heads
from udiff.nn.norm import ModulatedLayerNorm, ModulatedRMSNorm, RMSNorm
from udiff.nn.patch import patchify, unpatchify
from udiff.nn.rotary import RotaryTable, rotary_table
from udiff.nn.timestep import timestep_features
from udiff.nn.token_mask import keep_tokens, restore_tokens
from udiff.system import Prediction

ROTARY_EXTENT = 16.0
"""Positions span [0, 16] at every resolution."""


class PatchEmbedder(nn.Module):
    """Linear embedding of flattened patches."""

    def __init__(self, features: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(features, dim)
        nn.init.xavier_uniform_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(
        self, tokens: Float[Tensor, "batch tokens in"]
    ) -> Float[Tensor, "batch tokens dim"]:
        """Embed in the dtype of the weights."""
        return self.proj(tokens.to(self.proj.weight.dtype))


class TimestepEmbedder(nn.Module):
    """Sinusoidal features (period at most 10, t not scaled) and an MLP."""

    num_features = 256

    def __init__(self, dim: int) -> None:
        super().__init__()
        first, second = nn.Linear(self.num_features, dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(first, nn.SiLU(), second)
        for layer in (first, second):
            nn.init.normal_(layer.weight, std=0.02)

    def forward(self, t: Float[Tensor, "batch *tokens"]) -> Float[Tensor, "batch times dim"]:
        """Embed one time per sample, or one per token."""
        features = timestep_features(t.flatten(), self.num_features, max_period=10.0)
        embedded = self.mlp(features.to(next(self.mlp.parameters()).dtype))
        return embedded.unflatten(0, (t.shape[0], -1))


class LabelEmbedder(nn.Module):
    """Table of class embeddings; its last row is the null label."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def forward(self, label: Int[Tensor, " batch"]) -> Float[Tensor, "batch 1 dim"]:
        """Look the labels up."""
        return self.embedding_table(label)[:, None]


class Attention(nn.Module):
    """Self-attention with normalized queries and keys, turned by their positions."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_norm = RMSNorm(head_dim)
        self.k_norm = RMSNorm(head_dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        positions: RotaryTable,
        mask: Bool[Tensor, "batch #heads tokens tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """Attend among the tokens where `mask` (if any) is true."""
        q, k, v = rotary_heads(
            self.qkv(x),
            self.num_heads,
            positions=positions,
            q_norm=self.q_norm,
            k_norm=self.k_norm,
        )
        attended = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(attended.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Transformer block modulated by a condition of the sample, or of each token."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = ModulatedRMSNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = ModulatedRMSNorm(dim)
        self.mlp = SwiGLU(dim, int(2 * int(4 * dim) / 3))
        # The published initialization is torch's default here: not zero.
        self.adaLN_modulation = nn.Sequential(nn.Linear(dim, 6 * dim))

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        condition: Float[Tensor, "batch #tokens dim"],
        positions: RotaryTable,
        mask: Bool[Tensor, "batch #heads tokens tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """Attend, then transform each token; `condition` has its SiLU already."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(condition).chunk(
            6, dim=-1
        )
        x = addcmul(x, gate_a, self.attn(self.norm1(x, scale_a, shift_a), positions, mask))
        return addcmul(x, gate_m, self.mlp(self.norm2(x, scale_m, shift_m)))


class FinalLayer(nn.Module):
    """Modulated norm and linear map back to patches; zero at the start."""

    def __init__(self, dim: int, features: int) -> None:
        super().__init__()
        self.norm_final = ModulatedLayerNorm(dim)
        self.linear = nn.Linear(dim, features)
        modulation = nn.Linear(dim, 2 * dim)
        self.adaLN_modulation = nn.Sequential(modulation)
        for layer in (self.linear, modulation):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        condition: Float[Tensor, "batch #tokens dim"],
    ) -> Float[Tensor, "batch tokens features"]:
        """Predict each token's patch."""
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        return self.linear(self.norm_final(x, scale, shift))


class DDT(nn.Module):
    """Decoupled diffusion transformer.

    The first `num_encoder_blocks` blocks find a state of every token, given time and label; the
    others, the velocity decoder, are modulated by that state and see neither time nor label.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        patch_size: int,
        dim: int,
        num_heads: int,
        num_blocks: int,
        num_encoder_blocks: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.head_dim = dim // num_heads
        self.num_encoder_blocks = num_encoder_blocks
        features = in_channels * patch_size**2
        self.x_embedder = PatchEmbedder(features, dim)
        self.s_embedder = PatchEmbedder(features, dim)
        self.t_embedder = TimestepEmbedder(dim)
        self.y_embedder = LabelEmbedder(num_classes, dim)
        self.final_layer = FinalLayer(dim, features)
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(num_blocks))

    def forward(
        self,
        x_t: Float[Tensor, "batch channels height width"],
        t: Float[Tensor, "batch *tokens"],
        *,
        label: Int[Tensor, " batch"],
        state: Float[Tensor, "batch tokens dim"] | None = None,
        mask: Bool[Tensor, "batch #heads tokens tokens"] | None = None,
        keep: Int[Tensor, "batch kept"] | None = None,
        feature_layer: int | None = None,
    ) -> Prediction:
        """Predict the velocity (data minus noise) and the encoder's state.

        Args:
            x_t: noised latent; its sides are multiples of the patch size.
            t: in [0, 1], 0 = noise.
            label: class, or the number of classes for the null label.
            state: of an earlier call; the encoder is skipped, and t and label have no effect.
            mask: true where a token may attend; the encoder alone follows it.
            keep: tokens that the encoder sees; of the others the decoder is told the time alone.
            feature_layer: number of blocks, counted from 1, after which tokens are returned.
        """
        tokens, grid = patchify(x_t, self.patch_size), _grid(x_t, self.patch_size)
        positions = rotary_table(grid, self.head_dim, extent=ROTARY_EXTENT, device=x_t.device)
        features: dict[int, Tensor] = {}
        if state is None:
            time = self.t_embedder(t)
            condition = silu(time + self.y_embedder(label))
            s = self._encode(tokens, condition, positions, features, mask=mask, keep=keep)
            state = silu(time + s)
        x = self.x_embedder(tokens)
        first = self.num_encoder_blocks
        for layer, block in enumerate(self.blocks[first:], first + 1):
            x = features[layer] = block(x, state, positions)
        velocity = unpatchify(self.final_layer(x, state), self.patch_size, grid).contiguous()
        return Prediction(velocity, feature=pick_feature(features, feature_layer), state=state)

    def _encode(
        self,
        tokens: Float[Tensor, "batch tokens in"],
        condition: Float[Tensor, "batch times dim"],
        positions: RotaryTable,
        features: dict[int, Tensor],
        *,
        mask: Bool[Tensor, "batch #heads tokens tokens"] | None,
        keep: Int[Tensor, "batch kept"] | None,
    ) -> Float[Tensor, "batch tokens dim"]:
        s = embedded = self.s_embedder(tokens)
        if keep is not None:
            s, positions = keep_tokens(embedded, keep), positions.keep(keep)
        for layer, block in enumerate(self.blocks[: self.num_encoder_blocks], 1):
            s = features[layer] = block(s, condition, positions, mask)
        return s if keep is None else restore_tokens(s, keep, torch.zeros_like(embedded))


class ImprovedDiT(nn.Module):
    """The undivided baseline: one stack of the same blocks, modulated by time and label."""

    def __init__(
        self,
        *,
        in_channels: int,
        patch_size: int,
        dim: int,
        num_heads: int,
        num_blocks: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.head_dim = dim // num_heads
        features = in_channels * patch_size**2
        self.x_embedder = PatchEmbedder(features, dim)
        self.t_embedder = TimestepEmbedder(dim)
        self.y_embedder = LabelEmbedder(num_classes, dim)
        self.final_layer = FinalLayer(dim, features)
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(num_blocks))

    def forward(
        self,
        x_t: Float[Tensor, "batch channels height width"],
        t: Float[Tensor, "batch *tokens"],
        *,
        label: Int[Tensor, " batch"],
        masks: tuple[Bool[Tensor, "batch #heads tokens tokens"], ...] = (),
        feature_layer: int | None = None,
    ) -> Prediction:
        """Predict the velocity (data minus noise); `masks` belong to the first blocks in order."""
        tokens, grid = patchify(x_t, self.patch_size), _grid(x_t, self.patch_size)
        positions = rotary_table(grid, self.head_dim, extent=ROTARY_EXTENT, device=x_t.device)
        condition = silu(self.t_embedder(t) + self.y_embedder(label))
        x = self.x_embedder(tokens)
        features: dict[int, Tensor] = {}
        for layer, block in enumerate(self.blocks, 1):
            mask = masks[layer - 1] if layer <= len(masks) else None
            x = features[layer] = block(x, condition, positions, mask)
        velocity = unpatchify(self.final_layer(x, condition), self.patch_size, grid).contiguous()
        return Prediction(velocity, feature=pick_feature(features, feature_layer))


def _grid(x: Tensor, patch_size: int) -> tuple[int, int]:
    height, width = x.shape[-2:]
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"latent is {height} x {width}; both sides must be multiples of patch_size {patch_size}"
        )
    return height // patch_size, width // patch_size
