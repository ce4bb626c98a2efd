"""The rows of a table: which texts a row's prompt shows, and whose adapter it uses.

A row is an adapter and a form of the prompt. Rows of one form see the very same prompt: where the description stands
in it, it is always the right one, and only the adapter's is swapped. Knows questions, checkpoints and libraries.
Knows no files of answers and no statistics.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import torch

from t2l.apply import apply_adapters
from t2l.config import PromptConfig
from t2l.encoder import tokenize
from t2l.errors import AdapterNotAppliedError, ConfigError, DataError, DescriptionError, SpecMismatchError
from t2l.eval import decode
from t2l.eval.retrieval import Familiarity, RetrievalIndex, cut_to_window
from t2l.eval.suites import TEXTS, Question
from t2l.library import AdapterLibrary
from t2l.lora import LoraTensors, interpolate, merge
from t2l.prompt import render, token_ids
from t2l.spec import AdapterSpec
from t2l.tasks import data_dir
from t2l.text_to_lora import LoraAdapter, TextToLora

LEVERS = {
    "t2l-average": "mean of three adapters",
    "t2l-best-of": "best of three adapters by eight unlabelled inputs",
    "t2l-vote": "vote of three adapters",
    "t2l-abstain": "less of what is unlike training",
}
"""What can be made of T2L without training; each with the task's descriptions, another task's, and random texts."""
TEXTS_OF = {"": "the task's description", "-wrong": "another task's description", "-random": "random text"}
ADAPTERS = {
    "base": "base model",
    "average": "average of the task LoRAs",
    "multitask": "multi-task LoRA",
    "arrow": "Arrow routing over the task LoRAs",
    "nearest": "task LoRA of the nearest description",
    "hyperdecoders": "Hyperdecoders (reads the input)",
    "t2l": "T2L, the task's description",
    "t2l-wrong": "T2L, another task's description",
    "t2l-random": "T2L, random text",
    **{f"{lever}{end}": f"T2L, {how}, {text}" for lever, how in LEVERS.items() for end, text in TEXTS_OF.items()},
    "oracle": "the task's own LoRA",
}
"""Whose adapter a row uses, in the order of tables."""
NEEDS = {
    "average": "--library",
    "multitask": "--multitask",
    "arrow": "--library",
    "nearest": "--library",
    "hyperdecoders": "--hyperdecoders",
    **{adapter: "--checkpoint" for adapter in ADAPTERS if adapter.startswith("t2l")},
    "oracle": "--library",
}
WITH_SHOTS = ("base", "multitask", "t2l", "t2l-wrong", "t2l-random")
"""Adapters with a row whose prompt shows examples."""
INPUT_TOKENS = 256
"""Of an unlabelled input, from its start, that `t2l-best-of` reads."""


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    adapter: str
    """A key of `ADAPTERS`."""
    description: bool = False
    """Whether the description stands in the prompt."""
    shots: bool = False
    """Whether three examples do."""

    @property
    def name(self) -> str:
        """Such as `base+shots+description` or `t2l-wrong`."""
        return self.adapter + "+shots" * self.shots + "+description" * self.description

    @property
    def way(self) -> str:
        """`t2l` or one of `LEVERS` for rows of T2L, whatever texts they read; else the adapter's name."""
        return self.adapter.removesuffix("-wrong").removesuffix("-random")

    @property
    def prompt(self) -> str:
        """Name of the prompt's form; rows of one form see the same prompts."""
        return Row("base", self.description, self.shots).name.removeprefix("base").strip("+") or "plain"


ROWS = {
    row.name: row
    for row in (
        Row(adapter, description, shots)
        for adapter in ADAPTERS
        for shots in ((False, True) if adapter in WITH_SHOTS else (False,))
        for description in (False, True)
    )
}
STANDARD = tuple(r for r in ROWS.values() if r.way not in LEVERS and (r.adapter == "base" or not r.shots))
"""Those of a table; T2L reads one description and nothing else."""
MINIMUM = tuple(ROWS[name] for name in ("base", "base+description")) + tuple(
    Row(adapter, description)
    for adapter in ("multitask", "t2l", "t2l-wrong", "t2l-random")
    for description in (False, True)
)
"""What it takes to say whether an adapter helps, and because of its description."""


