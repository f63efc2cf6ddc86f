"""Stage: pictures -> captions by a vision-language model of transformers."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from pipelines.rows import Row, Rows, cut
from pipelines.stages.decode_batch import ahead
from pipelines.stages.sane import DEFAULT_PROMPT, Made
from pipelines.stages.sign import open_cached

if TYPE_CHECKING:
    from pipelines.recaption import RecaptionSettings

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Recaption:
    """Caption the pictures of a unit, decoding the next batch while the model has this one.

    Sampling is seeded per batch, and batches are cut inside the unit in row order: its captions do
    not depend on which worker has it, or when.

    Reads: image (PNG bytes).
    Writes: made (captions as the model gave them, `Made`).
    Refuses: pictures that cannot be decoded.
    """

    def __init__(self, settings: "RecaptionSettings", *, device: str) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self._settings = settings
        self._device = torch.device(device)
        self._processor = AutoProcessor.from_pretrained(settings.model)
        self._processor.tokenizer.padding_side = "left"  # all rows begin to write at one place
        model = AutoModelForImageTextToText.from_pretrained(
            settings.model, dtype=_DTYPES[settings.precision]
        )
        self._model = model.eval().requires_grad_(False).to(self._device)
        self._ends = _end_tokens(self._processor.tokenizer, model).to(self._device)

    def __call__(self, name: str, rows: Sequence[Row]) -> Rows:
        """Caption all rows of the unit of this name, in order."""
        captioned, batches = Rows(), cut(rows, self._settings.batch_size)
        for number, batch in enumerate(ahead(_decode, batches)):
            captioned.rejected += batch.rejected
            if batch.kept:
                pictures = [row.pop("picture") for row in batch.kept]
                made = self._caption(pictures, f"{name}/{number}")
                pairs = zip(batch.kept, made, strict=True)
                captioned.kept += [{**row, "made": captions} for row, captions in pairs]
        return captioned

    def _caption(self, pictures: Sequence[Image.Image], place: str) -> list[list[Made]]:
        """Give for each picture its captions: of each prompt, as many as are asked for."""
        count = self._settings.num_captions
        answers = [
            self._generate(pictures, prompt, f"{place}/{prompt}")
            for prompt in self._settings.prompts or ("",)
        ]
        return [
            [made for answer in answers for made in answer[start : start + count]]
            for start in range(0, len(pictures) * count, count)
        ]

    @torch.inference_mode()
    def _generate(self, pictures: Sequence[Image.Image], prompt: str, place: str) -> list[Made]:
        inputs = self._inputs(pictures, prompt).to(self._device, self._model.dtype)
        torch.manual_seed(_seed(self._settings.seed, place))
        made = self._model.generate(**inputs, **_sampling(self._settings))
        prompt_ids = inputs.get("input_ids")
        if self._chats and prompt_ids is not None:
            shown = prompt_ids.repeat_interleave(self._settings.num_captions, 0)
            if torch.equal(made[:, : shown.shape[1]], shown):
                made = made[:, shown.shape[1] :]
        ended = (
            torch.isin(made, self._ends).any(1).tolist() if len(self._ends) else [True] * len(made)
        )
        texts = self._processor.batch_decode(made, skip_special_tokens=True)
        return [Made(*each) for each in zip(texts, ended, strict=True)]

    @property
    def _chats(self) -> bool:
        """Tell whether prompts go into a conversation; else a caption begins with its prompt."""
        return bool(getattr(self._processor, "chat_template", None))

    def _inputs(self, pictures: Sequence[Image.Image], prompt: str) -> Any:
        if self._chats:
            return self._processor.apply_chat_template(
                [_conversation(picture, prompt or DEFAULT_PROMPT) for picture in pictures],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
            )
        texts = {"text": [prompt] * len(pictures), "padding": True} if prompt else {}
        return self._processor(images=list(pictures), return_tensors="pt", **texts)


def check_model(name: str) -> None:
    """Look whether transformers has such a model, without loading its weights.

    Raises:
        ValueError: it has not, or only one that does not make texts of pictures.
    """
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig, AutoProcessor

    try:
        config = AutoConfig.from_pretrained(name)
        AutoProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model {name!r} is neither a folder with config and processor of a model of "
            f"transformers, nor one of the hub that can be reached: {error}"
        ) from error
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ValueError(
            f"model {name!r} is a {config.model_type}, which is no image-text-to-text model"
        )


def fingerprint_model(name: str) -> str:
    """Tell a model from another: a folder by its files, one of the hub by its commit."""
    folder = Path(name)
    if not folder.is_dir():
        from transformers.utils.hub import cached_file, extract_commit_hash

        config = cached_file(name, "config.json")
        return f"{name}@{extract_commit_hash(config, None)}"
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        with file.open("rb") as stream:
            digest.update(f"{file.name} ".encode())
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _decode(rows: Iterable[Row]) -> Rows:
    decoded = Rows()
    for row in rows:
        decoded.add(row, lambda row: {**row, "picture": open_cached(row)})
    return decoded


def _end_tokens(tokenizer: Any, model: Any) -> Tensor:
    ends = model.generation_config.eos_token_id
    listed = ends if isinstance(ends, list) else [ends]
    found = {*listed, tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    return torch.tensor(sorted(found), dtype=torch.int64)


def _conversation(picture: Image.Image, prompt: str) -> list[dict[str, Any]]:
    content = [{"type": "image", "image": picture}, {"type": "text", "text": prompt}]
    return [{"role": "user", "content": content}]


def _sampling(settings: "RecaptionSettings") -> dict[str, Any]:
    sampled = {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p}
    return {
        "max_new_tokens": settings.max_tokens,
        "num_return_sequences": settings.num_captions,
        **(sampled if settings.temperature else {"do_sample": False}),
    }


def _seed(seed: int, place: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{place}".encode()).digest()[:8], "big")
