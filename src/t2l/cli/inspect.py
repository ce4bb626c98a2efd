"""`t2l inspect` and `t2l doctor`."""

import os
import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from t2l import __version__
from t2l.cli.common import (
    DEFAULT,
    DEFAULT_MODELS,
    JsonOption,
    app,
    print_json,
    print_report,
    say,
    try_writing,
)
from t2l.errors import CheckpointError, DataError, OutputError, T2LError
from t2l.kinds import ADAPTER, CHECKPOINT, LIBRARY, SHARDS, require_kind

if TYPE_CHECKING:
    from t2l.checkpoint import CheckpointConfig
    from t2l.spec import AdapterSpec


@app.command()
def inspect(
    reference: Annotated[
        str, typer.Argument(metavar="REF", help="Folder of a checkpoint, adapter or library; t2l:NAME; or a Hub id.")
    ],
    as_json: JsonOption = False,
) -> None:
    """Say what is in a checkpoint, an adapter or a library."""
    from t2l.text_to_lora import checkpoint_folder

    folder = checkpoint_folder(reference)
    require_kind(folder, CHECKPOINT, ADAPTER, LIBRARY, SHARDS)
    if ADAPTER.fits(folder):
        report = _inspect_adapter(folder)
    elif LIBRARY.fits(folder):
        report = _inspect_library(folder)
    elif SHARDS.fits(folder):
        report = _inspect_shards(folder)
    else:
        report = _inspect_checkpoint(folder)
    if as_json:
        print_json(report)
    else:
        print_report(report)
    if report.get("sha256_ok") is False:
        raise CheckpointError(f"{folder / CHECKPOINT.mark} is not the file its config.json describes; fetch it again")


def _inspect_checkpoint(folder: Path) -> dict[str, Any]:
    from t2l.checkpoint import WEIGHTS, load_checkpoint, read_config
    from t2l.config import to_plain
    from t2l.io import sha256

    spec, config = read_config(folder)
    intact = sha256(folder / WEIGHTS) == config.weights_sha256
    parameters = sum(p.numel() for p in load_checkpoint(folder).hypernet.parameters()) if intact else None
    return {
        "kind": "checkpoint",
        "path": str(folder),
        **_shape(spec),
        "encoder": to_plain(config.encoder) | {"revision": config.encoder_revision},
        "hypernet": to_plain(config.hypernet),
        "hypernet_parameters": parameters,
        "description_in_prompt": config.prompt.description_in_prompt,
        "needs_base_weights_to_generate": needs_base(config),
        "sha256_ok": intact,
        "training": config.training,
    }


def _inspect_library(folder: Path) -> dict[str, Any]:
    from t2l.library import AdapterLibrary

    found = AdapterLibrary.open(folder)
    return {
        "kind": "library",
        "path": str(folder),
        "purpose": found.purpose,
        "adapters": len(found.names),
        "first_names": ", ".join(found.names[:3]),
        "with_descriptions": sum(bool(about.get("descriptions")) for about in found.index.values()),
        **_shape(found.spec),
        "sha256": found.checksum,
    }


def _inspect_shards(folder: Path) -> dict[str, Any]:
    from t2l.shards import ShardedLibrary

    found = ShardedLibrary.open(folder)
    return {
        "kind": "library of shards",
        "path": str(folder),
        "adapters": len(found),
        "strength": found.origin.strength,
        "dtype": found.origin.dtype,
        **_shape(found.spec),
        "checkpoint_sha256": found.origin.checkpoint_sha256,
    }


def _inspect_adapter(folder: Path) -> dict[str, Any]:
    """From the folder alone: its base model need not be at hand, and it may adapt any modules of any layers."""
    from t2l.peft_io import read_facts, read_norms, read_origin

    facts = read_facts(folder)
    places: dict[str, list[str]] = {}
    layers: set[int] = set()
    for path in facts.modules:
        places.setdefault(path.rsplit(".", 1)[-1], []).append(path)
        if found := re.search(r"\.(\d+)\.", path):
            layers.add(int(found[1]))
    norms, of_path = {}, read_norms(folder, facts)  # refuses NaN and infinite values
    for name, paths in places.items():
        values = [of_path[path] for path in paths]
        spread = {"mean": sum(values) / len(values), "min": min(values), "max": max(values)}
        norms[name] = {key: round(value, 6) for key, value in spread.items()}
    sizes = {name: sorted({facts.modules[path] for path in paths}) for name, paths in places.items()}
    return {
        "kind": "adapter",
        "path": str(folder),
        "description": read_origin(folder).description or None,
        "base_model": facts.base_model,
        "targets": {name: ", ".join(f"{i} x {o}" for i, o in found) for name, found in sizes.items()},
        "modules": len(facts.modules),
        "layers": len(layers),
        "rank": facts.rank,
        "alpha": facts.alpha,
        "scaling": facts.scaling,
        "adapter_parameters": sum(facts.rank * (i + o) for i, o in facts.modules.values()),
        "norm_of_update_over_layers": norms,
        "finite": True,
    }


def _shape(spec: "AdapterSpec") -> dict[str, Any]:
    return {
        "base_model": spec.base_model,
        "targets": {t.name: f"{t.in_features} x {t.out_features}" for t in spec.targets},
        "layers": len(spec.layers),
        "rank": spec.rank,
        "alpha": spec.alpha,
        "scaling": spec.scaling,
        "adapter_parameters": spec.num_parameters,
    }


def needs_base(config: "CheckpointConfig") -> bool:
    """Whether generating needs the base model's weights."""
    return config.encoder.kind == "tokens" and config.encoder.model == "base"


# ---------------------------------------------------------------------------------------------------- doctor


