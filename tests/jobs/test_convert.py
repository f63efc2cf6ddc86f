"""`jobs.convert`: official checkpoints in and out, byte for byte."""

import pickle
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

from jobs.convert import main
from udiff.bundle import load_bundle
from udiff.models.ddt.checkpoint import network_from_official as make_ddt
from udiff.models.lightningdit.checkpoint import network_from_official as make_lightningdit
from udiff.models.mdtv2.checkpoint import network_from_official as make_mdtv2

GOLDEN = Path(__file__).parents[1] / "golden/cases/ddt"
DDT = {
    "cls": "DDT", "in_channels": 4, "patch_size": 2, "hidden_size": 32, "num_groups": 2,
    "num_blocks": 3, "num_encoder_blocks": 2, "num_classes": 10,
}  # fmt: skip
LIGHTNINGDIT = {
    "in_channels": 4, "input_size": 8, "patch_size": 2, "hidden_size": 32, "depth": 2,
    "num_heads": 2, "num_classes": 10, "use_rope": True, "use_swiglu": True, "use_rmsnorm": True,
}  # fmt: skip
MDT = {
    "input_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 32, "depth": 4,
    "num_heads": 2, "decode_layer": 2, "num_classes": 10,
}  # fmt: skip
FAMILIES = {
    "ddt": (make_ddt, DDT),
    "ddt_baseline": (make_ddt, {**DDT, "cls": "DiT"}),
    "lightningdit": (make_lightningdit, LIGHTNINGDIT),
    "mdtv2": (make_mdtv2, MDT),
    "mdtv2_version_1": (make_mdtv2, {**MDT, "model": "MDT"}),
}
LAYOUTS = {
    "bare": lambda weights: weights,
    "model": lambda weights: {"model": weights},
    "module": lambda weights: {"model": {f"module.{k}": t for k, t in weights.items()}},
    "ema": lambda weights: {"ema": weights, "model": {k: t + 1 for k, t in weights.items()}},
    "compiled": lambda weights: {"state_dict": {f"_orig_mod.{k}": t for k, t in weights.items()}},
}
LIGHTNING = {
    "bare": lambda weights: weights,
    "ema_denoiser": lambda weights: {
        "state_dict": {f"ema_denoiser.{k}": t for k, t in weights.items()}
    },
    "compiled": lambda weights: {
        "state_dict": {f"ema_denoiser._orig_mod.{k}": t for k, t in weights.items()}
    },
}
CASES = [
    (name, layout)
    for name in FAMILIES
    for layout in (LIGHTNING if name.startswith("ddt") else LAYOUTS)
]


def _weights(name: str) -> dict[str, Tensor]:
    make, arguments = FAMILIES[name]
    torch.manual_seed(0)
    network = make(arguments)
    for parameter in network.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return network.state_dict()


def _convert(folder: Path, name: str, checkpoint: object) -> int:
    torch.save(checkpoint, folder / "in.ckpt")
    (folder / "config.yaml").write_text(yaml.safe_dump(FAMILIES[name][1]))
    arguments = [
        "--family",
        name.split("_", maxsplit=1)[0],
        "--checkpoint",
        str(folder / "in.ckpt"),
    ]
    return main([*arguments, "--config", str(folder / "config.yaml"), "--out", str(folder / "out")])


def _averaged(official: dict) -> dict[str, Tensor]:
    found = official.get("state_dict") or official.get("ema") or official
    return {k.removeprefix("ema_denoiser."): t for k, t in found.items()
            if not k.startswith("denoiser.")}  # fmt: skip


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_weights_come_back_bit_for_bit(name, layout, tmp_path):
    weights = _weights(name)
    made = (LIGHTNING if name.startswith("ddt") else LAYOUTS)[layout](weights)
    assert _convert(tmp_path, name, made) == 0
    back = tmp_path / "back.pt"
    assert main(["--to-official", "--checkpoint", str(tmp_path / "out"), "--out", str(back)]) == 0
    official = _averaged(torch.load(back, weights_only=True))
    assert set(official) == set(weights)
    for key, tensor in weights.items():
        assert official[key].dtype == tensor.dtype
        assert torch.equal(official[key].view(torch.uint8), tensor.view(torch.uint8)), key
    load_bundle(tmp_path / "out")


