"""The engine: whatever else is in the batch, an answer is the one that its adapter gives alone."""

import gc
import json
import random
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import make_base, make_config
from loading import load
from serve_helpers import SHAPES, TinyAdapter, in_use, make_adapter, make_prompt, reference
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from t2l.apply import apply_adapters
from t2l.errors import AnswerError, BusyError, ClosingError, ConfigError, RequestError
from t2l.serve.answers import Answer, Generation, Piece
from t2l.serve.batch import _piece_length
from t2l.serve.engine import Engine
from t2l.serve.limits import Limits
from t2l.serve.sampling import Sampling


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    model = make_base(make_config())
    model.generation_config.eos_token_id = 1
    return model


@pytest.fixture(scope="module")
def adapters(base: LlamaForCausalLM) -> list[TinyAdapter]:
    return [make_adapter(base, seed, **SHAPES[seed % len(SHAPES)]) for seed in range(8)]


@pytest.fixture
def engine(base: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase) -> Iterator[Engine]:
    engine = Engine(base, tiny_tokenizer, Limits(rows=8, prompt_piece=24))
    yield engine
    engine.close()
    assert hooks(base) == 0, "an engine that is idle leaves no hook on the model"


def hooks(model: torch.nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def generation(ids: list[int], adapter: Any = None, max_tokens: int = 12, **options: Any) -> Generation:
    return Generation(prompt=ids, adapter=adapter, max_tokens=max_tokens, **options)


# ------------------------------------------------------------------------------------------------ the same answers


def test_answers_are_the_same_alone_and_in_any_batch(
    engine: Engine, base: LlamaForCausalLM, tiny_tokenizer: Any, adapters: list[TinyAdapter]
) -> None:
    """Prompts of all lengths, adapters of four shapes and none, answers of all lengths, joining and leaving."""
    draw = random.Random(1)
    asked = [(make_prompt(n), draw.choice([None, *adapters]), draw.randrange(1, 25)) for n in range(40)]
    expected = [reference(base, tiny_tokenizer, *request) for request in asked]
    alone = [engine.submit(generation(*request)).text() for request in asked[:10]]
    assert alone == expected[:10]
    together = []
    for request in asked:
        together.append(engine.submit(generation(*request)))
        time.sleep(draw.choice([0, 0, 0.004]))
    assert [answer.text() for answer in together] == expected
    assert engine.counts["forward_rows"] > 1.5 * engine.counts["forward_passes"], "they must share forward passes"


def test_base_rows_beside_adapters_get_the_bits_of_the_base(
    base: LlamaForCausalLM, tiny_tokenizer: Any, adapters: list[TinyAdapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a row lacks is zero, not almost zero: same batch shape, other rows' adapters on and off."""
    from t2l.serve.rows import RowAdapters

    tokens = torch.tensor([make_prompt(n, 9) for n in range(3)])
    plain = base(tokens).logits
    rows = RowAdapters(base)
    rows.set(0, adapters[1])
    rows.set(2, adapters[3])
    rows.select(0, 3)
    mixed = base(tokens).logits
    assert torch.equal(mixed[1], plain[1])
    assert not torch.equal(mixed[0], plain[0]) and not torch.equal(mixed[2], plain[2])
    # From q, k, v, o to q, v alone: nothing of k and o stays.
    rows.set(0, adapters[0])
    rows.select(0, 1)
    only = RowAdapters(base)
    after = base(tokens[:1]).logits
    rows.release()
    only.set(0, adapters[0])
    only.select(0, 1)
    assert (base(tokens[:1]).logits - after).abs().max() <= 1e-5
    stacks = {name: stack for (name, *_), stack in only._stacks.items()}
    assert not any("k_proj" in name or "o_proj" in name for name in stacks)
    only.release()
    assert torch.equal(base(tokens).logits, plain)


def test_a_row_forgets_the_adapter_before(base: LlamaForCausalLM, adapters: list[TinyAdapter]) -> None:
    """The next adapter in a row has other targets and a smaller rank: the rest of the row is exactly zero."""
    from t2l.serve.rows import RowAdapters

    rows = RowAdapters(base)
    rows.set(0, adapters[3])
    rows.set(0, adapters[1])
    for (path, *_), stack in rows._stacks.items():
        spoken = {target.path for target in adapters[1].spec.targets}
        a, b = stack._a[:, 0], stack._b[:, 0]
        if path not in spoken:
            assert not a.any() and not b.any(), path
        else:
            assert not a[..., adapters[1].spec.rank :].any() and a[..., : adapters[1].spec.rank].any()
    rows.release()


def test_adapters_are_kept_ready_as_long_as_they_live(base: LlamaForCausalLM) -> None:
    """As on a GPU: the same numbers in the rows, nothing made twice, and nothing left of an adapter that has gone."""
    from t2l.serve.rows import RowAdapters

    kept, plain = RowAdapters(base, keep=True), RowAdapters(base)
    living, gone = make_adapter(base, 1), make_adapter(base, 2, targets=("down_proj",), rank=7, layers=(1,))
    for adapters in ((living, gone), (gone, living)):
        for row, adapter in enumerate(adapters):
            kept.set(row, adapter)
            plain.set(row, adapter)
        for one, other in zip(kept._stacks.values(), plain._stacks.values(), strict=True):
            assert torch.equal(one._a, other._a) and torch.equal(one._b, other._b)
    both, alone = kept.kept_nbytes, sum(x.nbytes for x in (*living.lora.a, *living.lora.b))
    assert both > alone > 0 == plain.kept_nbytes
    assert kept._ready.get(living.lora) is kept._ready.get(living.lora)
    del gone, adapter, adapters
    gc.collect()
    assert kept.kept_nbytes == alone
    kept.release()
    plain.release()


def test_clients_with_an_adapter_each_and_constant_churn(
    base: LlamaForCausalLM, tiny_tokenizer: Any, adapters: list[TinyAdapter]
) -> None:
    """8 clients x 8 adapters, rows scarcer than clients, some answers cancelled half-way."""
    asked = [[(make_prompt(100 * c + n), adapters[(c + n) % 8], 3 + (c * n) % 14) for n in range(5)] for c in range(8)]
    expected = [[reference(base, tiny_tokenizer, *request) for request in client] for client in asked]
    engine = Engine(base, tiny_tokenizer, Limits(rows=5, prompt_piece=16))
    found: list[list[str]] = [[] for _ in asked]

    def client(number: int) -> None:
        for n, request in enumerate(asked[number]):
            doomed = engine.submit(generation(make_prompt(n + number, 30), adapters[n], 200))
            found[number].append(engine.submit(generation(*request)).text())
            doomed.cancel()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    engine.close()
    assert found == expected


def test_models_of_other_kinds(tiny_tokenizer: Any) -> None:
    """Eager attention takes an additive mask, and the window of one layer is shorter than prompts."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(3)
    sizes = {
        "vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3,
    }  # fmt: skip
    windows = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
    eager = Qwen3ForCausalLM._from_config(
        Qwen3Config(**sizes, **windows, eos_token_id=1, max_position_embeddings=60), attn_implementation="eager"
    ).eval()
    adapter = make_adapter(eager, 5)
    engine = Engine(eager, tiny_tokenizer)
    assert engine.most_tokens == 60
    asked = [(make_prompt(n, 5 + 9 * n), adapter if n % 2 else None, 12) for n in range(4)]
    answers = [engine.submit(generation(*request)) for request in asked]
    assert [a.text() for a in answers] == [reference(eager, tiny_tokenizer, *request) for request in asked]
    engine.close()


def test_models_that_keep_other_states_are_refused(base: LlamaForCausalLM, tiny_tokenizer: Any) -> None:
    model = make_base(make_config())
    model.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    with pytest.raises(ConfigError, match="linear_attention"):
        Engine(model, tiny_tokenizer)


# ------------------------------------------------------------------------------------------------ pieces and ends


def test_streamed_pieces_are_the_whole_text(engine: Engine, adapters: list[TinyAdapter]) -> None:
    for seed in range(6):
        request = generation(make_prompt(seed), adapters[seed], 40)
        pieces = list(engine.submit(request))
        assert "".join(piece.text for piece in pieces) == engine.submit(request).text()
        assert [piece.end for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        assert sum(len(piece.choices) for piece in pieces) <= 40


def test_stop_strings_end_an_answer_and_leave_the_engine(engine: Engine, adapters: list[TinyAdapter]) -> None:
    whole = engine.submit(generation(make_prompt(3, 12), adapters[0], 60)).text()
    assert len(whole) > 12
    for stop in (whole[5:8], whole[7:8], whole[4:12]):
        pieces = list(engine.submit(generation(make_prompt(3, 12), adapters[0], 60, stops=("never this", stop))))
        assert "".join(piece.text for piece in pieces) == whole[: whole.index(stop)]
        assert pieces[-1].end == "stop"
    pieces = list(engine.submit(generation(make_prompt(3, 12), adapters[0], 60, stops=("never this",))))
    assert "".join(piece.text for piece in pieces) == whole


def test_a_seed_draws_the_same_in_any_batch(engine: Engine, adapters: list[TinyAdapter]) -> None:
    def request(seed: int | None, n: int = 0) -> Generation:
        sampling = Sampling(temperature=1.3, top_p=0.9 if n % 2 else 1.0, seed=seed)
        return generation(make_prompt(n, 20), adapters[n], 20, sampling=sampling)

    alone = [engine.submit(request(7, n)).text() for n in range(4)]
    answers = [engine.submit(request(seed, n)) for seed in (7, None, 8) for n in range(4)]
    texts = [answer.text() for answer in answers]
    assert texts[:4] == alone
    assert all(other != text for text, other in zip(texts[:4], texts[8:], strict=True))


def test_logprobs_are_of_the_models_distribution(
    engine: Engine, base: LlamaForCausalLM, adapters: list[TinyAdapter]
) -> None:
    ids = make_prompt(4, 10)
    sampling = Sampling(top_logprobs=3, temperature=2.0, seed=1)
    pieces = list(engine.submit(generation(ids, adapters[0], 5, sampling=sampling)))
    choices = [choice for piece in pieces for choice in piece.choices]
    with apply_adapters(base, adapters[0]):
        logits = base(torch.tensor([ids + [choice.token for choice in choices]])).logits[0, len(ids) - 1 : -1]
    expected = logits.log_softmax(-1)
    for step, choice in enumerate(choices):
        assert choice.logprob == pytest.approx(float(expected[step, choice.token]), abs=1e-4)
        assert [token for token, _ in choice.top] == expected[step].topk(3).indices.tolist()


def test_cancelled_and_overdue_answers_end_soon(engine: Engine, adapters: list[TinyAdapter]) -> None:
    long = engine.submit(generation(make_prompt(1), adapters[0], 400, stops=("never this",)))
    overdue = engine.submit(generation(make_prompt(2), adapters[1], 400, timeout=0.05))
    first = next(iter(long))
    assert first.end is None
    long.cancel()
    for answer, why in ((long, "cancelled"), (overdue, "deadline")):
        started = time.monotonic()
        ends = {piece.end for piece in answer} - {None}
        assert time.monotonic() - started < 5
        assert ends == {why} or ends == {"stop"}


def test_memory_returns_when_idle(engine: Engine, adapters: list[TinyAdapter]) -> None:
    answers = [engine.submit(generation(make_prompt(n), adapters[n], 30)) for n in range(8)]
    next(iter(answers[-1]))
    assert engine.state["cache_bytes"] > 0
    for answer in answers:
        answer.cancel()
    for _ in range(200):
        if engine.state == dict.fromkeys(engine.state, 0):
            break
        time.sleep(0.02)
    assert engine.state == dict.fromkeys(engine.state, 0)


# ---------------------------------------------------------------------------------------------------- failing rows


def test_a_failing_row_leaves_alone(base: LlamaForCausalLM, tiny_tokenizer: Any, adapters: list[TinyAdapter]) -> None:
    """Not finite, not fitting, and raising in the forward pass: each ends with its reason, the others as if alone."""
    before = base(torch.tensor([make_prompt(9)])).logits
    broken = replace(adapters[0], lora=adapters[0].lora.map(lambda x: x.clone()))
    broken.lora.b[0][1, 3] = float("nan")
    foreign = make_adapter(make_base(make_config(num_hidden_layers=5)), 1)
    asked = [(make_prompt(n, 20), adapters[n], 20) for n in range(4)]
    expected = [reference(base, tiny_tokenizer, *request) for request in asked]
    engine = Engine(base, tiny_tokenizer, Limits(rows=8))
    answers = [engine.submit(generation(*request)) for request in asked[:2]]
    failing = [engine.submit(generation(make_prompt(5), adapter, 20)) for adapter in (broken, foreign)]
    answers += [engine.submit(generation(*request)) for request in asked[2:]]
    assert [answer.text() for answer in answers] == expected
    last = [list(answer)[-1] for answer in failing]
    assert [piece.end for piece in last] == ["error", "error"]
    assert "not finite" in str(last[0].error) and "no such module" in str(last[1].error)
    # Its keys and values were not finite either; the rows that come into their place see nothing of it.
    assert [engine.submit(generation(*request)).text() for request in asked] == expected
    engine.close()
    assert torch.equal(base(torch.tensor([make_prompt(9)])).logits, before)


def test_an_exception_in_the_pass_ends_only_its_row(
    base: LlamaForCausalLM, tiny_tokenizer: Any, adapters: list[TinyAdapter]
) -> None:
    before = base(torch.tensor([make_prompt(9)])).logits
    asked = [(make_prompt(n, 20), adapters[n], 20) for n in range(4)]
    expected = [reference(base, tiny_tokenizer, *request) for request in asked]

    def trip(module: Any, args: Any, kwargs: Any) -> None:
        if kwargs["input_ids"][:, :3].tolist().count([0, 5, 263]):
            raise RuntimeError("boom")

    handle = base.register_forward_pre_hook(trip, with_kwargs=True)
    engine = Engine(base, tiny_tokenizer, Limits(rows=8))
    try:
        answers = [engine.submit(generation(*request)) for request in asked[:2]]
        poisoned = engine.submit(generation([0, 5, 263], adapters[5], 20))
        answers += [engine.submit(generation(*request)) for request in asked[2:]]
        found = [answer.text() for answer in answers]
        piece = list(poisoned)[-1]
    finally:
        engine.close()
        handle.remove()
    assert (piece.end, piece.error) == ("error", "RuntimeError"), "what went wrong inside is not the client's to read"
    assert found == expected
    assert torch.equal(base(torch.tensor([make_prompt(9)])).logits, before)


def test_a_listener_that_fails_costs_only_its_answer(engine: Engine, adapters: list[TinyAdapter]) -> None:
    def broken(piece: Piece) -> None:
        raise RuntimeError("the client has gone")

    bad = engine.submit(generation(make_prompt(1), adapters[0], 50), broken)
    assert engine.submit(generation(make_prompt(2), adapters[1], 10)).text()
    assert bad.cancelled


# ------------------------------------------------------------------------------------------------- limits and jobs


def test_what_can_never_fit_is_refused_with_the_numbers(engine: Engine) -> None:
    with pytest.raises(RequestError, match=r"500 tokens; with 13 .* 513, and at most 512"):
        engine.submit(generation(make_prompt(1, 500), None, 13))
    with pytest.raises(RequestError, match="at least one token"):
        engine.submit(generation([], None, 13))


def test_the_queue_has_an_end(base: LlamaForCausalLM, tiny_tokenizer: Any) -> None:
    engine = Engine(base, tiny_tokenizer, Limits(rows=1, waiting=2))
    gate = threading.Event()
    engine.run(gate.wait)
    answers = [engine.submit(generation(make_prompt(n))) for n in range(2)]
    with pytest.raises(BusyError, match="2 requests wait"):
        engine.submit(generation(make_prompt(3)))
    gate.set()
    assert all(answer.text() is not None for answer in answers)
    engine.close()
    with pytest.raises(ClosingError, match="shutting down"):
        engine.submit(generation(make_prompt(3)))


def test_room_in_the_cache_bounds_the_rows(
    base: LlamaForCausalLM, tiny_tokenizer: Any, adapters: list[TinyAdapter]
) -> None:
    engine = Engine(base, tiny_tokenizer, Limits(rows=8, tokens=100))
    most = 0

    def listener(piece: Piece) -> None:
        nonlocal most
        most = max(most, engine.state["running"])
        if piece.end:
            done.release()

    done = threading.Semaphore(0)
    for n in range(8):
        engine.submit(generation(make_prompt(n, 20), adapters[n], 20, stops=("never this",)), listener)
    for _ in range(8):
        assert done.acquire(timeout=20)
    engine.close()
    assert most == 2, "two rows of forty tokens fit into a hundred"


def test_jobs_run_between_tokens_on_the_plain_model(
    engine: Engine, base: LlamaForCausalLM, adapters: list[TinyAdapter]
) -> None:
    tokens = torch.tensor([make_prompt(9)])
    plain = base(tokens).logits
    answer = engine.submit(generation(make_prompt(1), adapters[0], 60))
    next(iter(answer))
    assert torch.equal(engine.run(lambda: base(tokens).logits).result(10), plain)
    with pytest.raises(ZeroDivisionError):
        engine.run(lambda: 1 // 0).result(10)
    answer.cancel()


def test_closing_lets_answers_end_and_then_ends_them(
    base: LlamaForCausalLM, tiny_tokenizer: Any, adapters: list[TinyAdapter]
) -> None:
    engine = Engine(base, tiny_tokenizer)
    short = engine.submit(generation(make_prompt(1), adapters[0], 5))
    engine.close(patience=20)
    assert list(short)[-1].end in ("stop", "length")
    engine = Engine(base, tiny_tokenizer, Limits(rows=1))
    slow = [engine.submit(generation(make_prompt(n), None, 450)) for n in range(3)]
    engine.run(lambda: time.sleep(0.1))
    engine.close()
    assert {list(answer)[-1].end for answer in slow} <= {"cancelled", "stop", "length"}
    assert isinstance(slow[0], Answer)


@pytest.mark.parametrize("for_good", [False, True])
def test_nobody_waits_for_ever_when_the_engine_itself_fails(
    for_good: bool, base: LlamaForCausalLM, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def boom(*_: Any) -> None:
        raise RuntimeError("device lost")

    engine = Engine(base, tiny_tokenizer, Limits(rows=1))
    gate = threading.Event()
    engine.run(gate.wait)
    answers = [engine.submit(generation(make_prompt(n))) for n in range(2)]
    late = engine.run(lambda: 1)
    with monkeypatch.context() as patch:
        patch.setattr(engine._batch, "step", boom)
        if for_good:
            patch.setattr(engine._batch, "fail", boom)
        gate.set()
        ends = [list(answer)[-1].end for answer in answers]
    assert ends == ["error", "error"]
    if for_good:
        with pytest.raises(AnswerError, match="engine stopped"):
            late.result(10)
        assert not engine.alive
        with pytest.raises(AnswerError, match="engine stopped"):
            engine.submit(generation(make_prompt(1)))
    else:
        assert late.result(10) == 1
        assert engine.alive and engine.submit(generation(make_prompt(1))).text() is not None
    engine.close()
    assert hooks(base) == 0


@pytest.mark.parametrize(
    ("unread", "most", "length"),
    [([10], 512, 10), ([10], 4, 4), ([9, 10, 10], 512, 10), ([2, 10], 512, 2), ([2, 10], 1, 1), ([5, 6, 40], 512, 6)],
)
def test_prompts_are_read_with_little_padding(unread: list[int], most: int, length: int) -> None:
    assert _piece_length(unread, most) == length


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_benchmark_runs(
    base_folder: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = load("benchmarks", "serve")
    options = ["--base", str(base_folder), "--adapters", "3", "--requests", "4", "--rows", "2", "--new-tokens", "3"]
    found = tmp_path / "figures.json"
    monkeypatch.setattr(sys, "argv", ["serve.py", *options, "--repeats", "1", "--json", str(found)])
    module.main()
    assert json.loads(found.read_text())["ratios"].keys() == module.GOALS.keys()
    assert "engine, one adapter" in capsys.readouterr().out


def test_packed_linears_compute_the_same_and_leave_the_model_as_it_was(base: LlamaForCausalLM) -> None:
    from t2l.serve.packed import PackedLinears

    tokens = torch.tensor([make_prompt(n, 9) for n in range(3)])
    plain = base(tokens).logits
    packed = PackedLinears(base)
    assert packed._modules or sys.platform == "darwin", "CPUs that run these tests have oneDNN"
    assert (base(tokens).logits - plain).abs().max() <= 1e-5 * plain.abs().max()
    linear = base.model.layers[0].mlp.down_proj
    odd = torch.randn(2, linear.in_features, 5).mT  # rows that do not lie one after the other
    assert (linear(odd) - torch.nn.functional.linear(odd, linear.weight)).abs().max() <= 1e-5
    packed.release()
    assert torch.equal(base(tokens).logits, plain) and "forward" not in vars(linear)


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc for the memory in use")
def test_packed_linears_do_not_keep_memory_for_each_number_of_rows() -> None:
    """oneDNN keeps a program of half a MiB for each number of rows that it meets, and prompts have all lengths."""
    from t2l.serve.packed import SIZES, PackedLinears

    linear = torch.nn.Linear(24, 40)
    packed = PackedLinears(linear)

    @torch.no_grad()
    def grown(numbers: Iterable[int]) -> float:
        before = in_use()
        for rows in numbers:
            x = torch.randn(1, rows, 24)
            assert torch.allclose(linear(x), torch.nn.functional.linear(x, linear.weight, linear.bias), atol=1e-5)
        return (in_use() - before) / 2**20

    first, others = grown(SIZES), grown(range(1, 700))
    packed.release()
    assert first < len(SIZES) and others < 1, (first, others)
