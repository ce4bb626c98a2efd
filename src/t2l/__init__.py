"""Text-to-LoRA: describe a task in plain language, get a LoRA adapter for a language model in one forward pass."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from t2l.adapter import LoraAdapter as LoraAdapter
    from t2l.apply import apply_adapters as apply_adapters
    from t2l.errors import AdapterNotAppliedError as AdapterNotAppliedError
    from t2l.errors import CheckpointError as CheckpointError
    from t2l.errors import ConfigError as ConfigError
    from t2l.errors import DataError as DataError
    from t2l.errors import DescriptionError as DescriptionError
    from t2l.errors import DownloadError as DownloadError
    from t2l.errors import ModelNotFoundError as ModelNotFoundError
    from t2l.errors import OutputError as OutputError
    from t2l.errors import SpecMismatchError as SpecMismatchError
    from t2l.errors import T2LError as T2LError
    from t2l.errors import UploadError as UploadError
    from t2l.functions import function as function
    from t2l.prompt import render as render_prompt  # noqa: F401
    from t2l.spec import AdapterSpec as AdapterSpec
    from t2l.text_to_lora import TextToLora as TextToLora

__version__ = "0.1.0"

_ERRORS = (
    "AdapterNotAppliedError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DescriptionError",
    "DownloadError",
    "ModelNotFoundError",
    "OutputError",
    "SpecMismatchError",
    "T2LError",
    "UploadError",
)
_HOMES = {
    "AdapterSpec": ("t2l.spec", "AdapterSpec"),
    "LoraAdapter": ("t2l.adapter", "LoraAdapter"),
    "TextToLora": ("t2l.text_to_lora", "TextToLora"),
    "apply_adapters": ("t2l.apply", "apply_adapters"),
    "function": ("t2l.functions", "function"),
    "render_prompt": ("t2l.prompt", "render"),
    **{name: ("t2l.errors", name) for name in _ERRORS},
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    # Public names load on first use, so that `t2l --help` and `import t2l` do not import torch.
    if name not in _HOMES:
        raise AttributeError(f"module 't2l' has no attribute '{name}'")
    from importlib import import_module

    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return ["__version__", *__all__]
