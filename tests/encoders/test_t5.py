"""T5's encoder, with a tiny random one and a tokenizer of whole words."""

import pytest
import torch
from safetensors.torch import save_file

from tests.made import save_t5
from udiff.encoders.frozen import Frozen
from udiff.encoders.t5 import T5, load_t5, read_token_row
from udiff.encoders.text import TextEncoder
from udiff.settings import T5Settings
from udiff.weights import WeightsError


@pytest.fixture
def folder(tmp_path):
    save_t5(tmp_path / "t5")
    return tmp_path / "t5"


def _load(folder, **settings) -> T5:
    return load_t5(T5Settings(path=str(folder), **settings))


def test_it_is_a_text_encoder(folder):
    assert isinstance(_load(folder), TextEncoder)


@pytest.mark.parametrize(("pad", "fill"), [("end", 1), ("pad", 0)])
def test_texts_are_ended_cut_and_filled_up(folder, pad, fill):
    encoder = _load(folder, pad=pad)
    ids = encoder.tokenize(["a red cat", "", "a cat on a red bus under a tree"], 6)
    assert ids[0].tolist() == [3, 6, 9, 1, fill, fill]
    assert ids[1].tolist() == [1, *[fill] * 5]
    assert ids[2, -1] == 1
    assert ids[2].tolist()[:5] == [3, 9, 13, 3, 6]
    assert encoder.count_tokens(ids).tolist() == [4, 1, 6]
    assert [encoder.decode(row) for row in ids] == ["a red cat", "", "a cat on a red"]


def test_states_are_those_of_the_model_without_a_mask(folder):
    encoder = _load(folder, pad="end")
    ids = encoder.tokenize(["a red cat", "the dog"], 6)
    states = encoder.encode(ids)
    assert states.shape == (2, 6, encoder.width)
    torch.testing.assert_close(states, encoder.model(input_ids=ids).last_hidden_state)
    torch.testing.assert_close(states, encoder.encode_embedded(encoder.embed(ids)))


def test_bf16_states_come_as_float32(folder):
    encoder = _load(folder, precision="bf16")
    states = encoder.encode(encoder.tokenize(["a red cat"], 5))
    assert states.dtype == torch.float32
    assert encoder.model.get_input_embeddings().weight.dtype == torch.bfloat16


def test_the_fingerprint_tells_encoders_and_padding_apart(folder, tmp_path):
    save_t5(tmp_path / "other", seed=5)
    found = {
        _load(folder).fingerprint(),
        _load(folder, pad="end").fingerprint(),
        _load(tmp_path / "other").fingerprint(),
    }
    assert len(found) == 3
    assert _load(folder).fingerprint() in found


def test_a_pipelines_folder_is_found(folder, tmp_path):
    for name in ("text_encoder", "tokenizer"):
        save_t5(tmp_path / "pipeline" / name)
    save_t5(tmp_path / "pipeline" / "text_encoder_2", width=48)
    assert _load(tmp_path / "pipeline").fingerprint() == _load(folder).fingerprint()


def test_no_encoder_is_explained(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"text_encoder.path .*empty' is neither"):
        _load(tmp_path / "empty")


def test_a_row_is_read_from_torch_and_safetensors_files(tmp_path):
    row = torch.randn(24)
    torch.save(row, tmp_path / "mask.pth")
    save_file({"mask": row[None]}, tmp_path / "mask.safetensors")
    for name in ("mask.pth", "mask.safetensors"):
        assert torch.equal(read_token_row(tmp_path / name), row)
    save_file({"table": torch.randn(3, 24)}, tmp_path / "table.safetensors")
    with pytest.raises(WeightsError, match="one row of a token table"):
        read_token_row(tmp_path / "table.safetensors")


def test_a_frozen_encoder_is_loaded_once_and_has_no_gradients(folder):
    loads = []
    frozen = Frozen(lambda: loads.append(1) or _load(folder))
    assert not loads
    encoder = frozen.on(torch.device("cpu"))
    assert frozen.on(torch.device("cpu")) is encoder
    assert len(loads) == 1
    assert not any(p.requires_grad for p in encoder.parameters())
