"""The demo's report: `report.json`, and `report.html` with the grid and the loss curves."""

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt

from udiff.training.log import read_metrics, select_losses

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>udiff demo</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto }}
table {{ border-collapse: collapse }} td, th {{ padding: .2rem .8rem; border-bottom: 1px solid #ddd;
text-align: left }} td:last-child {{ text-align: right; font-variant-numeric: tabular-nums }}
img {{ max-width: 100% }}
</style></head><body>
<h1>udiff demo</h1>
<h2>Samples</h2><img alt="sampled pictures, a row per class" src="{samples}">
<h2>Loss</h2><img alt="loss by training samples" src="{losses}">
<h2>Figures</h2>{figures}
<h2>Stages</h2>{stages}
</body></html>
"""


def write_report(out: Path, report: dict[str, Any]) -> None:
    """Write both files into the demo's folder."""
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    figures = {name: value for name, value in report.items() if name != "stages"}
    stages = {
        f"{stage}: {name}": value
        for stage, facts in report["stages"].items()
        for name, value in facts.items()
    }
    page = _PAGE.format(
        samples=_data_url((out / "samples.png").read_bytes()),
        losses=_data_url(_draw_losses(out, ["autoencoder", "ddt"])),
        figures=_table(figures),
        stages=_table(stages),
    )
    (out / "report.html").write_text(page)


def _draw_losses(out: Path, runs: list[str]) -> bytes:
    figure, axes = plt.subplots(1, len(runs), figsize=(10, 3.5), layout="constrained")
    for axis, run in zip(axes, runs, strict=True):
        rows = read_metrics(out / run)
        for name in select_losses(rows[0]):
            axis.plot([row["images"] for row in rows], [row[name] for row in rows], label=name)
        axis.legend()
        axis.set(title=run, xlabel="training samples", ylabel="loss", yscale="log")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    plt.close(figure)
    return buffer.getvalue()


def _table(values: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(_text(value))}</td></tr>"
        for name, value in values.items()
    )
    return f"<table>{rows}</table>"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}"
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
