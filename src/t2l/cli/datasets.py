"""`t2l data`."""

import sys
from pathlib import Path
from typing import Annotated

import typer
import typer.core

from t2l.cli.common import JsonOption, app, print_json, say

data_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Fetch, check and extend training data.")
app.add_typer(data_app, name="data")


@data_app.command("build")
def data_build(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the packed files; a rerun goes on.")],
    tasks: Annotated[
        str | None,
        typer.Option(metavar="N|NAMES|all", help="How many tasks, or their names with commas.", show_default=False),
    ] = None,
    benchmarks: Annotated[bool, typer.Option("--benchmarks", help="Also the ten benchmarks.")] = False,
    source: Annotated[
        str | None,
        typer.Option(metavar="TEMPLATE", help="Folder or data set id with {task} in it, instead of the Hub's."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make the packed data files from the Hugging Face Hub. Prints the folder."""
    if tasks is None and not benchmarks:
        raise typer.BadParameter("nothing is asked for: give --tasks or --benchmarks")
    from t2l.data import build
    from t2l.io import only_writer

    with only_writer(out):
        bar = sys.stderr.isatty()
        manifest = build.build(out, tasks=tasks, benchmarks=benchmarks, template=source, say=say, progress=bar)
    for name, entry in manifest["files"].items():
        say(f"{name}: {entry['rows']:,} rows, sha256 {entry['sha256'][:12]}…")
    if as_json:
        print_json({"folder": str(out), **manifest})
    else:
        print(out)


@data_app.command("check")
def data_check(
    path: Annotated[
        str | None,
        typer.Argument(metavar="PATH", show_default=False, help="JSONL file, folder or hf:NAME; T2L_DATA if absent."),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="REF", help="Count lengths in this model's tokens too.", show_default=False)
    ] = None,
    manifest: Annotated[bool, typer.Option("--manifest", help="Compare a packed folder's checksums too.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Look for leaks, blank answers, empty tasks and repeats. Exit code 1 if training would go wrong."""
    from t2l.data.check import check
    from t2l.tasks import data_dir

    count = None
    if tokenizer is not None:
        from t2l.hub import load_tokenizer

        loaded = load_tokenizer(tokenizer)

        def count(texts: list[str]) -> list[int]:
            return [len(ids) for ids in loaded(texts, add_special_tokens=False, verbose=False).input_ids]

    report = check(path or str(data_dir()), count_tokens=count, manifest=manifest)
    if as_json:
        print_json(report.to_plain())
    else:
        from t2l.data.check import show

        show(report)
    for warning in report.warnings:
        say(f"warning: {warning}")
    for problem in report.problems:
        say(f"error: {problem}")
    if report.problems:
        raise typer.Exit(1)


@data_app.command("describe")
def data_describe(
    tasks: Annotated[str, typer.Argument(metavar="TASKS", help="JSONL file, folder of them, or hf:NAME.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="JSONL file to write, one task a line.")],
    endpoint: Annotated[str, typer.Option(metavar="URL", help="OpenAI-compatible; such as http://localhost:8000.")],
    model: Annotated[str, typer.Option(metavar="NAME", help="The endpoint's name of the model.")],
    number: Annotated[int, typer.Option("--n", min=1, max=64, help="Descriptions for each task.")] = 8,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with FILE; its tasks are not asked again.")] = False,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for an answer.")] = 120.0,
    as_json: JsonOption = False,
) -> None:
    """Ask a chat endpoint for more descriptions of each task. Its key, if any, comes from OPENAI_API_KEY."""
    from t2l.data.describe import describe
    from t2l.endpoint import open_endpoint
    from t2l.io import only_writer
    from t2l.tasks import load_own

    opened = open_endpoint(endpoint, model, timeout=timeout)
    with only_writer(out):
        written = describe(load_own(tasks), out, opened, number=number, resume=resume, say=say)
    if as_json:
        print_json({"file": str(out), "tasks_written": written})
    else:
        print(out)
