"""Losses on ΔW without a ΔW, and the targets whose statistics are undone in the checkpoint."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reconstruction_helpers import CPU, NAMES, make_config, make_library, make_spec, run, stacked
from transformers import LlamaConfig

from t2l import TextToLora
from t2l.library import AdapterLibrary
from t2l.lora import LoraTensors
from t2l.spec import AdapterSpec
from t2l.train.reconstruction import (
    ReconstructionConfig,
)
from t2l.train.reconstruction_data import (
    AdapterSampler,
)
from t2l.train.reconstruction_losses import (
    compare,
    components,
    factor_loss,
    make_targets,
    principal_directions,
    square_loss,
)


@pytest.fixture(scope="module")
def spec(tiny_config: LlamaConfig, base_folder: Path) -> AdapterSpec:
    return make_spec(tiny_config, base_folder)


@pytest.fixture(scope="module")
def library(spec: AdapterSpec, tmp_path_factory: pytest.TempPathFactory) -> AdapterLibrary:
    return make_library(spec, tmp_path_factory.mktemp("library") / "six")


@pytest.fixture(scope="module")
def config(library: AdapterLibrary, sentence_folder: Path) -> ReconstructionConfig:
    return make_config(library, sentence_folder)


def dense(lora: LoraTensors) -> list[torch.Tensor]:
    return [lora.delta(m) for m in range(len(lora.a))]


def test_inner_products_and_distances_are_those_of_the_dense_products(spec: AdapterSpec) -> None:
    one, other = (stacked(spec, 3, seed).map(torch.Tensor.double) for seed in (0, 1))
    pairs = list(zip(dense(one), dense(other), strict=True))
    for found, (x, y) in zip(one.inner(other), pairs, strict=True):
        assert (found - (x * y).sum((-2, -1))).abs().max() <= 1e-10
    for found, (x, y) in zip(one.squared_distances(other), pairs, strict=True):
        assert (found - (x - y).square().sum((-2, -1))).abs().max() <= 1e-10


def test_a_small_distance_is_no_rounding(spec: AdapterSpec) -> None:
    """In float32, of adapters a thousandth apart."""
    one = stacked(spec, 3)
    near = one.map(lambda x: x + 1e-4 * torch.randn_like(x))
    for found, x, y in zip(near.squared_distances(one), dense(near), dense(one), strict=True):
        exact = (x.double() - y.double()).square().sum((-2, -1))
        assert (found / exact - 1).abs().max() <= 1e-2


def test_the_loss_on_the_product_is_the_dense_one(spec: AdapterSpec) -> None:
    written, wanted = stacked(spec, 3), stacked(spec, 3, seed=1)
    pairs = list(zip(dense(written), dense(wanted), strict=True))
    assert square_loss(written, wanted, torch.tensor(3.0)).item() == pytest.approx(
        sum((x - y).square().sum((1, 2, 3)).mean() for x, y in pairs).item() / 3, rel=1e-5
    )
    assert square_loss(wanted, wanted, torch.tensor(3.0)).item() == 0


def test_the_mean_adapter_loses_all_variance(spec: AdapterSpec) -> None:
    """Hence a square loss of 1 where nothing has been learnt."""
    lora = stacked(spec, 5)
    targets = make_targets(lora, NAMES[:5], device=CPU)
    middle = lora.map(lambda x: x.mean(0).expand_as(x))
    assert square_loss(middle, lora, targets.variance).item() == pytest.approx(1.0, rel=1e-5)


def test_the_loss_has_a_finite_gradient_where_nothing_differs(spec: AdapterSpec) -> None:
    """And also where a product is of lower rank than R."""
    wanted = stacked(spec, 2)
    wanted = LoraTensors(wanted.a, tuple(b * torch.tensor([1.0, 1, 0, 0]) for b in wanted.b), wanted.scaling)
    written = wanted.map(lambda x: x.clone().requires_grad_())
    loss = square_loss(written, wanted, torch.tensor(1.0))
    for gradient in torch.autograd.grad(loss, [*written.a, *written.b]):
        assert gradient.isfinite().all()


def test_errors_are_those_of_all_dense_products_together(spec: AdapterSpec) -> None:
    written, wanted = stacked(spec, 3), stacked(spec, 3, seed=1)
    errors = compare(written, wanted)
    mine, theirs = (torch.cat([x.flatten(1) for x in dense(lora)], dim=1) for lora in (written, wanted))
    assert errors.relative == pytest.approx(((mine - theirs).norm(dim=1) / theirs.norm(dim=1)).tolist(), rel=1e-5)
    assert errors.cosine == pytest.approx(torch.cosine_similarity(mine, theirs).tolist(), rel=1e-4)
    elements = [torch.cat([x.flatten(1) for x in (*lora.a, *lora.b)], dim=1) for lora in (written, wanted)]
    assert errors.element_l1 == pytest.approx((elements[0] - elements[1]).abs().mean(1).tolist(), rel=1e-5)
    zeros = compare(wanted.map(torch.zeros_like), wanted)
    assert zeros.relative == pytest.approx([1] * 3) and zeros.cosine == [0] * 3


# ---------------------------------------------------------------------------------------------------- the targets


def test_targets_are_z_scored_and_restored(spec: AdapterSpec) -> None:
    lora = stacked(spec, 5)
    lora.a[0][:, 0, 0, 0] = 0.25  # all agree
    targets = make_targets(lora, NAMES[:5], device=CPU)
    flat = torch.cat([z.flatten(1) for z in (*targets.z.a, *targets.z.b)], dim=1)
    constant = (flat == 0).all(0)
    assert int(constant.sum()) == 1
    assert flat.mean(0).abs().max() <= 1e-5
    assert (flat[:, ~constant].std(0, correction=0) - 1).abs().max() <= 1e-4
    back = targets.adapters(torch.tensor([3, 1]))
    for m in range(2):
        assert (back.delta(m) - lora.select(torch.tensor([3, 1])).delta(m)).abs().max() <= 1e-5
    assert (back.a[0] - lora.a[0][[3, 1]]).abs().max() <= 1e-5


def test_the_factor_loss_is_the_papers(spec: AdapterSpec) -> None:
    """Mean absolute z-score difference: of writing the mean it is the mean absolute z-score."""
    targets = make_targets(stacked(spec, 5), NAMES[:5], device=CPU)
    everything = [*targets.z.a, *targets.z.b]
    index = torch.tensor([4, 0])
    loss = factor_loss([torch.zeros_like(x[:2]) for x in everything], everything, index)
    expected = torch.cat([x[index].flatten() for x in everything]).abs().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert factor_loss([x[index] for x in everything], everything, index).item() == 0


def test_components_are_numpys_in_z_scores(spec: AdapterSpec) -> None:
    """With as many as there can be, mixtures of them are the adapters; with fewer, numpy's best approximation."""
    lora = stacked(spec, 5)
    lora.a[0][:, 0, 0, 0] = 0.25  # all agree: nothing to mix
    targets = make_targets(lora, NAMES[:5], device=CPU)
    flat = torch.cat([x.flatten(1) for x in (*lora.a, *lora.b)], dim=1).double()
    unit = torch.cat([x.flatten() for x in (*targets.deviation.a, *targets.deviation.b)]).double()
    left, sizes, right = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    for number in (1, 3, 4):
        basis = components(targets, number)
        found = torch.cat([x.flatten(1) for x in (*basis.a, *basis.b)], dim=1).double() * unit
        shares = principal_directions(lora, number) * 5**0.5
        torch.testing.assert_close(shares.square().mean(0), torch.ones(number, dtype=torch.double))
        best = left[:, :number] * sizes[:number] @ right[:number]
        torch.testing.assert_close(shares @ found, best, rtol=0, atol=1e-5)
        assert ((best - (flat - flat.mean(0))).abs().max() < 1e-5) == (number == 4)


