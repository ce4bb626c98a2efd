"""What users of PEFT do with adapters, done with ours: mixed batches, beams, sums, hot swaps, half precision."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import make_base, make_config, make_tokenizer, random_lora
from peft.utils import hotswap

from t2l import peft_io
from t2l.apply import apply_adapters
from t2l.config import LoraConfig
from t2l.lora import LoraTensors
from t2l.spec import AdapterSpec
from t2l.text_to_lora import LoraAdapter

TOKENS = torch.tensor([[0, 17, 200, 33, 4, 90, 121]])
PROMPTS = ["Add 3 and 4.", "A much longer prompt, which the others are padded for on the left.", "Où ?"]


@pytest.fixture
def adapters() -> list[LoraAdapter]:
    spec = AdapterSpec.from_config(
        make_config(), "tiny", LoraConfig(r=4, lora_alpha=8, target_modules=("q_proj", "v_proj", "down_proj"))
    )
    return [LoraAdapter(random_lora(spec, seed, 0.15), spec, f"Task {seed}.", {}) for seed in range(3)]


@pytest.fixture
def model(adapters: list[LoraAdapter], tmp_path: Path) -> Any:
    """A PEFT model with all three, read from their folders."""
    for number, adapter in enumerate(adapters):
        adapter.save_pretrained(tmp_path / str(number))
    found = peft.PeftModel.from_pretrained(make_base(make_config()), tmp_path / "0", adapter_name="0")
    for number in (1, 2):
        found.load_adapter(tmp_path / str(number), adapter_name=str(number))
    return found.eval()


@torch.no_grad()
def ours(lora: LoraTensors, spec: AdapterSpec) -> torch.Tensor:
    base = make_base(make_config())
    with apply_adapters(base, LoraAdapter(lora, spec, "", {})):
        return base(TOKENS).logits


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("beams", [1, 4])
def test_mixed_batches_answer_as_single_prompts_do(beams: int, model: Any, adapters: list[LoraAdapter]) -> None:
    """One prompt for each adapter and one for the plain base, of unequal lengths, padded on the left."""
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "left"
    prompts, names = [*PROMPTS, "And now without."], ["2", "0", "1", "__base__"]
    settings = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams, "pad_token_id": 2, "eos_token_id": -1}
    batch = tokenizer(prompts, padding=True, return_tensors="pt", return_token_type_ids=False)
    mixed = model.generate(**batch, adapter_names=names, **settings)[:, batch.input_ids.shape[1] :]
    base = make_base(make_config())
    for prompt, name, found in zip(prompts, names, mixed, strict=True):
        single = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        if name == "__base__":
            expected = base.generate(**single, **settings)
        else:
            with apply_adapters(base, adapters[int(name)]):
                expected = base.generate(**single, **settings)
        assert found.tolist() == expected[0, single.input_ids.shape[1] :].tolist()


@pytest.mark.parametrize("combination", ["cat", "svd"])
def test_weighted_sums_add_the_updates(combination: str, model: Any, adapters: list[LoraAdapter]) -> None:
    weights = [0.75, 0.5]
    options = {"svd_rank": 8} if combination == "svd" else {}
    model.add_weighted_adapter(["0", "1"], weights, "both", combination_type=combination, **options)
    model.set_adapter("both")
    base = make_base(make_config())
    with torch.no_grad():
        for m, target in enumerate(adapters[0].spec.targets):
            for layer in range(3):
                update = sum(w * a.lora.delta(m)[layer] for w, a in zip(weights, adapters, strict=False))
                base.get_submodule(target.path.format(layer=layer)).weight += update
        torch.testing.assert_close(logits(model), base(TOKENS).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("compiled", [False, True])
def test_hot_swaps_need_no_file_and_no_new_compilation(
    compiled: bool, adapters: list[LoraAdapter], tmp_path: Path
) -> None:
    adapters[0].save_pretrained(tmp_path / "first")
    model = peft.PeftModel.from_pretrained(make_base(make_config()), tmp_path / "first").eval()
    config = peft.LoraConfig.from_pretrained(tmp_path / "first")
    wanted = [ours(adapter.lora, adapter.spec) for adapter in adapters]  # our hooks make compiled code compile again
    called = model
    if compiled:
        # Given the model's own settings it would write the padded rank into them, and a swap would scale by that.
        hotswap.prepare_model_for_compiled_hotswap(model, target_rank=8)
        torch.compiler.reset()
        called = torch.compile(model, backend="eager")
    torch.testing.assert_close(logits(called), wanted[0], rtol=1e-4, atol=1e-4)
    for adapter, expected in zip(adapters[1:], wanted[1:], strict=True):
        # In a live model the names of tensors have the adapter's name in them; in files they have not.
        saved = peft_io.to_state_dict(adapter.lora, adapter.spec)
        state = {name.replace(".weight", ".default.weight"): value for name, value in saved.items()}
        with torch.compiler.set_stance("fail_on_recompile" if compiled else "default"):
            hotswap.hotswap_adapter_from_state_dict(model, state, "default", config)
            found = logits(called)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept_where_it_is_asked_for(
    dtype: torch.dtype, adapters: list[LoraAdapter], tmp_path: Path
) -> None:
    """PEFT reads half precision as float32 unless it is told otherwise."""
    adapters[0].save_pretrained(tmp_path / "half", dtype=dtype)
    base = make_base(make_config()).to(dtype)
    for autocast, expected in ((True, torch.float32), (False, dtype)):
        model = peft.PeftModel.from_pretrained(base, tmp_path / "half", autocast_adapter_dtype=autocast)
        assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {expected}
        found = logits(model).float()
        wanted = ours(adapters[0].lora, adapters[0].spec)
        assert (found - wanted).abs().max() <= 0.05 * wanted.abs().max()
        base = model.unload()
