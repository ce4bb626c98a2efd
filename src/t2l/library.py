"""AdapterLibrary: many adapters of one shape in one folder, and the way from and to PEFT folders.

    adapters.safetensors    for each target A (N, L, R, I) and B (N, L, O, R), named `q_proj.A` and so on
    spec.json               what they all fit
    index.json              their names in order, facts about each, purpose, checksum, format version
    README.md               a card for the Hub

Knows adapters, specs and files. Knows no tasks, no training and no hypernetwork. Shape letters as in `spec.py`.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch

from t2l import kinds, peft_io
from t2l.cards import card_header, library_card
from t2l.config import LoraConfig
from t2l.errors import CheckpointError, ConfigError, SpecMismatchError
from t2l.io import new_folder, read_json, read_tensors, read_whole, require_float, sha256
from t2l.kinds import require_kind
from t2l.lora import LoraTensors
from t2l.names import require_folder_names
from t2l.peft_folder import shape_of
from t2l.pypi import public_name
from t2l.spec import AdapterSpec, base_reference, linear_modules
from t2l.upload import SharedLibrary

if TYPE_CHECKING:
    from transformers import PretrainedConfig

T = TypeVar("T")

FORMAT_VERSION = 1
WEIGHTS, SPEC, INDEX = kinds.LIBRARY.mark, "spec.json", "index.json"

Purpose = Literal["training", "evaluation"]
"""`evaluation`: trained on tasks that no hypernetwork may see, to be an upper bound in a table and nothing else."""


@dataclass(frozen=True)
class AdapterLibrary(SharedLibrary):
    """N adapters of one spec on disk; tensors are read only when `stack` asks for them."""

    folder: Path
    names: tuple[str, ...]
    """In the order of the stacked tensors."""
    spec: AdapterSpec
    index: dict[str, dict[str, Any]]
    """Facts of each adapter, by name: descriptions, steps, losses; nothing here depends on any of them."""
    purpose: Purpose
    checksum: str
    """sha256 of the tensors' file."""

    @classmethod
    def open(cls, folder: str | Path) -> "AdapterLibrary":
        """Reads names, spec and facts, and checks the tensors' file against its checksum.

        Raises:
            CheckpointError: if files are missing, malformed, changed after they were written or of another format.
        """
        folder = Path(folder)
        require_kind(folder, kinds.LIBRARY)
        plain = read_json(folder / INDEX)
        if plain.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(
                f"{folder / INDEX}: format_version is {plain.get('format_version')!r}, this version of t2l reads "
                f"{FORMAT_VERSION}; update t2l or write the library again"
            )
        names, adapters, purpose = plain.get("names"), plain.get("adapters"), plain.get("purpose")
        if not isinstance(names, list) or not isinstance(adapters, dict) or sorted(adapters) != sorted(map(str, names)):
            raise CheckpointError(f"{folder / INDEX}: names and adapters must name the same adapters")
        require_folder_names(names, "an adapter", CheckpointError)
        for name, about in adapters.items():
            if not isinstance(about, dict):
                raise CheckpointError(f"{folder / INDEX}: the facts about {name} must be a mapping, got {about!r}")
        if purpose not in ("training", "evaluation"):
            raise CheckpointError(f"{folder / INDEX}: purpose is {purpose!r}, expected training or evaluation")
        found = sha256(folder / WEIGHTS)
        if found != plain.get("sha256"):
            raise CheckpointError(
                f"{folder / WEIGHTS} has sha256 {found}, its {INDEX} says {plain.get('sha256')}: the file was changed "
                "after it was written; fetch it again"
            )
        spec = AdapterSpec.from_json(read_whole(folder / SPEC), where=str(folder / SPEC))
        return cls(folder, tuple(names), spec, adapters, purpose, found)

    def stack(self, names: Sequence[str] | None = None) -> LoraTensors:
        """Reads adapters as a batch, in float32 on the CPU.

        Args:
            names: Which, in which order; all of them if not given.

        Returns:
            A (N, L, R, I) and B (N, L, O, R) for each target, N the number of names.

        Raises:
            CheckpointError: if a name is unknown, or tensors are not what the spec says, or not finite.
        """
        position = {name: n for n, name in enumerate(self.names)}
        unknown = [name for name in names or () if name not in position]
        if unknown:
            raise CheckpointError(
                f"{self.folder} holds no adapter {', '.join(unknown[:5])}; it holds {len(self.names)}, "
                f"such as {', '.join(self.names[:3])}"
            )
        rows = None if names is None else [position[name] for name in names]
        tensors = read_tensors(self.folder / WEIGHTS, tensor_shapes(self.spec, len(self.names)), rows=rows)
        return LoraTensors(
            tuple(tensors[f"{t.name}.A"].float() for t in self.spec.targets),
            tuple(tensors[f"{t.name}.B"].float() for t in self.spec.targets),
            self.spec.scaling,
        )

    def export(
        self, folder: str | Path, names: Sequence[str] | None = None, *, dtype: torch.dtype = torch.float32
    ) -> None:
        """Writes one PEFT folder an adapter into `folder`, all or none, each with the first of its descriptions.

        Raises:
            CheckpointError: if a name is unknown.
            OutputError: if `folder` exists or cannot be written.
        """
        chosen = self.names if names is None else tuple(names)
        lora = self.stack(chosen)
        with new_folder(Path(folder)) as temporary:
            for name, single in zip(chosen, lora.unbind(), strict=True):
                texts = self.index[name].get("descriptions")
                text = texts[0] if isinstance(texts, list) and texts and isinstance(texts[0], str) else ""
                card, origin = self._card(name), peft_io.Origin(text)
                peft_io.save_adapter(temporary / name, single, self.spec, card=card, origin=origin, dtype=dtype)

    def _card(self, name: str) -> str:
        facts = "".join(
            f"| {key} | {value} |\n"
            for key, value in self.index[name].items()
            if isinstance(value, str | int | float) and "\n" not in str(value)
        )
        return (
            f"{card_header(self.spec.base_model, 'lora')}"
            f"# {name}\n\nOne adapter of a library of {len(self.names)} for {public_name(self.spec.base_model)}: rank "
            f"{self.spec.rank}, alpha {self.spec.alpha:g}, targets {', '.join(t.name for t in self.spec.targets)}.\n\n"
            f"| | |\n| --- | --- |\n| library sha256 | {self.checksum} |\n{facts}"
        )


