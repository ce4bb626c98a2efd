"""Tiny real models, built in memory: a Llama base with grouped-query attention, a BERT sentence encoder, tokenizers.

Weights are drawn wide (0.3), so that a change anywhere shows in the outputs. What takes seconds to import is imported
by the functions that need it, as pytest-xdist reads this file before it starts the processes that run tests.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
from eval_helpers import TASKS

from t2l import endpoint
from t2l.config import EncoderConfig, HypernetConfig, LoraConfig, PromptConfig
from t2l.spec import AdapterSpec

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

    from t2l.hypernet import Hypernet
    from t2l.lora import LoraTensors

hypothesis.settings.register_profile("t2l", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("t2l")

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)  # on matrices this small, threads that wait for one another only cost time


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What a test draws does not depend on the tests before it."""
    import torch

    torch.manual_seed(0)


@contextmanager
def full_disk(size: int = 4096) -> Iterator[None]:
    """As if files could have so many bytes: writing more fails as it does on a full disk."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


SMALL: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
"""Three layers of width 32; k and v are half as wide as q. Ids as in `make_tokenizer`."""


def make_config(**changes: Any) -> LlamaConfig:
    """A Llama of the sizes above."""
    from transformers import LlamaConfig

    return LlamaConfig(**(SMALL | {"max_position_embeddings": 512} | changes))


def make_base(config: LlamaConfig, seed: int = 0) -> LlamaForCausalLM:
    import torch
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval().requires_grad_(False)


def make_tokenizer(specials: tuple[str, ...] = ("<s>", "</s>", "<pad>")) -> PreTrainedTokenizerFast:
    """One token a byte, so any text can be encoded and lengths are easy to count."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if "[CLS]" in specials:
        pairs = [(name, vocab[name]) for name in ("[CLS]", "[SEP]")]
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=pairs)
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", model_max_length=128
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=CHAT_TEMPLATE
    )


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The `datasets` library caches in the test's folder; neither data nor a key are those of who runs the tests."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "hf"))
    monkeypatch.delenv("T2L_DATA", raising=False)
    monkeypatch.delenv(endpoint.KEY_VARIABLE, raising=False)


@pytest.fixture(scope="session")
def tiny_config() -> LlamaConfig:
    return make_config()


@pytest.fixture(scope="session")
def tiny_base(tiny_config: LlamaConfig) -> LlamaForCausalLM:
    return make_base(tiny_config)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerBase:
    return make_tokenizer()


@pytest.fixture(scope="session")
def base_folder(
    tiny_base: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny base as a local model reference."""
    folder = tmp_path_factory.mktemp("models") / "tiny-base"
    tiny_base.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_sentence_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes tiny BERT folders as sentence-transformers lays them out."""
    import torch
    from transformers import BertConfig, BertModel

    def make(
        pooling: str = "mean_tokens", *, normalize: bool = True, extra: tuple[str, ...] = (), window: int = 120
    ) -> Path:
        folder = tmp_path_factory.mktemp("encoders") / "tiny-bert"
        config = BertConfig(
            vocab_size=264,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=128,
            initializer_range=0.3,
        )
        with torch.random.fork_rng():
            torch.manual_seed(1)
            BertModel(config).save_pretrained(folder)
        make_tokenizer(("[CLS]", "[SEP]", "[PAD]")).save_pretrained(folder)
        kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else []), *extra]
        paths = [f"{i}_{kind}" if i else "" for i, kind in enumerate(kinds)]
        modules = [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (kind, path) in enumerate(zip(kinds, paths, strict=True))
        ]
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": window}))
        (folder / "1_Pooling").mkdir()
        modes = dict.fromkeys(("cls_token", "mean_tokens", "max_tokens", "lasttoken"), False) | {pooling: True}
        plain = {"word_embedding_dimension": 32} | {f"pooling_mode_{k}": v for k, v in modes.items()}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(plain))
        return folder

    return make


@pytest.fixture(scope="session")
def sentence_folder(make_sentence_folder: Callable[..., Path]) -> Path:
    """The tiny BERT with mean pooling and normalisation."""
    return make_sentence_folder()


def random_lora(spec: AdapterSpec, seed: int = 0, size: float = 0.3) -> LoraTensors:
    """A single adapter whose effect is plain to see."""
    import torch

    from t2l.lora import LoraTensors

    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return size * torch.randn(len(spec.layers), *shape, generator=generator)

    return LoraTensors(
        tuple(draw(spec.rank, t.in_features) for t in spec.targets),
        tuple(draw(t.out_features, spec.rank) for t in spec.targets),
        spec.scaling,
    )


def make_hypernet(
    spec: AdapterSpec,
    *,
    kind: str = "sentence",
    embedding_size: int = 32,
    seed: int = 0,
    randomise: bool = True,
    **config: Any,
) -> Hypernet:
    """A small hypernetwork in evaluation mode, its zero-initialised weights filled so that adapters differ by text."""
    import torch

    from t2l.hypernet import Hypernet

    values: dict[str, Any] = {"variant": "L", "width": 24, "head_size": 16, "token_blocks": 2, "attention_heads": 4}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        hypernet = Hypernet(spec, embedding_size=embedding_size, kind=kind, config=HypernetConfig(**(values | config)))
        if randomise:
            randomise_head(hypernet)
    return hypernet.eval()


