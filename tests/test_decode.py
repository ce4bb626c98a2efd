"""Answers of a batch that rows leave: token by token those of `model.generate`, and how large a batch may be."""

import random
import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import SMALL, make_base, make_config, random_lora
from transformers import AutoModelForCausalLM, Lfm2Config, MistralConfig

from t2l.apply import apply_adapters
from t2l.config import LoraConfig
from t2l.eval import decode
from t2l.spec import AdapterSpec
from t2l.text_to_lora import LoraAdapter

# Answers as ids: a text hides which bytes were no character.
IDS = SimpleNamespace(pad_token_id=2, eos_token_id=1, batch_decode=lambda said, skip_special_tokens: said)


@pytest.fixture(scope="module")
def adapters(tiny_config: Any) -> list[LoraAdapter]:
    spec = AdapterSpec.from_config(tiny_config, "tiny/base", LoraConfig(r=4, lora_alpha=8))
    return [LoraAdapter(random_lora(spec, seed), spec, "", {}) for seed in range(12)]


def draw_prompts(draw: random.Random, number: int) -> list[list[int]]:
    return [[0, *(draw.randrange(3, 264) for _ in range(draw.randint(0, 25)))] for _ in range(number)]


def generated(
    model: Any, prompts: Sequence[list[int]], adapters: Any, ends: Sequence[int], limit: int
) -> list[list[int]]:
    """What `model.generate` answers, each answer up to the token that ends it."""
    longest = max(map(len, prompts))
    tokens = torch.tensor([[2] * (longest - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
    settings: dict[str, Any] = {"max_new_tokens": limit, "do_sample": False, "pad_token_id": 2}
    with apply_adapters(model, adapters) if adapters else torch.no_grad(), torch.no_grad():
        out = model.generate(tokens, attention_mask=mask, eos_token_id=list(ends) or None, **settings)
    found = [row[longest:].tolist() for row in out]
    return [ids[: next((n for n, token in enumerate(ids, 1) if token in ends), limit)] for ids in found]


def staged(model: Any, prompts: Sequence[list[int]], adapters: Any, ends: Sequence[int], limit: int) -> Any:
    model.generation_config.eos_token_id = list(ends)
    return decode.greedy(model, IDS, prompts, adapters, max_new_tokens=limit)


@pytest.mark.parametrize("seed", range(20))
def test_answers_are_those_of_generate(seed: int, adapters: list[LoraAdapter]) -> None:
    draw = random.Random(seed)
    model = make_base(make_config(), seed)
    prompts = draw_prompts(draw, draw.randint(1, 12))
    ends = draw.sample(range(264), draw.choice([0, 1, 8, 60]))
    for used in (None, [draw.choice(adapters) for _ in prompts], adapters[:1]):
        expected = generated(model, prompts, used, ends, seed + 1)
        assert staged(model, prompts, used, ends, seed + 1) == expected


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**SMALL, sliding_window=6),
        Lfm2Config(**SMALL, layer_types=["conv", "full_attention", "conv"], block_auto_adjust_ff_dim=False),
    ],
    ids=["sliding window", "recurrent states"],
)
def test_other_caches_lose_the_same_rows(config: Any) -> None:
    draw = random.Random(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    prompts, ends = draw_prompts(draw, 10), draw.sample(range(264), 40)
    expected = generated(model, prompts, None, ends, 15)
    assert len(set(map(len, expected))) > 2
    assert staged(model, prompts, None, ends, 15) == expected


@pytest.mark.parametrize("adapted", [False, True])
def test_rows_that_have_ended_leave(adapted: bool, adapters: list[LoraAdapter], tiny_config: Any) -> None:
    """Some answers end at once and some never; a batch holds at most a quarter of rows that have ended."""
    model, prompts = make_base(tiny_config), draw_prompts(random.Random(1), 12)
    used = adapters if adapted else None
    free = generated(model, prompts, used, [], 20)
    kept = {token for ids in free[:3] for token in ids}
    ends = sorted({ids[0] for ids in free[3:9]} - kept)
    expected = generated(model, prompts, used, ends, 20)
    lengths = [len(ids) for ids in expected]
    assert lengths.count(1) >= 3 and lengths.count(20) >= 3
    held: list[int] = []
    model.register_forward_pre_hook(
        lambda module, _, given: held.append(given["attention_mask"].shape[0]), with_kwargs=True
    )
    assert staged(model, prompts, used, ends, 20) == expected
    assert len(held) == 20 and held[0] == 12
    for step, number in enumerate(held):
        going = sum(length > step for length in lengths)
        assert going <= number < 4 / 3 * going


def test_keys_and_values_are_given_by_the_name_that_the_model_knows(
    tiny_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers 5.24 calls them `cache`, before it `past_key_values`; the old name is a warning, then an error."""
    model = make_base(tiny_config)
    real, name = model.forward, decode.cache_argument(model)
    prompts = draw_prompts(random.Random(1), 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        expected = decode.greedy(model, IDS, prompts, None, max_new_tokens=6)

    class Renamed(dict):  # type: ignore[type-arg]
        logits = property(lambda self: self["logits"])

    def as_cache(ids: Any, cache: Any = None, **others: Any) -> Renamed:
        output = real(ids, **others, **{name: cache})
        return Renamed(logits=output.logits, cache=output[name])

    def as_past(ids: Any, past_key_values: Any = None, **others: Any) -> Renamed:
        output = as_cache(ids, past_key_values, **others)
        return Renamed(logits=output.logits, past_key_values=output["cache"])

    for forward in (as_cache, as_past):
        monkeypatch.setattr(model, "forward", forward)
        assert decode.greedy(model, IDS, prompts, None, max_new_tokens=6) == expected


def test_a_batch_ends_with_its_longest_answer(tiny_config: Any) -> None:
    model, prompts = make_base(tiny_config), draw_prompts(random.Random(2), 4)
    steps: list[int] = []
    model.register_forward_pre_hook(lambda *_: steps.append(1))
    ends = [ids[0] for ids in generated(model, prompts, None, [], 1)]
    steps.clear()
    assert staged(model, prompts, None, ends, 20) == [[token] for token in ends]
    assert len(steps) == 1


def test_a_model_that_names_no_end_has_its_tokenizers(tiny_config: Any) -> None:
    model, prompts = make_base(tiny_config), draw_prompts(random.Random(3), 3)
    first, *_ = generated(model, prompts, None, [], 1)
    model.generation_config.eos_token_id = None
    for eos, length in ((first[0], 1), (None, 8)):
        tokenizer = SimpleNamespace(**(vars(IDS) | {"eos_token_id": eos}))
        assert len(decode.greedy(model, tokenizer, prompts[:1], None, max_new_tokens=8)[0]) == length
    model.generation_config.eos_token_id = first[0]  # the model's own, a single one, comes first
    assert decode.greedy(model, IDS, prompts[:1], None, max_new_tokens=8) == [first]


def test_a_batch_follows_from_a_gpus_memory(
    tiny_config: Any, adapters: list[LoraAdapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    parameter = SimpleNamespace(device=torch.device("cuda"), element_size=lambda: 2)
    model = SimpleNamespace(config=tiny_config, parameters=lambda: iter([parameter]))
    per_token = decode.bytes_per_token(model)
    assert per_token == 2 * (3 * 2 * 2 * 8 + 32 * 32)  # k and v of 3 layers, 2 heads of 8; 32 hidden sizes
    spec = adapters[0].spec
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 30 * 2**20)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10 * 2**20)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (40 * 2**20, 80 * 2**20))
    free = 60 * 2**20
    assert decode.room(model, None) == (free // 2 // per_token, decode.MAX_SEQUENCES)
    assert decode.room(model, spec) == (free // 2 // per_token, free // 3 // (6 * spec.num_parameters))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 80 * 2**20))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10 * 2**20)
    assert decode.room(model, spec) == (2**13, 1)
    assert decode.room(make_base(tiny_config), spec) == (2**13, decode.MAX_SEQUENCES)


def test_answers_need_no_padding_token(tiny_config: Any, adapters: list[LoraAdapter]) -> None:
    """Tokenizers such as Llama's name none. Padding is masked, so answers and likelihoods are the same."""
    model, prompts = make_base(tiny_config), draw_prompts(random.Random(3), 6)
    found = []
    for tokenizer in (IDS, SimpleNamespace(**vars(IDS) | {"pad_token_id": None})):
        words = decode.greedy(model, tokenizer, prompts, adapters[:6], max_new_tokens=5)
        found.append((words, decode.log_likelihoods(model, tokenizer, prompts, prompts[::-1], adapters[:6])))
    assert found[0] == found[1]


def test_answers_do_not_depend_on_who_was_asked_before(tiny_config: Any, adapters: list[LoraAdapter]) -> None:
    """Prompts with a shared start under adapter A, then B, then A, then none: each as a model that was just loaded."""
    start = draw_prompts(random.Random(4), 1)[0]
    prompts, model = [[*start, token] for token in (9, 31, 77)], make_base(tiny_config)
    orders: list[Any] = [adapters[:1], adapters[1:2], adapters[:1], None, adapters[:3], None]
    cold = [decode.greedy(make_base(tiny_config), IDS, prompts, used, max_new_tokens=8) for used in orders]
    assert [decode.greedy(model, IDS, prompts, used, max_new_tokens=8) for used in orders] == cold
    assert cold[0] != cold[1] != cold[3]


def test_the_base_is_bit_for_bit_itself_after_adapters(tiny_config: Any, adapters: list[LoraAdapter]) -> None:
    model, tokens = make_base(tiny_config), torch.tensor(draw_prompts(random.Random(5), 1))
    with torch.no_grad():
        before = model(tokens).logits
        for used in (adapters[:1], [adapters[1]]):
            with apply_adapters(model, used):
                assert not torch.equal(model(tokens).logits, before)
        assert torch.equal(model(tokens).logits, before)


def test_beams_of_a_mixed_batch_are_those_of_each_prompt_alone(tiny_config: Any, adapters: list[LoraAdapter]) -> None:
    """Beam search repeats every prompt; `rows` says which adapter each of the repeated ones has (PEFT #2283)."""
    model, beams = make_base(tiny_config), 4
    prompts = draw_prompts(random.Random(6), 3)
    assert len(set(map(len, prompts))) == 3

    def searched(prompts: list[list[int]], used: list[LoraAdapter]) -> list[list[int]]:
        longest = max(map(len, prompts))
        tokens = torch.tensor([[2] * (longest - len(ids)) + ids for ids in prompts])
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
        rows = [n for n in range(len(prompts)) for _ in range(beams)]
        with apply_adapters(model, used, rows=rows), torch.no_grad():
            out = model.generate(
                tokens, attention_mask=mask, num_beams=beams, max_new_tokens=6, do_sample=False, pad_token_id=2
            )
        return [ids[longest:].tolist() for ids in out]

    together = searched(prompts, adapters[:3])
    assert together == [searched([ids], [adapter])[0] for ids, adapter in zip(prompts, adapters[:3], strict=True)]
