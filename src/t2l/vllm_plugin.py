"""A plug-in for vLLM: ask a server for the model `t2l:<description>`, and its adapter is written and loaded.

vLLM finds `register` by the entry point group `vllm.general_plugins`. It asks our resolver for every model name that
it does not know; the answer is a folder with a PEFT adapter, named after its content. Nothing is loaded before the
first such request. Settings come from the environment, see `PluginSettings`.

Knows generating and PEFT folders, and of vLLM two classes: `LoRARequest` and `LoRAResolver`.
"""

import asyncio
import atexit
import logging
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2l.config import load_yaml
from t2l.errors import ConfigError, OutputError, SpecMismatchError

if TYPE_CHECKING:
    from t2l.text_to_lora import TextToLora

PREFIX = "t2l:"
"""What the names begin with that are descriptions."""
_CONTENT_NAME = re.compile(r"t2l-[0-9a-f]{16}")
_log = logging.getLogger("t2l.vllm")


@dataclass(frozen=True, kw_only=True)
class PluginSettings:
    """What the plug-in does, from variables of the environment."""

    checkpoint: str
    """`T2L_VLLM_CHECKPOINT`: folder, Hub id, or `t2l:NAME` of the checkpoint that writes the adapters."""
    base: str | None
    """`T2L_VLLM_BASE`: the name under which vLLM has the checkpoint's base model, where it is another one."""
    folder: Path | None
    """`T2L_VLLM_FOLDER`: where adapters are kept while the server runs; memory (`/dev/shm`) where there is some."""
    max_adapters: int
    """`T2L_VLLM_MAX_ADAPTERS`: how many adapters are written at most. vLLM reads an adapter again whenever it has put
    it out of its own memory, so none is ever deleted under it: when all places are taken, new ones are refused."""
    rank: int | None
    """`T2L_VLLM_RANK`: rank of the adapters' files; the next one that vLLM takes, if absent."""
    names: Mapping[str, str] = field(default_factory=dict)
    """`T2L_VLLM_ADAPTERS`: a YAML file that gives descriptions names, which users may ask for in their place."""

    @classmethod
    def from_environment(cls) -> "PluginSettings":
        """Reads the variables.

        Raises:
            ConfigError: if one has no sensible value; it is named.
        """
        folder, names = os.environ.get("T2L_VLLM_FOLDER"), os.environ.get("T2L_VLLM_ADAPTERS")
        named = load_yaml(Path(names)) if names else {}
        for name, text in named.items():
            if not isinstance(name, str) or not isinstance(text, str) or name.startswith(PREFIX):
                raise ConfigError(
                    f"T2L_VLLM_ADAPTERS: {names} must give each name a description, got {name!r}: {text!r}"
                )
        return cls(
            checkpoint=os.environ.get("T2L_VLLM_CHECKPOINT") or "t2l:smollm2-135m",
            base=os.environ.get("T2L_VLLM_BASE") or None,
            folder=Path(folder) if folder else None,
            max_adapters=_number("T2L_VLLM_MAX_ADAPTERS", 256),
            rank=_number("T2L_VLLM_RANK", 0) or None,
            names=named,
        )


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable)
    if not text:
        return default
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 10**6:
        raise ConfigError(f"{variable} must be a whole number from 1 to 1000000, got {text!r}")
    return int(text)


