"""The plug-in for vLLM through what vLLM calls: the entry point, and the resolver that it registers."""

import asyncio
import logging
import os
import subprocess
import sys
import threading
import tomllib
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_base, make_config, random_lora
from peft import PeftModel
from vllm_helpers import bench

from t2l import peft_io
from t2l.apply import apply_adapters
from t2l.config import LoraConfig
from t2l.errors import SpecMismatchError
from t2l.ranks import VLLM_RANKS, next_rank, pad_rank
from t2l.spec import AdapterSpec
from t2l.text_to_lora import LoraAdapter, TextToLora
from t2l.vllm_plugin import register

TEXT = "Say whether the review is positive or negative."
TOKENS = torch.tensor([[0, 17, 200, 33, 4, 90, 121]])

# ------------------------------------------------------------------------------------------------------- ranks


@pytest.mark.parametrize("rslora", [False, True])
def test_padding_changes_the_rank_and_nothing_else(rslora: bool) -> None:
    spec = AdapterSpec.from_config(make_config(), "tiny", LoraConfig(r=3, lora_alpha=5, use_rslora=rslora))
    lora, padded = pad_rank(random_lora(spec), spec, 16)
    assert padded.rank == 16
    assert padded.scaling == pytest.approx(spec.scaling)
    for m, target in enumerate(spec.targets):
        assert lora.a[m].shape == (3, 16, target.in_features)
        assert lora.b[m].shape == (3, target.out_features, 16)
        assert torch.allclose(lora.delta(m), random_lora(spec).delta(m), atol=1e-6)


def test_padding_cannot_take_ranks_away() -> None:
    spec = AdapterSpec.from_config(make_config(), "tiny", LoraConfig(r=8))
    assert pad_rank(random_lora(spec), spec, 8)[1] is spec
    with pytest.raises(SpecMismatchError, match="has rank 8, which rank 4 cannot hold; give a higher one"):
        pad_rank(random_lora(spec), spec, 4)


def test_the_next_rank_is_one_that_vllm_takes() -> None:
    assert [next_rank(rank) for rank in (1, 8, 9, 64, 257)] == [8, 8, 16, 64, 320]
    with pytest.raises(SpecMismatchError, match=f"rank 513; vLLM takes ranks up to {VLLM_RANKS[-1]}"):
        next_rank(513)


# ----------------------------------------------------------------------------------------------------- resolver


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Resolvers by name. Where vLLM is not installed, its two classes and its registry have stand-ins."""
    resolvers: dict[str, Any] = {}

    def keep(name: str, resolver: Any) -> None:
        resolvers[name] = resolver

    try:
        from vllm.lora.resolver import LoRAResolverRegistry
    except ImportError:

        @dataclass
        class LoRARequest:
            lora_name: str
            lora_int_id: int
            lora_path: str = ""

            def __post_init__(self) -> None:
                assert self.lora_int_id >= 1 and self.lora_path

        class LoRAResolver(ABC):
            @abstractmethod
            async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None: ...

        registry = types.SimpleNamespace(register_resolver=keep)
        for name, values in {
            "vllm": {},
            "vllm.lora": {},
            "vllm.lora.request": {"LoRARequest": LoRARequest},
            "vllm.lora.resolver": {"LoRAResolver": LoRAResolver, "LoRAResolverRegistry": registry},
        }.items():
            module = types.ModuleType(name)
            vars(module).update(values)
            monkeypatch.setitem(sys.modules, name, module)
    else:
        monkeypatch.setattr(LoRAResolverRegistry, "register_resolver", staticmethod(keep))
    return resolvers


@pytest.fixture
def ask(
    registry: dict[str, Any], make_checkpoint: Any, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Any]]:
    """Registers the plug-in with some variables set, once, and asks its resolver for a name."""
    monkeypatch.setenv("T2L_VLLM_CHECKPOINT", str(make_checkpoint(tmp_path / "checkpoint")))
    monkeypatch.setenv("T2L_VLLM_FOLDER", str(tmp_path / "adapters"))

    def ask(name: str, *, base: str = str(base_folder), **variables: str) -> Any:
        for variable, value in variables.items():
            monkeypatch.setenv(f"T2L_VLLM_{variable}", value)
        if not registry:
            register()
        return asyncio.run(registry["t2l"].resolve_lora(base, name))

    yield ask


def test_the_entry_point_is_declared() -> None:
    with (Path(__file__).resolve().parents[1] / "pyproject.toml").open("rb") as file:
        declared = tomllib.load(file)["project"]["entry-points"]["vllm.general_plugins"]
    assert declared == {"t2l": "t2l.vllm_plugin:register"}


def test_a_description_becomes_an_adapter(ask: Callable[..., Any], base_folder: Path, tmp_path: Path) -> None:
    """The folder's adapter, loaded by PEFT, gives the logits of the one that the library writes."""
    request = ask(f"t2l:{TEXT}")
    folder = Path(request.lora_path)
    assert request.lora_name == folder.name
    assert folder.is_relative_to(tmp_path / "adapters")
    facts = peft_io.read_facts(folder)
    assert (facts.rank, facts.base_model) == (8, str(base_folder))
    (expected,) = TextToLora.from_pretrained(str(tmp_path / "checkpoint")).generate([TEXT])
    base = make_base(make_config())
    with torch.no_grad():
        plain = base(TOKENS).logits
        with apply_adapters(base, expected):
            wanted = base(TOKENS).logits
        found = PeftModel.from_pretrained(base, folder)(TOKENS).logits
    assert (wanted - plain).abs().max() > 0.1
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_names_tell_the_content(ask: Callable[..., Any], make_checkpoint: Any, tmp_path: Path) -> None:
    first, again, other = ask(f"t2l:{TEXT}"), ask(f"t2l: {TEXT} "), ask("t2l:Add the two numbers.")
    assert first == again
    assert first.lora_name != other.lora_name
    # The server lists adapters by these names, and may be asked for them.
    assert ask(first.lora_name) == first
    assert ask("t2l-0123456789abcdef") is None