def test_the_reference_checkpoint_comes_back_with_all_that_training_needs(tmp_path):
    source = torch.load(GOLDEN / "ckpt_import.ckpt", weights_only=True)
    config = {**DDT, "num_blocks": 2, "num_encoder_blocks": 1}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    bundle, back = str(tmp_path / "bundle"), str(tmp_path / "back.ckpt")
    given = ["--checkpoint", str(GOLDEN / "ckpt_import.ckpt"), "--out", bundle]
    assert main(["--family", "ddt", *given, "--config", str(tmp_path / "config.yaml")]) == 0
    assert main(["--to-official", "--checkpoint", bundle, "--out", back]) == 0
    official = torch.load(back, weights_only=True)
    assert list(official["state_dict"]) == list(source["state_dict"])
    for key, tensor in source["state_dict"].items():
        assert torch.equal(official["state_dict"][key], tensor)
    states = official["optimizer_states"][0]["state"]
    for index, moments in source["optimizer_states"][0]["state"].items():
        for key, value in moments.items():
            assert torch.equal(states[index][key], torch.as_tensor(value))
    assert official["global_step"] == source["global_step"]


def test_the_official_configuration_lies_beside_the_weights_and_reads_back(tmp_path):
    torch.save(_weights("ddt"), tmp_path / "in.ckpt")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(DDT))
    given = ["--family", "ddt", "--checkpoint", str(tmp_path / "in.ckpt")]
    config = ["--config", str(tmp_path / "config.yaml")]
    bundle, back = str(tmp_path / "bundle"), tmp_path / "back.ckpt"
    assert main([*given, *config, "--out", bundle]) == 0
    assert main(["--to-official", "--checkpoint", bundle, "--out", str(back)]) == 0
    config = ["--config", str(back.with_suffix(".yaml"))]
    assert main(["--family", "ddt", "--checkpoint", str(back), *config, "--out", f"{bundle}2"]) == 0
    first, second = (load_bundle(Path(folder)).recipe for folder in (bundle, f"{bundle}2"))
    assert second == first.model_copy(update={"train": second.train})


def test_missing_and_unknown_keys_are_named(tmp_path, capsys):
    weights = _weights("ddt")
    weights["blocks.0.norm9.weight"] = weights.pop("blocks.0.norm1.weight")
    assert _convert(tmp_path, "ddt", weights) == 2
    error = capsys.readouterr().err
    assert "missing keys ['blocks.0.norm1.weight']" in error
    assert "unknown keys ['blocks.0.norm9.weight']" in error
    assert not (tmp_path / "out").exists()


class Trap:
    def __reduce__(self):
        return print, ("a pickled object ran",)


def test_pickled_objects_are_refused(tmp_path, capsys):
    (tmp_path / "in.ckpt").write_bytes(pickle.dumps({"state_dict": Trap()}))
    torch.save({"state_dict": Trap()}, tmp_path / "zip.ckpt")
    for file in ("in.ckpt", "zip.ckpt"):
        given = ["--checkpoint", str(tmp_path / file), "--out", str(tmp_path / "out")]
        assert main(["--family", "ddt", *given]) == 2
    captured = capsys.readouterr()
    assert "pickled objects" in captured.err
    assert "a pickled object ran" not in captured.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--family", "ddd"], "--family must be one of ddt"),
        ([], "--family is needed"),
        (["--to-official"], "is not a bundle"),
    ],
)
def test_what_is_asked_wrongly_is_explained(arguments, message, tmp_path, capsys):
    file = tmp_path / "in.ckpt"
    torch.save({}, file)
    out = str(tmp_path / "out")
    assert main([*arguments, "--checkpoint", str(file), "--out", out]) == 2
    assert message in capsys.readouterr().err
