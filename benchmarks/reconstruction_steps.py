"""Reconstruction steps per second: targets resident on the device against loading them from disk at every step.

    python benchmarks/reconstruction_steps.py --adapters 364 --steps 400

Random adapters of SmolLM2-135M's shape; the network and its optimiser are the same in both ways. Loading reads the
step's adapters from their PEFT files, already in the page cache, and z-scores them. Prints JSON. `--tiny` runs on a
small shape, on the CPU.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from t2l import peft_io
from t2l.config import EncoderConfig, HypernetConfig
from t2l.encoder import Encoded
from t2l.library import AdapterLibrary, save_library
from t2l.lora import LoraTensors
from t2l.spec import AdapterSpec, Target
from t2l.train.embeddings import EmbeddingCache
from t2l.train.reconstruction import (
    ReconstructionConfig,
    ReconstructionDataConfig,
    ReconstructionTrainConfig,
    Trainer,
    new_hypernet,
)
from t2l.train.reconstruction_data import names_as_texts
from t2l.train.reconstruction_losses import Targets, factor_loss, make_targets


class RandomEncoder:
    """As many random vectors as there are texts: what they are does not change the time of a step."""

    kind, embedding_size, max_tokens = "sentence", 384, 1

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def encode(self, descriptions: Sequence[str]) -> Encoded:
        return Encoded(torch.randn(len(descriptions), self.embedding_size, device=self.device))


def make_spec(layers: int, width: int, narrow: int, rank: int) -> AdapterSpec:
    targets = tuple(
        Target(name=name, path=f"model.layers.{{layer}}.self_attn.{name}", in_features=width, out_features=size)
        for name, size in (("q_proj", width), ("v_proj", narrow))
    )
    return AdapterSpec(
        base_model="random",
        model_type="llama",
        num_layers=layers,
        layers=tuple(range(layers)),
        targets=targets,
        rank=rank,
        alpha=2.0 * rank,
    )


def random_library(spec: AdapterSpec, number: int, folder: Path) -> AdapterLibrary:
    depth, rank = len(spec.layers), spec.rank
    lora = LoraTensors(
        tuple(torch.randn(number, depth, rank, t.in_features) for t in spec.targets),
        tuple(torch.randn(number, depth, t.out_features, rank) for t in spec.targets),
        spec.scaling,
    )
    return save_library(folder / "library", lora, spec, {f"adapter{n}": {} for n in range(number)})


class FromDisk:
    """What a step would cost if its targets were read when they are needed."""

    def __init__(self, trainer: Trainer, folders: list[Path], spec: AdapterSpec) -> None:
        self.trainer, self.folders, self.spec = trainer, folders, spec

    def step(self, number: int, index_n: Tensor, texts_n: Tensor) -> Tensor:
        loaded = [
            peft_io.from_state_dict(load_file(self.folders[i] / peft_io.WEIGHTS), self.spec) for i in index_n.tolist()
        ]
        lora = LoraTensors.stack(loaded).map(lambda x: x.to(self.trainer.device))
        mean, deviation = self.trainer.targets.mean, self.trainer.targets.deviation
        targets = [
            (x - m) / d
            for x, m, d in zip((*lora.a, *lora.b), (*mean.a, *mean.b), (*deviation.a, *deviation.b), strict=True)
        ]
        every = torch.arange(len(index_n), device=self.trainer.device)
        hypernet = self.trainer.hypernet
        assert hypernet.trunk is not None and hypernet.head is not None

        def loss(states: Tensor, mask: Tensor | None, _: Tensor) -> Tensor:
            z_a, z_b = hypernet.head(hypernet.trunk(states, mask))
            return factor_loss([*z_a, *z_b], targets, every)

        self.trainer.loss = loss
        return self.trainer.step(number, index_n, texts_n)


def steps_per_second(way: Any, trainer: Trainer, steps: int, warm_up: int) -> float:
    adapters, texts = (x.to(trainer.device) for x in trainer.sampler.steps(0, steps + warm_up))
    started = 0.0
    for step in range(steps + warm_up):
        if step == warm_up:
            _wait(trainer.device)
            started = time.perf_counter()
        way.step(step, adapters[step], texts[step])
    _wait(trainer.device)
    return steps / (time.perf_counter() - started)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(
    spec: AdapterSpec, hypernet: HypernetConfig, *, adapters: int, per_step: int, steps: int, compiled: bool
) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        library = random_library(spec, adapters, Path(folder))
        library.export(Path(folder) / "peft")
        folders = [Path(folder) / "peft" / name for name in library.names]
        names = library.names
        targets: Targets = make_targets(library.stack(), names, device=device)
        encoder = RandomEncoder(device)
        config = ReconstructionConfig(
            encoder=EncoderConfig(kind="sentence", model="random"),
            hypernet=hypernet,
            data=ReconstructionDataConfig(library="random"),
            train=ReconstructionTrainConfig(max_steps=1_000_000, adapters_per_batch=per_step, torch_compile=compiled),
        )
        texts = names_as_texts(names)
        bank = EmbeddingCache(encoder, texts.texts)
        network = new_hypernet(hypernet, spec, encoder, targets).to(device).train()
        trainer = Trainer(config, library, encoder, network, targets, bank, texts, device)
        resident = steps_per_second(trainer, trainer, steps, 10)
        peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None
        plain = Trainer(
            replace(config, train=replace(config.train, torch_compile=False)),
            library,
            encoder,
            network,
            targets,
            bank,
            texts,
            device,
        )
        loading = steps_per_second(FromDisk(plain, folders, spec), plain, max(3, steps // 20), 2)
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "adapters": adapters,
        "adapters_per_step": per_step,
        "parameters_each": spec.num_parameters,
        "network_parameters": sum(p.numel() for p in network.parameters()),
        "resident_steps_per_second": resident,
        "loading_steps_per_second": loading,
        "ratio": resident / loading,
        "memory_gb": peak,
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=364)
    parser.add_argument("--per-step", type=int, default=32)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--head-size", type=int, default=512)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--tiny", action="store_true", help="twelve small adapters")
    given = parser.parse_args(arguments)
    torch.set_float32_matmul_precision("high")
    if given.tiny:
        hypernet = HypernetConfig(width=16, head_size=16, dropout=0.0)
        spec = make_spec(2, 32, 16, 2)
        result = measure(spec, hypernet, adapters=12, per_step=4, steps=20, compiled=False)
    else:
        hypernet = HypernetConfig(width=128, head_size=given.head_size, dropout=0.0)
        spec = make_spec(30, 576, 192, 8)
        result = measure(
            spec,
            hypernet,
            adapters=given.adapters,
            per_step=given.per_step,
            steps=given.steps,
            compiled=torch.cuda.is_available(),
        )
    text = json.dumps(result, indent=2)
    print(text)
    if given.out:
        given.out.write_text(text + "\n")
    return result


if __name__ == "__main__":
    main()