def randomise_head(hypernet: Hypernet, size: float = 0.2) -> None:
    """Stands in for training: every matrix that starts at zero gets small random numbers."""
    import torch

    with torch.no_grad():
        for linear in hypernet.head.write if hypernet.head is not None else ():
            linear.weight.normal_(std=size)
        for b in hypernet.shared_lora.b:
            b.normal_(std=size)


@pytest.fixture(scope="session")
def make_checkpoint(base_folder: Path, tiny_config: LlamaConfig) -> Callable[..., Path]:
    """Saves a checkpoint for the tiny base with a randomised head; `encoder` is a folder or 'base'."""
    import torch

    from t2l.checkpoint import CheckpointConfig, save_checkpoint
    from t2l.hub import fingerprint

    def make(
        folder: Path,
        *,
        encoder: str = "base",
        dtype: torch.dtype = torch.float32,
        spec: AdapterSpec | None = None,
        revision: str | None = None,
        prompt: PromptConfig | None = None,
        **hypernet_config: Any,
    ) -> Path:
        spec = spec or AdapterSpec.from_config(tiny_config, str(base_folder), LoraConfig(r=4, lora_alpha=8))
        if encoder == "base":
            layers = (0, 3) if hypernet_config.get("pointer") else (1, 3)
            encoder_config = EncoderConfig(kind="tokens", model="base", layers=layers, max_tokens=96)
        else:
            encoder_config = EncoderConfig(kind="sentence", model=encoder, max_tokens=96)
        embedding_size = 64 if encoder == "base" else 32
        hypernet = make_hypernet(spec, kind=encoder_config.kind, embedding_size=embedding_size, **hypernet_config)
        with torch.no_grad():
            for pointer in hypernet.pointers.values():
                pointer.gain.bias.fill_(0.5)
        values: dict[str, Any] = {"variant": "L", "width": 24, "head_size": 16, "token_blocks": 2, "attention_heads": 4}
        config = CheckpointConfig.current(
            {"seed": 7},
            embedding_size=embedding_size,
            encoder=encoder_config,
            encoder_revision=revision or fingerprint(str(base_folder) if encoder == "base" else encoder),
            hypernet=HypernetConfig(**(values | hypernet_config)),
            prompt=prompt or PromptConfig(),
        )
        save_checkpoint(folder, hypernet, spec, config, card="A tiny checkpoint.\n", dtype=dtype)
        return folder

    return make


DESCRIPTIONS = (
    "Translate the sentence into French.",
    "Say whether the review is positive or negative; answer with one word.",
    "Add the two numbers.",
    "Résumé: write a one-line summary — in German.",
)


@pytest.fixture(scope="session")
def tasks_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tasks of `eval_helpers`, with test examples and examples to show."""
    path = tmp_path_factory.mktemp("tasks") / "words.jsonl"
    lines = []
    for name, (description, pairs) in TASKS.items():
        shown = [(f"{text} shown {n}", answer) for n, (text, answer) in enumerate([*pairs, *pairs])]
        for split, examples in (("test", pairs), ("train", shown)):
            for text, answer in examples:
                line = {"task": name, "description": [description, f"{name}: {description}"], "split": split}
                lines.append(line | {"input": text, "output": answer})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="session")
def spec(tiny_config: Any) -> AdapterSpec:
    """q and v have different sizes, so a mix-up of targets cannot go unseen."""
    return AdapterSpec.from_config(tiny_config, "tiny/base", LoraConfig(r=4, lora_alpha=8))


@pytest.fixture(scope="session")
def checkpoint(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "t2l"))


@pytest.fixture(scope="session")
def multitask(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "multitask", variant="none"))


@pytest.fixture(scope="session")
def sft_jsonl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks with the same inputs: only the description says which answer is right."""
    from sft_helpers import ANSWERS

    rows = [
        {"task": name, "description": list(texts), "input": f"Is it {n}?", "output": name, "split": split}
        for name, texts in ANSWERS.items()
        for split, numbers in (("train", range(30, 90)), ("val", range(20, 26)))
        for n in numbers
    ]
    path = tmp_path_factory.mktemp("tasks") / "own.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="session")
def sft_config(base_folder: Path, sft_jsonl: Path) -> Any:
    """Settings of a training of six steps on these tasks, which takes a second."""
    from t2l.train.config import DataConfig, SftConfig, TrainConfig

    return SftConfig(
        base=str(base_folder),
        lora=LoraConfig(r=4, lora_alpha=8),
        encoder=EncoderConfig(kind="tokens", model="base", layers=(1, 2), max_tokens=32),
        hypernet=HypernetConfig(width=24, head_size=16, token_blocks=1, attention_heads=4),
        data=DataConfig(tasks=str(sft_jsonl), held_out_descriptions=1),
        train=TrainConfig(
            max_steps=6,
            tasks_per_batch=4,
            max_seq_length=96,
            max_target_length=12,
            description_in_prompt_prob=0.25,
            learning_rate=5e-3,
            shared_lora_learning_rate=5e-3,
            logging_steps=1,
            eval_steps=1000,
            save_steps=3,
            report_to="none",
        ),
    )
