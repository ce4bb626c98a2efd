"""What the tests of compression share: a library of four adapters."""

from pathlib import Path

from conftest import random_lora

from t2l.library import AdapterLibrary, save_library
from t2l.lora import LoraTensors
from t2l.spec import AdapterSpec

NAMES = ("add", "bark", "count", "dance")


def four_adapters(folder: Path, spec: AdapterSpec, *, one_a: bool = False) -> AdapterLibrary:
    """Random adapters with five descriptions each; with `one_a` all have the A of the first."""
    lora = LoraTensors.stack([random_lora(spec, n) for n in range(4)])
    if one_a:
        lora = LoraTensors(tuple(a[:1].repeat(4, 1, 1, 1) for a in lora.a), lora.b, lora.scaling)
    words = ("Do", "Please", "Always", "Never", "Now")
    facts = {
        name: {"descriptions": [f"{word} {name}." for word in words], "prompt": {"description_in_prompt": False}}
        for name in NAMES
    }
    return save_library(folder, lora, spec, facts)
