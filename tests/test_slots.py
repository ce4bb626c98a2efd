"""Adapters side by side: each starts, steps, clips and stops as if it were alone."""

import torch
from transformers import LlamaConfig

from t2l.config import LoraConfig
from t2l.spec import AdapterSpec
from t2l.train.loop import schedule
from t2l.train.slots import Slots, StepSizes, adamw, step_sizes
from t2l.train.task_config import TaskLorasTrainConfig


def test_each_slot_is_clipped_and_stopped_on_its_own() -> None:
    """Three adapters in one call of adamw: as torch's AdamW would each; one that breaks stays as it was, for good."""
    torch.manual_seed(0)
    start = [torch.randn(3, 2, 4, 5), torch.randn(3, 2, 6, 4)]
    weights = [x.clone() for x in start]
    mean, square = ([torch.zeros_like(x) for x in start] for _ in range(2))
    alive = torch.ones(3, dtype=torch.bool)
    rates = torch.tensor([1e-2, 3e-2, 1e-2])
    gradients = [
        [torch.randn_like(x) * torch.tensor([1.0, 0.01, 1.0])[:, None, None, None] for x in start] for _ in range(4)
    ]
    gradients[1][0][2, 0, 0, 0] = float("nan")
    before_break = []
    for t, given in enumerate(gradients, start=1):
        count = torch.tensor([float(t)] * 3)
        sizes = StepSizes(rates, 1 - 0.9**count, 1 - 0.999**count)
        if t == 2:
            before_break = [w[2].clone() for w in weights]
        adamw(weights, [g.clone() for g in given], mean, square, alive, sizes, 0.1, 1.0)
    assert alive.tolist() == [True, True, False]
    for k, rate in ((0, 1e-2), (1, 3e-2)):
        alone = [torch.nn.Parameter(x[k].clone()) for x in start]
        optimizer = torch.optim.AdamW(alone, lr=rate, weight_decay=0.1)
        for given in gradients:
            for p, g in zip(alone, given, strict=True):
                p.grad = g[k].clone()
            torch.nn.utils.clip_grad_norm_(alone, 1.0)
            optimizer.step()
        for p, w in zip(alone, weights, strict=True):
            assert (p - w[k]).abs().max() <= 1e-6
    for old, w in zip(before_break, weights, strict=True):
        assert torch.equal(old, w[2])


def test_step_sizes_are_each_slots_own() -> None:
    train = TaskLorasTrainConfig(max_steps=100, warmup_ratio=0.1, learning_rate=2.0, eval_steps=25)
    steps = ((0, 50, None), (1, 51, None))
    for taken, sizes in zip(steps, step_sizes(steps, train, torch.device("cpu")), strict=True):
        known = [t for t in taken if t is not None]
        rates = [2 * schedule(t, train.max_steps, train.warmup_ratio) for t in known]
        assert torch.allclose(sizes.rate, torch.tensor([*rates, 0.0]))
        count = torch.tensor(known, dtype=torch.float64) + 1
        assert torch.allclose(sizes.correction1[:2], (1 - 0.9**count).float())
        assert torch.allclose(sizes.correction2[:2], (1 - 0.999**count).float())


def test_shared_and_own_starts(tiny_config: LlamaConfig) -> None:
    """Shared: every adapter begins with the same A; own: each with another. B is zero, so neither does anything yet."""
    spec = AdapterSpec.from_config(tiny_config, "tiny", LoraConfig(r=4, lora_alpha=8))
    slots = Slots(spec, 3, torch.device("cpu"))
    for slot, (name, shared) in enumerate((("x", True), ("y", True), ("y", False))):
        slots.start(slot, name, seed=0, shared=shared)
    a, b = slots.weights[:2], slots.weights[2:]
    assert all(torch.equal(x[0], x[1]) and not torch.equal(x[1], x[2]) for x in a)
    assert all(x.abs().max() <= 32**-0.5 and x.std() > 0.5 * 32**-0.5 for x in a)
    assert not any(x.any() for x in b)


def test_the_optimiser_gets_what_is_trained_alone() -> None:
    """No gradient, moments or decay for an A that stays, and no part in the norm that is clipped."""
    spec = AdapterSpec.from_config(LlamaConfig(hidden_size=32, num_attention_heads=4), "tiny", LoraConfig(r=2))
    slots = Slots(spec, 2, torch.device("cpu"), freeze_a=True)
    assert [x.requires_grad for x in slots.weights] == [False, False, True, True]
    assert all(x is y for x, y in zip(slots.trained, slots.weights[2:], strict=True))
    assert [x.shape for x in slots.trained] == [x.shape for x in slots.mean] == [x.shape for x in slots.square]
