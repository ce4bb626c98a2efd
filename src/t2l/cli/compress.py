"""`t2l compress` and `t2l library evaluate`: one network for many adapters, and what it is worth."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from t2l.cli.common import Device, DeviceOption, JsonOption, app, checked_device, print_json, require_place, say
from t2l.cli.library import LibraryArgument, library_app
from t2l.cli.train import (
    DryRunOption,
    MinutesOption,
    SetOption,
    benchmark_tasks,
    print_estimate,
    shown_to_people,
)

if TYPE_CHECKING:
    from t2l.compress.networks import Kind
    from t2l.library import AdapterLibrary
    from t2l.tasks import Task

ScoreOption = Annotated[
    list[str] | None,
    typer.Option(
        "--score",
        metavar="SOURCE",
        help="Score on held-out examples: sni, benchmarks, or own tasks (JSONL, folder, hf:NAME); may be repeated.",
    ),
]
LimitOption = Annotated[
    int | None, typer.Option("--limit", min=1, show_default=False, help="Most held-out examples of a task.")
]
ReadsOption = Annotated[
    str,
    typer.Option("--reads", metavar="KINDS", help="What networks are given to read: of trained,held-out,random,other."),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="YAML settings as for `t2l train reconstruction`, without data.library."),
]
ReportOut = Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where checkpoint and report go.")]


@app.command("compress")
def compress_library(
    library: LibraryArgument,
    out: ReportOut,
    config: ConfigOption = None,
    overrides: SetOption = None,
    score: ScoreOption = None,
    limit: LimitOption = None,
    reads: ReadsOption = "trained,held-out",
    dry_run: DryRunOption = False,
    max_minutes: MinutesOption = None,
    device: DeviceOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing checkpoint.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Turn a library of adapters into one checkpoint.

    A report has sizes, errors and scores. Called again after it was stopped, it goes on where it was.
    """
    kinds = _kinds(reads)
    if not dry_run:
        require_place(out, "folder", overwrite=overwrite)
    from t2l.compress.plan import plan_network
    from t2l.compress.run import compress, run_folder
    from t2l.config import load_yaml
    from t2l.library import AdapterLibrary
    from t2l.train.dry_run import dry_run_reconstruction
    from t2l.watching import watch_reconstruction

    opened = AdapterLibrary.open(library)
    chosen = _device(device)
    planned = plan_network(
        opened,
        load_yaml(config) if config else None,
        overrides or [],
        torch_compile=chosen == "cuda",
        where=str(config or "settings"),
    )
    if dry_run:
        print_estimate(dry_run_reconstruction(planned, device=chosen, log=say), out, as_json)
        return
    tasks = scoring_tasks(opened, score or [])
    report = compress(
        opened,
        out,
        planned,
        tasks=tasks,
        base=_base(opened.spec.base_model, chosen) if tasks else None,
        kinds=kinds,
        limit=limit,
        max_minutes=max_minutes,
        device=chosen,
        overwrite=overwrite,
        log=say,
        **shown_to_people(watch_reconstruction),
    )
    if as_json:
        print_json({"complete": False, "run": str(run_folder(out))} if report is None else report)
    elif report is not None:
        print(out)


@library_app.command("evaluate")
def evaluate_library(
    library: LibraryArgument,
    checkpoints: Annotated[
        list[Path], typer.Argument(metavar="CHECKPOINT...", help="Networks trained to reconstruct the library.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where the report goes.")],
    score: ScoreOption = None,
    limit: LimitOption = None,
    reads: ReadsOption = "trained,held-out,random,other",
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare networks for one library. Errors, and scores beside the base and the library's own adapters."""
    kinds = _kinds(reads)
    require_place(out, "folder")
    from t2l.compress.networks import evaluate_networks
    from t2l.compress.report import write_report
    from t2l.compress.scores import prepare_scores
    from t2l.io import new_folder
    from t2l.library import AdapterLibrary

    opened = AdapterLibrary.open(library)
    chosen = _device(device)
    tasks = scoring_tasks(opened, score or [])
    scorer = prepare_scores(opened, tasks, _base(opened.spec.base_model, chosen), limit=limit) if tasks else None
    # runs/recon-L/checkpoint is the network of the run recon-L.
    labels = [(x.resolve().parent if x.name == "checkpoint" else x).name for x in checkpoints]
    folders = list(zip(labels, checkpoints, strict=True))
    networks, scores = evaluate_networks(folders, opened, scorer, kinds=kinds, device=chosen, log=say)
    with new_folder(out) as temporary:
        report = write_report(temporary, opened, networks, scores)
    if as_json:
        print_json(report)
    else:
        print(out)


def scoring_tasks(library: "AdapterLibrary", sources: list[str]) -> "list[Task]":
    """Tasks with held-out examples for adapters of the library."""
    import re

    from t2l.tasks import load_own, load_sni

    tasks: dict[str, Task] = {}
    for source in sources:
        if source == "sni":
            found = load_sni([n for n in library.names if re.match(r"task\d+_", n)], splits=("test",))
        elif source == "benchmarks":
            found = benchmark_tasks()
        else:
            found = load_own(source)
        tasks |= {task.name: task for task in found}
    return list(tasks.values())


def _kinds(words: str) -> "list[Kind]":
    from t2l.compress.networks import KINDS

    unknown = set(words.split(",")) - set(KINDS)
    if unknown:
        raise typer.BadParameter(f"--reads knows {', '.join(KINDS)}, not {', '.join(sorted(unknown))}")
    return [kind for kind in KINDS if kind in words.split(",")]


def _device(device: Device | None) -> str:
    """The device to use: the one asked for, or the GPU if there is one."""
    from t2l import hub

    return hub.best_device(checked_device(device))


def _base(reference: str, device: str) -> tuple[Any, Any]:
    import torch

    from t2l import hub

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return hub.load_causal_lm(reference, device=device, dtype=dtype), hub.load_tokenizer(reference)
