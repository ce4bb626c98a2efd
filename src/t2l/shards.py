"""ShardedLibrary: adapters by the million in one folder, each found by the text that it was written from.

    library.json                          what wrote them, and in which type
    spec.json                             what they all fit
    README.md                             a card for the Hub
    shards/NAME/adapters.safetensors      as in a library: for each target A (n, L, R, I) and B (n, L, O, R)
    shards/NAME/index.parquet             one row an adapter: id, description, shard, row, norm, checkpoint

A shard's folder appears whole or not at all, and there is no other record of what is done: whoever writes may be killed
at any moment. `shards/*/index.parquet` together are a Parquet data set for any program.

Knows adapters and files. Knows no hypernetwork. Shape letters as in `spec.py`; n adapters of a shard.
"""

import hashlib
import json
import math
import re
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from t2l import kinds
from t2l.adapter import LoraAdapter
from t2l.cards import EXAMPLE, library_card
from t2l.config import Range, build, check_ranges, to_plain
from t2l.errors import AdapterNotFoundError, CheckpointError, ConfigError, OutputError
from t2l.io import new_folder, read_json, read_shapes, read_tensors, read_whole
from t2l.library import SPEC, WEIGHTS, tensor_shapes
from t2l.locks import sweep
from t2l.lora import LoraTensors
from t2l.parquet import reading_parquet, require_pyarrow
from t2l.peft_io import CARD
from t2l.spec import AdapterSpec
from t2l.upload import SharedLibrary

FORMAT_VERSION = 2
LIBRARY, SHARDS, INDEX = kinds.SHARDS.mark, "shards", "index.parquet"
COLUMNS = ("id", "description", "shard", "row", "norm", "crc32", "checkpoint")
ID_DIGITS = 32

SavedType = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What `library.json` holds: what all adapters of a library were written by."""

    format_version: int = FORMAT_VERSION
    checkpoint_sha256: str
    """Of the hypernetwork's weights."""
    strength: Annotated[float, Range(at_least=0, at_most=2)] = 1.0
    """Share of a description's change."""
    dtype: SavedType = "float16"
    """Type of the saved tensors."""
    provenance: dict = field(default_factory=dict)
    """Facts for cards: where the checkpoint came from, versions. Nothing depends on it."""

    def __post_init__(self) -> None:
        check_ranges(self)

    def id_of(self, description: str) -> str:
        """The adapter's name: one for each text, checkpoint and strength, in every library."""
        content = "\0".join((self.checkpoint_sha256, f"{self.strength:g}", description))
        return hashlib.sha256(content.encode()).hexdigest()[:ID_DIGITS]


