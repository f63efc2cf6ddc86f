"""Reference cases of what happens around sampling: contexts, colors, captions, the autoencoder."""

import torch

from tests.golden.case import Case, Outputs
from udiff.autoencoders.ldm import LDMAutoencoder
from udiff.autoencoders.ldm_checkpoint import autoencoder_weights, infer_architecture
from udiff.models.versatile.captions import clean_caption, merge_words
from udiff.models.versatile.colors import match_colors_8bit, match_statistics
from udiff.models.versatile.editing import edit_contexts, edit_latent
from udiff.models.versatile.low_rank import focus, keep_leading, remove_leading
from udiff.weights import load_strictly, strip_prefix


def captions(case: Case) -> Outputs:
    for text, cleaned in case.header["pairs"]:
        assert clean_caption(text) == cleaned
    for text, merged in case.header["pairs_old"]:
        assert merge_words(text) == merged
    lengths = [len(clean_caption(text)) for text, _ in case.header["pairs"]]
    return {"lens": torch.tensor(lengths)}


def low_rank(case: Case) -> Outputs:
    x, config = case.inputs["x"], case.config
    found = {}
    for name in case.outputs:
        kind, _, value = name.rpartition("_")
        if kind == "focus":
            drop_rank = tuple(config["max_drop_rank"])
            found[name] = focus(x, float(value), drop_rank=drop_rank, rank=config["q"])
        elif kind == "keep_top":
            found[name] = keep_leading(x, int(value))
        else:
            number = int(name.split("_")[2])
            found[name] = remove_leading(x, number, rank=int(value))
    return found


def colors(case: Case) -> Outputs:
    images, reference = case.inputs["images"], case.inputs["reference"]
    levels, wanted = (
        (x[0].clamp(0, 1) * 255).to(torch.uint8).permute(1, 2, 0).numpy()
        for x in (images, reference)
    )
    keep = case.config["keep"]
    return {
        "simple": match_statistics(images, reference),
        "old_simple": torch.from_numpy(match_colors_8bit(levels, wanted, keep=keep)),
        "old_full": torch.from_numpy(
            match_colors_8bit(levels, wanted, keep=keep, by_histogram=True)
        ),
    }


def image_text_image(case: Case) -> Outputs:
    given = case.inputs
    contexts, nulls = edit_contexts(
        given["c_image"],
        given["u_image"],
        new_text=given["c_newtext"],
        positive=given["c_positive"],
        null_text=given["u_text"],
        rank=case.config["rank"],
    )
    return {
        "z_edited": edit_latent(given["zt"], given["z_negative"], given["z_positive"]),
        "c_first": contexts["image"],
        "c_second": contexts["text"],
        "u_first": nulls["image"],
        "u_second": nulls["text"],
    }


def autoencoder(case: Case) -> Outputs:
    weights = autoencoder_weights(strip_prefix(case.weights, "vae.image."))
    model = LDMAutoencoder(infer_architecture(weights))
    load_strictly(model, weights, source=case.name)
    model.eval()
    given, factor = case.inputs, case.config["latent_scale_factor"]
    moments = model.encode(given["image"] * 2 - 1).latent_dist
    sample = moments.sample(given["eps"])
    raw = (model.decode(sample).sample + 1) / 2
    from_latent = (model.decode(factor * sample / factor).sample + 1) / 2
    return {
        "mean": moments.mean,
        "logvar": moments.logvar,
        "std": (moments.logvar / 2).exp(),
        "kl": moments.elementwise_kl().sum((1, 2, 3)),
        "z_sample": sample,
        "latent_scaled": factor * sample,
        "decode_raw": raw,
        "decode_sample": raw.clamp(0, 1),
        "decode_z": ((model.decode(given["z"]).sample + 1) / 2).clamp(0, 1),
        "image_from_latent": from_latent.clamp(0, 1),
    }
