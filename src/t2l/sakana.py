"""Published Text-to-LoRA checkpoints (SakanaAI) as checkpoints of this library.

A published folder holds `args.yaml`, `adapter_config.json` and `hypermod.pt`. The last is a pickle: it is read by
torch's restricted reader, which builds tensors and nothing else, and its content is checked name by name and shape by
shape before it is used. The result is a folder as every other checkpoint: safetensors, strict, no pickle.

What the published network computes is what `Hypernet` computes, but for the layout of what its heads write:
- `L` keeps B of each rank together; the rows of its matrix are put into our order.
- `M` and `S` have heads of their own here, `published-M` and `published-S`.
- A head's bias is the same for all descriptions and layers: it goes into the shared LoRA, with a multi-task LoRA that
  the network was trained on top of.
- Networks trained by reconstruction write standard scores, whose means and deviations go into the shared LoRA and
  `output_std`, or numbers scaled up, whose scale goes into the head.
- Embeddings are scaled to a length of √E; the encoder gives length 1, and √E goes into the first matrix.

The order of the target modules is that of the file's `heads.*`: the authors' program numbers them as a set comes out,
which differs from process to process, and only the file remembers.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2l import hub
from t2l.cards import EXAMPLE, card_header
from t2l.checkpoint import CheckpointConfig, save_checkpoint
from t2l.config import EncoderConfig, HypernetConfig, LoraConfig, PromptConfig, load_yaml
from t2l.encoder import encoder_revision, load_encoder
from t2l.errors import CheckpointError, ConfigError
from t2l.hypernet import Hypernet
from t2l.io import read_json
from t2l.spec import AdapterSpec

WEIGHTS, ARGUMENTS, ADAPTER = "hypermod.pt", "args.yaml", "adapter_config.json"
WINDOW = 512
"""Tokens of a description that the imported checkpoint reads; longer ones are refused."""

BASES: dict[str, dict[str, Any]] = {
    "mistralai/Mistral-7B-Instruct-v0.2": {
        "model_type": "mistral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "meta-llama/Llama-3.1-8B-Instruct": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "google/gemma-2-2b-it": {
        "model_type": "gemma2",
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
    },
}
"""Shapes of the bases of the published checkpoints: adapters for them are written without asking the Hub, which gives
two of the three only to those who have accepted a licence."""

# Ours on the left. The file's residual blocks count their layers from the norm that opens them, ours from after it.
_TRUNK = {
    "trunk.embedding.0": "task_encoder.mlp.0",
    "trunk.embedding.1": "task_encoder.mlp.1",
    "trunk.depth.0": "layer_depth_encoder.0",
    "trunk.depth.1": "layer_depth_encoder.1",
    "trunk.target.0": "layer_type_encoder.0",
    "trunk.target.1": "layer_type_encoder.1",
    "trunk.mixer.1": "mixer.1",
    "trunk.mixer.4": "mixer.4",
    "trunk.block.norm": "mlp1.mlp.0",
    "trunk.block.mlp.0": "mlp1.mlp.1",
    "trunk.block.mlp.3": "mlp1.mlp.4",
    "head.block.norm": "mlp2.mlp.0",
    "head.block.mlp.0": "mlp2.mlp.1",
    "head.block.mlp.3": "mlp2.mlp.4",
    "head.widen.0": "mlp3.0",
    "head.widen.1": "mlp3.1",
    "head.widen.4": "mlp3.4",
    "head.part_norm": "out_emb_norm",
}


@dataclass(frozen=True)
class Published:
    """A published folder's settings, as far as they decide what is computed."""

    base_model: str
    encoder: str
    variant: str
    """Ours: `L`, `published-M` or `published-S`."""
    width: int
    head_size: int
    standard_scores: bool
    """Whether the network writes standard scores of A and B."""
    scale: float
    """Factor of what the network writes."""
    conditioning: str
    rank: int
    alpha: float
    use_rslora: bool


