"""What a training step of the hypernetwork costs beside a plain LoRA step: one command, all ratios from one run.

    python benchmarks/train_step.py --out steps.json           # an H100 or H200; most of the time is compiling
    python benchmarks/train_step.py --shape smollm2-135m       # one shape alone, a few minutes
    python benchmarks/train_step.py --tiny                     # CPU, seconds: shows that it runs, measures nothing

Every row makes whole steps (forward, backward, clipping, optimiser) on the same base with random weights and the same
documents. No model or data is needed: time depends on shapes alone, and what the encoder says is cached in training.

    lora            one LoRA, compiled with the very kernels of the T2L rows: what the ratios are to
    t2l sentence    hypernetwork L on sentence embeddings, an adapter for each row
    t2l tokens      hypernetwork L on token states
    ... checkpoint  the same with gradient checkpointing
    peft eager      the same LoRA by PEFT, not compiled
    reference       the published implementation's way: one document a row, padded to the longest, A and B repeated for
                    every token, logits of all positions, not compiled
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from t2l.apply import AdapterHooks, compiled, hooked
from t2l.config import EncoderConfig, HypernetConfig, LoraConfig
from t2l.encoder import Encoded
from t2l.hypernet import Hypernet
from t2l.lora import LoraTensors
from t2l.spec import AdapterSpec
from t2l.train.batches import Batch
from t2l.train.config import SftConfig, TrainConfig
from t2l.train.embeddings import EmbeddingCache
from t2l.train.loss import AnswerLosses, LossFunction, answer_losses, checkpoint_layers
from t2l.train.packing import PackedRows
from t2l.train.sft import Trainer, make_optimizer


@dataclass(frozen=True)
class Shape:
    """A base model's sizes, and a batch for it."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    rows: int
    tokens: int
    answer_tokens: int
    sentence: int
    """Size of a sentence embedding."""
    width: int
    """Of the token-level hypernetwork."""
    checkpointing: bool
    """Whether gradient checkpointing is measured too."""


SHAPES = (
    Shape("llama-3.1-8b", 4096, 14336, 32, 32, 8, 128256, 8, 512, 96, 1024, 384, True),
    Shape("smollm2-135m", 576, 1536, 30, 9, 3, 49152, 64, 384, 96, 384, 384, False),
)
TINY = Shape("tiny", 32, 48, 3, 4, 2, 264, 4, 64, 16, 16, 24, True)


@dataclass
class Row:
    """One row of the table."""

    shape: str
    step: str
    milliseconds: float | None
    """Median; None if it ran out of memory."""
    spread: float
    """Of the rounds' medians, largest over smallest."""
    gigabytes: float
    tokens: int
    """Document tokens of a step, padding not counted."""
    parameters: int
    """That are trained."""
    to_lora: float | None = None


