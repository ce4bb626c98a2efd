"""A report as one HTML page with plots, which needs no other file. Knows results and tables; computes nothing."""

import html
import io
from collections.abc import Sequence

import numpy as np

from t2l.errors import EvaluationError
from t2l.eval.answers import AnswerFile
from t2l.eval.report import DEFAULT, Options, suite_title, tables
from t2l.eval.results import Suite, compared
from t2l.eval.stats import Difference, Estimate, estimate

STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;font-size:.85rem;display:block;overflow-x:auto}th,td{padding:.3rem .6rem;text-align:left;
border-bottom:1px solid #ddd;white-space:nowrap}th{background:#f6f6f6}tr:hover td{background:#fafafa}svg{max-width:100%;
height:auto}"""


def as_html(files: Sequence[AnswerFile], options: Options = DEFAULT) -> str:
    """The report as one page that needs no other file, with plots. Arguments as of `tables`.

    Raises:
        EvaluationError: if matplotlib is not installed, or as `tables`.
    """
    suites, found = tables(files, options)
    plots = {suite_title(suite): _plot(suite, compared(suite, options.compare)) for suite in suites}
    parts = []
    for table in found:
        head, *body = ([_inline(cell) for cell in row] for row in table.cells)
        parts.append(f"<h2>{html.escape(table.title)}</h2>")
        parts += [f"<p>{_inline(note)}</p>" for note in table.notes]
        parts.append(plots.get(table.title, ""))
        rows = [f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in body]
        parts.append(
            f"<table><thead><tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr></thead>"
            f"<tbody>{''.join(rows)}</tbody></table>"
        )
    return (
        f"<!doctype html><html lang=en><head><meta charset=utf-8><title>t2l eval report</title><style>{STYLE}</style>"
        f"</head><body><h1>Evaluated adapters</h1>{''.join(parts)}</body></html>\n"
    )


def _inline(text: str) -> str:
    """Escaped text with Markdown's bold."""
    parts = html.escape(text).split("**")
    return "".join(f"<strong>{part}</strong>" if i % 2 else part for i, part in enumerate(parts))


def _plot(suite: Suite, differences: Sequence[tuple[str, str, Difference]]) -> str:
    """Conditions with their intervals, and paired differences with theirs, as an SVG."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EvaluationError(
            "Plots need matplotlib: pip install 'text-to-lora[eval]'; Markdown and CSV do without"
        ) from error

    rows = [(name, estimate(scores, fixed_tasks=suite.fixed_tasks)) for name, scores in suite.conditions.items()]
    gaps: list[tuple[str, Estimate]] = [(f"{one} − {other}", value) for one, other, value in differences]
    figure = Figure(figsize=(11, 0.6 + 0.26 * max(len(rows), len(gaps))), layout="constrained")
    panels = [(rows, suite.score), *([(gaps, "paired differences")] if gaps else [])]
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (points, title) in zip(axes, panels, strict=True):
        y = np.arange(len(points))[::-1]
        means = np.array([x.mean for _, x in points])
        around = np.array([[x.mean - x.low for _, x in points], [x.high - x.mean for _, x in points]])
        axis.errorbar(means, y, xerr=around.clip(0), fmt="o", markersize=4, capsize=2, color="#1f5fa8")
        axis.set_yticks(y, [name for name, _ in points], fontsize=8)
        axis.set_title(title, fontsize=9)
        axis.grid(axis="x", alpha=0.3)
        axis.tick_params(axis="x", labelsize=8)
    if gaps:
        axes[1].axvline(0, color="#888", linewidth=1)
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()[out.getvalue().index("<svg") :]
