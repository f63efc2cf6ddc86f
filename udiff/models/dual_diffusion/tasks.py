"""Dual Diffusion's tasks: what a request's sampling starts with, and how its result is written."""

import io
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from jaxtyping import Bool, Float, Int64
from PIL import Image
from torch import Tensor, nn

from udiff.autoencoders.kl import KLAutoencoder
from udiff.autoencoders.pixels import to_pixels
from udiff.data.conversation import QUESTION, prompt
from udiff.data.squares import bicubic
from udiff.encoders.frozen import Frozen
from udiff.encoders.t5 import T5
from udiff.models.dual_diffusion.requests import ImageToText, TextToImage, VisualQuestion
from udiff.models.dual_diffusion.sampler import descend, make_guidance, noise_levels
from udiff.models.dual_diffusion.settings import (
    DualSampling,
    LatentSettings,
    NetworkSettings,
    TextSettings,
)
from udiff.requests import open_picture
from udiff.samplers.unmask import unmask
from udiff.system import Guidance, Sampling


@dataclass
class Tasks:
    """Starts samplings; the text encoder is loaded when a request first needs it."""

    text_encoder: Frozen[T5]
    network: NetworkSettings
    latent: LatentSettings
    text: TextSettings
    sampling: DualSampling
    autoencoder: KLAutoencoder | None = None
    """What encodes the pictures of requests; it comes by `use_autoencoder`."""

    def use_autoencoder(self, autoencoder: nn.Module) -> None:
        """Take the autoencoder that also decodes: it is loaded once, from wherever it may lie."""
        assert isinstance(autoencoder, KLAutoencoder)
        self.autoencoder = autoencoder

    def text_to_image(self, request: TextToImage, *, device: torch.device) -> Sampling:
        """Start a picture from noise."""
        height, width = self._latent_size(request)
        generator = torch.Generator().manual_seed(request.seed)
        noise = torch.randn(self.latent.channels, height, width, generator=generator).to(device)
        settings = self.sampling.image
        levels = noise_levels(
            self._scheduler(request),
            num_steps=request.num_steps or settings.num_steps,
            num_tokens=height * width // self.network.patch_size**2,
            sigmas=request.sigmas,
            mu=request.mu,
        )
        encoder = self.text_encoder.on(device)
        texts = [request.prompt, request.negative_prompt]
        states = encoder.encode(encoder.tokenize(texts, self.text.max_tokens).to(device))
        scale = request.guidance_scale
        return Sampling(
            descend(noise, levels),
            {"text": states[0]},
            {"text": states[1]},
            make_guidance(settings.guidance_scale if scale is None else scale),
        )

    def image_to_text(self, request: ImageToText, *, device: torch.device) -> Sampling:
        """Start a caption, all of it masked but for what a template says."""
        num_tokens = request.num_tokens or self.text.max_tokens
        ids = torch.full((num_tokens,), self.text.mask_id)
        if request.template is not None:
            encoder = self.text_encoder.on(device)
            ids = encoder.tokenize([request.template], num_tokens)[0]
        return self._sample_text(
            request,
            ids,
            ids != self.text.mask_id,
            num_steps=request.num_steps or self.sampling.text.caption_steps,
            device=device,
        )

    def visual_question_answering(
        self, request: VisualQuestion, *, device: torch.device
    ) -> Sampling:
        """Start an answer behind its question."""
        encoder = self.text_encoder.on(device)
        num_tokens = request.num_tokens or self.text.max_tokens
        question = encoder.tokenize_bare(QUESTION.format(request.question))
        asked = prompt(question, num_tokens=num_tokens, end_id=self.text.end_id)
        return self._sample_text(
            request,
            torch.tensor(asked.ids),
            ~torch.tensor(asked.is_learned).bool(),
            num_steps=request.num_steps or self.sampling.text.answer_steps,
            device=device,
            skip=min(len(question), num_tokens - 1),
        )

    def _sample_text(
        self,
        request: ImageToText | VisualQuestion,
        ids: Int64[Tensor, " tokens"],
        is_fixed: Bool[Tensor, " tokens"],
        *,
        num_steps: int,
        device: torch.device,
        skip: int = 0,
    ) -> Sampling:
        generator = torch.Generator().manual_seed(request.seed)
        latent = self._encode_picture(request.image, generator, device)
        steps = unmask(
            ids.to(device),
            is_fixed.to(device),
            mask_id=self.text.mask_id,
            num_steps=num_steps,
            race=partial(_race, generator, self.network.vocab_size),
            method=self.sampling.text.method,
        )
        finish = partial(self._write, skip=skip)
        return Sampling(steps, {"latent": latent}, {}, Guidance(), finish)

    def _write(self, ids: Int64[Tensor, " tokens"], *, skip: int) -> str:
        return self.text_encoder.on(ids.device).decode(ids[skip:]).strip()

    def _encode_picture(
        self, data: bytes, generator: torch.Generator, device: torch.device
    ) -> Float[Tensor, "channels height width"]:
        """Sample a picture's latent, as training did: not the mean of its distribution.

        Raises:
            ValueError: no picture can be read from the data, or nothing was handed to encode it.
        """
        if self.autoencoder is None:
            raise ValueError("reading a picture needs the autoencoder, which is not there")
        size = min(self.latent.size) * self.latent.downscale
        square = torch.from_numpy(bicubic(open_picture(data), size).copy())
        moments = self.autoencoder.encode_moments(to_pixels(square[None].to(device)))
        noise = torch.randn(moments.mean.shape, generator=generator).to(device)
        return self.autoencoder.normalize(moments.sample(noise))[0]

    def _scheduler(self, request: TextToImage) -> FlowMatchEulerDiscreteScheduler:
        settings = self.sampling.image
        return FlowMatchEulerDiscreteScheduler(
            shift=settings.shift,
            use_dynamic_shifting=settings.is_dynamic or request.mu is not None,
            max_shift=settings.max_shift,
        )

    def _latent_size(self, request: TextToImage) -> tuple[int, int]:
        """Find a picture's height and width in latent elements.

        Raises:
            ValueError: it is not made of whole tokens, or has too many of them.
        """
        unit = self.latent.downscale
        default = dict(zip(("height", "width"), self.latent.size, strict=True))
        token, most = unit * self.network.patch_size, self.network.max_size
        sides = []
        for name, side in default.items():
            wanted = getattr(request, name) or side * unit
            if wanted % token or wanted > token * most:
                raise ValueError(
                    f"{name} must be a multiple of {token} up to {token * most}, got {wanted}"
                )
            sides.append(wanted // unit)
        return sides[0], sides[1]


def blank_picture() -> bytes:
    """Write a small picture file, to try tasks out with."""
    file = io.BytesIO()
    Image.new("RGB", (32, 32), "gray").save(file, "PNG")
    return file.getvalue()


def _race(generator: torch.Generator, vocab_size: int, masked: Tensor) -> Tensor:
    """Draw numbers for the tokens that are masked, on the CPU: equal on every device."""
    count = int(masked.sum())
    return torch.rand(count, vocab_size, generator=generator).to(masked.device)
