"""Reference cases of the contexts that CLIP makes."""

import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from tests.golden.case import Case, Outputs
from udiff.encoders.clip import CLIPContexts


def contexts(case: Case) -> Outputs:
    encoder, given = _load(case), case.inputs
    pixels = encoder.prepare([_to_picture(image) for image in given["images"]])
    black = encoder.prepare([Image.new("RGB", (96, 96))] * len(pixels))
    hidden = encoder.encode_hidden(given["ids"])
    vision = encoder.model.vision_model
    return {
        "text_context": encoder.encode(given["ids"]),
        "text_hidden": hidden,
        "text_pooled": hidden[torch.arange(len(hidden)), given["ids"].argmax(1)],
        "pixel_values": pixels[:1],
        "image_context": encoder.encode_image(pixels),
        "image_context_zeros": encoder.encode_image(black),
        "masked_context": encoder.encode_image(pixels, given["masks"]),
        "fullmask_context": encoder.encode_image(pixels, torch.ones_like(given["masks"])),
        "vision_hidden_pre_norm": vision(pixels).last_hidden_state,
    }


def _load(case: Case) -> CLIPContexts:
    config = CLIPConfig(
        text_config=case.config["text_config"],
        vision_config=case.config["vision_config"],
        projection_dim=case.config["projection_dim"],
    )
    model = CLIPModel(config)
    result = model.load_state_dict(case.weights, strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) <= {"logit_scale"}
    return CLIPContexts(model, tokenizer=None).eval()


def _to_picture(image: Tensor) -> Image.Image:
    levels = (image * 255).to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(levels.numpy())
