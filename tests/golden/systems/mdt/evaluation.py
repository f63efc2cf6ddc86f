"""Reference cases of MDT's data preparation and of ADM's evaluator."""

import re

import torch
from PIL import Image
from torch import Tensor

from pipelines.class_names import list_pictures, number_classes
from pipelines.stages.crop import center_crop, crop_at, scale_shorter_side
from tests.golden.case import Case, Outputs, relative_error
from udiff.autoencoders.pixels import to_pixels, to_uint8, to_uint8_truncating
from udiff.evaluation.frechet import feature_statistics, frechet_distance
from udiff.evaluation.inception import (
    average_pool,
    halving_max_pool,
    max_pool,
    normalize,
    resize_bilinear,
)
from udiff.evaluation.inception_score import class_probabilities, inception_score
from udiff.evaluation.precision_recall import (
    manifold_members,
    manifold_radii,
    official_distances,
    precision_recall,
    realism,
    squared_distances,
)

_POINTS = ("manifold", "nearest_ref_index")
_FRACTIONS = ("precision", "recall", "evaluate_fraction")


def tolerance(case: Case, output: str) -> float:
    used_half = bool(case.outputs["fp16_path_used"].any()) or output == "distances_block"
    if output.endswith(_POINTS):
        return 3 if used_half else 0
    if output.startswith(_FRACTIONS):
        num_points = case.config["n_ref" if output.startswith("recall") else "n_sample"]
        return 2 / num_points if output.endswith("_fp32") else 0.01
    if output.endswith("_fp32"):
        return 2e-5
    if output.startswith(("radii", "distances", "realism")):
        return 3e-3 if used_half else 2e-5
    return 1e-4


def error(case: Case, output: str, ours: Tensor, theirs: Tensor) -> float:
    if output.endswith(_POINTS):
        return float((ours != theirs).sum())
    if output.startswith(_FRACTIONS):
        return float((ours - theirs).abs())
    return relative_error(ours, theirs)


def _metrics(case: Case) -> Outputs:
    given, k = case.inputs, case.config["k"]
    ref, sample = given["ref_pool"], given["sample_pool"]
    found: dict[str, Tensor | float | bool] = {
        "fid": frechet_distance(ref, sample),
        "sfid": frechet_distance(given["ref_spatial"], given["sample_spatial"]),
    }
    for name, features in (("ref", ref), ("sample", sample)):
        mean, covariance = feature_statistics(features)
        found |= {f"mu_{name}": mean, f"sigma_{name}": covariance}
    return _as_tensors({**found, **_scores(case), **_manifolds(case, k), **_neighbors(case, k)})


def _scores(case: Case) -> dict[str, float]:
    given = case.inputs
    probabilities = class_probabilities(given["sample_pool"], given["softmax_weight"])
    found = {}
    for name in case.outputs:
        if name.startswith("inception_score"):
            size = re.search(r"split(\d+)", name)
            split = {"split_size": int(size[1])} if size else {}
            found[name] = inception_score(probabilities, **split)
    return found


def _manifolds(case: Case, k: int) -> dict[str, Tensor | float]:
    ref, sample = case.inputs["ref_pool"], case.inputs["sample_pool"]
    found: dict[str, Tensor | float] = {}
    for suffix, distances in (("", official_distances), ("_fp32", squared_distances)):
        both = precision_recall(ref, sample, k=k, distances=distances)
        found[f"precision{suffix}"], found[f"recall{suffix}"] = both
        radii = [manifold_radii(x, k=k, distances=distances) for x in (ref, sample)]
        if not suffix:
            near = manifold_members(ref, radii[0], sample, radii[1])
            found["ref_in_sample_manifold"] = near[0][:, None]
            found["sample_in_ref_manifold"] = near[1][:, None]
            found |= _small_blocks(case, radii[0], radii[1])
            radii = [radius[:, None] for radius in radii]
        found[f"radii_ref{suffix}"], found[f"radii_sample{suffix}"] = radii
        found[f"distances_block{suffix}"] = distances(ref[:40], sample[:30])
    return found


