"""What a Versatile Diffusion system does with requests: each flow, their mixes, and edits."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from udiff.autoencoders.kl import KLAutoencoder
from udiff.autoencoders.optimus_checkpoint import TextAutoencoder, load_text_autoencoder
from udiff.autoencoders.pixels import to_uint8
from udiff.diffusion.gaussian import NoiseSchedule
from udiff.encoders.frozen import Frozen
from udiff.models.versatile import requests as ask
from udiff.models.versatile.captions import clean_caption
from udiff.models.versatile.colors import match_statistics
from udiff.models.versatile.contexts import Contexts, edit_tokens
from udiff.models.versatile.editing import IMAGE_SHARE, edit_contexts, edit_latent
from udiff.models.versatile.flows import FLOWS, RATIO, DataNetwork
from udiff.models.versatile.network import VersatileNetwork
from udiff.models.versatile.sampler import Sampler
from udiff.models.versatile.settings import SamplingSettings
from udiff.requests import open_picture
from udiff.samplers.ticks import drive
from udiff.settings import EncoderSettings
from udiff.system import Guidance, Sampling, Steps, Task

Tokens = Float[Tensor, "tokens dim"]
MIXES = ("dual_context", "multi_context")


class Studio:
    """A network, and what stands between it and the texts and pictures of requests."""

    def __init__(
        self,
        network: VersatileNetwork,
        contexts: Contexts,
        *,
        schedule: NoiseSchedule,
        settings: SamplingSettings,
        latent_shape: tuple[int, int, int],
        text_dim: int,
        text_autoencoder: EncoderSettings | None,
    ) -> None:
        """Take all of them; the autoencoder of pictures comes by `use_autoencoder`."""
        self._networks = {data: DataNetwork(network, data) for data in network.kinds_of_data}
        self._contexts = contexts
        self._schedule = schedule
        self._settings = settings
        self._shapes = {"image": latent_shape, "text": (text_dim,)}
        self._texts: Frozen[TextAutoencoder] | None = None
        if text_autoencoder is not None:
            self._texts = Frozen(partial(load_text_autoencoder, text_autoencoder))
        self._autoencoder: KLAutoencoder | None = None

    def use_autoencoder(self, autoencoder: nn.Module) -> None:
        """Take the autoencoder of pictures, which requests that begin from one need."""
        assert isinstance(autoencoder, KLAutoencoder)
        self._autoencoder = autoencoder

    def tasks(self, flows: tuple[str, ...]) -> dict[str, Task]:
        """List what a network that learns these flows can be asked."""
        found = {name: self._flow_task(name) for name in flows if self._can_write(name)}
        if {"text_to_image", "image_variation"} <= set(flows):
            picture = ask.example_picture()
            found["dual_context"] = self._image_task(
                "dual_context", ask.DualContext, self._dual, {"prompt": "a", "image": picture}
            )
            found["multi_context"] = self._image_task(
                "multi_context", ask.MultiContext, self._multi, {"images": [{"image": picture}]}
            )
            if "image_to_text" in found:
                found["image_text_image"] = self._image_task(
                    "image_text_image",
                    ask.ImageTextImage,
                    self._edit,
                    {"image": picture, "positive": "a"},
                )
        return found

    # ------------------------------------------------------------ tasks

    def _flow_task(self, name: str) -> Task:
        picture = ask.example_picture()
        match name:
            case "text_to_image":
                return self._image_task(name, ask.TextToImage, self._draw, {"prompt": "a"})
            case "image_variation":
                return self._image_task(name, ask.ImageVariation, self._vary, {"image": picture})
            case "image_to_text":
                return self._text_task(name, ask.ImageToText, self._caption, {"image": picture})
            case _:
                return self._text_task(name, ask.TextVariation, self._rewrite, {"prompt": "a"})

    def _can_write(self, flow: str) -> bool:
        return FLOWS[flow].data == "image" or self._texts is not None

    def _image_task(self, name: str, request: type, start: Any, example: Mapping[str, Any]) -> Task:
        return Task(name, request, start, self._networks["image"], "image", example)

    def _text_task(self, name: str, request: type, start: Any, example: Mapping[str, Any]) -> Task:
        return Task(name, request, start, self._networks["text"], "text", example)

    def _draw(self, request: ask.TextToImage, *, device: torch.device) -> Sampling:
        context = {"text": self._contexts.text(request.prompt, device)}
        return self._from_noise(request, "image", context, device)

    def _vary(self, request: ask.ImageVariation, *, device: torch.device) -> Sampling:
        picture = self._fit(open_picture(request.image))
        contexts = {"image": self._focused(request, picture, device)}
        nulls = {"image": self._null_picture(request.disentanglement, device)}
        reference = _to_pixels(picture).to(device)
        finish = partial(_adjust_colors, reference) if request.adjust_colors else None
        sampler = self._sampler(request)
        normals = self._normals(request.seed, "image", device)
        num_steps = int(len(sampler.timesteps) * (1 - request.fidelity))
        if request.fidelity == 0:
            steps = sampler.from_noise(next(normals), normals)
        else:
            data = self._encode(reference, next(normals))
            if num_steps == 0:  # so near to the picture that no step is left
                steps, finish = _finished(data), partial(_replace, picture)
            else:
                steps = sampler.from_data(data, next(normals), num_steps, normals)
        return Sampling(steps, contexts, nulls, self._guidance(request), finish)

    def _dual(self, request: ask.DualContext, *, device: torch.device) -> Sampling:
        picture = self._fit(open_picture(request.image))
        image = self._focused(request, picture, device)
        return self._mixed(request, image, request.prompt, request.text_strength, device)

    def _multi(self, request: ask.MultiContext, *, device: torch.device) -> Sampling:
        parts = [part.weight * self._part_tokens(part, device) for part in request.images]
        image = torch.cat(parts)
        return self._mixed(request, image, request.prompt, request.text_strength, device)

    def _caption(self, request: ask.ImageToText, *, device: torch.device) -> Sampling:
        picture = self._fit(open_picture(request.image))
        contexts = {"image": self._contexts.picture(picture, device)}
        return self._from_noise(request, "text", contexts, device, self._writer(request, device))

    def _rewrite(self, request: ask.TextVariation, *, device: torch.device) -> Sampling:
        contexts = {"text": self._contexts.text(request.prompt, device)}
        return self._from_noise(request, "text", contexts, device, self._writer(request, device))

    def _edit(self, request: ask.ImageTextImage, *, device: torch.device) -> Sampling:
        """Caption the picture, change the caption's latent, and draw it again; all at the start."""
        picture = self._fit(open_picture(request.image))
        image = self._contexts.picture(picture, device)
        captioned = self._from_noise(request, "text", {"image": image}, device)
        [latent] = drive(self._networks["text"], [captioned])
        texts = self._texts_on(device)
        prompts = [request.negative, request.positive]
        negative, positive = (texts.encode_texts([p]) if p else None for p in prompts)
        edited = edit_latent(latent[None], negative, positive)[0]
        caption = texts.decode(edited, seed=request.seed)
        null = self._contexts.null("text", data="image", device=device)
        contexts, nulls = edit_contexts(
            image[None],
            self._contexts.null("image", data="text", device=device)[None],
            new_text=self._contexts.text(caption, device)[None],
            positive=self._contexts.text(request.positive, device)[None],
            null_text=null[None],
        )
        shares = _shares(IMAGE_SHARE, device)
        normals = self._normals(request.seed, "image", device)
        return Sampling(
            self._sampler(request).from_noise(next(normals), normals),
            {name: tokens[0] for name, tokens in contexts.items()} | shares,
            {name: tokens[0] for name, tokens in nulls.items()} | shares,
            self._guidance(request),
        )

    # ------------------------------------------------------------ pieces

    def _from_noise(
        self,
        request: ask.SampleRequest,
        data: str,
        contexts: dict[str, Tensor],
        device: torch.device,
        finish: Callable[[Any], Any] | None = None,
    ) -> Sampling:
        normals = self._normals(request.seed, data, device)
        nulls = {kind: self._contexts.null(kind, data=data, device=device) for kind in contexts}
        steps = self._sampler(request).from_noise(next(normals), normals)
        return Sampling(steps, contexts, nulls, self._guidance(request), finish)

    def _mixed(
        self,
        request: ask.SampleRequest,
        image: Tokens,
        prompt: str,
        text_strength: float,
        device: torch.device,
    ) -> Sampling:
        null_image = self._contexts.null("image", data="image", device=device)
        repeats = len(image) // len(null_image)
        contexts, nulls = {"image": image}, {"image": null_image.repeat(repeats, 1)}
        if prompt and text_strength:
            shares = _shares(1 - text_strength, device)
            text = {"text": self._contexts.text(prompt, device), **shares}
            null_text = self._contexts.null("text", data="image", device=device)
            contexts, nulls = contexts | text, nulls | {"text": null_text, **shares}
        normals = self._normals(request.seed, "image", device)
        steps = self._sampler(request).from_noise(next(normals), normals)
        return Sampling(steps, contexts, nulls, self._guidance(request))

    def _focused(
        self, request: ask.FocusRequest, picture: Image.Image, device: torch.device
    ) -> Tokens:
        return edit_tokens(
            self._contexts.picture(picture, device),
            focus_level=request.focus,
            disentanglement=request.disentanglement,
        )

    def _part_tokens(self, part: ask.ImagePart, device: torch.device) -> Tokens:
        picture = self._fit(open_picture(part.image))
        mask = None
        if part.mask is not None:
            mask = open_picture(part.mask).convert("L")
            mask = mask.resize(picture.size, Image.Resampling.BILINEAR)
        tokens = self._contexts.picture(picture, device, mask=mask)
        return edit_tokens(tokens, focus_level=part.focus)

    def _null_picture(self, disentanglement: int, device: torch.device) -> Tokens:
        null = self._contexts.null("image", data="image", device=device)
        return edit_tokens(null, disentanglement=disentanglement)

    def _fit(self, picture: Image.Image) -> Image.Image:
        """Resize to the size that is generated, whatever the shape, as officially."""
        _, height, width = self._shapes["image"]
        scale = self._autoencoder.downscale if self._autoencoder else 8
        return picture.resize((width * scale, height * scale), Image.Resampling.BICUBIC)

    def _encode(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """Draw a latent of a picture (1, 3, height, width) in [0, 1]."""
        if self._autoencoder is None:
            raise ValueError("fidelity needs the autoencoder of pictures, which is not there")
        moments = self._autoencoder.encode_moments(pixels * 2 - 1)
        return self._autoencoder.normalize(moments.sample(noise[None]))[0]

    def _writer(self, request: ask.TextRequest, device: torch.device) -> Callable[[Tensor], str]:
        def write(latent: Tensor) -> str:
            temperature = request.temperature
            if temperature is None:
                temperature = self._settings.text_temperature
            text = self._texts_on(device).decode(
                latent,
                seed=request.seed,
                temperature=temperature or 1.0,
                top_k=request.top_k if temperature else 1,
                top_p=request.top_p,
            )
            return clean_caption(text) if request.clean else text

        return write

    def _texts_on(self, device: torch.device) -> TextAutoencoder:
        assert self._texts is not None
        return self._texts.on(device)

    def _sampler(self, request: ask.SampleRequest) -> Sampler:
        settings = self._settings
        eta = settings.eta if request.eta is None else request.eta
        num_steps = request.num_steps or settings.num_steps
        return Sampler(self._schedule, num_steps, settings.spacing, eta=eta)

    def _guidance(self, request: ask.SampleRequest) -> Guidance:
        scale = request.guidance_scale
        return Guidance(scale=self._settings.guidance_scale if scale is None else scale)

    def _normals(self, seed: int, data: str, device: torch.device) -> Iterator[Tensor]:
        # Drawn on the CPU, so that a seed gives the same sample on every device.
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield torch.randn(self._shapes[data], generator=generator).to(device)


def _shares(image: float, device: torch.device) -> dict[str, Tensor]:
    values = {"image": image, "text": 1 - image}
    return {kind + RATIO: torch.tensor(v, device=device) for kind, v in values.items()}


def _to_pixels(picture: Image.Image) -> Float[Tensor, "1 3 height width"]:
    levels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return levels.view(1, picture.height, picture.width, 3).permute(0, 3, 1, 2).float() / 255


def _adjust_colors(
    reference: Float[Tensor, "1 3 h w"], pixels: Float[Tensor, "3 height width"]
) -> UInt8[Tensor, "height width 3"]:
    picture = (pixels[None].float() / 2 + 0.5).clamp(0, 1)
    return to_uint8(match_statistics(picture, reference) * 2 - 1)[0]


def _replace(
    picture: Image.Image, pixels: Float[Tensor, "3 height width"]
) -> UInt8[Tensor, "height width 3"]:
    return to_uint8(_to_pixels(picture) * 2 - 1)[0]


def _finished(latent: Tensor) -> Steps:
    """Sample without a step."""
    return latent
    yield
