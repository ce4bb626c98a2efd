"""`t2l eval`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
import typer.core

from t2l.cli.common import DeviceOption, JsonOption, app, checked_device, print_json, say, try_writing

eval_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Judge adapters against every control.")
app.add_typer(eval_app, name="eval")


class Convention(StrEnum):
    """How a server addresses adapters."""

    vllm = "vllm"
    sglang = "sglang"
    llama_cpp = "llama.cpp"


@eval_app.command("run")
def eval_run(
    suites: Annotated[
        list[str],
        typer.Option(
            "--suite",
            metavar="NAME|FILE",
            help="seen, held-back, validation, test, benchmarks, likelihood, or own tasks; may be repeated.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="JSONL of answers; a rerun goes on with it.")],
    checkpoint: Annotated[
        str | None, typer.Option(metavar="REF", help="The hypernetwork that is judged.", show_default=False)
    ] = None,
    multitask: Annotated[
        str | None, typer.Option(metavar="REF", help="Multi-task LoRA, for its rows.", show_default=False)
    ] = None,
    libraries: Annotated[
        list[str] | None, typer.Option("--library", metavar="DIR", help="Task LoRAs, for their rows.")
    ] = None,
    hyperdecoders: Annotated[
        str | None, typer.Option(metavar="REF", help="Checkpoint that reads the input.", show_default=False)
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="REF", help="Base model, if nothing else says it.", show_default=False)
    ] = None,
    rows: Annotated[
        str, typer.Option(metavar="NAMES", help="Rows with commas; standard, minimum, levers, all.")
    ] = "standard",
    seeds: Annotated[str, typer.Option(metavar="N,N", help="Draw descriptions, random texts and examples.")] = "0,1,2",
    per_task: Annotated[
        int | None,
        typer.Option(min=1, help="Items of each task; 20, and 500 of a benchmark, if absent.", show_default=False),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="All items.")] = False,
    held_out: Annotated[int, typer.Option(min=0, help="Last descriptions of a task that training has not read.")] = 4,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="In place of each suite's own limit.", show_default=False)
    ] = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of a batch; what a GPU has room for, if absent.", show_default=False),
    ] = None,
    device: DeviceOption = None,
    backend: Annotated[
        str, typer.Option(metavar="NAME|URL", help="Who answers: transformers, vllm, or an OpenAI-compatible server.")
    ] = "transformers",
    served_model: Annotated[
        str | None, typer.Option(metavar="NAME", help="The server's name of the base model.", show_default=False)
    ] = None,
    server: Annotated[Convention, typer.Option(help="How the server addresses adapters.")] = Convention.vllm,
    adapter_folder: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The server sees it; adapters it lacks go there.", show_default=False),
    ] = None,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Run the models' HumanEval and MBPP code in a sandbox.")
    ] = False,
    skip_floor_check: Annotated[
        bool, typer.Option("--skip-floor-check", help="Go on where the base scores below chance.")
    ] = False,
) -> None:
    """Ask every question under every row; prints the file of answers."""
    if full and per_task is not None:
        raise typer.BadParameter("--full and --per-task are two numbers of items: give one")
    try:
        numbers = tuple(dict.fromkeys(int(part) for part in seeds.split(",")))
    except ValueError as error:
        raise typer.BadParameter(f"--seeds takes whole numbers with commas, such as 0,1,2; got '{seeds}'") from error
    try_writing(out.absolute().parent)
    from t2l.eval.run import Settings, run

    settings = Settings(
        suites=tuple(dict.fromkeys(suites)),
        rows=rows,
        checkpoint=checkpoint,
        multitask=multitask,
        hyperdecoders=hyperdecoders,
        libraries=tuple(libraries or ()),
        base=base,
        seeds=numbers,
        per_task=per_task,
        full=full,
        held_out=held_out,
        max_new_tokens=max_new_tokens,
        batch_tokens=batch_tokens,
        device=checked_device(device),
        backend=backend,
        served_model=served_model,
        server=server.value,
        adapter_folder=adapter_folder,
        allow_code_execution=allow_code_execution,
        check_floor=not skip_floor_check,
    )
    run(settings, out, log=say)
    print(out)


@eval_app.command("report")
def eval_report(
    files: Annotated[list[Path], typer.Argument(metavar="FILES...", help="Files of answers, .jsonl or .jsonl.gz.")],
    out: Annotated[
        list[Path] | None,
        typer.Option("--out", metavar="FILE", help="Where to: .md, .csv or .html; may be repeated."),
    ] = None,
    compare: Annotated[
        list[str] | None, typer.Option(metavar="ROW:ROW", help="Further pair to compare; may be repeated.")
    ] = None,
    score: Annotated[
        str | None, typer.Option(metavar="NAME", help="Another score, such as rouge_l.", show_default=False)
    ] = None,
    without_controls: Annotated[
        bool, typer.Option("--without-controls", help="Make a table that lacks control rows; it says so.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make the table of one or more files of answers; prints Markdown, or the files that it wrote."""
    pairs = []
    for text in compare or ():
        one, colon, other = text.partition(":")
        if not colon:
            raise typer.BadParameter(f"--compare takes two rows, such as t2l:base+shots; got '{text}'")
        pairs.append((one, other))
    from t2l.eval.answers import read
    from t2l.eval.report import Options, document_for, markdown
    from t2l.io import write_text

    options = Options(compare=tuple(pairs), score=score, without_controls=without_controls)
    makers = [(path, document_for(path)) for path in out or ()]
    for path in out or ():
        try_writing(path.absolute().parent)
    found = [read(path) for path in files]
    if not makers:
        print(markdown(found, options), end="")
        return
    texts = [(path, make(found, options)) for path, make in makers]
    for path, text in texts:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    if as_json:
        print_json({"reports": [str(path) for path, _ in texts]})
    else:
        for path, _ in texts:
            print(path)
