"""Training: it learns from descriptions, and its loss and its steps are what the settings say."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import make_base, make_hypernet, make_tokenizer, randomise_head
from sft_helpers import lengths, metrics, quiet, shorter, within
from transformers import LlamaForCausalLM

from t2l import TextToLora
from t2l.apply import apply_adapters, compiled, hooked
from t2l.config import LoraConfig, PromptConfig
from t2l.encoder import load_encoder
from t2l.hypernet import Hypernet
from t2l.prompt import render, token_ids
from t2l.spec import AdapterSpec
from t2l.text_to_lora import LoraAdapter
from t2l.train import sft, sft_step
from t2l.train.batches import Batch
from t2l.train.config import SftConfig
from t2l.train.dataset import RunData, prepare_data
from t2l.train.embeddings import EmbeddingCache
from t2l.train.loss import answer_losses, checkpoint_layers, neftune_noise
from t2l.train.sft import Trainer, make_optimizer, train
from t2l.train.sft_step import MARGIN


@pytest.fixture(scope="module")
def config(sft_config: SftConfig) -> SftConfig:
    return sft_config


def test_learns_what_only_the_description_says(config: SftConfig, tmp_path: Path) -> None:
    """Without reading the description the loss cannot fall below one coin toss a document; the answers must differ."""
    steps = 200
    # Two rows are always the two tasks, so the other row's description is the other task's.
    learning = shorter(
        config, max_steps=steps, tasks_per_batch=2, description_in_prompt_prob=0.0, logging_steps=20, save_steps=1000
    )
    learning = replace(
        learning,
        encoder=replace(config.encoder, layers=(3,)),
        hypernet=replace(config.hypernet, dropout=0.0, token_dropout=0.0),
    )
    folder = train(learning, tmp_path / "run", device="cpu", log=quiet)
    rows = metrics(tmp_path / "run")
    losses = [row["loss"] for row in rows if "loss" in row]
    judged = rows[-1]
    assert len(losses) == 10
    assert losses[-1] < losses[0] - 3
    # ln 2 on the first of four or three answer tokens, nothing on the others: the best a blind model can do.
    assert losses[-1] < 0.8 * math.log(2) * (1 / 4 + 1 / 3) / 2
    # New inputs, and descriptions that were held out.
    assert judged["seen/adapter/margin"] > 0.5
    assert judged["seen/adapter/exact_match"] > 0.9 > 0.1 > judged["seen/adapter/wrong_exact_match"]

    generator = TextToLora.from_pretrained(str(folder))
    base = LlamaForCausalLM.from_pretrained(config.base)
    prompt = torch.tensor(token_ids(make_tokenizer(), [render(make_tokenizer(), "", "Is it 21?", PromptConfig())] * 2))
    with apply_adapters(base, generator.generate(["Say yes.", "Say no."])), torch.no_grad():
        first = base(prompt).logits[:, -1].argmax(-1)
    assert make_tokenizer().convert_ids_to_tokens(first) == ["y", "n"]


def test_multi_task_lora_trains_without_descriptions(config: SftConfig, tmp_path: Path) -> None:
    blind = replace(config, hypernet=replace(config.hypernet, variant="none"))
    folder = train(blind, tmp_path / "run", device="cpu", log=quiet)
    generator = TextToLora.from_pretrained(str(folder))
    one, other = generator.generate(["Say yes.", "Say no."])
    assert all(torch.equal(x, y) for x, y in zip(one.lora.b, other.lora.b, strict=True))
    assert all(b.abs().max() > 0 for b in one.lora.b)


MakeTrainer = Callable[..., Trainer]


@pytest.fixture
def make_trainer() -> Iterator[MakeTrainer]:
    """Builds trainers as `train` does, their heads filled so that everything has a gradient."""
    with ExitStack() as stack:

        def make(config: SftConfig, base: Any, data: RunData) -> Trainer:
            encoder = load_encoder(config.encoder, config.base, base=(base, make_tokenizer()))
            spec = AdapterSpec.from_config(base.config, config.base, config.lora)
            with torch.random.fork_rng():
                torch.manual_seed(1)
                sizes = {"embedding_size": encoder.embedding_size, "kind": encoder.kind}
                hypernet = Hypernet(spec, **sizes, config=config.hypernet)
                randomise_head(hypernet)
            slots = stack.enter_context(hooked(base, spec))
            losses = answer_losses(
                base, slots, keep=config.train.gradient_checkpointing, fuse=config.train.torch_compile
            )
            cache = None if config.unconditional else EmbeddingCache(encoder, data.texts)
            optimizer = make_optimizer(hypernet, config.train)
            return Trainer(config, base, hypernet, hypernet, losses, cache, optimizer, torch.device("cpu"))

        yield make


@pytest.fixture
def own_base(tiny_config: Any) -> LlamaForCausalLM:
    """A base that may be hooked and left so."""
    return make_base(tiny_config)


@pytest.fixture
def still(config: SftConfig) -> SftConfig:
    """Without dropout, so that two passes are the same."""
    return replace(config, hypernet=replace(config.hypernet, dropout=0.0, token_dropout=0.0))


def prepared(config: SftConfig) -> tuple[RunData, Batch]:
    data = prepare_data(config, make_tokenizer(), lengths)
    return data, data.train[0]


def trainer_spec(trainer: Trainer) -> AdapterSpec:
    return AdapterSpec.from_config(trainer.base.config, trainer.config.base, trainer.config.lora)


def test_margin_loss_of_some_rows(make_trainer: MakeTrainer, still: SftConfig, own_base: LlamaForCausalLM) -> None:
    """An eighth of four rows, rounded up: the first one's hinge, the loss of all; evaluation sees all under both."""
    config = shorter(still, margin_loss_weight=0.5)
    data, batch = prepared(config)
    batch = batch._replace(in_prompt=torch.zeros(4, dtype=torch.bool))
    trainer, plain = make_trainer(config, own_base, data), make_trainer(still, make_base(own_base.config), data)
    (right, _), (wrong, _), _ = plain.compare(*plain.parts(batch), learning=False)
    of_row = (wrong - right) * batch.rows.weights
    hinge = MARGIN - of_row[0].sum() / batch.rows.weights[0].sum()
    assert hinge > 0
    assert trainer.loss(*trainer.parts(batch)).item() == pytest.approx(
        (plain.loss(*plain.parts(batch)) + 0.5 * hinge).item(), rel=1e-5
    )
    judged = [t.compare(*t.parts(batch), learning=False)[:2] for t in (trainer, plain)]
    for (mine, _), (theirs, _) in zip(*judged, strict=True):
        assert mine.shape == batch.rows.labels.shape
        assert torch.allclose(mine, theirs, atol=1e-5)
    assert not torch.allclose(judged[0][0][0], judged[0][1][0], atol=1e-3)


