"""A run's curves as one page that needs nothing else: `report.html`, drawn from `metrics.jsonl`."""

import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from t2l.errors import DataError
from t2l.io import read_json, write_text
from t2l.train.watch import read_metrics

PANELS = {
    "Training loss": ("loss",),
    "Steering margin: another task's description minus the right one, nats": ("margin",),
    "Loss on new examples": ("/loss",),
    "Exact match, right description and another task's": ("exact_match",),
    "Tokens a second": ("tokens_per_second",),
    "Gradient norm": ("gradient_norm",),
}


def write_report(run: Path) -> Path:
    """Writes `report.html` into a run's folder.

    Raises:
        DataError: if matplotlib is not installed, or the run has no metrics.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DataError("report.html needs matplotlib: pip install 'text-to-lora[train]'") from error
    rows = read_metrics(run)
    if not rows:
        raise DataError(f"{run} has no metrics to draw")
    pictures = []
    for title, names in PANELS.items():
        keys = [key for key in dict.fromkeys(key for row in rows for key in row) if _belongs(key, names)]
        if not keys:
            continue
        figure = Figure(figsize=(7, 3), layout="constrained")
        axes = figure.subplots()
        for key in keys:
            points = [(row["step"], row[key]) for row in rows if key in row]
            axes.plot(*zip(*points, strict=True), label=key, marker="." if len(points) < 30 else "")
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if len(keys) > 1:
            axes.legend(fontsize="small")
        picture = io.StringIO()
        figure.savefig(picture, format="svg", metadata={"Date": None})
        svg = picture.getvalue()
        pictures.append(f"<h2>{html.escape(title)}</h2>\n{svg[svg.index('<svg') :]}")
    path = run / "report.html"
    write_text(path, _page(run, rows, pictures))
    return path


def _belongs(key: str, names: Sequence[str]) -> bool:
    return key in names or ("/" in key and any(key.endswith(name) and name != "loss" for name in names))


def _page(run: Path, rows: list[dict[str, Any]], pictures: list[str]) -> str:
    last: dict[str, Any] = {}
    for row in rows:
        last |= row
    cells = "\n".join(
        f"<tr><td>{html.escape(key)}</td><td>{value:.4g}</td></tr>" if isinstance(value, float) else
        f"<tr><td>{html.escape(key)}</td><td>{html.escape(str(value))}</td></tr>"
        for key, value in last.items()
    )  # fmt: skip
    settings = html.escape(json.dumps(read_json(run / "config.json"), indent=2))
    title = html.escape(f"t2l run {run.resolve().name}")
    style = "body{font-family:sans-serif;max-width:60em;margin:2em auto}td{padding:0 1em 0 0}svg{max-width:100%}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{style}</style></head>\n<body><h1>{title}</h1>\n"
        + "\n".join(pictures)
        + f"\n<h2>Last values</h2>\n<table>\n{cells}\n</table>\n"
        f"<details><summary>Settings</summary><pre>{settings}</pre></details>\n</body></html>\n"
    )
