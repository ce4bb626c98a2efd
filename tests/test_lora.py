"""Stacked A and B: norms, the update that they stand for, and what takes them apart."""

from dataclasses import replace

import torch
from conftest import random_lora
from hypernet_helpers import close

from t2l.lora import LoraTensors
from t2l.spec import AdapterSpec


def test_norms_are_those_of_the_dense_update(spec: AdapterSpec) -> None:
    batch = LoraTensors.stack([random_lora(spec, seed) for seed in range(3)])
    for m, norm in enumerate(batch.norms()):
        assert norm.shape == (3, 3)
        torch.testing.assert_close(norm, batch.delta(m).flatten(-2).norm(dim=-1), rtol=1e-5, atol=1e-6)
    assert (batch.map(torch.zeros_like).norms()[0] == 0).all()


def test_delta_is_scaled_b_times_a(spec: AdapterSpec) -> None:
    lora = random_lora(spec)
    dense = torch.stack([2.0 * b @ a for a, b in zip(lora.a[1], lora.b[1], strict=True)])
    assert lora.scaling == 2.0
    assert torch.allclose(lora.delta(1), dense)
    assert replace(spec, alpha=8, use_rslora=True).scaling == 8 / 4**0.5


def test_stack_unbind_select_round_trip(spec: AdapterSpec) -> None:
    singles = [random_lora(spec, seed) for seed in range(3)]
    batch = LoraTensors.stack(singles)
    assert (batch.batch_size, singles[0].batch_size) == (3, None)
    for one, other in zip(batch.unbind(), singles, strict=True):
        assert close(one, other, 0)
    picked = batch.select(torch.tensor([2, 0, 2, 1]))
    for row, n in enumerate((2, 0, 2, 1)):
        assert close(picked.unbind()[row], singles[n], 0)