def import_published(
    folder: Path, output: Path, *, base_model: str | None = None, encoder: str | None = None
) -> AdapterSpec:
    """Writes a published checkpoint as a checkpoint of this library.

    Args:
        folder: The published folder.
        output: The checkpoint folder to write.
        base_model: Reference of the base model, where it is not to be had by the name in the folder.
        encoder: Reference of the encoder, likewise; a sentence-transformers folder with a native class.

    Returns:
        Where the checkpoint's adapters belong.

    Raises:
        CheckpointError: if a file is missing, damaged, or holds anything but the tensors that its settings ask for.
        ConfigError: if the checkpoint is of a kind that is not read; the setting is named.
        SpecMismatchError: if the tensors do not fit the base model.
        OutputError: if `output` exists or cannot be written.
        T2LError: if the base's config or the encoder cannot be had.
    """
    published = read_arguments(folder)
    state = read_state(folder / WEIGHTS)
    base_model = base_model or published.base_model
    spec = published_spec(state, published, base_config(base_model), base_model)
    encoder_config = EncoderConfig(
        kind="sentence", model=encoder or published.encoder, max_tokens=WINDOW, full_stop=True
    )
    loaded = load_encoder(encoder_config, base_model)
    if getattr(loaded, "pooling", None) != "cls" or not getattr(loaded, "normalize", False):
        raise ConfigError(
            f"{encoder_config.model} does not pool by its first token and scale to length 1, as the published networks "
            "ask; `t2l import gte` writes a folder that does"
        )
    config = CheckpointConfig.current(
        {"imported_from": "SakanaAI/text-to-lora", "encoder": published.encoder, "base_model": published.base_model},
        embedding_size=loaded.embedding_size,
        encoder=encoder_config,
        encoder_revision=encoder_revision(encoder_config, base_model),
        hypernet=hypernet_config(published),
        prompt=PromptConfig(),
        conditioning=published.conditioning,
    )
    hypernet = build(state, published, spec, loaded.embedding_size)
    save_checkpoint(output, hypernet, spec, config, card=_card(spec), dtype=torch.float32)
    return spec


def base_config(base_model: str) -> Any:
    """The Transformers config of a base model; for one of the published checkpoints' bases, without asking the Hub."""
    if base_model in BASES:
        from transformers import AutoConfig

        return AutoConfig.for_model(**BASES[base_model])
    return hub.load_config(base_model)


def read_arguments(folder: Path) -> Published:
    """Reads the settings of a published folder.

    Raises:
        CheckpointError: if a file is missing or damaged.
        ConfigError: if a setting asks for a network that is not read; both values are named.
    """
    if not (folder / ARGUMENTS).is_file():
        raise CheckpointError(f"{folder / ARGUMENTS} is missing")
    arguments, adapter = load_yaml(folder / ARGUMENTS), read_json(folder / ADAPTER)
    read = {
        "exp_setup": "hyper_lora",
        "encoder_type": "linear",
        "learnable_pos_emb": False,
        "use_one_hot_task_emb": False,
    }
    for key, value in read.items():
        if arguments.get(key, value) != value:
            raise ConfigError(f"{folder / ARGUMENTS}: {key} is {arguments[key]!r}; only {value!r} is read")
    shared, single = bool(arguments.get("shared_AB_head")), bool(arguments.get("autoreg_gen"))
    if single and not shared:
        raise ConfigError(f"{folder / ARGUMENTS}: autoreg_gen without shared_AB_head is none of L, M and S")
    task = arguments.get("training_task", "sft")
    if task not in ("sft", "recon") or not arguments.get("emb_model") or not arguments.get("model_dir"):
        raise ConfigError(
            f"{folder / ARGUMENTS}: training_task must be sft or recon, and emb_model and model_dir must be named; got "
            f"{task!r}, {arguments.get('emb_model')!r} and {arguments.get('model_dir')!r}"
        )
    if adapter.get("peft_type") != "LORA":
        raise ConfigError(f"{folder / ADAPTER}: only adapters with peft_type 'LORA' are read")
    factorized = bool(arguments.get("factorized"))
    recon = task == "recon"
    return Published(
        base_model=str(arguments["model_dir"]),
        encoder=str(arguments["emb_model"]),
        variant="published-S" if single else "published-M" if shared else "L",
        width=_size(arguments, "hypernet_latent_size", 128),
        head_size=_size(arguments, "head_in_size", 512),
        standard_scores=recon and factorized and bool(arguments.get("pred_z_score", True)),
        # A and B each bear the root of what ΔW was scaled up by.
        scale=_positive(arguments, "delta_w_scaling", 10000) ** -0.5 if recon and not factorized else 1.0,
        conditioning="input" if arguments.get("use_inp_as_desc") else "description",
        rank=_size(adapter, "r", 0, least=1),
        alpha=_positive(adapter, "lora_alpha", 8),
        use_rslora=bool(adapter.get("use_rslora", False)),
    )


def _size(settings: Mapping[str, Any], key: str, default: int, *, least: int = 4) -> int:
    value = settings.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= 2**16:
        raise ConfigError(f"The published setting {key} must be a whole number from {least} to {2**16}, got {value!r}")
    return value