def choose_rows(names: str) -> list[Row]:
    """Rows from a list with commas; `standard`, `minimum`, `levers` (what is not standard) and `all` stand for several.

    Raises:
        ConfigError: naming the unknown row and those there are.
    """
    groups = {
        "all": tuple(ROWS.values()),
        "standard": STANDARD,
        "minimum": MINIMUM,
        "levers": tuple(row for row in ROWS.values() if row not in STANDARD),
    }
    chosen: dict[Row, None] = {}
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name in groups:
            chosen |= dict.fromkeys(groups[name])
        elif name in ROWS:
            chosen[ROWS[name]] = None
        else:
            raise ConfigError(f"There is no row '{name}'; there are: {', '.join([*groups, *ROWS])}")
    if not chosen:
        raise ConfigError("No row is named; `standard` are those of a table, as far as their inputs are given")
    return [row for row in ROWS.values() if row in chosen]


def prompt_of(row: Row, question: Question, tokenizer: Any) -> str:
    """The text the model continues, the start of its answer included."""
    config = PromptConfig(description_in_prompt=row.description)
    examples = question.shots if row.shots else ()
    start = render(tokenizer, question.description, question.item.text, config, examples=examples)
    return start + question.task.prefill


def texts_of(row: Row, question: Question) -> tuple[str, ...]:
    """What a row of T2L writes adapters from; its first text is that of the row without a lever."""
    if row.adapter.endswith("-wrong"):
        return question.wrong_descriptions
    return question.random_texts if row.adapter.endswith("-random") else question.descriptions


def short_hash(text: str) -> str:
    """Twelve hexadecimal digits that stand for a text in files of answers."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


# ------------------------------------------------------------------------------------------------------- adapters


class Key(NamedTuple):
    """What decides an adapter, given the files of weights."""

    source: str
    """`text`, `mean`, `best` and `part` are written by the checkpoint; `multitask`, `average` and `library` read."""
    names: tuple[str, ...] = ()
    """Texts, or the library's task."""
    task: str = ""
    """`best`: the task whose inputs decide."""
    in_prompt: bool | None = None
    """Whether the row's prompts show the description, where the checkpoint writes other adapters then."""


KEYS = {"t2l-average": "mean", "t2l-best-of": "best", "t2l-abstain": "part"}


@dataclass(frozen=True)
class UsedAdapter:
    """An adapter in the base model's type, on its device, and what is recorded of it."""

    adapter: LoraAdapter
    id: str
    """Hash of the weights' file and of what it was written from, which together decide it."""

    @property
    def description(self) -> str | None:
        """What it was written from, if texts."""
        return self.adapter.description or None

    @property
    def lora(self) -> LoraTensors:
        """Its tensors."""
        return self.adapter.lora

    @property
    def spec(self) -> Any:
        """Where they belong."""
        return self.adapter.spec