def _small_blocks(case: Case, ref_radii: Tensor, sample_radii: Tensor) -> dict[str, float]:
    note = case.header["outputs"]["precision_small_blocks"]
    row_block, column_block = (int(number) for number in re.findall(r"\d+", note))
    ref_near, sample_near = manifold_members(
        case.inputs["ref_pool"],
        ref_radii,
        case.inputs["sample_pool"],
        sample_radii,
        row_block=row_block,
        column_block=column_block,
    )
    return {
        "precision_small_blocks": float(sample_near.double().mean()),
        "recall_small_blocks": float(ref_near.double().mean()),
    }


def _neighbors(case: Case, k: int) -> dict[str, Tensor | float]:
    ref, sample = case.inputs["ref_pool"], case.inputs["sample_pool"]
    judged = realism(ref, manifold_radii(ref, k=k), sample)
    pairs = ((ref, ref), (sample, sample), (ref, sample))
    is_half = [bool(squared_distances(a.half(), b.half()).isfinite().all()) for a, b in pairs]
    return {
        "evaluate_fraction": float(judged.is_near.double().mean()),
        "nearest_ref_index": judged.nearest,
        "realism_score": judged.score,
        "fp16_path_used": torch.tensor(is_half).long(),
    }


def _as_tensors(found: dict) -> Outputs:
    return {
        name: value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
        for name, value in found.items()
    }


def _inception_ops(case: Case) -> Outputs:
    given, found = case.inputs, {}
    for number, (*_, height, width) in enumerate(case.config["sizes"]):
        pixels = given[f"img{number}"].permute(0, 3, 1, 2).float()
        resized = resize_bilinear(pixels, (height, width))
        rows = case.outputs[f"normalised{number}"].shape[1]
        found[f"resized{number}"] = resized.permute(0, 2, 3, 1)
        found[f"normalised{number}"] = normalize(resized).permute(0, 2, 3, 1)[:, :rows]
    x = given["pool_x"].permute(0, 3, 1, 2)
    pools = {
        "avg_pool_same": average_pool,
        "max_pool_same": max_pool,
        "max_pool_valid_s2": halving_max_pool,
    }
    return {**found, **{name: pool(x).permute(0, 2, 3, 1) for name, pool in pools.items()}}


def _dataset(case: Case) -> Outputs:
    given, config, found = case.inputs, case.config, {}
    for name, image in given.items():
        if not name.startswith("img"):
            continue
        number, picture = name.removeprefix("img"), Image.fromarray(image.numpy())
        for size in config["resolutions"]:
            found[f"center{number}.{size}"] = _image(center_crop(picture, size))
        if f"random{number}.draws" in given:
            side, top, left = given[f"random{number}.draws"].tolist()
            size = case.outputs[f"random{number}"].shape[0]
            scaled = scale_shorter_side(picture, side)
            found[f"random{number}"] = _image(crop_at(scaled, size, left=left, top=top))
    pixels = to_pixels(found[f"center0.{config['resolutions'][0]}"][None])[0]
    listing = list_pictures(config["files"])
    assert listing == config["listing"]
    ids = torch.tensor(number_classes(listing))
    return {
        **found,
        "normalised0": pixels,
        "flipped0": pixels.flip(-1),
        "class_ids": ids,
        "first_batch_y": ids[: len(case.outputs["first_batch_y"])],
    }


def _image(picture: Image.Image) -> Tensor:
    size = (picture.height, picture.width, 3)
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(size)


def _uint8(case: Case) -> Outputs:
    pixels = case.inputs["decoded"].view(1, 1, 1, -1)
    return {
        "uint8": to_uint8_truncating(pixels).flatten(),
        "save_image_uint8": to_uint8(pixels).flatten(),
    }


RUNNERS = {
    "dataset_preprocess": _dataset,
    "eval_inception_ops": _inception_ops,
    "eval_metrics_fp16": _metrics,
    "eval_metrics_fp32_fallback": _metrics,
    "eval_metrics_mixed_precision": _metrics,
    "uint8_conversion": _uint8,
}