def llama_config(shape: Shape) -> Any:
    """The configuration of a base model."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=shape.vocabulary < 100_000,
        attn_implementation="sdpa",
    )


def make_base(shape: Shape, device: torch.device) -> Any:
    """A frozen Llama with random weights."""
    from transformers import LlamaForCausalLM

    config = llama_config(shape)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    try:
        with device:
            base = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return base.eval().requires_grad_(False)


def packed_batch(shape: Shape, descriptions: int, device: torch.device) -> Batch:
    """Rows filled with documents of a quarter of their length, more or less, a sixth of each its answer."""
    draw = torch.Generator().manual_seed(0)
    size, answers = (shape.rows, shape.tokens), (shape.rows, shape.answer_tokens)
    tokens = torch.randint(shape.vocabulary, size, generator=draw)
    positions, documents = torch.zeros(size, dtype=torch.long), torch.full(size, -1)
    label_positions, labels = torch.zeros(answers, dtype=torch.long), torch.zeros(answers, dtype=torch.long)
    label_documents, weights = torch.full(answers, -1), torch.zeros(answers)
    for row in range(shape.rows):
        start = label = number = 0
        while True:
            length = int(torch.randint(shape.tokens // 8, shape.tokens * 3 // 8, (), generator=draw))
            answer = max(1, length // 6)
            end, label_end = start + length, label + answer
            if end > shape.tokens or label_end > shape.answer_tokens:
                break
            positions[row, start:end] = torch.arange(length)
            documents[row, start:end] = number
            label_positions[row, label:label_end] = torch.arange(end - answer, end)
            labels[row, label:label_end] = torch.randint(shape.vocabulary, (answer,), generator=draw)
            label_documents[row, label:label_end] = number
            weights[row, label:label_end] = 1 / answer
            start, label, number = end, label_end, number + 1
        weights[row] /= number * shape.rows
    read = torch.arange(shape.rows) % descriptions
    rows = PackedRows(tokens, positions, documents, label_positions, labels, label_documents, weights)
    shown = torch.zeros(shape.rows, dtype=torch.bool)
    return Batch(rows, read, (read + 1) % descriptions, shown, ~shown, torch.tensor(0)).to(device)


def padded_batch(packed: Batch) -> Batch:
    """The same documents, one a row."""
    whole = packed.to(torch.device("cpu"))
    batch = whole.rows
    places = [(row, n) for row in range(len(batch.tokens)) for n in range(int(batch.documents[row].max()) + 1)]
    lengths = [int((batch.documents[row] == n).sum()) for row, n in places]
    answers = [int((batch.label_documents[row] == n).sum()) for row, n in places]
    size, label_size = (len(places), max(lengths)), (len(places), max(answers))
    tokens, positions, documents = (torch.zeros(size, dtype=torch.long) for _ in range(3))
    documents -= 1
    label_positions, labels = (torch.zeros(label_size, dtype=torch.long) for _ in range(2))
    label_documents, weights = torch.full(label_size, -1), torch.zeros(label_size)
    for at, (row, n) in enumerate(places):
        own, label = batch.documents[row] == n, batch.label_documents[row] == n
        tokens[at, : lengths[at]] = batch.tokens[row][own]
        positions[at, : lengths[at]] = torch.arange(lengths[at])
        documents[at, : lengths[at]] = 0
        first = int(own.nonzero()[0])
        label_positions[at, : answers[at]] = batch.label_positions[row][label] - first
        labels[at, : answers[at]] = batch.labels[row][label]
        label_documents[at, : answers[at]] = 0
        weights[at, : answers[at]] = batch.weights[row][label]
    rows = torch.tensor([row for row, _ in places])
    padded = PackedRows(tokens, positions, documents, label_positions, labels, label_documents, weights)
    texts = (whole.read[rows], whole.negatives[rows], whole.in_prompt[rows], whole.told[rows])
    return Batch(padded, *texts, whole.skipped).to(packed.read.device)


class RandomEncoder:
    """Stands in for an encoder: the states of training are cached, so only their shape counts."""

    def __init__(self, kind: Any, embedding_size: int, max_tokens: int, device: torch.device) -> None:
        self.kind, self.embedding_size, self.max_tokens, self.device = kind, embedding_size, max_tokens, device

    def encode(self, descriptions: Sequence[str]) -> Encoded:
        n = len(descriptions)
        if self.kind == "sentence":
            return Encoded(torch.randn(n, self.embedding_size, device=self.device))
        lengths = torch.arange(n, device=self.device) % (self.max_tokens // 2) + self.max_tokens // 2
        mask = torch.arange(self.max_tokens, device=self.device) < lengths[:, None]
        return Encoded(torch.randn(*mask.shape, self.embedding_size, device=self.device) * mask[..., None], mask)


def repeated_losses(base: Any, spec: AdapterSpec, stack: ExitStack) -> LossFunction:
    """The reference's way: A and B once for every token, the vocabulary for every position."""
    current: list[LoraTensors | None] = [None]

    def hook(m: int, layer: int) -> Any:
        def add(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            lora = current[0]
            assert lora is not None
            (x,) = inputs
            tokens = x.shape[1]
            a = lora.a[m][:, layer].to(x.dtype).repeat_interleave(tokens, 0)  # (B·T, R, I)
            b = lora.b[m][:, layer].to(x.dtype).repeat_interleave(tokens, 0)
            update = torch.bmm(torch.bmm(x.reshape(-1, 1, x.shape[-1]), a.mT), b.mT)
            return output + update.view_as(output) * lora.scaling

        return add

    for m, target in enumerate(spec.targets):
        for place, layer in enumerate(spec.layers):
            module = base.get_submodule(target.path.format(layer=layer))
            stack.callback(module.register_forward_hook(hook(m, place)).remove)

    def function(rows: PackedRows, lora: LoraTensors | None, *_: Any) -> AnswerLosses:
        current[0] = lora
        mask = (rows.documents >= 0).long()
        logits = base(
            input_ids=rows.tokens, attention_mask=mask, position_ids=rows.positions, use_cache=False
        ).logits.float()
        at = rows.label_positions[..., None].expand(-1, -1, logits.shape[-1])
        # As a mean over labels at all positions, most of them ignored, would cost; here kept apart for each label.
        places = torch.full_like(rows.tokens, -100)
        places.scatter_(1, rows.label_positions.flip(1), rows.labels.flip(1))
        everywhere = F.cross_entropy(logits.flatten(0, 1), places.flatten(), reduction="none", ignore_index=-100)
        losses = everywhere.view_as(rows.tokens).gather(1, rows.label_positions)
        return AnswerLosses(losses, logits.detach().gather(1, at).argmax(-1) == rows.labels)

    return function


@contextmanager
def measured_memory(device: torch.device) -> Iterator[list[float]]:
    """Yields a list that holds the peak in GB afterwards."""
    found: list[float] = []
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    yield found
    found.append(torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0)


def measure(trainer: Trainer, batch: Batch, *, warm_up: int, rounds: int, steps: int) -> tuple[float, float, float]:
    """(median milliseconds of a step, spread of the rounds, peak GB)."""

    def wait() -> None:
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()

    for step in range(warm_up):
        trainer.step(batch, step)
    wait()
    medians = []
    with measured_memory(trainer.device) as memory:
        for _ in range(rounds):
            started = time.perf_counter()
            for step in range(steps):
                trainer.step(batch, warm_up + step)
            wait()
            medians.append((time.perf_counter() - started) / steps * 1000)
    return statistics.median(medians), max(medians) / min(medians), memory[0]


def bench(shape: Shape, device: torch.device, *, compile_: bool, warm_up: int, rounds: int, steps: int) -> list[Row]:
    """All rows of one shape."""
    torch.manual_seed(0)
    base = make_base(shape, device)
    spec = AdapterSpec.from_config(base.config, shape.name, LoraConfig(r=8, lora_alpha=16))
    batch = packed_batch(shape, 16, device)
    tokens = int((batch.rows.documents >= 0).sum())
    rows: list[Row] = []
    train = TrainConfig(max_steps=10_000, tasks_per_batch=shape.rows)
    config = SftConfig(base=shape.name, encoder=EncoderConfig(kind="tokens", layers=(1,)), train=train)
    window = 128 if device.type == "cuda" else 16
    encoders = {
        "sentence": RandomEncoder("sentence", shape.sentence, window, device),
        "tokens": RandomEncoder("tokens", 3 * shape.hidden, window, device),
    }

    def hypernet(kind: str, **changes: Any) -> Hypernet:
        sizes = {"width": shape.width, "head_size": shape.width, "attention_heads": 6} if kind == "tokens" else {}
        encoder = encoders[kind]
        built = HypernetConfig(**(sizes | changes))
        return Hypernet(spec, embedding_size=encoder.embedding_size, kind=encoder.kind, config=built).to(device).train()

    def add(name: str, trainer: Trainer, on: Batch) -> None:
        parameters = sum(p.numel() for p in trainer.hypernet.parameters() if p.requires_grad)
        try:
            median, spread, memory = measure(trainer, on, warm_up=warm_up, rounds=rounds, steps=steps)
            rows.append(Row(shape.name, name, median, spread, memory, tokens, parameters))
        except torch.cuda.OutOfMemoryError:
            rows.append(Row(shape.name, name, None, 1.0, 0.0, tokens, parameters))
        print(format_row(rows[-1], rows), flush=True)

    def trainer(network: Any, write: Any, losses: Any, bank: EmbeddingCache | None) -> Trainer:
        optimizer = make_optimizer(network, train)
        return Trainer(config, base, network, write, losses, bank, optimizer, device)

    texts = [f"{n}" for n in range(16)]
    for checkpointing in (False, True) if shape.checkpointing else (False,):
        if checkpointing:
            checkpoint_layers(base)
        suffix = " checkpoint" if checkpointing else ""
        with hooked(base, spec) as slots, compiled(base, spec) if compile_ else nullcontext():
            losses = answer_losses(base, slots, keep=checkpointing, fuse=compile_)
            one = hypernet("sentence", variant="none")

            def shared(*_: Any, one: Hypernet = one) -> LoraTensors:
                return one.shared_adapter()

            add("lora" + suffix, trainer(one, shared, losses, None), batch)
            for kind, encoder in encoders.items():
                network = hypernet(kind)
                write = torch.compile(network, dynamic=False) if compile_ else network
                bank = EmbeddingCache(encoder, texts)
                add(f"t2l {kind}{suffix}", trainer(network, write, losses, bank), batch)
    for layer in base.model.layers:
        layer.gradient_checkpointing = False

    with ExitStack() as stack:
        network = hypernet("sentence")
        way = repeated_losses(base, spec, stack)
        bank = EmbeddingCache(encoders["sentence"], texts)
        add("reference", trainer(network, network, way, bank), padded_batch(batch))

    import peft

    settings = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    peft.get_peft_model(base, settings)
    losses = answer_losses(base, AdapterHooks((), "unused"))

    def own_lora(rows: Any, _: LoraTensors, *more: Any) -> Any:
        return losses(rows, None, *more)

    add("peft eager", trainer(base, lambda *_: LoraTensors((), (), 1.0), own_lora, None), batch)
    return rows


def format_row(row: Row, rows: Sequence[Row]) -> str:
    """A line of the table; sets the row's ratio."""
    reference = next((r for r in rows if r.shape == row.shape and r.step == "lora"), None)
    if row.milliseconds is None:
        return f"| {row.shape} | {row.step} | out of memory | | | | |"
    if reference is not None and reference.milliseconds:
        row.to_lora = row.milliseconds / reference.milliseconds
    rate = row.tokens / row.milliseconds * 1000
    return (
        f"| {row.shape} | {row.step} | {row.milliseconds:.1f} (× {row.spread:.2f}) | {row.to_lora or 0:.2f} | "
        f"{rate:,.0f} | {row.gigabytes:.1f} | {row.parameters / 1e6:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", choices=[s.name for s in SHAPES], help="may be repeated")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, not compiled, a step or two")
    parser.add_argument("--out", type=Path, help="JSON with every row")
    parser.add_argument("--steps", type=int, default=10, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.tiny:
        device, shapes, effort = torch.device("cpu"), (TINY,), {"warm_up": 1, "rounds": 1, "steps": 1}
    else:
        if not torch.cuda.is_available():
            parser.error("there is no CUDA device; --tiny runs anywhere")
        device, effort = torch.device("cuda"), {"warm_up": 5, "rounds": arguments.rounds, "steps": arguments.steps}
        shapes = tuple(s for s in SHAPES if not arguments.shape or s.name in arguments.shape)
    torch.set_float32_matmul_precision("high")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, tiny: these times mean nothing"
    print(f"{name}, torch {torch.__version__}\n")
    print("| base | step | ms (spread) | to lora | tokens/s | peak GB | trained, M |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    rows = []
    for shape in shapes:
        rows += bench(shape, device, compile_=device.type == "cuda", **effort)
        torch.compiler.reset()
    if arguments.out:
        record = {"device": name, "torch": torch.__version__, "rows": [asdict(row) for row in rows]}
        arguments.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
