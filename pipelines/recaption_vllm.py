"""Captions by vLLM, through `ray.data.llm`: engines that take many questions at once.

Ray Data brings pictures to the engines; what comes back is text, kept per unit in `captions/` of
the output, so that a killed job asks again only for the units that it has not got. The chain then
takes them from there. vLLM's answers may differ from run to run.
"""

import base64
import importlib.util
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from pipelines.picture_files import PictureFiles
from pipelines.rows import Row, Rows
from pipelines.shards import Unit
from pipelines.stages.sane import DEFAULT_PROMPT, Made
from udiff.data.storage import Folder

if TYPE_CHECKING:
    from pipelines.recaption import RecaptionSettings

CAPTIONS = "captions"


class StoredCaptions:
    """Stage: takes captions that are there already, as `Recaption` makes them.

    Writes: made.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder

    def __call__(self, name: str, rows: Sequence[Row]) -> Rows:
        """Caption all rows of the unit of this name."""
        stored = json.loads(self._folder.read(f"{name}.json"))
        pairs = zip(rows, stored, strict=True)
        return Rows(kept=[{**row, "made": [Made(*each) for each in made]} for row, made in pairs])


def check_installed() -> None:
    """Raise a ValueError where there is no vLLM."""
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(
            "engine vllm needs the package vllm (pip install 'ray[llm]'); engine transformers "
            "does without"
        )


def caption_units(
    settings: "RecaptionSettings", pictures: PictureFiles, wanted: Sequence[Unit], folder: Folder
) -> None:
    """Ask vLLM for the captions of the units that are not in the folder yet."""
    import ray.data

    units = [unit for unit in wanted if not folder.exists(f"{unit.name}.json")]
    if not units:
        return
    each = settings.num_captions * len(settings.prompts or (DEFAULT_PROMPT,))
    questions = ray.data.from_items(
        [asdict(unit) for unit in units], override_num_blocks=len(units)
    ).flat_map(partial(ask, settings, pictures))
    answers = _processor(settings)(questions).iter_rows()
    collect(answers, {unit.name: (unit.num_samples, each) for unit in units}, folder)


def ask(
    settings: "RecaptionSettings", pictures: PictureFiles, unit: Mapping[str, Any]
) -> Iterator[Row]:
    """Give the questions about a unit's pictures, in the terms of chat completions."""
    for number, row in enumerate(pictures.read(Unit(**unit))):
        url = "data:image/png;base64," + base64.b64encode(row["image"]).decode()
        prompts = settings.prompts or (DEFAULT_PROMPT,)
        for place in range(len(prompts) * settings.num_captions):
            question = {"type": "text", "text": prompts[place // settings.num_captions]}
            content = [{"type": "image_url", "image_url": {"url": url}}, question]
            yield {
                "unit": unit["name"],
                "row": number,
                "place": place,
                "messages": [{"role": "user", "content": content}],
                "sampling_params": {
                    "max_tokens": settings.max_tokens,
                    "temperature": settings.temperature,
                    "top_p": settings.top_p,
                    "seed": settings.seed + place,
                },
            }


def collect(answers: Iterable[Row], sizes: Mapping[str, tuple[int, int]], folder: Folder) -> None:
    """Keep the answers of each unit, as soon as all of them are there, in the order of its rows.

    Args:
        answers: in any order; unit, row, place, text and ended of each.
        sizes: rows of each unit, and answers of each row.
        folder: gets a file per unit.
    """
    waiting: dict[str, dict[tuple[int, int], Made]] = defaultdict(dict)
    for answer in answers:
        unit, made = answer["unit"], waiting[answer["unit"]]
        made[answer["row"], answer["place"]] = Made(answer["text"], answer["ended"])
        rows, each = sizes[unit]
        if len(made) == rows * each:
            stored = [[made[row, place] for place in range(each)] for row in range(rows)]
            folder.write(f"{unit}.json", json.dumps(stored).encode())
            del waiting[unit]


def _processor(settings: "RecaptionSettings") -> Any:
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    config = vLLMEngineProcessorConfig(
        model_source=settings.model,
        batch_size=settings.batch_size,
        concurrency=settings.workers or 1,
        prepare_multimodal_stage=True,
        engine_kwargs={
            "limit_mm_per_prompt": {"image": 1},
            "dtype": {"fp32": "float32", "bf16": "bfloat16"}[settings.precision],
        },
    )
    return build_processor(config, postprocess=partial(_answer, settings.max_tokens))


def _answer(max_tokens: int, row: Row) -> Row:
    return {
        **{name: row[name] for name in ("unit", "row", "place")},
        "text": row["generated_text"],
        "ended": row["num_generated_tokens"] < max_tokens,
    }
