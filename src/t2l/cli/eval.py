"""`t2l eval`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from t2l.cli.common import (
    DEFAULT,
    DeviceOption,
    JsonOption,
    WorkersOption,
    app,
    checked_device,
    print_json,
    say,
    try_writing,
)

eval_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Evaluate adapters beside every control.")
app.add_typer(eval_app, name="eval")


class Convention(StrEnum):
    """How a server addresses adapters."""

    vllm = "vllm"
    sglang = "sglang"
    llama_cpp = "llama.cpp"


def _option(help: str, *names: str, **more: Any) -> Any:
    """An option without a default to show."""
    return typer.Option(*names, help=help, show_default=False, **more)


SuiteOption = Annotated[
    list[str],
    _option(
        "seen, held-back, validation, test, everyday, benchmarks, likelihood, or own tasks; may be repeated.",
        "--suite",
        metavar="NAME|FILE",
    ),
]
OutOption = Annotated[Path, _option("JSONL of answers; a rerun goes on with it.", "--out", metavar="FILE")]
CheckpointOption = Annotated[
    str | None, _option("The hypernetwork that is evaluated; the shipped one, if nothing else is named.", metavar="REF")
]
MultitaskOption = Annotated[
    str | None,
    _option("Multi-task LoRA, for its conditions; that of a shipped checkpoint, if absent.", metavar="REF"),
]
LibraryOption = Annotated[
    list[str] | None, _option("Task LoRAs, for their conditions; may be repeated.", "--library", metavar="DIR")
]
HyperdecodersOption = Annotated[str | None, _option("Checkpoint that reads the input.", metavar="REF")]
BaseOption = Annotated[str | None, _option("Base model, if nothing else says it.", metavar="REF")]
ConditionsOption = Annotated[
    str, typer.Option(metavar="NAMES", help="Conditions with commas; standard, minimum, extra, all.")
]
SeedsOption = Annotated[str, typer.Option(metavar="N,N", help="Draw descriptions, random texts and examples.")]
PerTaskOption = Annotated[int | None, _option("Items of each task; 20, and 500 of a benchmark, if absent.", min=1)]
FullOption = Annotated[bool, typer.Option("--full", help="All items.")]
HeldOutOption = Annotated[int, typer.Option(min=0, help="Last descriptions of a task that training has not read.")]
MaxNewTokensOption = Annotated[int | None, _option("In place of each suite's own limit.", min=1)]
BatchTokensOption = Annotated[int | None, _option("Tokens of a batch; what a GPU has room for, if absent.", min=1)]
BackendOption = Annotated[
    str, typer.Option(metavar="NAME|URL", help="Who answers: transformers, vllm, or an OpenAI-compatible server.")
]
ServedModelOption = Annotated[str | None, _option("The server's name of the base model.", metavar="NAME")]
ServerOption = Annotated[Convention, typer.Option(help="How the server addresses adapters.")]
AdapterFolderOption = Annotated[Path | None, _option("The server sees it; adapters it lacks go there.", metavar="DIR")]
CodeOption = Annotated[
    bool, typer.Option("--allow-code-execution", help="Run the models' HumanEval and MBPP code in a sandbox.")
]
FloorOption = Annotated[bool, typer.Option("--skip-floor-check", help="Go on where the base scores below chance.")]


@eval_app.command("run")
def eval_run(
    suites: SuiteOption,
    out: OutOption,
    checkpoint: CheckpointOption = None,
    multitask: MultitaskOption = None,
    libraries: LibraryOption = None,
    hyperdecoders: HyperdecodersOption = None,
    base: BaseOption = None,
    conditions: ConditionsOption = "standard",
    seeds: SeedsOption = "0,1,2",
    per_task: PerTaskOption = None,
    full: FullOption = False,
    held_out: HeldOutOption = 4,
    max_new_tokens: MaxNewTokensOption = None,
    batch_tokens: BatchTokensOption = None,
    device: DeviceOption = None,
    backend: BackendOption = "transformers",
    served_model: ServedModelOption = None,
    server: ServerOption = Convention.vllm,
    adapter_folder: AdapterFolderOption = None,
    allow_code_execution: CodeOption = False,
    skip_floor_check: FloorOption = False,
    workers: WorkersOption = 0,
) -> None:
    """Ask every input under every condition. Prints the file of answers."""
    if full and per_task is not None:
        raise typer.BadParameter("--full and --per-task are two numbers of items: give one")
    named = checkpoint or multitask or hyperdecoders or libraries or base
    try_writing(out.absolute().parent)
    from t2l.eval.run import Settings, run

    settings = Settings(
        suites=tuple(dict.fromkeys(suites)),
        conditions=conditions,
        checkpoint=checkpoint if named else DEFAULT,
        multitask=multitask,
        hyperdecoders=hyperdecoders,
        libraries=tuple(libraries or ()),
        base=base,
        seeds=_whole_numbers(seeds),
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
    if workers:
        from t2l.eval.workers import run_on_workers

        run_on_workers(settings, out, workers=workers, log=say)
    else:
        run(settings, out, log=say)
    print(out)


def _whole_numbers(seeds: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(part) for part in seeds.split(",")))
    except ValueError as error:
        raise typer.BadParameter(f"--seeds takes whole numbers with commas, such as 0,1,2; got '{seeds}'") from error


@eval_app.command("report")
def eval_report(
    files: Annotated[list[Path], typer.Argument(metavar="FILES...", help="Files of answers, .jsonl or .jsonl.gz.")],
    out: Annotated[
        list[Path] | None,
        typer.Option("--out", metavar="FILE", help="Where to: .md, .csv or .html; may be repeated."),
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(metavar="CONDITION:CONDITION", help="Further pair to compare; may be repeated."),
    ] = None,
    score: Annotated[str | None, _option("Another score, such as rouge_l.", metavar="NAME")] = None,
    title: Annotated[str | None, _option("Heading; checkpoint and base, if absent.", metavar="TEXT")] = None,
    without_controls: Annotated[
        bool, typer.Option("--without-controls", help="Make a table that lacks controls; it says so.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make the table of one or more files of answers. Prints Markdown, or the files that it wrote."""
    pairs = []
    for text in compare or ():
        one, colon, other = text.partition(":")
        if not colon:
            raise typer.BadParameter(f"--compare takes two conditions, such as t2l:base+shots; got '{text}'")
        pairs.append((one, other))
    from t2l.eval.answers import read
    from t2l.eval.report import Options, markdown
    from t2l.io import write_text

    options = Options(compare=tuple(pairs), score=score, without_controls=without_controls, title=title)
    makers = [(path, _document(path)) for path in out or ()]
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


def _document(path: Path) -> Any:
    """The function that makes the document that a file's suffix names."""
    from t2l.errors import DataError
    from t2l.eval.html import as_html
    from t2l.eval.report import as_csv, markdown

    formats = {".md": markdown, ".csv": as_csv, ".html": as_html}
    if path.suffix not in formats:
        raise DataError(f"{path}: reports are written as {', '.join(formats)}")
    return formats[path.suffix]
