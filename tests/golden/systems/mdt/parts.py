"""Reference cases of single layers and tables."""

from torch import Tensor

from tests.golden.case import Case, Outputs
from udiff.diffusion.conditions import LabelDropout
from udiff.models.mdtv2.layers import (
    Attention,
    LabelEmbedder,
    RelativePositionBias,
    relative_position_index,
    sincos_table,
)
from udiff.nn.timestep import timestep_features
from udiff.weights import load_strictly, strip_prefix


def helper_tables(case: Case) -> Outputs:
    given, found = case.inputs, {}
    for name in case.outputs:
        part, _, arguments = name.partition(".")
        numbers = [int(number) for number in arguments.split(".") if number]
        if part == "sincos":
            found[name] = sincos_table(*numbers)
        elif part in ("temb", "temb_frac"):
            t = given["t_int" if part == "temb" else "t_frac"].float()
            found[name] = timestep_features(t, *numbers, max_period=10_000.0)
        elif part == "relidx":
            found[name] = relative_position_index(*numbers)
        elif part in ("reltable", "relbias"):
            table = case.outputs[f"reltable.{arguments}"]
            bias = RelativePositionBias(*numbers, table.shape[1])
            bias.relative_position_bias_table.data.copy_(table)
            found[name] = bias() if part == "relbias" else bias.relative_position_bias_table
    return {**found, **_attention(case), **_labels(case)}


def _attention(case: Case) -> dict[str, Tensor]:
    given, sizes = case.inputs, case.config["attn"]
    attention = Attention(sizes["dim"], sizes["heads"], int(sizes["num_patches"] ** 0.5))
    load_strictly(attention, strip_prefix(case.weights, "attn."), source=case.name)
    keep, index = given["ids_keep"], attention.rel_pos_bias.relative_position_index
    rows = index[keep[:, :, None], keep[:, None, :]]
    return {
        "attn_full": attention(given["attn_x_full"]),
        "attn_masked": attention(given["attn_x_masked"], rows),
        "attn_masked_bias": attention.rel_pos_bias(rows),
    }


def _labels(case: Case) -> dict[str, Tensor]:
    given, config = case.inputs, case.config["label"]
    embedder = LabelEmbedder(config["num_classes"] + 1, config["hidden"])
    load_strictly(embedder, strip_prefix(case.weights, "label."), source=case.name)
    dropout = LabelDropout(config["num_classes"], 0.5)
    forced = dropout.drop(given["labels"], 1.0 - given["force_drop_ids"])
    return {"label_eval": embedder(given["labels"]), "label_forced": embedder(forced)}
