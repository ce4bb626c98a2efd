"""A report as one HTML page with plots, which needs no other file. Knows results and tables; computes nothing.

Plots are boxes of CSS, so that their words stay as large as the page's on a telephone, and follow its dark colours.
"""

import html
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from t2l.eval.answers import AnswerFile
from t2l.eval.conditions import ADAPTERS, CONDITIONS
from t2l.eval.report import DEFAULT, FORMS, Options, Table, report_title, suite_title, tables
from t2l.eval.results import Suite, compared
from t2l.eval.stats import Estimate, estimate

STYLE = """:root{color-scheme:light dark;--line:#ddd;--soft:#f5f5f7;--ink:#222;--mark:#1f5fa8;--good:#1a7f37;
--bad:#b3261e}@media(prefers-color-scheme:dark){:root{--line:#444;--soft:#26282c;--ink:#e6e6e6;--mark:#7ab8ff;
--good:#5fd38a;--bad:#ff8f85}body{background:#17181b}}body{font:16px/1.5 system-ui,sans-serif;max-width:75rem;
margin:2rem auto;padding:0 1rem;color:var(--ink)}*{box-sizing:border-box;overflow-wrap:anywhere}h2{margin-top:2.5rem;
border-top:1px solid var(--line);padding-top:1rem}table{border-collapse:collapse;font-size:.9rem;width:100%}
th,td{padding:.3rem .6rem .3rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
.row{display:grid;grid-template-columns:22rem 1fr;gap:0 1rem;align-items:center;font-size:.9rem;margin:.2rem 0}
.plot{max-width:60rem}.name b{float:right;font-weight:400}.track{position:relative;height:1rem;background:var(--soft)}
.track i{position:absolute;top:0;height:100%}.span{background:var(--mark);opacity:.35}.at{width:3px;
background:var(--mark)}.zero{width:1px;background:var(--ink)}article{background:var(--soft);padding:.7rem 1rem;
margin:.8rem 0}article p{margin:.2rem 0;white-space:pre-wrap}dl{margin:.4rem 0 0;display:grid;
grid-template-columns:24rem 1fr;gap:.1rem 1rem}dd{margin:0}.right{color:var(--good)}.wrong{color:var(--bad)}
dt,.small{font-size:.85rem;opacity:.8}@media(max-width:50rem){.row{grid-template-columns:1fr;margin:.5rem 0}
dl{grid-template-columns:1fr}dd{margin-bottom:.4rem}thead{display:none}tr{display:block;
border-bottom:1px solid var(--line);padding:.4rem 0}td{display:block;border:0;padding:.1rem 0}
td:first-child{font-weight:600}td[data-of]:not([data-of=""]):not(:empty)::before{content:attr(data-of) ": ";
font-weight:400;opacity:.75}}"""
SHOWN = (*(f"{who}+description" for who in ("base", "multitask", "t2l", "t2l-wrong", "t2l-random")), "t2l")
"""Conditions whose answers stand below a question; all there are where a file has none of these. All but the last see
the same prompt: beside controls that do not see the description an adapter looks better than it is."""


def as_html(files: Sequence[AnswerFile], options: Options = DEFAULT) -> str:
    """The report as one page that needs no other file, with plots and questions. Arguments as of `tables`.

    Raises:
        DataError, EvaluationError: as `tables`.
    """
    suites, found = tables(files, options)
    by_title = {suite_title(suite): suite for suite in suites}
    parts = []
    for table in found:
        parts.append(f"<h2>{html.escape(table.title)}</h2>")
        parts += [f"<p>{_inline(note)}</p>" for note in table.notes]
        parts.append(_table(table))
        if suite := by_title.get(table.title):
            parts += [_plots(suite, options), _questions(suite, files)]
    title = html.escape(report_title(files, options))
    return (
        f"<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{title}</title><style>{STYLE}</style></head><body><h1>{title}</h1>{''.join(parts)}</body></html>\n"
    )


def _inline(text: str) -> str:
    """Escaped text with Markdown's bold."""
    parts = html.escape(text).split("**")
    return "".join(f"<strong>{part}</strong>" if i % 2 else part for i, part in enumerate(parts))


