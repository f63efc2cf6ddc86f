"""Pictures as token sequences, row by row."""

from einops import rearrange
from jaxtyping import Float
from torch import Tensor


def patchify(
    x: Float[Tensor, "batch channels height width"], patch_size: int
) -> Float[Tensor, "batch tokens features"]:
    """Cut into square patches; a token's features are ordered (channel, row, column)."""
    return rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=patch_size, q=patch_size)


def unpatchify(
    tokens: Float[Tensor, "batch tokens features"], patch_size: int, grid: tuple[int, int]
) -> Float[Tensor, "batch channels height width"]:
    """Undo `patchify`; `grid` is the number of patches along height and width."""
    h, w = grid
    pattern = "b (h w) (c p q) -> b c (h p) (w q)"
    return rearrange(tokens, pattern, h=h, w=w, p=patch_size, q=patch_size)
