"""Reference cases of picture transforms, token layouts and the rating of answers."""

import torch
from PIL import Image
from torch import Tensor

from tests.golden.case import Case, Outputs
from udiff.autoencoders.pixels import to_pixels
from udiff.data.conversation import Turn, lay_out, prompt
from udiff.data.squares import bicubic, bilinear, bilinear_from_float, lanczos
from udiff.evaluation.answers import normalize_answer, number_answers, vqa_accuracy


def image_preprocess(case: Case) -> Outputs:
    size, found = case.config["resolution"], {}
    for name, levels in case.inputs.items():
        picture = Image.fromarray(levels.numpy())
        for kind, square in (("bicubic", bicubic), ("llava", bilinear), ("webdataset", lanczos)):
            image = torch.from_numpy(square(picture, size).copy())
            found[f"{name}/{kind}"] = to_pixels(image[None])[0]
        found[f"{name}/llava_from_pil"] = torch.from_numpy(bilinear_from_float(picture, size))
    return found


LAYOUTS = {
    "forward": "forward",
    "forward_new": "forward",
    "reverse": "reverse",
    "reverse_new": "reverse_end",
}


def sft_tokens(case: Case) -> Outputs:
    given, config = case.inputs, case.config
    num_tokens, end_id = config["max_length"], config["eos_id"]
    found: dict[str, Tensor] = {}
    for number in {name.split("/")[0] for name in given if "/" in name}:
        turn = Turn(given[f"{number}/question"].tolist(), given[f"{number}/answer"].tolist())
        for theirs, layout in LAYOUTS.items():
            tokens = lay_out([turn], num_tokens=num_tokens, end_id=end_id, layout=layout)
            found[f"{number}/{theirs}/input_ids"] = torch.tensor(tokens.ids)
            found[f"{number}/{theirs}/label_mask"] = torch.tensor(tokens.is_learned)
    asked = prompt(given["eval_prompt"].tolist(), num_tokens=num_tokens, end_id=end_id)
    is_fixed = 1 - torch.tensor([asked.is_learned])
    return {
        **found,
        "eval/ids": torch.tensor([asked.ids]),
        "eval/prompt_mask": is_fixed,
        "eval/prompt_len": is_fixed.sum(),
    }


def vqa_eval(case: Case) -> Outputs:
    data = case.header["data"]
    for raw, expected in data["normalise"]:
        assert normalize_answer(raw) == expected, (raw, normalize_answer(raw), expected)
    rates = [vqa_accuracy(e["prediction"], number_answers(e["answers"])) for e in data["accuracy"]]
    alike = vqa_accuracy("yes", [{"answer": "yes"}] * 10)
    return {
        "accuracy": torch.tensor([round(100 * rate, 2) for rate in rates]),
        "accuracy_identical_records": torch.tensor([round(100 * alike, 2)]),
    }


RUNNERS = {"image_preprocess": image_preprocess, "sft_tokens": sft_tokens, "vqa_eval": vqa_eval}
