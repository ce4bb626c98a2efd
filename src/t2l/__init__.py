"""Text-to-LoRA: describe a task in plain language, get a LoRA adapter for a language model in one forward pass."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from t2l.apply import apply_adapters as apply_adapters
    from t2l.functions import function as function
    from t2l.text_to_lora import LoraAdapter as LoraAdapter
    from t2l.text_to_lora import TextToLora as TextToLora

__version__ = "0.1.0"
__all__ = ["LoraAdapter", "TextToLora", "apply_adapters", "function"]

_HOMES = {
    "LoraAdapter": "t2l.text_to_lora",
    "TextToLora": "t2l.text_to_lora",
    "apply_adapters": "t2l.apply",
    "function": "t2l.functions",
}


def __getattr__(name: str) -> Any:
    # Public names load on first use, so that `t2l --help` and `import t2l` do not import torch.
    if name not in _HOMES:
        raise AttributeError(f"module 't2l' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