def _positive(settings: Mapping[str, Any], key: str, default: float) -> float:
    value = settings.get(key) or default
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e12:
        raise ConfigError(f"The published setting {key} must be a number above 0, got {value!r}")
    return float(value)


def read_state(path: Path) -> dict[str, Tensor]:
    """Reads the tensors of a published file, in its order, as float32.

    Raises:
        CheckpointError: if the file is missing or damaged, holds anything but a flat dictionary of finite float
            tensors, or asks for any code to be run.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    # What the reader raises on damaged files depends on where the damage is.
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path} is damaged, or holds more than tensors: {first}") from error
    if not isinstance(data, dict) or not data:
        raise CheckpointError(f"{path} must hold a dictionary of tensors, got {type(data).__name__}")
    state = {}
    for name, value in data.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: {name!r:.80} is a {type(value).__name__}, not a named tensor")
        if not value.is_floating_point() or value.layout != torch.strided or not torch.isfinite(value).all():
            raise CheckpointError(f"{path}: {name} is no dense float tensor of finite numbers ({value.dtype})")
        state[name] = value.detach().float().contiguous()
    return state


def published_spec(state: Mapping[str, Tensor], published: Published, config: Any, base_model: str) -> AdapterSpec:
    """Where a published network's adapters belong: targets in the order of the file's heads, all layers of the base.

    Raises:
        CheckpointError: if the file has no heads.
        SpecMismatchError: if the base has no such modules.
    """
    names = [name.split(".")[1] for name in state if name.startswith("heads.") and name.endswith(".weight")]
    if not names:
        raise CheckpointError(
            f"{WEIGHTS} holds no tensors named heads.<module>.weight; is it a published hypernetwork?"
        )
    lora = LoraConfig(
        target_modules=tuple(names), r=published.rank, lora_alpha=published.alpha, use_rslora=published.use_rslora
    )
    return AdapterSpec.from_config(config, base_model, lora)


def hypernet_config(published: Published) -> HypernetConfig:
    """Our settings for a published network."""
    return HypernetConfig(
        variant=published.variant,  # type: ignore[arg-type]
        width=published.width,
        head_size=published.head_size,
        output_std=published.standard_scores,
    )


def new_hypernet(published: Published, spec: AdapterSpec, embedding_size: int) -> Hypernet:
    """Our hypernetwork of a published network's shape, untrained."""
    return Hypernet(spec, embedding_size=embedding_size, kind="sentence", config=hypernet_config(published))


def build(state: Mapping[str, Tensor], published: Published, spec: AdapterSpec, embedding_size: int) -> Hypernet:
    """Our hypernetwork with a published network's weights, in evaluation mode.

    Raises:
        CheckpointError: if a tensor is missing, unknown or of another shape than the settings and the base ask for.
    """
    hypernet = new_hypernet(published, spec, embedding_size)
    reader = _Reader(state)
    ours = _trunk(reader, embedding_size, shared=published.variant != "L")
    ours |= _heads(reader, published, spec)
    ours |= _constants(reader, published, spec)
    reader.require_all_read()
    for name, value in hypernet.state_dict().items():
        if name not in ours or ours[name].shape != value.shape:
            found = tuple(ours[name].shape) if name in ours else "nothing"
            raise CheckpointError(f"{WEIGHTS} gives {found} for {name}, whose shape must be {tuple(value.shape)}")
    hypernet.load_state_dict(ours, strict=True)
    return hypernet.eval().requires_grad_(False)


class _Reader:
    """The file's tensors, each to be asked for by name; what nobody asks for is told at the end."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state, self.unread = state, set(state)

    def get(self, name: str) -> Tensor:
        """A tensor that must be there."""
        found = self.find(name)
        if found is None:
            raise CheckpointError(f"{WEIGHTS} lacks {name}, which its settings ask for")
        return found

    def find(self, name: str) -> Tensor | None:
        """A tensor that may be there."""
        self.unread.discard(name)
        return self.state.get(name)

    def require_all_read(self) -> None:
        """Raises if a tensor was left over; rotary embedding's frequencies, which some versions saved, may be."""
        left = sorted(self.unread - {"rotary_emb.inv_freq"})
        if left:
            raise CheckpointError(f"{WEIGHTS} holds {len(left)} tensors that its settings do not ask for: {left[:3]}")


def _trunk(reader: _Reader, embedding_size: int, *, shared: bool) -> dict[str, Tensor]:
    """Everything before the heads."""
    ours = {}
    for name, theirs in _TRUNK.items():
        if name == "head.part_norm" and not shared:
            continue
        for part in ("weight", "bias"):
            if part == "bias" and name in ("trunk.depth.0", "trunk.target.0"):  # embeddings have none
                continue
            ours[f"{name}.{part}"] = reader.get(f"{theirs}.{part}")
    ours["trunk.embedding.0.weight"] = ours["trunk.embedding.0.weight"] * embedding_size**0.5
    return ours