@app.command()
def doctor(
    checkpoint: Annotated[
        str | None,
        typer.Option(
            metavar="REF",
            show_default=False,
            help="Also write an adapter with this checkpoint; measure what it does.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what is installed, cached and missing. Exit code 1 if something essential is missing."""
    problems: list[str] = []
    report: dict[str, Any] = {
        "python": platform.python_version(),
        "packages": _packages(problems),
        "hardware": _hardware(),
        "cache": _cache(problems),
        "checkpoints": _checkpoints(problems),
        "training_data": _training_data(problems),
    }
    if checkpoint is not None:
        report["effect"] = _effect(checkpoint, problems)
    if as_json:
        print_json(report | {"problems": problems})
    else:
        print_report(report)
    for problem in problems:
        say(f"error: {problem}")
    if problems:
        raise typer.Exit(1)
    waiting = [name for name, state in report["cache"].items() if str(state).startswith("not there")]
    say(f"nothing is wrong; {' and '.join(waiting)} will be fetched at first use" if waiting else "all is there")


def _packages(problems: list[str]) -> dict[str, str]:
    from importlib import metadata

    extras = {"gguf": "embedded", "pyarrow": "train"}
    found = {"t2l": __version__}
    for name in ("torch", "transformers", "peft", "safetensors", *extras):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            way_out = f"pip install 'text-to-lora[{extras[name]}]'" if name in extras else f"pip install {name}"
            found[name] = f"missing; {way_out}"
            if name not in extras:
                problems.append(f"{name} is missing; run: {way_out}")
    return found


def _hardware() -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        import torch

        cuda = torch.cuda.is_available()
        device = f"CUDA, {torch.cuda.get_device_name()}" if cuda else "CPU"
    except (ImportError, OSError, RuntimeError) as error:  # absent, libraries that do not load, a broken driver
        device = f"unknown ({error})"
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return {"device": device, "cores": cores}
    return {"device": device, "cores": cores, "memory_GiB": round(memory / 2**30, 1)}


def _cache(problems: list[str]) -> dict[str, Any]:
    from importlib.util import find_spec

    from t2l import hub, pypi

    folder = pypi.cache_dir()
    try:
        try_writing(folder)
        writable = True
    except OutputError:
        writable = False
    report: dict[str, Any] = {"folder": str(folder), "writable": writable}
    for ref in DEFAULT_MODELS:
        cached = hub.is_cached(ref)
        report[ref] = "ready" if cached else "not there; fetched at its first use"
        if not cached and not writable:
            problems.append(
                f"{ref} is not in the cache, and {folder} cannot be written; set T2L_CACHE to another folder"
            )
    if not hub.is_cached(DEFAULT_MODELS[0]) and find_spec("gguf") is None:
        problems.append(
            "gguf is missing, which reads the default base model; run: pip install 'text-to-lora[embedded]'"
        )
    return report


def _checkpoints(problems: list[str]) -> dict[str, Any]:
    from importlib import resources

    shipped = Path(str(resources.files("t2l"))) / "pretrained"
    report: dict[str, Any] = {}
    for folder in sorted(shipped.iterdir()) if shipped.is_dir() else []:
        try:
            report[f"t2l:{folder.name}"] = _state_of(folder)
        except ImportError as error:  # torch, which `_packages` has named
            report[f"t2l:{folder.name}"] = f"cannot be read: {error}"
        except T2LError as error:
            report[f"t2l:{folder.name}"] = f"damaged: {error}"
            problems.append(f"t2l:{folder.name} is damaged; run: pip install --force-reinstall text-to-lora")
    if DEFAULT not in report:
        report[DEFAULT] = "missing"
        problems.append(f"{DEFAULT} is not part of this installation; give --checkpoint, or install text-to-lora again")
    return report


def _training_data(problems: list[str]) -> str:
    value = os.environ.get("T2L_DATA")
    if not value:
        return "T2L_DATA is not set; only training on Super-NaturalInstructions needs it"
    from importlib.util import find_spec

    from t2l.data import packed

    folder = Path(value)
    if not (folder / packed.TASKS).is_file():
        return f"T2L_DATA={value}, which holds no {packed.TASKS}"
    if find_spec("pyarrow") is None:  # `_packages` has said so
        return f"T2L_DATA={value}"
    damaged = []
    for name in packed.FILES:
        try:
            if (folder / name).is_file():
                packed.check_schema(folder / name, name)
        except DataError as error:
            damaged.append(name)
            problems.append(f"{error}; run: t2l data build")
    return f"T2L_DATA={value}" + (f"; damaged: {', '.join(damaged)}" if damaged else "")


def _effect(checkpoint: str, problems: list[str]) -> dict[str, Any]:
    """What an adapter of a checkpoint changes: weights, and what the base would say next."""
    from t2l.session import Session

    try:
        session = Session(checkpoint, description="Decide whether the review of a hotel is positive or negative.")
        (prompt,) = session.prompts(["The bed was soft and the view superb."], 1)
        change = round(session.largest_change(prompt), 4)
    except T2LError as error:
        problems.append(f"{checkpoint}: {error}")
        return {"checkpoint": checkpoint, "usable": False}
    return {"checkpoint": checkpoint, "norm_of_update": round(session.adapter.norm, 4), "largest_logit_change": change}


def _state_of(folder: Path) -> str:
    from t2l.checkpoint import WEIGHTS, read_config
    from t2l.io import sha256

    spec, config = read_config(folder)
    if not (folder / WEIGHTS).is_file() or sha256(folder / WEIGHTS) != config.weights_sha256:
        raise CheckpointError(f"{folder / WEIGHTS} is missing or changed")
    needs = f"needs the weights of {spec.base_model}" if needs_base(config) else "needs no base weights"
    return f"ready; {needs} to generate"
