"""The page of `jobs.inspect`: one HTML file with everything in it."""

import base64
import html
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipelines.summary import Example, Summary

_SHOWN_PX = 256
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto }}
table {{ border-collapse: collapse; margin: 0 2rem 1.5rem 0; display: inline-table;
vertical-align: top }}
td, th {{ padding: .1rem .7rem; text-align: left }} td:nth-child(2) {{ text-align: right }}
.bar {{ background: #69c; height: .8rem }}
.rows {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1rem }}
figure {{ margin: 0; border: 1px solid #ddd; padding: .6rem; overflow-wrap: anywhere }}
img {{ max-width: 100%; image-rendering: pixelated }} small {{ color: #666 }}
</style></head><body>
<h1>{title}</h1><p>{counts}</p>
<div>{histograms}</div><div class="rows">{rows}</div>
</body></html>
"""


@dataclass(frozen=True)
class Shown:
    """What a page tells beside its rows."""

    title: str
    summary: Summary
    histograms: Mapping[str, Counter[str]]
    autoencoder: str | None
    """Makes reconstructions beside the pictures."""


def make_page(shown: Shown, examples: Sequence[Example]) -> str:
    """Put the page together."""
    made: list[Image.Image | None] = [None] * len(examples)
    if shown.autoencoder:
        made = reconstruct(shown.autoencoder, examples)
    summary = shown.summary
    counts = (
        f"{summary.kind}: {summary.rows_in} in = {summary.rows} here + "
        f"{sum(summary.rejected.values())} rejected"
    )
    return _PAGE.format(
        title=html.escape(shown.title),
        counts=html.escape(counts),
        histograms="".join(_histogram(*each) for each in shown.histograms.items()),
        rows="".join(_figure(*each) for each in zip(examples, made, strict=True)),
    )


def reconstruct(autoencoder: str, examples: Sequence[Example]) -> list[Image.Image | None]:
    """Decode the latents of examples; of those without, what their pictures are encoded to."""
    import torch

    from udiff.autoencoders.pixels import to_pixels, to_uint8
    from udiff.bundle import load_autoencoder

    model = load_autoencoder(autoencoder).eval()
    made: list[Image.Image | None] = []
    for example in examples:
        with torch.inference_mode():
            if example.latent is not None:
                raw = torch.from_numpy(example.latent)[None]
            elif example.picture is not None:
                picture = torch.from_numpy(np.array(example.picture))[None]
                raw = model.encode_moments(to_pixels(picture)).mean
            else:
                made.append(None)
                continue
            made.append(Image.fromarray(to_uint8(model.decode(model.normalize(raw)))[0].numpy()))
    return made


def _figure(example: Example, made: Image.Image | None) -> str:
    pictures = [picture for picture in (example.picture, made) if picture is not None]
    images = " ".join(f'<img alt="" src="{_data_url(picture)}">' for picture in pictures)
    lines = [example.caption, *(f"&rarr; {html.escape(text)}" for text in example.recaption)]
    lines[0] = html.escape(lines[0])
    about = " · ".join(filter(None, (example.key, example.label, example.size)))
    return (
        f"<figure>{images}<p>{'<br>'.join(lines)}</p><small>{html.escape(about)}</small></figure>"
    )


def _histogram(title: str, counts: Counter[str]) -> str:
    most = max(counts.values())
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{number}</td>"
        f'<td><div class="bar" style="width:{120 * number // most}px"></div></td></tr>'
        for name, number in counts.items()
    )
    return f"<table><tr><th colspan=3>{html.escape(title)}</th></tr>{rows}</table>"


def _data_url(picture: Image.Image) -> str:
    small = picture.copy()
    small.thumbnail((_SHOWN_PX, _SHOWN_PX))
    file = io.BytesIO()
    small.convert("RGB").save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