def test_components_of_adapters_that_share_a_lose_least_of_their_product(spec: AdapterSpec) -> None:
    """Numpy's best approximation of ΔW, whatever the lengths and angles of A's rows; a dead row does no harm."""
    lora = stacked(spec, 6)
    stretch = torch.logspace(1, -1, lora.a[0].shape[-2])[:, None]
    stretch[1] = 0
    lora = LoraTensors(tuple((a[:1] * stretch).expand_as(a) for a in lora.a), lora.b, lora.scaling)
    targets = make_targets(lora, NAMES[:6], device=CPU, freeze_a=True)
    delta = torch.cat([(b @ a).flatten(1) for a, b in zip(lora.a, lora.b, strict=True)], dim=1).double()
    left, sizes, right = torch.linalg.svd(delta - delta.mean(0), full_matrices=False)
    for number in (1, 3):
        basis = components(targets, number)
        assert not basis.a
        shares = principal_directions(lora, number).float() * 6**0.5
        parts = [
            torch.einsum("nk,k...->n...", shares, z * u) for z, u in zip(basis.b, targets.deviation.b, strict=True)
        ]
        made = torch.cat([(b @ a).flatten(1) for a, b in zip(lora.a, parts, strict=True)], dim=1).double()
        best = left[:, :number] * sizes[:number] @ right[:number]
        assert (best - made).norm() < 1e-4 * best.norm()


def test_a_basis_stays_and_is_no_larger_than_the_library(
    config: ReconstructionConfig, library: AdapterLibrary, tmp_path: Path
) -> None:
    """Six adapters that are mixtures of three: five components at most, of which the last two are nothing."""
    hypernet = replace(config.hypernet, variant="basis", head_size=40)
    folder = run(replace(config, hypernet=hypernet), tmp_path / "run")
    net = TextToLora.from_pretrained(str(folder)).hypernet
    targets = make_targets(library.stack(), NAMES, device=CPU)
    wanted, stays = components(targets, 5), net.head.basis()
    for mine, theirs in zip((*stays[0], *stays[1]), (*wanted.a, *wanted.b), strict=True):
        assert mine.shape == theirs.shape and (mine.abs() - theirs.abs()).abs().max() <= 2e-3
        assert theirs[:3].abs().max() > 0.1 and theirs[3:].abs().max() < 1e-2


def test_draws_are_a_function_of_seed_and_step() -> None:
    """Each adapter once before any again, with its own descriptions only, wherever one begins."""
    own = [(0, 1, 2), (3,), (4, 5), (6, 7), (8,)]
    adapters, texts = AdapterSampler(own, per_batch=2, seed=1).steps(0, 20)
    flat = adapters.flatten().tolist()
    assert all(sorted(flat[i : i + 5]) == list(range(5)) for i in range(0, 40, 5))
    assert all(t in own[n] for n, t in zip(flat, texts.flatten().tolist(), strict=True))
    assert set(texts.flatten().tolist()) == set(range(9))
    later = AdapterSampler(own, per_batch=2, seed=1).steps(7, 20)
    assert torch.equal(later[0], adapters[7:]) and torch.equal(later[1], texts[7:])
    assert not torch.equal(AdapterSampler(own, per_batch=2, seed=2).steps(0, 20)[0], adapters)
    everyone, _ = AdapterSampler(own, per_batch=9, seed=1).steps(0, 3)
    assert everyone.shape == (3, 5) and all(sorted(row) == list(range(5)) for row in everyone.tolist())
