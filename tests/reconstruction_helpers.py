"""What the tests of reconstruction share: libraries of random adapters."""

from pathlib import Path
from typing import Any

import torch
from conftest import random_lora
from transformers import LlamaConfig

from t2l.config import EncoderConfig, HypernetConfig, LoraConfig, PromptConfig
from t2l.library import AdapterLibrary, save_library
from t2l.lora import LoraTensors
from t2l.spec import AdapterSpec
from t2l.train.reconstruction import ReconstructionConfig, ReconstructionTrainConfig, train_reconstruction
from t2l.train.reconstruction_data import ReconstructionDataConfig

NAMES = ("add", "bark", "count", "dance", "echo", "fold")
CPU = torch.device("cpu")


def stacked(spec: AdapterSpec, number: int, seed: int = 0, size: float = 0.3) -> LoraTensors:
    return LoraTensors.stack([random_lora(spec, 100 * seed + n, size) for n in range(number)])


def quiet(_: str) -> None:
    pass


def run(config: ReconstructionConfig, folder: Path, **options: Any) -> Path:
    return train_reconstruction(config, folder, device="cpu", log=quiet, **options)


def make_spec(tiny_config: LlamaConfig, base_folder: Path) -> AdapterSpec:
    return AdapterSpec.from_config(
        tiny_config, str(base_folder), LoraConfig(target_modules=("q_proj", "v_proj"), r=4, lora_alpha=6)
    )


def make_library(spec: AdapterSpec, folder: Path) -> AdapterLibrary:
    """Six adapters that differ from a common start in a few directions, as training leaves them."""
    start, ways = stacked(spec, 1), stacked(spec, 3, seed=1, size=0.1)
    mix = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))

    def combine(first: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
        return first + torch.einsum("nk,k...->n...", mix, basis)

    lora = LoraTensors(
        tuple(combine(x, y) for x, y in zip(start.a, ways.a, strict=True)),
        tuple(combine(x, y) for x, y in zip(start.b, ways.b, strict=True)),
        spec.scaling,
    )
    facts = {
        name: {
            "descriptions": [f"{verb} {name}, {number} times." for verb in ("Do", "Please", "Now") for number in "12"]
        }
        for name in NAMES
    }
    return save_library(folder, lora, spec, facts)


def make_config(library: AdapterLibrary, sentence_folder: Path) -> ReconstructionConfig:
    return ReconstructionConfig(
        encoder=EncoderConfig(kind="sentence", model=str(sentence_folder), max_tokens=60),
        hypernet=HypernetConfig(width=24, head_size=16, dropout=0.0),
        prompt=PromptConfig(description_in_prompt=True),
        data=ReconstructionDataConfig(library=str(library.folder), held_out_descriptions=2),
        train=ReconstructionTrainConfig(
            max_steps=12,
            adapters_per_batch=4,
            learning_rate=5e-3,
            logging_steps=3,
            eval_steps=6,
            save_steps=6,
            report_to="none",
        ),
    )