def save_library(
    folder: str | Path,
    lora: LoraTensors,
    spec: AdapterSpec,
    facts: Mapping[str, Mapping[str, Any]],
    *,
    purpose: Purpose = "training",
    sources: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
    overwrite: bool | None = False,
) -> AdapterLibrary:
    """Writes a library, whole or not at all.

    Args:
        folder: Where to.
        lora: A batch of N adapters.
        spec: What they fit.
        facts: Name of each adapter, in the batch's order, to plain facts about it.
        purpose: What the library may be used for.
        sources: Where its tasks come from, as settings name them; for the card.
        dtype: Type of the saved tensors.
        overwrite: Whether an existing folder is replaced, see `io.require_absent`.

    Raises:
        CheckpointError: if there is no adapter, a name cannot be a folder's, or a tensor is not finite in `dtype`.
        SpecMismatchError: if shapes or scaling are not the spec's.
        OutputError: if the folder exists or cannot be written.
    """
    from safetensors.torch import save_file

    if not facts:
        raise CheckpointError(f"A library needs at least one adapter; {folder} was not written")
    require_folder_names(facts, "an adapter", CheckpointError)
    state = {f"{t.name}.{part}": tensors[m] for m, t in enumerate(spec.targets) for part, tensors in _parts(lora)}
    expected = tensor_shapes(spec, len(facts))
    found = {name: tuple(value.shape) for name, value in state.items()}
    if found != expected or lora.scaling != spec.scaling:
        raise SpecMismatchError(
            f"{len(facts)} adapters for {spec.base_model} have tensors {expected} scaled by {spec.scaling}, "
            f"got {found} scaled by {lora.scaling}"
        )
    require_float(dtype)
    state = {name: value.detach().to("cpu", dtype).contiguous() for name, value in state.items()}
    for name, value in state.items():
        bad = (~torch.isfinite(value)).flatten(1).any(1).nonzero().flatten().tolist()
        if bad:
            raise CheckpointError(
                f"Adapter {list(facts)[bad[0]]} ({len(bad)} of {len(facts)}) holds values in {name} that are not "
                f"finite in {dtype}; nothing was written"
            )
    with new_folder(Path(folder), overwrite=overwrite) as temporary:
        save_file(state, temporary / WEIGHTS, metadata={"format": "pt"})
        index = {
            "format_version": FORMAT_VERSION,
            "purpose": purpose,
            "sha256": sha256(temporary / WEIGHTS),
            "names": list(facts),
            "adapters": {name: dict(about) for name, about in facts.items()},
        }
        texts = [text for about in facts.values() for text in about.get("descriptions", ()) if isinstance(text, str)]
        card = library_card(
            spec,
            len(facts),
            sources=sources,
            example=texts[0] if texts else None,
            facts={"purpose": purpose, "sha256": index["sha256"]},
        )
        (temporary / peft_io.CARD).write_text(card, encoding="utf-8", newline="")
        (temporary / SPEC).write_text(spec.to_json(), encoding="utf-8")
        (temporary / INDEX).write_text(json.dumps(index, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return AdapterLibrary.open(folder)


def from_peft_folders(
    paths: Sequence[Path],
    folder: str | Path,
    config: "PretrainedConfig",
    base_model: str,
    *,
    facts: Mapping[str, Mapping[str, Any]] | None = None,
    leave_out: bool = False,
) -> tuple[AdapterLibrary, dict[str, str]]:
    """Makes a library of existing PEFT LoRA folders, each named after its folder.

    What most of them agree on (rank, alpha, rsLoRA, base, targets, layers) is the library's spec. A folder that is
    damaged, incomplete or different is never bent to fit.

    Args:
        paths: PEFT adapter folders.
        folder: Where to write the library.
        config: The base model's Transformers config; the adapters' sizes must be its own.
        base_model: The base's reference, written into the spec; adapters must name the same base.
        facts: Facts to keep of an adapter, by folder name; `descriptions` is what reconstruction reads. By default the
            description that this library wrote into the folder, if it did.
        leave_out: Whether folders that do not fit are left out and reported; otherwise they are all named and
            nothing is written.

    Returns:
        The library, and for each folder that was left out the reason.

    Raises:
        SpecMismatchError: naming every folder that does not fit and why (unless `leave_out`), or if none fits.
        ConfigError: if there are no folders or two have one name.
        OutputError: if `folder` exists or cannot be written.
    """
    repeated = [name for name, count in Counter(path.name for path in paths).items() if count > 1]
    if not paths or repeated:
        what = f"several are named {', '.join(repeated[:5])}" if repeated else "there are none"
        raise ConfigError(f"PEFT folders become adapters named after them, but {what}")
    modules = linear_modules(config)
    refused: dict[str, str] = {}
    shapes = _each(paths, lambda path: _shape(path, modules, base_model), refused)
    loaded: dict[str, LoraTensors] = {}
    own: dict[str, dict[str, Any]] = {}
    if shapes:
        shape = Counter(shapes.values()).most_common(1)[0][0]
        spec = AdapterSpec.from_config(config, base_model, shape)

        def load(path: Path) -> LoraTensors:
            if shapes[path.name] != shape:
                raise SpecMismatchError(f"{_difference(shapes[path.name], shape)} in most of the others")
            description = peft_io.read_origin(path).description
            own[path.name] = {"descriptions": [description]} if description else {}
            return peft_io.load_adapter(path, spec)

        loaded = _each([path for path in paths if path.name in shapes], load, refused)
    if not loaded or (refused and not leave_out):
        listed = "\n".join(f"  {name}: {why}" for name, why in refused.items())
        raise SpecMismatchError(f"{len(refused)} of {len(paths)} PEFT folders do not fit into one library:\n{listed}")
    about = {name: dict((facts or {}).get(name) or own[name]) for name in loaded}
    return save_library(folder, LoraTensors.stack(list(loaded.values())), spec, about, overwrite=None), refused


def _each(paths: Sequence[Path], read: Callable[[Path], T], refused: dict[str, str]) -> dict[str, T]:
    """What `read` makes of each folder, by its name; a folder that it refuses goes into `refused` with the reason."""
    found = {}
    for path in paths:
        try:
            found[path.name] = read(path)
        except (CheckpointError, SpecMismatchError) as error:
            refused[path.name] = str(error)
    return found


def _difference(one: LoraConfig, other: LoraConfig) -> str:
    """The first setting that differs, with both values."""
    names = (name for name, value in vars(one).items() if value != vars(other)[name])
    return next(f"{name} is {_brief(vars(one)[name])} against {_brief(vars(other)[name])}" for name in names)


def _brief(value: object) -> str:
    if isinstance(value, tuple) and value and all(isinstance(x, int) for x in value):
        gapless = value == tuple(range(value[0], value[-1] + 1))
        return f"{value[0]}-{value[-1]}" if gapless and len(value) > 1 else ", ".join(map(str, value))
    return ", ".join(value) if isinstance(value, tuple) else str(value)


def _shape(folder: Path, modules: dict[str, tuple[str, int]], base_model: str) -> LoraConfig:
    """Reads what a folder adapts; raises where that is for another base, or no full grid of targets and layers."""
    facts = peft_io.read_facts(folder)
    if base_reference(facts.base_model) not in (base_reference(base_model), public_name(base_model)):
        raise SpecMismatchError(
            f"it is for the base {facts.base_model}, the library is for {base_model}; if they are the same model, give "
            "the base by the adapters' name"
        )
    return shape_of(facts, modules, base_model, where="it")


def _parts(lora: LoraTensors) -> tuple[tuple[str, tuple[torch.Tensor, ...]], ...]:
    return ("A", lora.a), ("B", lora.b)


def tensor_shapes(spec: AdapterSpec, number: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of `number` adapters."""
    shapes: dict[str, tuple[int, ...]] = {}
    for t in spec.targets:
        shapes[f"{t.name}.A"] = (number, len(spec.layers), spec.rank, t.in_features)
        shapes[f"{t.name}.B"] = (number, len(spec.layers), t.out_features, spec.rank)
    return shapes