@dataclass(frozen=True)
class ShardedLibrary(SharedLibrary):
    """Adapters of one spec on disk; tensors are read only when they are asked for, of these adapters alone."""

    folder: Path
    spec: AdapterSpec
    origin: Origin

    @classmethod
    def open(cls, folder: str | Path) -> "ShardedLibrary":
        """Reads what all adapters have in common.

        Raises:
            CheckpointError: if files are missing, damaged or of another format.
        """
        folder = Path(folder)
        kinds.require_kind(folder, kinds.SHARDS)
        plain = read_json(folder / LIBRARY)
        if plain.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(
                f"{folder / LIBRARY}: format_version is {plain.get('format_version')!r}, this version of t2l reads "
                f"{FORMAT_VERSION}; update t2l or generate the library again"
            )
        try:
            origin = build(Origin, plain, where=str(folder / LIBRARY))
            text = read_whole(folder / SPEC)
            return cls(folder, AdapterSpec.from_json(text, where=str(folder / SPEC)), origin)
        except (OSError, UnicodeDecodeError, ConfigError) as error:
            raise CheckpointError(f"{folder} is damaged: {error}") from error

    @classmethod
    def begin(cls, folder: Path, spec: AdapterSpec, origin: Origin) -> "ShardedLibrary":
        """Makes an empty library, or opens the one that is there to go on with it.

        Raises:
            ConfigError: if the one that is there was written by another checkpoint, or with other settings.
            OutputError: if the folder holds something else or cannot be written.
        """
        if (folder / LIBRARY).exists():
            found = cls.open(folder)
            mine, theirs = to_plain(origin), to_plain(found.origin)
            for key in ("checkpoint_sha256", "strength", "dtype"):
                if mine[key] != theirs[key]:
                    raise ConfigError(
                        f"{folder} was begun with {key} {theirs[key]}, now it is {mine[key]}; {ELSEWHERE}"
                    )
            if found.spec != spec:
                raise ConfigError(f"{folder} holds adapters of another shape; {ELSEWHERE}")
            sweep(folder / SHARDS)
            return found
        if folder.exists() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise OutputError(f"{folder} holds other things than an adapter library; {ELSEWHERE}")
        with new_folder(folder, overwrite=True) as temporary:
            (temporary / SHARDS).mkdir()
            (temporary / SPEC).write_text(spec.to_json(), encoding="utf-8")
            facts = {"strength": f"{origin.strength:g}", "type": origin.dtype, **origin.provenance}
            license = origin.provenance.get("license")
            card = library_card(spec, None, license=license, example=EXAMPLE, facts=facts)
            (temporary / CARD).write_text(card, encoding="utf-8", newline="")
            (temporary / LIBRARY).write_text(json.dumps(to_plain(origin), indent=1) + "\n", encoding="utf-8")
        return cls(folder, spec, origin)

    # ---------------------------------------------------------------------------------------------------- reading

    def index(self) -> Any:
        """The index of all shards as a `pyarrow.dataset.Dataset`, with the columns `COLUMNS`.

        Raises:
            DataError: if pyarrow is not installed.
        """
        require_pyarrow("An adapter library's index", "library")
        from pyarrow import dataset

        parts = sorted(str(path) for path in self.folder.glob(f"{SHARDS}/[!.]*/{INDEX}"))
        with reading_parquet(f"An {INDEX} of {self.folder}", WRITE_AGAIN, CheckpointError):
            return dataset.dataset(parts, schema=index_schema(), format="parquet")

    def ids(self) -> Iterator[list[str]]:
        """The ids of all adapters, some thousands at a time."""
        for rows in self._read_index(columns=["id"]):
            names = [row["id"] for row in rows]
            for name in names:
                if not _is_id(name):
                    raise self._damaged(f"it holds {str(name)[:40]!r} for an id")
            yield names

    def __len__(self) -> int:
        return sum(len(ids) for ids in self.ids())

    def rows(self, ids: Sequence[str]) -> list[dict[str, Any]]:
        """The index's rows of these adapters, in their order.

        Raises:
            AdapterNotFoundError: if one is not there.
        """
        require_pyarrow("An adapter library's index", "library")
        from pyarrow import dataset

        wanted = dataset.field("id").isin(list(ids))
        found = {row["id"]: self._checked(row) for rows in self._read_index(filter=wanted) for row in rows}
        absent = [name for name in ids if name not in found]
        if absent:
            raise AdapterNotFoundError(
                f"{self.folder} holds no adapter {', '.join(absent[:5])}; {INDEX} of its shards names those it holds"
            )
        return [found[name] for name in ids]

    def _read_index(self, **options: Any) -> Iterator[list[dict[str, Any]]]:
        """The index's rows, some thousands at a time."""
        index = self.index()
        with reading_parquet(f"An {INDEX} of {self.folder}", WRITE_AGAIN, CheckpointError):
            for batch in index.to_batches(**options):
                yield batch.to_pylist()

    def _damaged(self, why: str) -> CheckpointError:
        return CheckpointError(f"An {INDEX} of {self.folder} is damaged ({why}); {WRITE_AGAIN}")

    def _checked(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row that is one that `write_shard` wrote: its id is that of its text, and no path is in it."""
        shard, place, norm, text = row["shard"], row["row"], row["norm"], row["description"]
        if not isinstance(text, str) or self.origin.id_of(text) != row["id"]:
            raise self._damaged(f"the description of {row['id']} is not the one that it was written for")
        if not _is_id(shard) or place is None or place < 0 or norm is None or not math.isfinite(norm):
            raise self._damaged(f"{row['id']} is said to be row {place} of {str(shard)[:40]!r} with norm {norm}")
        return row

    def stack(self, ids: Sequence[str]) -> LoraTensors:
        """Reads adapters as a batch, in float32 on the CPU.

        Args:
            ids: Which, in which order; N of them.

        Returns:
            A (N, L, R, I) and B (N, L, O, R) for each target.

        Raises:
            AdapterNotFoundError: if one is not there.
            CheckpointError: if tensors are not what the spec says, not finite, or not those that the index was written
                for.
        """
        return self._tensors(self.rows(ids))

    def _tensors(self, rows: Sequence[Mapping[str, Any]]) -> LoraTensors:
        by_shard: dict[str, list[int]] = {}
        for position, row in enumerate(rows):
            by_shard.setdefault(row["shard"], []).append(position)
        read: dict[int, LoraTensors] = {}
        for shard, positions in by_shard.items():
            path = self.folder / SHARDS / shard / WEIGHTS
            number = min((shape[0] if shape else 0 for shape in read_shapes(path).values()), default=0)
            places = [int(rows[position]["row"]) for position in positions]
            if max(places) >= number:
                raise CheckpointError(f"{path} holds {number} adapters, its {INDEX} names row {max(places)}")
            tensors = read_tensors(path, tensor_shapes(self.spec, number), rows=places)
            found = checksums(tensors, [rows[position]["norm"] for position in positions])
            batch = LoraTensors(
                tuple(tensors[f"{t.name}.A"].float() for t in self.spec.targets),
                tuple(tensors[f"{t.name}.B"].float() for t in self.spec.targets),
                self.spec.scaling,
            )
            for position, crc32, single in zip(positions, found, batch.unbind(), strict=True):
                if crc32 != rows[position]["crc32"]:
                    raise CheckpointError(
                        f"{path}: row {rows[position]['row']} is not what its {INDEX} was written for (crc32 {crc32}, "
                        f"not {rows[position]['crc32']}): a file was changed after it was written; {WRITE_AGAIN}"
                    )
                read[position] = single
        return LoraTensors.stack([read[position] for position in range(len(rows))])

    def adapters(self, ids: Sequence[str]) -> list[LoraAdapter]:
        """Reads adapters with what they were written from; errors as `stack`."""
        rows = self.rows(ids)
        facts = {str(key): str(value) for key, value in self.origin.provenance.items()}
        return [
            LoraAdapter(single, self.spec, row["description"], facts | {"library id": row["id"]})
            for row, single in zip(rows, self._tensors(rows).unbind(), strict=True)
        ]

    def export(self, folder: str | Path, ids: Sequence[str], *, dtype: torch.dtype = torch.float32) -> None:
        """Writes one PEFT folder an adapter, named by its id, into `folder`, all or none.

        Raises:
            AdapterNotFoundError, CheckpointError: as `stack`.
            OutputError: if `folder` exists or cannot be written.
        """
        adapters = self.adapters(ids)
        with new_folder(Path(folder)) as temporary:
            for name, adapter in zip(ids, adapters, strict=True):
                adapter.save_pretrained(temporary / name, dtype=dtype)

    # ---------------------------------------------------------------------------------------------------- writing

    def write_shard(
        self, descriptions: Sequence[str], tensors: Mapping[str, torch.Tensor], norms: Sequence[float]
    ) -> None:
        """Writes a shard and its index, whole or not at all; a shard of these texts that is there stays as it is.

        Args:
            descriptions: What each of n adapters was written from.
            tensors: A (n, L, R, I) and B (n, L, O, R) of each target, named as in a library's file, on the CPU.
            norms: `LoraTensors.total_norms` of the adapters as they are saved, (n,).

        Raises:
            OutputError: if it cannot be written.
        """
        import pyarrow as pa
        from pyarrow import parquet
        from safetensors.torch import save_file

        ids = [self.origin.id_of(text) for text in descriptions]
        name = hashlib.sha256("".join(ids).encode()).hexdigest()[:ID_DIGITS]
        path = self.folder / SHARDS / name
        if path.is_dir():
            return
        number = len(ids)
        checkpoints = [self.origin.checkpoint_sha256] * number
        index = pa.table(
            [ids, list(descriptions), [name] * number, range(number), norms, checksums(tensors, norms), checkpoints],
            schema=index_schema(),
        )
        try:
            with new_folder(path) as temporary:
                save_file(dict(tensors), temporary / WEIGHTS, metadata={"format": "pt"})
                parquet.write_table(index, temporary / INDEX)
        except OutputError:
            if not path.is_dir():  # otherwise another worker was given the same texts, and was faster
                raise


ELSEWHERE = "choose another folder"
WRITE_AGAIN = "delete the shard's folder and generate it again"


def _is_id(name: Any) -> bool:
    """Whether it is what `Origin.id_of` makes; shards have names of the same form, and nothing else names a folder."""
    return isinstance(name, str) and re.fullmatch(f"[0-9a-f]{{{ID_DIGITS}}}", name) is not None


def checksums(tensors: Mapping[str, torch.Tensor], norms: Sequence[float]) -> list[int]:
    """A checksum of each adapter's saved numbers and its norm, (n,); no secret: damage is what it finds.

    Args:
        tensors: As `ShardedLibrary.write_shard` takes them.
        norms: What the index says, (n,).
    """
    found = [zlib.crc32(struct.pack("<f", norm)) for norm in norms]
    for _, tensor in sorted(tensors.items()):
        for row, values in enumerate(tensor.flatten(1).view(torch.uint8).numpy()):
            found[row] = zlib.crc32(values.data, found[row])
    return found


def is_sharded(folder: Path) -> bool:
    """Whether a folder is a sharded library, or one that was begun."""
    return (folder / LIBRARY).is_file()


def index_schema() -> Any:
    """Names and types of the index's columns."""
    import pyarrow as pa

    kinds = (pa.string(), pa.string(), pa.string(), pa.int32(), pa.float32(), pa.uint32(), pa.string())
    return pa.schema(list(zip(COLUMNS, kinds, strict=True)))