def _table(table: Table) -> str:
    """A table; on a narrow screen each of its rows is a box whose cells name their column."""
    head, *body = ([_inline(cell) for cell in row] for row in table.cells)
    named = ["", *(head[1:] if len(head) > 2 else [""])]
    rows = ("".join(f'<td data-of="{of}">{cell}</td>' for of, cell in zip(named, row, strict=True)) for row in body)
    return (
        f"<table><thead><tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr></thead>"
        f"<tbody>{''.join(f'<tr>{row}</tr>' for row in rows)}</tbody></table>"
    )


def _plots(suite: Suite, options: Options) -> str:
    """Conditions with their intervals, and paired differences with theirs; first what their names stand for."""
    means = [(name, estimate(scores, fixed_tasks=suite.fixed_tasks)) for name, scores in suite.conditions.items()]
    gaps = [(f"{one} − {other}", value) for one, other, value in compared(suite, options.compare)]
    used = dict.fromkeys(CONDITIONS[name].adapter for name in suite.conditions)
    names = [f"{adapter}: {ADAPTERS[adapter]}" for adapter in used]
    shown = {"+description": "description in the prompt", "+shots": "three examples in the prompt"}
    names += [f"{mark}: {what}" for mark, what in shown.items() if any(mark in name for name in suite.conditions)]
    return (
        f"<p class=small>Names below: {html.escape('; '.join(names))}.</p>"
        + _plot(f"{suite.score.capitalize()}, 95 % intervals", means)
        + (_plot("Paired differences", gaps) if gaps else "")
    )


def _plot(title: str, points: Sequence[tuple[str, Estimate]]) -> str:
    """A line of words and a bar for each estimate, all on one scale."""
    low = min(0.0, *(value.low for _, value in points))
    width = max(0.0, *(value.high for _, value in points)) - low or 1.0

    def place(x: float) -> float:
        return 100 * (x - low) / width

    rows = [
        f"<div class=row><span class=name>{html.escape(name)} <b>{value}</b></span><div class=track>"
        f'<i class=span style="left:{place(value.low):.2f}%;width:{place(value.high) - place(value.low):.2f}%"></i>'
        f'<i class=zero style="left:{place(0):.2f}%"></i><i class=at style="left:{place(value.mean):.2f}%"></i>'
        "</div></div>"
        for name, value in points
    ]
    scale = f"<p class=small>From {low:.2f} to {low + width:.2f}; the thin line is 0.</p>"
    return f"<section class=plot><h3>{html.escape(title)}</h3>{''.join(rows)}{scale}</section>"


def _questions(suite: Suite, files: Sequence[AnswerFile]) -> str:
    """Questions that stand in the files, each with what was answered under the first seed."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for file in files:
        for one in file.header["suites"].get(suite.name, {}).get("questions", []):
            found[one["task"], one["id"]] = one
    said: dict[tuple[str, str], dict[str, Any]] = defaultdict(dict)
    for file in files:
        for line in file.lines:
            if line["suite"] == suite.name and line["seed"] == suite.seeds[0]:
                said[line["task"], line["id"]][line["condition"]] = line
    shown = [name for name in SHOWN if name in suite.conditions] or list(suite.conditions)
    boxes = []
    for key, one in found.items():
        answers = "".join(_answer(name, said[key][name]) for name in shown if name in said[key])
        boxes.append(
            f"<article><p class=small>{html.escape(one['task'])}: {html.escape(one['description'])}</p>"
            f"<p>{html.escape(one['input'])}</p><p>Expected: <strong>{html.escape(one['expected'])}</strong></p>"
            f"<dl>{answers}</dl></article>"
        )
    if not boxes:
        return "<p class=small>Questions of this suite do not stand in its file of answers.</p>"
    return f"<h3>Questions and answers</h3><p>Some questions, with the answers of seed {suite.seeds[0]}.</p>" + "".join(
        boxes
    )


def _answer(name: str, line: dict[str, Any]) -> str:
    """Who answered and what, marked where it counts in full."""
    right = next(iter(line["scores"].values())) == 1
    kind, mark = ("right", "✓") if right else ("wrong", "✗")
    answer = html.escape(str(line.get("answer", ""))[:600]) or "(nothing)"
    condition = CONDITIONS[name]
    form = FORMS[condition.description, condition.shots]
    who = f"{ADAPTERS[condition.adapter]}, {form}"
    return f'<dt>{html.escape(who)}</dt><dd class="{kind}">{mark} {answer}</dd>'