def test_registered_names_stand_for_descriptions(ask: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "names.yaml").write_text(f"sentiment: {TEXT}\n")
    named = ask("sentiment", ADAPTERS=str(tmp_path / "names.yaml"))
    assert named == ask(f"t2l:{TEXT}")


def test_other_names_are_left_to_other_resolvers(ask: Callable[..., Any], tmp_path: Path, caplog: Any) -> None:
    for name in ("some/adapter", "../../etc", "/etc", "", "T2L:add", "t2l"):
        assert ask(name) is None
    assert not (tmp_path / "adapters").exists()
    assert caplog.records == []


def test_many_at_once_load_the_checkpoint_once(
    ask: Callable[..., Any], registry: dict[str, Any], base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []
    load = TextToLora.from_pretrained
    monkeypatch.setattr(TextToLora, "from_pretrained", lambda ref: (loads.append(threading.get_ident()), load(ref))[1])
    assert ask("unknown") is None

    async def crowd() -> list[Any]:
        names = [f"t2l:Task number {number % 8}." for number in range(24)]
        return await asyncio.gather(*(registry["t2l"].resolve_lora(str(base_folder), name) for name in names))

    requests = asyncio.run(crowd())
    assert len({request.lora_name for request in requests}) == 8
    assert requests[:8] == requests[8:16] == requests[16:]
    assert len(loads) == 1
    assert loads[0] != threading.get_ident()  # the server's loop goes on meanwhile


# ------------------------------------------------------------------------------------- it never raises, and says why


def test_another_base_is_refused_unless_said_to_be_the_same(
    ask: Callable[..., Any], registry: dict[str, Any], caplog: Any
) -> None:
    assert ask(f"t2l:{TEXT}", base="other/model") is None
    assert "vLLM serves other/model. If they are one model, set T2L_VLLM_BASE=other/model" in caplog.text
    registry.clear()
    request = ask(f"t2l:{TEXT}", base="other/model", BASE="other/model")
    # vLLM's own resolvers compare this name with the engine's.
    assert peft_io.read_facts(Path(request.lora_path)).base_model == "other/model"


def test_a_folder_under_another_spelling_is_the_same_base(ask: Callable[..., Any], base_folder: Path) -> None:
    assert ask(f"t2l:{TEXT}", base=f"{base_folder.parent}/./{base_folder.name}") is not None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("t2l:", "The description is empty"),
        ("t2l:   ", "only white space"),
        ("t2l:" + "long " * 100, "tokens; this checkpoint's encoder reads at most"),
        ("t2l:\ud800", "not valid UTF-8"),
    ],
)
def test_bad_descriptions_are_no_adapters(name: str, message: str, ask: Callable[..., Any], caplog: Any) -> None:
    assert ask(name) is None
    assert message in caplog.text