class AdapterStore:
    """Adapters by the names that users ask for, written when they are first asked for.

    Args:
        settings: What is written, where, and how much of it.
    """

    def __init__(self, settings: PluginSettings) -> None:
        self.settings = settings
        self._lock = threading.Lock()
        self._generator: TextToLora | None = None
        self._root: Path | None = None
        self._by_text: dict[str, Path] = {}

    def description(self, name: str) -> str | None:
        """The description that a name stands for; None where the name is none of ours."""
        if name.startswith(PREFIX):
            return name.removeprefix(PREFIX)
        return self.settings.names.get(name)

    def find(self, base_model_name: str, name: str) -> Path | None:
        """The folder of the adapter that a name stands for; its last part tells its content.

        Args:
            base_model_name: The engine's name of its base model.
            name: What the user asked for: `t2l:<description>`, a registered name, or a folder's name.

        Returns:
            The folder, or None where the name is none of ours.

        Raises:
            SpecMismatchError: if the checkpoint's adapters are not for this base.
            AdapterNotAppliedError: if the adapter does nothing, or holds numbers that are none.
            OutputError: if all places are taken or the folder cannot be written.
            T2LError: if the description cannot be used or the checkpoint cannot be loaded.
        """
        text = self.description(name)
        with self._lock:  # one generator, and one writer of a folder
            if text is None:
                written = self._by_text.values() if _CONTENT_NAME.fullmatch(name) else ()
                return next((folder for folder in written if folder.name == name), None)
            key = text.strip()
            if key not in self._by_text:
                self._by_text[key] = self._write(base_model_name, text)
            return self._by_text[key]

    def _write(self, base_model_name: str, text: str) -> Path:
        from t2l.eval.backends import adapter_name
        from t2l.ranks import next_rank, pad_rank
        from t2l.text_to_lora import TextToLora

        if len(self._by_text) >= self.settings.max_adapters:
            raise OutputError(
                f"{self.settings.max_adapters} adapters are written, as many as T2L_VLLM_MAX_ADAPTERS allows; raise it "
                "and start the server again"
            )
        if self._generator is None:
            self._generator = TextToLora.from_pretrained(self.settings.checkpoint)
        spec = self._generator.spec
        if not self._is_base(base_model_name, spec.base_model):
            raise SpecMismatchError(
                f"{self.settings.checkpoint} writes adapters for {spec.base_model}; vLLM serves {base_model_name}. If "
                f"they are one model, set T2L_VLLM_BASE={base_model_name}"
            )
        (adapter,) = self._generator.generate([text])
        adapter.require_effect()
        rank = self.settings.rank or next_rank(spec.rank)
        lora, padded = pad_rank(adapter.lora, replace(spec, base_model=base_model_name), rank)
        adapter = replace(adapter, lora=lora, spec=padded)
        folder = self._folder() / adapter_name(adapter)
        if not folder.exists():  # two texts that only white space tells apart may give one adapter
            adapter.save_pretrained(folder)
        return folder

    def _is_base(self, base_model_name: str, expected: str) -> bool:
        """Whether the engine's model is the checkpoint's base: by name, by folder, or because the operator says so."""
        from t2l import hub
        from t2l.pypi import public_name

        if base_model_name in (expected, public_name(expected), self.settings.base):
            return True
        served = Path(base_model_name)
        return served.is_dir() and hub.is_cached(expected) and served.resolve() == hub.resolve(expected).resolve()

    def _folder(self) -> Path:
        """A folder of this process, gone when it ends."""
        if self._root is None:
            memory = Path("/dev/shm")
            place = self.settings.folder or (memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir()))
            try:
                place.mkdir(parents=True, exist_ok=True)
                self._root = Path(tempfile.mkdtemp(prefix="t2l-vllm-", dir=place))
            except OSError as error:
                raise OutputError(f"Cannot write adapters to {place}: {error.strerror}") from error
            atexit.register(shutil.rmtree, self._root, ignore_errors=True)
        return self._root


def register() -> None:
    """Entry point of vLLM: makes our resolver one of those that it asks for unknown model names.

    vLLM calls it in each of its processes, with and without LoRA, so it reads the settings and loads nothing.
    """
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    try:
        store = AdapterStore(PluginSettings.from_environment())
    except ConfigError as error:
        _log.error("t2l's adapters are off: %s", error)
        return

    class T2LResolver(LoRAResolver):
        """Writes adapters for names that are descriptions."""

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            """A request for the adapter that the name stands for; None if there is none, never an error."""
            try:
                folder = await asyncio.to_thread(store.find, base_model_name, lora_name)
            # vLLM does not catch what a resolver raises: the request would end in a server error, and resolvers that
            # come after this one would not be asked.
            except Exception as error:
                _log.error("no adapter for %r: %s", lora_name[:200], error)
                return None
            if folder is None:
                return None
            # vLLM's cache of prompts goes by the adapter's name, so the name must change with the content.
            number = int(folder.name.removeprefix("t2l-")[:7], 16) + 1  # vLLM puts its own in its place
            return LoRARequest(lora_name=folder.name, lora_int_id=number, lora_path=str(folder))

    LoRAResolverRegistry.register_resolver("t2l", T2LResolver())