def _heads(reader: _Reader, published: Published, spec: AdapterSpec) -> dict[str, Tensor]:
    """The heads' matrices in our order, and the vectors that tell A from B."""
    ours = {}
    for m, target in enumerate(spec.targets):
        weight = reader.get(f"heads.{target.name}.weight") * published.scale
        if published.variant == "L":
            weight = _our_rows(weight, target.in_features, target.out_features, spec.rank)
        ours[f"head.write.{m}.weight"] = weight
    if published.variant != "L":
        for part in "AB":
            vectors = [reader.get(f"out_emb.{target.name}.{part}") for target in spec.targets]
            ours[f"head.part_{part.lower()}"] = torch.stack(vectors)
    return ours


def _our_rows(rows: Tensor, in_features: int, out_features: int, rank: int) -> Tensor:
    """Rows of L's matrix, or of its bias: after those of A, B's go rank by rank there and output by output here."""
    if len(rows) != rank * (in_features + out_features):
        return rows  # of a shape that is refused by name later
    a, b = rows.split([rank * in_features, rank * out_features])
    return torch.cat([a, b.unflatten(0, (rank, out_features)).transpose(0, 1).flatten(0, 1)])


def _constants(reader: _Reader, published: Published, spec: AdapterSpec) -> dict[str, Tensor]:
    """The shared LoRA and, for standard scores, the deviations: what is the same for all descriptions."""
    ours = {}
    for m, target in enumerate(spec.targets):
        bias = reader.find(f"heads.{target.name}.bias")
        parts = (None, None) if bias is None else _bias_parts(bias * published.scale, published, spec, m)
        for part, constant in zip("AB", parts, strict=True):
            size = target.in_features if part == "A" else target.out_features
            shape = (len(spec.layers), spec.rank, size) if part == "A" else (len(spec.layers), size, spec.rank)
            shared = torch.zeros(shape) if constant is None else constant.expand(shape).clone()
            offset, mean, deviation = (
                reader.find(f"{kind}.{part}.{target.name}")
                for kind in ("AB_offset", "mean_recon_target", "std_recon_target")
            )
            for name, value in (("AB_offset", offset), ("mean_recon_target", mean), ("std_recon_target", deviation)):
                if value is not None and tuple(value.shape) != shape:
                    raise CheckpointError(
                        f"{WEIGHTS}: {name}.{part}.{target.name} is {tuple(value.shape)}, not {shape}"
                    )
            if published.standard_scores:
                if mean is None or deviation is None:
                    raise CheckpointError(f"{WEIGHTS} lacks means and deviations for {target.name}, yet writes scores")
                scale = deviation + 1e-10  # as the authors' program has it
                shared = shared * scale + mean
                ours[f"output_std.{part.lower()}.{m}"] = scale
            if offset is not None and published.scale == 1:
                shared = shared + offset
            ours[f"shared_lora.{part.lower()}.{m}"] = shared
    return ours


def _bias_parts(bias: Tensor, published: Published, spec: AdapterSpec, m: int) -> tuple[Tensor, Tensor]:
    """What a head's bias adds to A (R, I) and to B (O, R) of target m."""
    target, rank = spec.targets[m], spec.rank
    i, o = target.in_features, target.out_features
    length = {"L": rank * (i + o), "published-M": rank * max(i, o), "published-S": max(i, o)}[published.variant]
    if tuple(bias.shape) != (length,):
        raise CheckpointError(
            f"{WEIGHTS}: heads.{target.name}.bias has shape {tuple(bias.shape)}, expected ({length},)"
        )
    if published.variant == "L":
        a, b = bias.split([rank * i, rank * o])
        return a.unflatten(0, (rank, i)), b.unflatten(0, (rank, o)).T
    rows = bias.unflatten(0, (rank, -1)) if published.variant == "published-M" else bias.expand(rank, -1)
    return rows[:, :i], rows[:, :o].T


def _card(spec: AdapterSpec) -> str:
    facts = json.dumps([t.name for t in spec.targets])
    header = card_header(spec.base_model, "lora", "text-to-lora", library="text-to-lora", example=EXAMPLE)
    return (
        f"{header}# Imported Text-to-LoRA checkpoint\n\n"
        f"From SakanaAI/text-to-lora, for {spec.base_model}: rank {spec.rank}, targets {facts} in the order of the "
        "published file. See there for its licence.\n"
    )