class AdapterSource:
    """Finds each row's adapter for each question; writes those of T2L when `prepare` is told what will be asked.

    Args:
        base: The base model, or its outline where another backend answers, and its tokenizer.
        checkpoint: The hypernetwork that is judged.
        multitask: A checkpoint of variant `none`.
        hyperdecoders: A checkpoint that reads the input.
        libraries: Task LoRAs; those whose purpose is `judging` are used for the row `oracle` alone.
        held_out: How many of a training task's last descriptions training has not read.
        log: Where progress goes.

    Raises:
        ConfigError: if a checkpoint is not of the kind its row needs.
        SpecMismatchError: if adapters of different shape would have to share a batch.
    """

    def __init__(
        self,
        base: tuple[Any, Any],
        *,
        checkpoint: TextToLora | None = None,
        multitask: TextToLora | None = None,
        hyperdecoders: TextToLora | None = None,
        libraries: Sequence[AdapterLibrary] = (),
        held_out: int = 4,
        log: Callable[[str], None] = print,
    ) -> None:
        self.model, self.tokenizer = base
        self.checkpoint, self.multitask, self.hyperdecoders = checkpoint, multitask, hyperdecoders
        self.training = [library for library in libraries if library.purpose == "training"]
        self.libraries, self.held_out, self.log = list(libraries), held_out, log
        self.oracles = {name: library for library in libraries for name in library.names}
        self.ready: dict[Key, UsedAdapter] = {}
        self.nearest: dict[str, str] = {}
        if multitask is not None and multitask.config.hypernet.variant != "none":
            raise ConfigError(
                f"--multitask {multitask.reference} reads descriptions (hypernet.variant "
                f"'{multitask.config.hypernet.variant}'); a multi-task LoRA is a checkpoint of variant 'none'"
            )
        if checkpoint is not None and checkpoint.config.hypernet.variant == "none":
            raise ConfigError(f"--checkpoint {checkpoint.reference} reads no description: its variant is 'none'")
        if hyperdecoders is not None and hyperdecoders.config.reads != "input":
            raise ConfigError(
                f"--hyperdecoders {hyperdecoders.reference} reads the {hyperdecoders.config.reads}; "
                "Hyperdecoders read the input"
            )
        if len(self.training) > 1:
            folders = ", ".join(str(library.folder) for library in self.training)
            raise ConfigError(f"Only one --library of training tasks can be averaged and routed over, got {folders}")
        for library in self.libraries[1:]:
            self.libraries[0].spec.require_same_shape(
                library.spec, this=str(self.libraries[0].folder), that=str(library.folder)
            )
        specs = [(x.reference, x.spec) for x in (checkpoint, multitask, hyperdecoders) if x is not None]
        specs += [(str(library.folder), library.spec) for library in libraries]
        for name, spec in specs[1:]:
            if spec.base_model != specs[0][1].base_model:
                raise SpecMismatchError(
                    f"{specs[0][0]} is for {specs[0][1].base_model}, {name} for {spec.base_model}: rows of one table "
                    "share their base model"
                )

    def fits(self, text: str) -> bool:
        """Whether the checkpoint's encoder can read a description."""
        if self.checkpoint is None:
            return True
        encoder: Any = self.checkpoint.encoder
        try:
            tokenize(encoder.tokenizer, [text], encoder.max_tokens, prefix=getattr(encoder, "prefix", ()))
        except DescriptionError:
            return False
        return True

    def left_out(self, rows: Iterable[Row]) -> dict[str, str]:
        """Rows that cannot be answered, with the reason."""
        given = {
            "--checkpoint": self.checkpoint,
            "--multitask": self.multitask,
            "--hyperdecoders": self.hyperdecoders,
            "--library": self.libraries or None,
        }
        missing = {
            row.name: f"no {NEEDS[row.adapter]}"
            for row in rows
            if row.adapter in NEEDS and given[NEEDS[row.adapter]] is None
        }
        if self.libraries and not self.training:
            missing |= {
                row.name: "no --library of training tasks"
                for row in rows
                if row.adapter in ("average", "arrow", "nearest")
            }
        if (why := self._cannot_abstain()) is not None:
            missing |= {row.name: why for row in rows if row.way == "t2l-abstain" and row.name not in missing}
        return missing

    def _cannot_abstain(self) -> str | None:
        if self.checkpoint is None:
            return None
        source = self.checkpoint.config.training.get("settings", {}).get("data", {}).get("tasks", "sni")
        if source != "sni":
            return (
                f"the checkpoint was trained on {source}, not on the packed tasks that descriptions are compared with"
            )
        if not any(bool(b.any()) for b in self.checkpoint.hypernet.offset.b):
            return "the checkpoint's offset is empty, so that there is nothing to fall back on"
        try:
            data_dir()
        except DataError as error:
            return str(error)
        return None

    @cached_property
    def familiarity(self) -> Familiarity:
        """How far `t2l-abstain` follows a text."""
        self.log("embedding the training tasks' descriptions for t2l-abstain")
        found = Familiarity(held_out=self.held_out, device=str(next(self.model.parameters()).device))
        self.log(f"t2l-abstain: not followed up to a similarity of {found.low}, in full from {found.high}")
        return found

    @cached_property
    def wide(self) -> AdapterSpec:
        """Where means of several adapters belong: exact in the sum of their ranks, with the same scaling."""
        assert self.checkpoint is not None, "rows without a checkpoint are left out"
        spec = self.checkpoint.spec
        wide = replace(spec, rank=TEXTS * spec.rank)
        return replace(wide, alpha=wide.alpha * spec.scaling / wide.scaling)

    def spec(self, row: Row) -> AdapterSpec | None:
        """Of the row's adapters; None for the base model and Arrow's own."""
        if row.adapter in ("base", "arrow"):
            return None
        return self.wide if row.way == "t2l-average" else (self._writer(row) or self.libraries[0]).spec

    def _writer(self, row: Row) -> TextToLora | None:
        """The checkpoint that the row's adapters come from; None where they are the libraries'."""
        if row.adapter.startswith("t2l"):
            return self.checkpoint
        return {"multitask": self.multitask, "hyperdecoders": self.hyperdecoders}.get(row.adapter)

    def answer_space(self, row: Row) -> bool:
        """Whether the row's adapters were trained to begin answers with a space."""
        if row.adapter == "base":
            return False
        writer = self._writer(row)
        if writer is not None:
            return writer.config.prompt.answer_space
        entries = (library.index[name] for library in self.libraries for name in library.names)
        return any((entry.get("prompt") or {}).get("answer_space", False) for entry in entries)

    def shape(self, row: Row) -> Any:
        """What must be equal for adapters to share a batch."""
        spec = self.spec(row)
        return spec and (spec.layers, spec.targets, spec.rank, spec.scaling)

    def has(self, row: Row, question: Question) -> bool:
        """Whether the row answers this question.

        `oracle` only where a library holds the task, `t2l-best-of` where there are inputs to choose by, and `t2l-vote`
        where answers are words.
        """
        if row.adapter == "oracle":
            return question.task.name in self.oracles
        if row.way == "t2l-best-of":
            return bool(question.task.inputs)
        return row.way != "t2l-vote" or question.task.kind != "likelihood"

    def prepare(self, asked: Iterable[tuple[Row, Question]]) -> None:
        """Makes the adapters that these questions need under these rows, and checks that each changes the logits.

        Raises:
            AdapterNotAppliedError: if one does not.
        """
        keys: dict[Key, Question] = {}
        for row, question in asked:
            keys |= {key: question for key in self.keys(row, question) if key not in self.ready}
        written = [key for key in keys if key.source in ("text", *KEYS.values())]
        for alike in ([key for key in written if key.in_prompt is form] for form in (None, False, True)):
            for start in range(0, len(alike), 64 // TEXTS):
                self._write({key: keys[key] for key in alike[start : start + 64 // TEXTS]})
        if Key("multitask") in keys:
            assert self.multitask is not None, "rows without a multi-task LoRA are left out"
            checksum = self.multitask.config.weights_sha256
            (adapter,) = self.multitask.generate(["Every task."])
            self._keep([Key("multitask")], [replace(adapter, description="")], checksum)
        if Key("average") in keys:
            (library,) = self.training
            mean = library.stack(library.names).map(lambda x: x.mean(0))
            self._keep([Key("average")], [LoraAdapter(mean, library.spec, "", {})], library.checksum)
        names = [key.names[0] for key in keys if key.source == "library"]
        for start in range(0, len(names), 64):
            for library in {id(self.oracles[name]): self.oracles[name] for name in names[start : start + 64]}.values():
                chunk = [name for name in names[start : start + 64] if self.oracles[name] is library]
                loras = library.stack(chunk).unbind()
                adapters = [LoraAdapter(lora, library.spec, "", {}) for lora in loras]
                self._keep([Key("library", (name,)) for name in chunk], adapters, library.checksum)
        if keys:
            self.log(f"{len(self.ready)} adapters ready")

    def of(self, row: Row, questions: Sequence[Question]) -> list[tuple[UsedAdapter, ...]]:
        """The adapters of each question under a row: one, or several that vote, or none for the base model and Arrow's
        own."""
        if row.adapter == "hyperdecoders":
            assert self.hyperdecoders is not None, "rows without a checkpoint are left out"
            texts = [cut_to_window(self.hyperdecoders.encoder, question.item.text) for question in questions]
            checksum = self.hyperdecoders.config.weights_sha256
            # What it was written from is the input, not a description.
            written = self.hyperdecoders.generate(texts, prompt=PromptConfig(description_in_prompt=row.description))
            adapters = [replace(adapter, description="") for adapter in written]
            form = row.description if self.hyperdecoders.prompt_aware else None
            keys = [Key("text", (text,), in_prompt=form) for text in texts]
            return [(used,) for used in self._use(keys, adapters, checksum)]
        return [tuple(self.ready[key] for key in self.keys(row, question)) for question in questions]

    def identity(self, row: Row, question: Question) -> tuple[Any, ...]:
        """Equal for questions of one prompt that get the same adapters, and so the same answer."""
        return self.keys(row, question) or (row.adapter,)

    def keys(self, row: Row, question: Question) -> tuple[Key, ...]:
        """What the adapters of a question under a row are found by."""
        if row.adapter.startswith("t2l"):
            assert self.checkpoint is not None, "rows without a checkpoint are left out"
            texts, form = texts_of(row, question), row.description if self.checkpoint.prompt_aware else None
            if row.way == "t2l-vote":
                return tuple(Key("text", (text,), in_prompt=form) for text in texts)
            source = KEYS.get(row.way, "text")
            if source in ("text", "part"):
                return (Key(source, texts[:1], in_prompt=form),)
            # Sorted, as seeds differ in nothing but the order.
            task = f"{question.task.suite}/{question.task.name}" if source == "best" else ""
            return (Key(source, tuple(sorted(texts)), task, form),)
        if row.adapter in ("multitask", "average"):
            return (Key(row.adapter),)
        if row.adapter == "oracle":
            return (Key("library", (question.task.name,)),)
        if row.adapter == "nearest":
            return (Key("library", (self._nearest(question.description),)),)
        return ()

    def _write(self, keys: dict[Key, Question]) -> None:
        """Adapters that the checkpoint writes, for prompts alike: one a text, and of several what their key says."""
        assert self.checkpoint is not None, "rows without a checkpoint are left out"
        form = next(iter(keys)).in_prompt
        prompt = None if form is None else PromptConfig(description_in_prompt=form)
        adapters = iter(self.checkpoint.generate([text for key in keys for text in key.names], prompt=prompt))
        made, identities = [], []
        for key, question in keys.items():
            mine, identity = list(islice(adapters, len(key.names))), key
            if key.source == "text":
                (adapter,) = mine
            elif key.source == "mean":
                lora = merge([x.lora for x in mine], self.wide.rank)
                adapter = LoraAdapter(lora, self.wide, "\n".join(key.names), {})
            elif key.source == "part":
                lora = interpolate(self._offset, LoraTensors.stack([mine[0].lora]), self.familiarity(key.names))
                adapter = replace(mine[0], lora=lora.unbind()[0])
            else:
                values = self._log_likelihoods(mine, question.task.inputs)
                adapter = mine[values.index(max(values))]
                identity = Key("text", (adapter.description,), in_prompt=form)
            made.append(adapter)
            identities.append(identity)
        checksum = self.checkpoint.config.weights_sha256
        self.ready |= dict(zip(keys, self._use(identities, made, checksum), strict=True))

    @property
    def _offset(self) -> LoraTensors:
        """What the checkpoint's adapters have in common."""
        assert self.checkpoint is not None, "rows without a checkpoint are left out"
        return self.checkpoint.hypernet.offset_lora().map(torch.Tensor.detach)

    def _log_likelihoods(self, adapters: Sequence[LoraAdapter], inputs: Sequence[str]) -> list[float]:
        """Summed log-probability of all inputs' tokens under each adapter, each input where the user's words stand."""
        place = "⟨input⟩"
        start = render(self.tokenizer, "", place, PromptConfig(description_in_prompt=False)).partition(place)[0]
        prompt = token_ids(self.tokenizer, [start])[0] or [self.tokenizer.eos_token_id]
        ids = [row[:INPUT_TOKENS] for row in token_ids(self.tokenizer, list(inputs))]
        each = [adapter for adapter in adapters for _ in ids]
        values = decode.log_likelihoods(self.model, self.tokenizer, [prompt] * len(each), ids * len(adapters), each)
        return [sum(values[n : n + len(ids)]) for n in range(0, len(values), len(ids))]

    def _nearest(self, description: str) -> str:
        if description not in self.nearest:
            if not self.nearest:
                self.index = RetrievalIndex(self.training[0].names)
            self.nearest[description] = self.index.nearest(description)
        return self.nearest[description]

    def _keep(self, keys: Sequence[Key], adapters: Sequence[LoraAdapter], checksum: str) -> None:
        self.ready |= dict(zip(keys, self._use(keys, adapters, checksum), strict=True))

    def _use(self, keys: Sequence[Key], adapters: Sequence[LoraAdapter], checksum: str) -> list[UsedAdapter]:
        parameter = next(self.model.parameters())
        used = []
        for key, adapter in zip(keys, adapters, strict=True):
            lora = adapter.lora.map(lambda x: x if parameter.is_meta else x.to(parameter.device, parameter.dtype))
            moved = LoraAdapter(lora, adapter.spec, adapter.description, {})
            form = () if key.in_prompt is None else (f"description in prompt: {key.in_prompt}",)
            used.append(UsedAdapter(moved, short_hash("/".join((checksum, key.source, *key.names, *form)))))
        for spec in {id(x.spec): x.spec for x in used}.values():
            require_effect(self.model, self.tokenizer, [x for x in used if x.spec is spec])
        return used


@torch.no_grad()
def require_effect(model: Any, tokenizer: Any, adapters: Sequence[UsedAdapter]) -> None:
    """Checks that every adapter changes the logits of a short prompt.

    A model without weights has none: there it is the backend that compares, see `t2l.eval.backends`.

    Raises:
        AdapterNotAppliedError: naming the first that does not.
    """
    device = next(model.parameters()).device
    if device.type == "meta":
        return
    ids = tokenizer("Does the adapter change anything?", add_special_tokens=False).input_ids
    tokens_NT = torch.tensor([ids], device=device).expand(len(adapters), -1)
    # Both passes have one shape, so that rounding is the same and any difference is the adapter's.
    plain_NV = model(tokens_NT, use_cache=False, logits_to_keep=1).logits[:, 0]
    with apply_adapters(model, list(adapters)):
        adapted_NV = model(tokens_NT, use_cache=False, logits_to_keep=1).logits[:, 0]
    idle_N = (adapted_NV == plain_NV).all(1)
    if idle_N.any():
        adapter = adapters[int(idle_N.nonzero()[0])]
        what = f"written from “{adapter.adapter.description[:60]}”" if adapter.adapter.description else adapter.id
        raise AdapterNotAppliedError(
            f"The adapter {what} leaves the base model's logits as they are ({int(idle_N.sum())} of {len(adapters)} "
            "do): a row with it would repeat the base model's. Was the checkpoint trained?"
        )
