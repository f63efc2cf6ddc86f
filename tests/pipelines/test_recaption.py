"""Captions of a model, and which of them are kept."""

import shutil
from contextlib import nullcontext
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from pipelines.latents import LatentsChain, plan_latents
from pipelines.latents_settings import LatentsSettings
from pipelines.picture_files import hash_file, open_pictures
from pipelines.recaption import RecaptionChain, RecaptionSettings, plan_recaption
from pipelines.recaption_vllm import StoredCaptions, ask, collect
from pipelines.rows import Reason, Refusal
from pipelines.stages.recaption import fingerprint_model
from pipelines.stages.sane import Made, check_caption, find_repeated, keep_sane
from pipelines.update import carry_over, find_kept
from tests.captioner import COLORS, save_blip, save_captioner
from tests.made import save_autoencoder, save_t5, write_pictures
from udiff.data.manifest import committed_units, finish, read_manifest
from udiff.data.storage import open_folder

PROMPT = "what color is it"


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
    return save_captioner(tmp_path_factory.mktemp("captioner"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Eleven pictures, each of one color."""
    folder = tmp_path_factory.mktemp("pictures")
    colors = [COLORS[n % len(COLORS)] for n in range(11)]
    arrays = [np.asarray(Image.new("RGB", (40, 40), color)) for color in colors]
    write_pictures(folder, np.stack(arrays), rows_per_file=6)
    return folder


def _make(pictures, captioner, output, **changes):
    given = {"prompts": (PROMPT,), "batch_size": 4, "max_tokens": 8, **changes}
    settings = RecaptionSettings(input=str(pictures), output=str(output), model=captioner, **given)
    plan = plan_recaption(settings)
    files = open_pictures(settings.input)
    chain = RecaptionChain(settings, files, plan)
    for unit in reversed(files.units()):
        chain(unit)
    finish(open_folder(output), plan, [unit.name for unit in files.units()])
    return pq.read_table(output / "data")


def test_captions_say_what_the_picture_shows_and_the_original_is_kept(
    pictures, captioner, tmp_path
):
    made = _make(pictures, captioner, tmp_path)
    said = made["recaption"].to_pylist()
    assert said == [[f"a {COLORS[n % len(COLORS)]} picture"] for n in range(11)]
    whole = pq.read_table(pictures / "data")
    assert made.drop_columns(["recaption"]) == whole
    manifest = read_manifest(tmp_path)
    assert manifest.kind == "pictures"
    assert manifest.identity["recaption"]["prompts"] == [PROMPT]
    assert manifest.images_in == manifest.num_rows == 11


def test_after_pictures_changed_only_their_file_is_captioned_again(pictures, captioner, tmp_path):
    given = {"prompts": (PROMPT,), "batch_size": 4, "max_tokens": 8}
    _make(shutil.copytree(pictures, tmp_path / "in"), captioner, tmp_path / "out")
    changed = tmp_path / "in" / "data" / "00006.parquet"
    table = pq.read_table(changed)
    pq.write_table(table.set_column(2, table.field(2), pa.array(["new"] * len(table))), changed)
    (plan_file := tmp_path / "in" / "plan.json").write_text(
        plan_file.read_text().replace("11", "12")
    )
    with pytest.raises(ValueError, match=r"inputs\.pictures is"):
        _make(tmp_path / "in", captioner, tmp_path / "out")
    settings = RecaptionSettings(
        input=str(tmp_path / "in"),
        output=str(tmp_path / "out"),
        model=captioner,
        update=True,
        **given,
    )
    plan, files, output = plan_recaption(settings), open_pictures(settings.input), tmp_path / "out"
    units = {"pictures": files.units()}
    kept = find_kept(
        open_folder(output),
        plan,
        units,
        lambda asked: [hash_file(files.folder, unit) for unit in asked],
    )
    carry_over(open_folder(output), plan, kept)
    assert committed_units(open_folder(output)) == kept == {"00000"}
    RecaptionChain(settings, files, plan)(files.units()[1])
    finish(open_folder(output), plan, [unit.name for unit in files.units()])
    fresh = _make(tmp_path / "in", captioner, tmp_path / "fresh")
    assert fresh["caption"].to_pylist()[6:] == ["new"] * 5
    for file in (tmp_path / "fresh").rglob("*.*"):
        assert (output / file.relative_to(tmp_path / "fresh")).read_bytes() == file.read_bytes()


def test_latents_carry_the_captions_on(pictures, captioner, tmp_path):
    made = _make(pictures, captioner, tmp_path / "recaptioned")
    save_autoencoder(tmp_path / "vae")
    settings = LatentsSettings(
        input=str(tmp_path / "recaptioned"),
        output=str(tmp_path / "latents"),
        autoencoder=str(tmp_path / "vae"),
    )
    plan = plan_latents(settings)
    chain, units = LatentsChain(settings, plan), open_pictures(settings.input).units()
    for unit in units:
        chain(unit)
    manifest = finish(open_folder(settings.output), plan, [unit.name for unit in units])
    assert pq.read_table(tmp_path / "latents" / "data")["recaption"] == made["recaption"]
    assert manifest.identity["recaption"]["model"] == fingerprint_model(captioner)


def test_sampled_captions_are_several_and_the_same_again(pictures, captioner, tmp_path):
    how = {"num_captions": 4, "temperature": 2.0, "min_captions": 0}
    one = _make(pictures, captioner, tmp_path / "one", **how)
    assert one == _make(pictures, captioner, tmp_path / "same", **how)
    other = _make(pictures, captioner, tmp_path / "other", **how, seed=1)
    assert one["recaption"] != other["recaption"]
    counts = [len(captions) for captions in one["recaption"].to_pylist()]
    assert max(counts) > 1
    assert all(len(set(captions)) == len(captions) for captions in one["recaption"].to_pylist())


def test_a_second_run_adds_its_captions_behind(pictures, captioner, tmp_path):
    first = _make(pictures, captioner, tmp_path / "first")
    second = _make(tmp_path / "first", captioner, tmp_path / "second")
    for before, after in zip(*(t["recaption"].to_pylist() for t in (first, second)), strict=True):
        assert after == before * 2
    assert read_manifest(tmp_path / "second").identity["recaption"]["after"]


def test_rows_without_a_sane_caption_are_rejected(pictures, captioner, tmp_path):
    made = _make(pictures, captioner, tmp_path / "kept", max_tokens=1, min_captions=0)
    assert made["recaption"].to_pylist() == [[]] * 11
    with pytest.raises(ValueError, match=r"recaption/too_long.: 11"):
        _make(pictures, captioner, tmp_path / "none", max_tokens=1)


def test_another_model_or_prompt_is_not_continued(pictures, captioner, tmp_path):
    _make(pictures, captioner, tmp_path)
    with pytest.raises(ValueError, match=r"identity\.recaption\.prompts is"):
        _make(pictures, captioner, tmp_path, prompts=())
    with pytest.raises(ValidationError, match="set temperature above 0"):
        RecaptionSettings(input="a", output="b", model="c", num_captions=2)


def test_a_model_that_writes_no_captions_is_refused_before_anything_is_written(pictures, tmp_path):
    save_t5(tmp_path / "t5")
    for model, message in (
        ("/none", r"model '/none' is neither a folder"),
        (str(pictures), "is neither a folder with config"),
        (str(tmp_path / "t5"), "is a t5, which is no image-text-to-text model"),
    ):
        with pytest.raises(ValueError, match=message):
            _make(pictures, model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_does_not_chat_goes_on_from_its_prompt(pictures, tmp_path):
    blip = save_blip(tmp_path)
    how = {"temperature": 1.0, "min_captions": 0, "num_captions": 3}
    made = _make(pictures, blip, tmp_path / "out", prompts=("a picture of",), **how)
    captions = [caption for row in made["recaption"].to_pylist() for caption in row]
    assert captions
    assert all(caption.startswith("a picture of") for caption in captions)
    free = _make(pictures, blip, tmp_path / "free", prompts=(), **how)
    assert any(free["recaption"].to_pylist())


# ---------------------------------------------------------------- vLLM


def test_without_vllm_its_engine_is_refused(pictures, captioner, tmp_path):
    with pytest.raises(ValueError, match=r"pip install 'ray\[llm\]'"):
        _make(pictures, captioner, tmp_path, engine="vllm")


def test_answers_come_in_any_order_and_are_kept_per_unit(pictures, tmp_path):
    files, folder = open_pictures(str(pictures)), open_folder(tmp_path)
    settings = RecaptionSettings(
        input="a", output="b", model="c", prompts=("what?", "where?"), num_captions=2, temperature=1
    )
    questions = [q for unit in files.units() for q in ask(settings, files, asdict(unit))]
    assert len(questions) == 11 * 4
    first = questions[0]["messages"][0]["content"]
    assert first[0]["image_url"]["url"].startswith("data:image/png;base64,")
    answers = [
        {**q, "text": f"{q['row']} {q['messages'][0]['content'][1]['text']}", "ended": True}
        for q in reversed(questions)
    ]
    sizes = {unit.name: (unit.num_samples, 4) for unit in files.units()}
    collect(answers[:-1], sizes, folder)
    assert folder.names() == (f"{files.units()[1].name}.json",)
    collect(answers, sizes, folder)
    unit = files.units()[0]
    rows = StoredCaptions(folder)(unit.name, files.read(unit))
    assert rows.kept[3]["made"] == [
        Made(f"3 {q}", True) for q in ("what?", "what?", "where?", "where?")
    ]


# ---------------------------------------------------------------- sanity


@pytest.mark.parametrize(
    ("text", "ended", "reason"),
    [
        ("a red picture", True, None),
        ("", True, Reason.RECAPTION_EMPTY),
        ("... !", True, Reason.RECAPTION_EMPTY),
        ("very " * 4 + "big", True, Reason.RECAPTION_REPEATED),
        ("very very very big", True, None),
        ("a cat and a dog and " * 4, True, Reason.RECAPTION_REPEATED),
        ("a red", False, Reason.RECAPTION_TOO_LONG),
        (" ".join(str(n) for n in range(100)), True, Reason.RECAPTION_TOO_LONG),
    ],
)
def test_captions_that_say_nothing_are_refused(text, ended, reason):
    with nullcontext() if reason is None else pytest.raises(Refusal) as refusal:
        check_caption(text, ended, max_chars=100)
    assert reason in (None, refusal and refusal.value.reason)


@given(st.lists(st.sampled_from("abc"), max_size=40))
def test_a_phrase_is_repeated_when_it_stands_four_times_in_a_row(words):
    wanted = any(
        words[place : place + 4 * length] == words[place : place + length] * 4
        for length in range(1, 9)
        for place in range(len(words) - 4 * length + 1)
    )
    assert bool(find_repeated(words)) == wanted


def test_equal_captions_are_kept_once():
    settings = RecaptionSettings(input="a", output="b", model="c", min_captions=2)
    made = [Made("a  cat ", True), Made("a cat", True), Made("a dog", True)]
    row = keep_sane({"made": made}, settings=settings)
    assert row == {"recaption": ["a cat", "a dog"]}
    with pytest.raises(Refusal) as refusal:
        keep_sane({"made": made[:2]}, settings=settings)
    assert refusal.value.reason == Reason.RECAPTION_REPEATED
