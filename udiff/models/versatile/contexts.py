"""Contexts of requests, and the unconditional ones that guidance leads away from."""

from typing import Literal

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from udiff.encoders.clip import MEAN, STD, CLIPContexts
from udiff.encoders.frozen import Frozen
from udiff.models.versatile.low_rank import disentangle, focus

Tokens = Float[Tensor, "tokens dim"]
NullRule = Literal["zeros", "gray", "near_black"]


class Contexts:
    """Asks CLIP, which is loaded at its first use, one text or picture at a time."""

    def __init__(self, clip: Frozen[CLIPContexts], null_rule: NullRule) -> None:
        """Take CLIP, and say what unconditional pictures are."""
        self._clip = clip
        self._null_rule = null_rule
        self._nulls: dict[tuple[str, str], Tensor] = {}

    @torch.no_grad()
    def text(self, text: str, device: torch.device) -> Tokens:
        """Find the tokens of a text, the filling ones too."""
        clip = self._clip.on(device)
        return clip.encode(clip.tokenize([text], clip.max_tokens).to(device))[0]

    @torch.no_grad()
    def picture(
        self, picture: Image.Image, device: torch.device, *, mask: Image.Image | None = None
    ) -> Tokens:
        """Find the tokens of a picture; `mask` is white where it is to be kept."""
        clip = self._clip.on(device)
        kept = None
        if mask is not None:
            levels = torch.frombuffer(bytearray(mask.convert("L").tobytes()), dtype=torch.uint8)
            kept = levels.view(1, 1, mask.height, mask.width).float().to(device) / 255
        return clip.encode_image(clip.prepare([picture]).to(device), kept)[0]

    def null(self, kind: str, *, data: str, device: torch.device) -> Tokens:
        """Find the unconditional context of a kind, for a kind of data; kept once found."""
        key = kind, data
        if key not in self._nulls:
            find = self._null_picture if kind == "image" else self._null_text
            self._nulls[key] = find(data, device)
        return self._nulls[key].to(device)

    def _null_text(self, data: str, device: torch.device) -> Tokens:
        return self.text("", device)

    @torch.no_grad()
    def _null_picture(self, data: str, device: torch.device) -> Tokens:
        clip = self._clip.on(device)
        size = clip.image_size
        if self._null_rule == "zeros" and data == "image":
            return torch.zeros(clip.num_image_tokens, clip.width, device=device)
        # diffusers divides 0.5 by 255 before it normalizes.
        level = {"zeros": 0.0, "gray": 127 / 255, "near_black": 0.5 / 255}[self._null_rule]
        mean, std = torch.tensor(MEAN), torch.tensor(STD)
        pixels = ((level - mean) / std).view(1, 3, 1, 1).expand(1, 3, size, size)
        return clip.encode_image(pixels.to(device))[0]


def edit_tokens(tokens: Tokens, *, focus_level: float = 0.5, disentanglement: int = 0) -> Tokens:
    """Change a picture's tokens, but for the class token.

    Args:
        tokens: the class token first.
        focus_level: 0 leaves what is shown alone, 1 the style, 0.5 changes nothing.
        disentanglement: level of the first release, -2 to 2; 0 changes nothing.
    """
    local = disentangle(focus(tokens[1:], focus_level), disentanglement)
    return torch.cat([tokens[:1], local])
