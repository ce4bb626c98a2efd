"""The hypernetwork: its size, that it starts by changing nothing, and that one description never sees another."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import make_hypernet, random_lora
from hypernet_helpers import close, tensors
from torch import Tensor
from transformers import LlamaForCausalLM, MistralConfig

from t2l.apply import hooked
from t2l.config import HypernetConfig, LoraConfig
from t2l.errors import ConfigError, SpecMismatchError
from t2l.hypernet import Hypernet, InputNormalizer
from t2l.lora import LoraTensors
from t2l.spec import AdapterSpec

TOKENS = torch.tensor([[0, 17, 93, 240, 5, 66, 31], [0, 8, 200, 41, 12, 99, 7]])
VARIANTS = ("L", "M", "S", "basis")
KINDS = ("sentence", "tokens")


def encode(kind: str, n: int = 3, length: int = 6, seed: int = 3) -> tuple[Tensor, Tensor | None]:
    """Random encodings; token states are zero where masked, as the encoder leaves them."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "sentence":
        return torch.randn(n, 32, generator=generator), None
    mask = torch.arange(length) < torch.tensor([length - i for i in range(n)])[:, None]
    return torch.randn(n, length, 32, generator=generator) * mask[..., None], mask


# ------------------------------------------------------------------------------------------------------ size