def test_a_missing_checkpoint_is_said_at_each_request(ask: Callable[..., Any], tmp_path: Path, caplog: Any) -> None:
    assert ask(f"t2l:{TEXT}", CHECKPOINT=str(tmp_path / "gone")) is None
    assert "gone" in caplog.text


def test_an_adapter_that_does_nothing_is_refused(
    ask: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    write = TextToLora.generate

    def nothing(self: Any, texts: Any) -> Any:
        return [LoraAdapter(x.lora.map(torch.zeros_like), x.spec, x.description, {}) for x in write(self, texts)]

    monkeypatch.setattr(TextToLora, "generate", nothing)
    assert ask(f"t2l:{TEXT}") is None
    assert "changes nothing" in caplog.text


def test_places_are_bounded_and_never_taken_back(ask: Callable[..., Any], tmp_path: Path, caplog: Any) -> None:
    """vLLM reads a folder again when it has put an adapter out of memory; a deleted one would end its engine."""
    requests = [ask(f"t2l:Task number {number}.", MAX_ADAPTERS="3") for number in range(5)]
    assert [request is None for request in requests] == [False, False, False, True, True]
    assert "as many as T2L_VLLM_MAX_ADAPTERS allows" in caplog.text
    assert ask("t2l:Task number 1.") == requests[1]
    (folder,) = (tmp_path / "adapters").iterdir()
    assert {path.name for path in folder.iterdir()} == {request.lora_name for request in requests[:3]}


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("MAX_ADAPTERS", "many", "T2L_VLLM_MAX_ADAPTERS must be a whole number from 1 to 1000000, got 'many'"),
        ("RANK", "-8", "T2L_VLLM_RANK must be a whole number"),
        ("ADAPTERS", "/nowhere.yaml", "/nowhere.yaml"),
    ],
)
def test_bad_settings_switch_the_plugin_off(
    variable: str, value: str, message: str, registry: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setenv(f"T2L_VLLM_{variable}", value)
    with caplog.at_level(logging.ERROR):
        register()
    assert registry == {}
    assert "t2l's adapters are off" in caplog.text and message in caplog.text


# ------------------------------------------------------------------------------- the benchmark that really serves


def test_a_checkout_declares_its_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.metadata, "entry_points", lambda group: [])
    folder = bench.declare_plugin(tmp_path)
    code = (
        "from importlib.metadata import entry_points\n"
        "print([e.load().__name__ for e in entry_points(group='vllm.general_plugins') if 'checkout' in e.dist.name])"
    )
    paths = os.pathsep.join([str(folder), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "['register']"


@pytest.mark.parametrize("loses_adapters", [False, True])
def test_the_benchmark_tells_a_server_that_loses_adapters(
    loses_adapters: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fake:
        def answer(self, prompt: list[int], description: str | None) -> tuple[str, int]:
            return f"{prompt} {None if loses_adapters else description}", 3

        def call(self, path: str) -> Any:
            return {"data": [{"id": "base"}, *({"id": f"t2l-{n}"} for n in range(8))]}

        def status(self, model: str) -> int:
            return 404

    prompts = [[[n, m] for m in range(len(bench.INPUTS))] for n in range(len(bench.DESCRIPTIONS))]
    texts = zip(bench.DESCRIPTIONS, prompts, strict=True)
    expected = [[f"{prompt} {description}" for prompt in row] for description, row in texts]
    monkeypatch.setattr(bench.metadata, "version", lambda name: "0")
    report = bench.measure(Fake(), prompts, expected, 40, 0.8)
    failed = {name for name, fine in report["checks"].items() if not fine}
    both = {"every adapter changes an answer", "answers agree with Transformers'"}
    assert failed == (both if loses_adapters else set())
    assert report["equal_to_transformers"] == ("0 of 32" if loses_adapters else "32 of 32")