def test_margin_loss_of_plain_prompts_alone(
    make_trainer: MakeTrainer, still: SftConfig, own_base: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four rows two show the description: the hinge is the mean over the others, whatever the two cost."""
    monkeypatch.setattr(sft_step, "COMPARED", 1)
    config = shorter(still, margin_loss_weight=0.5, description_in_prompt_prob=0.5)
    data, batch = prepared(config)
    batch = batch._replace(in_prompt=torch.tensor([True, False, True, False]))
    trainer, plain = make_trainer(config, own_base, data), make_trainer(still, make_base(own_base.config), data)
    (right, _), (wrong, _), _ = plain.compare(*plain.parts(batch), learning=False)
    share = batch.rows.weights.sum(1)
    hinges = (MARGIN - ((wrong - right) * batch.rows.weights).sum(1) / share).relu()
    assert (hinges > 0).all()
    hinge = (hinges * share)[1::2].sum() / share[1::2].sum()
    assert trainer.loss(*trainer.parts(batch)).item() == pytest.approx(
        (plain.loss(*plain.parts(batch)) + 0.5 * hinge).item(), rel=1e-5
    )
    shown = batch._replace(in_prompt=torch.ones(4, dtype=torch.bool))
    assert trainer.loss(*trainer.parts(shown)).item() == pytest.approx(plain.loss(*plain.parts(shown)).item(), rel=1e-5)


@pytest.mark.parametrize("turns", [2, 3, 4])
def test_a_margin_loss_in_turns_is_that_of_one(
    turns: int,
    make_trainer: MakeTrainer,
    still: SftConfig,
    own_base: LlamaForCausalLM,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of four compared rows one does not count, so that turns have unlike parts of the margins; gradients too."""
    monkeypatch.setattr(sft_step, "COMPARED", 1)
    config = shorter(still, margin_loss_weight=2.0, description_in_prompt_prob=0.5, l2_weight=0.1)
    data, batch = prepared(config)
    batch = batch._replace(in_prompt=torch.tensor([False, True, False, False]))
    found = []
    for changes in ({}, {"gradient_accumulation_steps": turns}, {"margin_loss_weight": 0.0}):
        trainer = make_trainer(shorter(config, **changes), own_base, data)
        parts = trainer.parts(batch)
        assert len(parts) == changes.get("gradient_accumulation_steps", 1)
        own = [trainer.loss(part) for part in parts]
        for loss in own:
            loss.backward()
        found.append((sum(loss.item() for loss in own), [p.grad for p in trainer.hypernet.parameters()]))
    (one, grads), (other, theirs), (without, _) = found
    assert other == pytest.approx(one, rel=1e-5) and one > without + 0.1
    pairs = list(zip(grads, theirs, strict=True))
    assert all((x - y).abs().max() <= 1e-5 * x.abs().max().clamp_min(1e-3) for x, y in pairs)


def test_bfloat16_where_there_is_no_gpu(
    make_trainer: MakeTrainer, still: SftConfig, own_base: LlamaForCausalLM
) -> None:
    """Rounded products, so another loss of nearly the same size; weights and their gradients stay in float32."""
    data, batch = prepared(still)
    exact = make_trainer(still, own_base, data)
    rounded = make_trainer(shorter(still, bf16=True), make_base(own_base.config), data)
    loss = rounded.loss(*rounded.parts(batch))
    assert loss.item() != exact.loss(*exact.parts(batch)).item()
    assert loss.item() == pytest.approx(exact.loss(*exact.parts(batch)).item(), rel=0.02)
    loss.backward()
    assert all(p.dtype == torch.float32 for p in rounded.hypernet.parameters())
    assert all(p.grad.dtype == torch.float32 for p in rounded.hypernet.parameters() if p.grad is not None)


def test_evaluation_keeps_nothing_for_a_backward_pass(
    make_trainer: MakeTrainer, still: SftConfig, own_base: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU three batches' activations stayed in memory at a time, three times a training step's."""
    data, batch = prepared(still)
    trainer = make_trainer(still, own_base, data)
    held: list[torch.Tensor] = []

    def compare(*arguments: Any, **options: Any) -> Any:
        right, wrong, lora = Trainer.compare(trainer, *arguments, **options)
        held.extend([right.losses, wrong.losses, *lora.a, *lora.b])
        return right, wrong, lora

    monkeypatch.setattr(trainer, "compare", compare)
    sft.evaluate(trainer, data)
    assert held and not any(x.requires_grad for x in held)
    assert trainer.loss(*trainer.parts(batch)).requires_grad


def test_label_smoothing_is_torchs_and_only_in_training(
    make_trainer: MakeTrainer, still: SftConfig, own_base: LlamaForCausalLM
) -> None:
    smooth = shorter(still, label_smoothing_factor=0.1)
    data, batch = prepared(smooth)
    trainer = make_trainer(smooth, own_base, data)
    plain = make_trainer(still, make_base(own_base.config), data)
    with torch.no_grad():
        learning = trainer.forward(batch.rows, batch.read, learning=True)[0].losses
        judging = trainer.forward(batch.rows, batch.read, learning=False)[0].losses
        (expected, _), lora = plain.forward(batch.rows, batch.read, learning=True)
    assert torch.equal(judging, expected)
    with torch.no_grad():
        row, own = 0, batch.rows.label_documents[0] == 0
        length = int(within(batch, 0, 0).sum())
        adapter = LoraAdapter(lora.unbind()[row], trainer_spec(trainer), "", {})
        with apply_adapters(make_base(own_base.config), adapter) as model:
            logits = model(batch.rows.tokens[:1, :length]).logits[0][batch.rows.label_positions[row][own]]
    reference = F.cross_entropy(logits, batch.rows.labels[row][own], reduction="none", label_smoothing=0.1)
    assert (learning[row][own] - reference).abs().max() <= 1e-4
    assert (learning[row][own] - expected[row][own]).abs().max() > 1e-2


def test_l2_is_the_mean_square_of_what_is_written(
    make_trainer: MakeTrainer, still: SftConfig, own_base: LlamaForCausalLM
) -> None:
    data, batch = prepared(still)
    other = make_trainer(still, own_base, data)
    plain = other.loss(*other.parts(batch))
    trainer = make_trainer(shorter(still, l2_weight=0.5), make_base(own_base.config), data)
    lora = trainer.adapters(batch.read, learning=True)
    squares = [torch.stack([x.square().mean() for x in part]).mean() for part in (lora.a, lora.b)]
    assert (trainer.loss(*trainer.parts(batch)) - plain - 0.5 * (squares[0] + squares[1])).abs() <= 1e-5
    assert 0.5 * (squares[0] + squares[1]) > 1e-2


def test_neftune_noise_is_scaled_by_each_documents_length() -> None:
    """Uniform in ± alpha / sqrt(T·E): a packed document gets what it would get alone."""
    documents = torch.tensor([[0] * 4 + [1] * 36 + [-1] * 10])
    noise = neftune_noise(documents, 400, 5.0)[0]
    for part, length in ((noise[:4], 4), (noise[4:40], 36)):
        bound = 5 / math.sqrt(length * 400)
        assert part.abs().max() <= bound
        assert part.abs().max() > 0.99 * bound
        assert part.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert abs(part.mean().item()) < 0.05 * bound
    assert not neftune_noise(documents, 400, 0.0).any()


def test_neftune_disturbs_training_alone(
    make_trainer: MakeTrainer, still: SftConfig, own_base: LlamaForCausalLM
) -> None:
    noisy = shorter(still, neftune_noise_alpha=5.0)
    data, batch = prepared(noisy)
    trainer = make_trainer(noisy, own_base, data)
    plain = make_trainer(still, make_base(own_base.config), data)
    with torch.no_grad():
        one, other, judged = (
            trainer.forward(batch.rows, batch.read, learning=learning)[0].losses for learning in (True, True, False)
        )
        expected = plain.forward(batch.rows, batch.read, learning=False)[0].losses
    assert torch.equal(judged, expected)
    assert not torch.equal(one, other) and not torch.equal(one, expected)


def test_rows_whose_own_text_says_nothing_have_no_margin(
    make_trainer: MakeTrainer,
    still: SftConfig,
    own_base: LlamaForCausalLM,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The margin loss is then that of the other rows alone."""
    monkeypatch.setattr(sft_step, "COMPARED", 1)
    comparing = shorter(still, margin_loss_weight=1.0, description_in_prompt_prob=0.0)
    data, batch = prepared(comparing)
    trainer = make_trainer(comparing, own_base, data)
    right, wrong, _ = trainer.compare(*trainer.parts(batch), learning=False)
    told = torch.ones_like(batch.told)
    told[0] = False
    some = batch._replace(told=told)
    rest = batch._replace(
        rows=batch.rows.part(1, 4), read=batch.read[1:], in_prompt=batch.in_prompt[1:], told=batch.told[1:]
    )
    expected = trainer._hinge(*trainer.parts(rest), right.losses[1:], wrong.losses[1:])
    assert torch.allclose(trainer._hinge(*trainer.parts(some), right.losses, wrong.losses), expected, atol=1e-6)


def test_gradient_checkpointing_changes_no_gradient(
    make_trainer: MakeTrainer, still: SftConfig, own_base: LlamaForCausalLM
) -> None:
    """The layers run again in the backward pass, under the same adapters."""
    data, batch = prepared(still)
    runs = []
    for checkpointing in (False, True):
        base, calls = make_base(own_base.config), []
        config = shorter(still, gradient_checkpointing=checkpointing)
        trainer = make_trainer(config, base, data)
        if checkpointing:
            checkpoint_layers(base)
        base.model.layers[1].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        trainer.loss(*trainer.parts(batch)).backward()
        runs.append((len(calls), [p.grad for p in trainer.hypernet.parameters()]))
    assert [calls for calls, _ in runs] == [1, 2]
    pairs = list(zip(runs[0][1], runs[1][1], strict=True))
    assert all((x - y).abs().max() <= 1e-6 * x.abs().max().clamp_min(1) for x, y in pairs)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler itself looks at it
@pytest.mark.parametrize(("checkpointing", "margin_loss_weight"), [(False, 1.0), (True, 0.0)])
def test_compiled_step_is_the_same_step(
    checkpointing: bool,
    margin_loss_weight: float,
    make_trainer: MakeTrainer,
    still: SftConfig,
    own_base: LlamaForCausalLM,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Layers and hypernetwork are traced whole, with nothing left to Python, gradient checkpointing included."""
    torch.compiler.reset()  # what other tests compiled counts towards a limit
    layer_compile, torch_compile = torch.nn.Module.compile, torch.compile
    plain = {"backend": "aot_eager"}  # graphs are made as ever, but not turned into kernels
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: layer_compile(self, **options | plain))
    monkeypatch.setattr(torch, "compile", lambda f, **options: torch_compile(f, **options | plain))
    config = shorter(
        still, margin_loss_weight=margin_loss_weight, label_smoothing_factor=0.1, gradient_checkpointing=checkpointing
    )
    data, batch = prepared(config)
    gradients = []
    for compile_ in (False, True):
        base = make_base(own_base.config)
        trainer = make_trainer(shorter(config, torch_compile=compile_), base, data)
        if checkpointing:
            checkpoint_layers(base)
        if compile_:
            trainer.write = torch.compile(trainer.hypernet, dynamic=False, fullgraph=True)
        with compiled(base, trainer_spec(trainer)) if compile_ else nullcontext():
            trainer.loss(*trainer.parts(batch)).backward()
        gradients.append({name: p.grad for name, p in trainer.hypernet.named_parameters()})
    for name, one in gradients[0].items():
        assert (one - gradients[1][name]).abs().max() <= 1e-4 * one.abs().max().clamp_min(1), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_run_is_nearly_the_plain_one(config: SftConfig, tmp_path: Path) -> None:
    config = replace(config, hypernet=replace(config.hypernet, dropout=0.0, token_dropout=0.0))
    rows = []
    for compile_ in (False, True):
        run = tmp_path / str(compile_)
        train(shorter(config, torch_compile=compile_, margin_loss_weight=0.5), run, device="cpu", log=quiet)
        rows.append([row["loss"] for row in metrics(run) if "loss" in row])
    assert len(rows[0]) == config.train.max_steps
    assert rows[1] == pytest.approx(rows[0], rel=1e-3)


def test_mixed_precision_trains_every_part(tiny_config: Any) -> None:
    """As on a GPU: weights in float32, products in bfloat16, averages in float32."""
    spec = AdapterSpec.from_config(tiny_config, "tiny", LoraConfig(r=4, lora_alpha=8))
    hypernet = make_hypernet(spec).train()
    with torch.autocast("cpu", torch.bfloat16):
        lora = hypernet(torch.randn(3, 32), None, torch.tensor([0.0, 1.0, 0.5]))
        loss = sum(x.float().square().mean() for x in (*lora.a, *lora.b))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in hypernet.parameters())
    assert all(torch.equal(x[0], offset) for x, offset in zip(lora.b, hypernet.shared_lora.b, strict=True))
    assert all(x.dtype == torch.float32 for x in hypernet.state_dict().values())