@pytest.mark.parametrize(("variant", "published"), [("L", 55_251_776), ("M", 34_281_024), ("S", 4_920_896)])
def test_parameter_counts_of_the_paper(variant: str, published: int) -> None:
    """The paper's sizes for Mistral-7B come out exactly, part by part.

    H = 128 (width), D = 512 (head size), R = 8, E = 1024, L = 32 layers, targets q (4096 to 4096) and v (4096 to 1024).
    The paper counts neither the projection of the embedding nor what does not depend on the description.

    | part                                    | size                                                     | number     |
    | --------------------------------------- | -------------------------------------------------------- | ---------- |
    | depth embedding and its norm            | L x H/4 + 2 x H/4                                        | 1,088      |
    | target embedding and its norm           | M x H/4 + 2 x H/4                                        | 128        |
    | mixer                                   | H to 4H to H, biases                                     | 131,712    |
    | residual block of the trunk             | norm 2H, H to 4H to H                                    | 131,968    |
    | residual block of the head              | the same                                                 | 131,968    |
    | widening of the head                    | norm 2H, H to 4H to D                                    | 328,960    |
    | M, S: marks of A and B with their norm  | 2 x M x H + 2H                                           | 768        |
    | L: last matrices                        | D x R x (I + O), summed over targets                     | 54,525,952 |
    | M: last matrices                        | D x R x max(I, O)                                        | 33,554,432 |
    | S: last matrices                        | D x max(I, O)                                            | 4,194,304  |
    """
    h, d, r, layers, embedding_size, sizes = 128, 512, 8, 32, 1024, ((4096, 4096), (4096, 1024))
    m = len(sizes)

    def linear(i: int, o: int) -> int:
        return i * o + o

    mlp = linear(h, 4 * h) + linear(4 * h, h)
    common = (layers + 2) * h // 4 + (m + 2) * h // 4 + mlp + 2 * (2 * h + mlp)
    common += 2 * h + linear(h, 4 * h) + linear(4 * h, d)
    marks = 0 if variant == "L" else 2 * m * h + 2 * h
    last = {
        "L": sum(d * r * (i + o) for i, o in sizes),
        "M": sum(d * r * max(i, o) for i, o in sizes),
        "S": sum(d * max(i, o) for i, o in sizes),
    }[variant]
    assert common + marks + last == published

    config = MistralConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8
    )
    spec = AdapterSpec.from_config(config, "mistral", LoraConfig(target_modules=("q_proj", "v_proj"), r=8))
    assert tuple((t.in_features, t.out_features) for t in spec.targets) == sizes
    with torch.device("meta"):
        hypernet = Hypernet(
            spec,
            embedding_size=embedding_size,
            kind="sentence",
            config=HypernetConfig(variant=variant, width=h, head_size=d, train_shared_lora=False),
        )
    trainable = {name: p.numel() for name, p in hypernet.named_parameters() if p.requires_grad}
    embedding = sum(size for name, size in trainable.items() if name.startswith("trunk.embedding."))
    assert embedding == linear(embedding_size, h // 2) + 2 * (h // 2)
    assert sum(trainable.values()) - embedding == published
    assert not any(name.startswith("shared_lora.") for name in trainable)
    assert sum(p.numel() for p in hypernet.shared_lora.parameters()) == spec.num_parameters


# ------------------------------------------------------------------------------------------------ zero effect


@pytest.mark.parametrize("freeze_a", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_fresh_hypernet_changes_nothing_yet_learns(
    variant: str, kind: str, freeze_a: bool, spec: AdapterSpec, tiny_base: LlamaForCausalLM
) -> None:
    """Training starts at the base model itself, and not at a saddle: the head's gradient is there at once."""
    hypernet = make_hypernet(spec, variant=variant, kind=kind, freeze_a=freeze_a, randomise=False)
    states, mask = encode(kind, n=2)
    plain = tiny_base(TOKENS).logits
    lora = hypernet(states, mask)
    assert all(a.abs().max() > 0 for a in lora.a)
    assert all((b == 0).all() for b in lora.b)
    with hooked(tiny_base, spec) as slots:
        slots.lora = lora
        logits = tiny_base(TOKENS).logits
        assert torch.equal(logits, plain)
        optimizer = torch.optim.SGD(hypernet.parameters(), lr=0.1)
        logits.logsumexp(-1).sum().backward()
        assert all(linear.weight.grad.abs().sum() > 0 for linear in hypernet.head.write)
        assert all(b.grad.abs().sum() > 0 for b in hypernet.shared_lora.b)
        optimizer.step()
        optimizer.zero_grad()
        slots.lora = hypernet(states, mask)
        logits = tiny_base(TOKENS).logits
        assert not torch.equal(logits, plain)
        logits.logsumexp(-1).sum().backward()
    reader = hypernet.trunk.embedding[0] if kind == "sentence" else hypernet.trunk.read[0]
    assert reader.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("output_std", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_b_alone_is_written(variant: str, output_std: bool, spec: AdapterSpec) -> None:
    """Every adapter has the shared LoRA's A, bit for bit; B differs by text, in its unit, by its scale."""
    options: dict[str, Any] = {"variant": variant, "freeze_a": True, "output_std": output_std}
    hypernet = make_hypernet(spec, **options)
    states, _ = encode("sentence")
    with torch.no_grad():
        if output_std:
            for unit in hypernet.output_std.b:
                unit.fill_(0.5)
        lora, none = hypernet(states), hypernet(states, None, torch.zeros(3))
    unit = 0.5 if output_std else 1.0
    for m, target in enumerate(spec.targets):
        for single in (*lora.unbind(), *none.unbind()):
            assert torch.equal(single.a[m], hypernet.shared_lora.a[m])
        assert (lora.b[m][0] - lora.b[m][1]).abs().max() > 1e-3
        assert torch.equal(none.b[m][1], hypernet.shared_lora.b[m])
        written = hypernet.head(hypernet.trunk(states, None))[1][m]
        torch.testing.assert_close(lora.b[m], hypernet.shared_lora.b[m] + unit * written)
        rows = target.out_features * {"S": 1, "basis": len(spec.layers) * spec.rank}.get(variant, spec.rank)
        assert hypernet.head.write[m].weight.shape == (rows, 16)
    names = [name for name, _ in hypernet.named_parameters()]
    assert not any(name.startswith(("output_std.a.", "head.part")) for name in names)


@pytest.mark.parametrize("variant", VARIANTS)
def test_with_b_alone_the_update_is_linear_in_what_is_written(variant: str, spec: AdapterSpec) -> None:
    """Half the change of B is half the change of ΔW."""
    hypernet = make_hypernet(spec, variant=variant, freeze_a=True)
    states, _ = encode("sentence")
    none, half, whole = (hypernet(states, None, torch.full((3,), scale)) for scale in (0.0, 0.5, 1.0))
    for m in range(len(spec.targets)):
        torch.testing.assert_close(half.delta(m), (none.delta(m) + whole.delta(m)) / 2)


def test_offset_starts_like_peft(spec: AdapterSpec, tiny_base: LlamaForCausalLM) -> None:
    """A is drawn with PEFT's bound 1 / sqrt(I), B is zero."""
    for seed in range(3):
        offset = make_hypernet(spec, randomise=False, seed=seed).shared_lora
        for a, b, target in zip(offset.a, offset.b, spec.targets, strict=True):
            bound = 1 / math.sqrt(target.in_features)
            assert 0.9 * bound < a.abs().max() <= bound
            assert abs(a.std().item() - bound / math.sqrt(3)) < 0.15 * bound
            assert not b.any()


@pytest.mark.parametrize("variant", (*VARIANTS, "none"))
@pytest.mark.parametrize("kind", KINDS)
def test_loaded_offset_is_what_comes_out(kind: str, variant: str, spec: AdapterSpec) -> None:
    """Starting from a multi-task LoRA means starting exactly there, for every description."""
    hypernet = make_hypernet(spec, kind=kind, variant=variant, randomise=False)
    trained = random_lora(spec, seed=5)
    hypernet.load_shared_lora(trained)
    states, mask = encode(kind)
    for single in hypernet(states, mask).unbind():
        assert all(torch.equal(x, y) for x, y in zip(tensors(single), tensors(trained), strict=True))
        assert single.scaling == trained.scaling


@pytest.mark.parametrize("output_std", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_without_gradients_nothing_is_another_number(
    variant: str, autocast: bool, output_std: bool, spec: AdapterSpec
) -> None:
    """What is then added in place keeps the shared LoRA's digits and its memory."""
    hypernet = make_hypernet(spec, variant=variant, output_std=output_std)
    before = [x.clone() for x in hypernet.parameters()]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        trained = hypernet(encode("sentence")[0])
        with torch.no_grad():
            found = hypernet(encode("sentence")[0])
    assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(tensors(found), tensors(trained), strict=True))
    assert all(torch.equal(x, y) for x, y in zip(hypernet.parameters(), before, strict=True))


def test_offset_of_another_shape_or_scaling_is_refused(spec: AdapterSpec) -> None:
    hypernet = make_hypernet(spec, randomise=False)
    before = [x.clone() for x in (*hypernet.shared_lora.a, *hypernet.shared_lora.b)]
    for other, match in (
        (replace(spec, rank=2, alpha=4), r"\(3, 4, 32\).*\(3, 2, 32\)"),
        (replace(spec, layers=(0, 1)), r"\(2, 4, 32\)"),
        (replace(spec, targets=spec.targets[::-1]), r"same targets, layers, rank and alpha"),
        (replace(spec, alpha=16), r"scaled by 2.0, the adapter has .* scaled by 4.0"),
    ):
        with pytest.raises(SpecMismatchError, match=match):
            hypernet.load_shared_lora(random_lora(other))
    assert all(
        torch.equal(x, y) for x, y in zip(before, (*hypernet.shared_lora.a, *hypernet.shared_lora.b), strict=True)
    )


# ----------------------------------------------------------------------------------- one description, one adapter


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_batch_equals_single_calls(variant: str, kind: str, spec: AdapterSpec) -> None:
    """A description's adapter must not depend on its company, nor on how far the batch is padded."""
    hypernet = make_hypernet(spec, variant=variant, kind=kind)
    states, mask = encode(kind, n=4)
    with torch.no_grad():
        together = hypernet(states, mask).unbind()
        for n, single in enumerate(together):
            length = None if mask is None else int(mask[n].sum())
            alone = hypernet(states[n : n + 1, :length], None if mask is None else mask[n : n + 1, :length])
            assert close(single, alone.unbind()[0])
    # Different descriptions do give different adapters, so the equality above says something.
    assert all((x - y).abs().max() > 1e-3 for x, y in zip(tensors(together[0]), tensors(together[1]), strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_content_does_not_matter(variant: str, spec: AdapterSpec) -> None:
    hypernet = make_hypernet(spec, variant=variant, kind="tokens")
    states, mask = encode("tokens")
    assert mask is not None
    with torch.no_grad():
        clean = hypernet(states, mask)
        dirty = hypernet(states + 1e3 * ~mask[..., None], mask)
        moved = hypernet(states + 0.5 * mask[..., None] * torch.randn(states.shape), mask)
    assert close(clean, dirty)
    assert not close(clean, moved)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_standardized_encodings_are_read_like_others(variant: str, kind: str, spec: AdapterSpec) -> None:
    """The same network reads them as its twin reads what was standardized by hand; constants are no parameters."""
    states, mask = encode(kind)
    rows = states[mask] if mask is not None else states
    assert len(rows) > 2
    standardized = make_hypernet(spec, variant=variant, kind=kind, normalize_inputs=True)
    twin = make_hypernet(spec, variant=variant, kind=kind)
    saved = standardized.state_dict()
    constants = {name: saved.pop(name) for name in list(saved) if name.startswith("normalizer.")}
    assert set(constants) == {"normalizer.mean_E", "normalizer.scale_E"}
    assert not set(constants) & {name for name, _ in standardized.named_parameters()}
    twin.load_state_dict(saved)
    assert close(standardized(states, mask), twin(states, mask)), "until they are fitted, they do nothing"
    standardized.normalizer.fit(rows)
    by_hand = (states - rows.mean(0)) / rows.std(0, correction=0)
    assert close(standardized(states, mask), twin(by_hand, mask), tolerance=1e-4)
    assert not close(standardized(states, mask), twin(states, mask), tolerance=1e-3)


def test_a_number_that_never_changes_keeps_its_size() -> None:
    standard = InputNormalizer(3)
    rows = torch.tensor([[1.0, 5.0, 2.0], [3.0, 5.0, 2.00001]])
    standard.fit(rows)
    assert torch.allclose(standard(rows), torch.tensor([[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]), atol=1e-4)
    assert standard.scale_E[1:].tolist() == [1.0, 1.0]


def test_all_tokens_are_read(spec: AdapterSpec) -> None:
    """Each token of a description has a say, the first and the last too."""
    hypernet = make_hypernet(spec, kind="tokens")
    states, mask = encode("tokens", n=1)
    states.requires_grad_()
    hypernet(states, mask).b[0].square().sum().backward()
    assert (states.grad.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_variant_none_ignores_the_description(kind: str, spec: AdapterSpec) -> None:
    hypernet = make_hypernet(spec, kind=kind, variant="none", randomise=False)
    hypernet.load_shared_lora(random_lora(spec))
    one, other = (hypernet(*encode(kind, seed=seed)) for seed in (1, 2))
    assert one.batch_size == 3
    assert all(torch.equal(x, y) for x, y in zip(tensors(one), tensors(other), strict=True))
    assert {name.split(".")[0] for name, _ in hypernet.named_parameters()} == {"shared_lora"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_order_of_targets_is_only_an_order(variant: str, kind: str, spec: AdapterSpec) -> None:
    """With everything that belongs to a target moved along, permuted targets give permuted outputs."""
    hypernet = make_hypernet(spec, variant=variant, kind=kind)
    swapped = make_hypernet(replace(spec, targets=spec.targets[::-1]), variant=variant, kind=kind, seed=1)
    state = {}
    for name, value in hypernet.state_dict().items():
        if name.startswith(("shared_lora.a.", "shared_lora.b.", "head.write.")):
            parts = name.split(".")
            parts[2] = str(1 - int(parts[2]))
            name = ".".join(parts)
        elif name in ("head.part_a", "head.part_b", "trunk.target.0.weight"):
            value = value.flip(0)
        elif name == "trunk.target":
            value = value.flip(1)
        state[name] = value
    swapped.load_state_dict(state, strict=True)
    states, mask = encode(kind)
    with torch.no_grad():
        one, other = hypernet(states, mask), swapped(states, mask)
    assert close(one, LoraTensors(other.a[::-1], other.b[::-1], other.scaling))


@pytest.mark.parametrize("variant", VARIANTS)
def test_layers_and_targets_differ(variant: str, spec: AdapterSpec) -> None:
    """The same description is told apart by depth and module; the shared head alone would repeat itself."""
    hypernet = make_hypernet(spec, variant=variant)
    with torch.no_grad():
        for offset in (*hypernet.shared_lora.a, *hypernet.shared_lora.b):
            offset.zero_()
        lora = hypernet(*encode("sentence", n=1))
    for x in tensors(lora):
        assert (x[0, 0] - x[0, 1]).abs().max() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_ranks_and_parts_differ(variant: str, spec: AdapterSpec) -> None:
    """S writes every rank with the same matrix: only the rotary angle keeps them from being all the same (rank 1)."""
    hypernet = make_hypernet(spec, variant=variant)
    with torch.no_grad():
        for offset in (*hypernet.shared_lora.a, *hypernet.shared_lora.b):
            offset.zero_()
        lora = hypernet(*encode("sentence", n=1))
    for m in range(len(spec.targets)):
        assert torch.linalg.matrix_rank(lora.a[m][0, 0]) == spec.rank
        assert torch.linalg.matrix_rank(lora.b[m][0, 0]) == spec.rank
    # q is square, so nothing but its mark tells A from B.
    assert (lora.a[0][0, 0] - lora.b[0][0, 0].mT).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_shapes(variant: str, kind: str, tiny_config: Any) -> None:
    spec = AdapterSpec.from_config(
        tiny_config,
        "tiny",
        LoraConfig(target_modules=("down_proj", "q_proj", "k_proj"), layers_to_transform=(0, 2), r=3),
    )
    lora = make_hypernet(spec, variant=variant, kind=kind)(*encode(kind))
    assert [tuple(a.shape) for a in lora.a] == [(3, 2, 3, 48), (3, 2, 3, 32), (3, 2, 3, 32)]
    assert [tuple(b.shape) for b in lora.b] == [(3, 2, 32, 3), (3, 2, 32, 3), (3, 2, 16, 3)]
    assert [tuple(lora.delta(m).shape) for m in range(3)] == [(3, 2, 32, 48), (3, 2, 32, 32), (3, 2, 16, 32)]
    assert sum(x.numel() for x in tensors(lora)) == 3 * spec.num_parameters


def test_token_dropout_only_in_training_and_never_the_first_token(spec: AdapterSpec) -> None:
    hypernet = make_hypernet(spec, kind="tokens", token_dropout=0.9, dropout=0.0)
    states, mask = encode("tokens")
    with torch.no_grad():
        assert close(hypernet(states, mask), hypernet(states, mask), 0)
        plain = hypernet(states, mask)
        hypernet.train()
        drawn = [hypernet(states, mask) for _ in range(20)]
    assert sum(not close(lora, plain, 1e-3) for lora in drawn) > 10
    # An empty description would give NaN.
    assert all(x.isfinite().all() for lora in drawn for x in tensors(lora))


def test_impossible_sizes_are_refused(spec: AdapterSpec) -> None:
    with pytest.raises(ConfigError, match=r"width \(24\) must be divisible by hypernet.attention_heads \(5\)"):
        make_hypernet(spec, kind="tokens", attention_heads=5)
    with pytest.raises(ConfigError, match="divisible by 4"):
        HypernetConfig(width=30)
    with pytest.raises(ConfigError, match="leaves nothing to train"):
        HypernetConfig(variant="none", train_shared_lora=False)
