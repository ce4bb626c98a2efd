"""Published checkpoints: parity with a network written from its description, and what is refused."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from published_network import CASES, EMBEDDINGS, WEIGHTS, network
from torch.nn.functional import normalize
from transformers import AutoConfig
from typer.testing import CliRunner

from t2l import sakana
from t2l.checkpoint import load_checkpoint
from t2l.cli import app
from t2l.errors import CheckpointError, ConfigError, SpecMismatchError
from t2l.lora import LoraTensors
from t2l.text_to_lora import TextToLora

TOLERANCE = 1e-5
"""Largest difference of a number of A or B; the largest of them is about 5. Measured: 1.4e-6."""


def weights(case: str) -> dict[str, torch.Tensor]:
    """A network's weights in the order of its file."""
    return dict(WEIGHTS[case])


@pytest.fixture
def make_folder(tmp_path: Path, base_folder: Path, make_sentence_folder: Callable[..., Path]) -> Callable[..., Path]:
    """Writes a published folder."""
    encoder = make_sentence_folder("cls_token", window=512)

    def make(case: str = "L", *, state: Any = None, **arguments: Any) -> Path:
        folder = tmp_path / "published"
        folder.mkdir(exist_ok=True)
        settings = {
            "exp_setup": "hyper_lora",
            "training_task": "sft",
            "model_dir": str(base_folder),
            "emb_model": str(encoder),
            "hypernet_latent_size": 16,
            "head_in_size": 12,
            "encoder_type": "linear",
            "lr": 2.5e-05,
        }
        (folder / sakana.ARGUMENTS).write_text(yaml.safe_dump(settings | CASES[case] | arguments))
        targets = sorted(["q_proj", "v_proj", "down_proj"])
        adapter = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_rslora": True, "target_modules": targets}
        (folder / sakana.ADAPTER).write_text(json.dumps(adapter))
        torch.save(weights(case) if state is None else state, folder / sakana.WEIGHTS)
        return folder

    return make


@pytest.mark.parametrize("case", CASES)
def test_adapters_are_those_of_the_published_network(case: str, make_folder: Any, tmp_path: Path) -> None:
    folder = make_folder(case)
    spec = sakana.import_published(folder, tmp_path / "checkpoint")
    assert [t.name for t in spec.targets] == ["v_proj", "q_proj", "down_proj"]
    assert spec.scaling == pytest.approx(4 / 2**0.5)
    hypernet = load_checkpoint(tmp_path / "checkpoint").hypernet
    with torch.no_grad():
        lora = hypernet(normalize(EMBEDDINGS, dim=-1))
    written, error = [network(WEIGHTS[case], CASES[case], embedding) for embedding in EMBEDDINGS], 0.0
    for m, target in enumerate(spec.targets):
        for n in range(2):
            for layer in range(3):
                for found, wanted in zip((lora.a, lora.b), written[n][f"{target.name}.{layer}"], strict=True):
                    error = max(error, float((found[m][n, layer] - wanted).abs().max()))
    print(f"{case}: numbers differ by at most {error:.1e}")
    assert error <= TOLERANCE
    assert not torch.allclose(lora.a[0][0], lora.a[0][1], atol=1e-2)  # the description matters


def test_the_order_of_the_modules_is_the_files(make_folder: Any, tmp_path: Path) -> None:
    """`adapter_config.json` lists the modules as a set came out; `heads` has them by their numbers."""
    state = weights("L")
    names = ["q_proj", "down_proj", "v_proj"]
    heads = {name: value for name, value in state.items() if name.startswith("heads.")}
    others = {name: value for name, value in state.items() if name not in heads}
    turned = {k: v for name in names for k, v in heads.items() if k.startswith(f"heads.{name}.")}
    spec = sakana.import_published(make_folder(state=others | turned), tmp_path / "checkpoint")
    assert [t.name for t in spec.targets] == names
    hypernet = load_checkpoint(tmp_path / "checkpoint").hypernet
    with torch.no_grad():
        lora = hypernet(normalize(EMBEDDINGS, dim=-1))
    # The first number is now q_proj's: its adapter is another than where v_proj was first.
    was, _ = network(WEIGHTS["L"], CASES["L"], EMBEDDINGS[0])["q_proj.0"]
    assert not torch.allclose(lora.a[0][0, 0], was, atol=1e-2)


def test_the_command_makes_a_checkpoint_that_generates(make_folder: Any, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["import", "sakana", str(make_folder("S")), "-o", str(tmp_path / "checkpoint")])
    assert done.exit_code == 0, done.output
    generator = TextToLora.from_pretrained(str(tmp_path / "checkpoint"))
    one, same, other = generator.generate(["Add two numbers", "Add two numbers.", "Add two numbers!"])
    # The published program puts a full stop after a letter, and only there.
    assert equal(one.lora, same.lora) and not equal(one.lora, other.lora)
    one.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["use_rslora"] is True


def equal(one: LoraTensors, other: LoraTensors) -> bool:
    return all(torch.equal(x, y) for x, y in zip((*one.a, *one.b), (*other.a, *other.b), strict=True))


# ------------------------------------------------------------------------------------------------ what is refused


class Spy:
    """A pickle of it writes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_pickles_that_run_code_are_refused_and_run_none(make_folder: Any, tmp_path: Path) -> None:
    folder = make_folder(state=weights("L") | {"mixer.1.weight": Spy(tmp_path / "owned")})
    with pytest.raises(CheckpointError, match=r"hypermod\.pt is damaged, or holds more than tensors"):
        sakana.import_published(folder, tmp_path / "checkpoint")
    assert not (tmp_path / "owned").exists()


def changed(case: str, **tensors: Any) -> dict[str, Any]:
    """A network's weights, some of them others; None takes one out, and __ stands for a point."""
    state: dict[str, Any] = dict(weights(case))
    for name, value in tensors.items():
        key = name.replace("__", ".")
        state[key] = value
        if value is None:
            del state[key]
    return state


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("L", {"mixer__1__weight": None}, r"lacks mixer\.1\.weight, which its settings ask for"),
        (
            "L",
            {"pos_emb__0__weight": torch.ones(2, 16)},
            r"holds 1 tensors that its settings do not ask for: \['pos_emb",
        ),
        (
            "L",
            {"mixer__1__weight": torch.ones(3, 3)},
            r"gives \(3, 3\) for trunk\.mixer\.1\.weight.*must be \(64, 16\)",
        ),
        ("L", {"heads__q_proj__weight": torch.ones(3, 12)}, r"gives \(3, 12\) for head\.write\.1\.weight"),
        ("M", {"heads__q_proj__bias": torch.ones(5)}, r"heads\.q_proj\.bias has shape \(5,\), expected \(64,\)"),
        (
            "L",
            {"AB_offset__A__q_proj": torch.ones(3, 2, 31)},
            r"AB_offset\.A\.q_proj is \(3, 2, 31\), not \(3, 2, 32\)",
        ),
        (
            "L",
            {"mixer__1__bias": torch.full((64,), float("nan"))},
            r"mixer\.1\.bias is no dense float tensor of finite",
        ),
        ("L", {"mixer__1__bias": torch.ones(64, dtype=torch.long)}, r"mixer\.1\.bias is no dense float tensor"),
        ("L", {"step": 17}, r"'step' is a int, not a named tensor"),
        ("L-scores", {"std_recon_target__B__q_proj": None}, r"lacks means and deviations for q_proj"),
    ],
)
def test_files_with_other_tensors_are_refused(
    case: str, changes: Any, message: str, make_folder: Any, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        sakana.import_published(make_folder(case, state=changed(case, **changes)), tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 no archive"])
def test_damaged_files_are_refused(content: bytes, make_folder: Any, tmp_path: Path) -> None:
    folder = make_folder()
    (folder / sakana.WEIGHTS).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"hypermod\.pt is damaged"):
        sakana.import_published(folder, tmp_path / "checkpoint")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"encoder_type": "vq"}, "encoder_type is 'vq'; only 'linear' is read"),
        ({"exp_setup": "hyper_vera"}, "exp_setup is 'hyper_vera'"),
        ({"autoreg_gen": True}, "autoreg_gen without shared_AB_head is none of L, M and S"),
        ({"learnable_pos_emb": True}, "learnable_pos_emb is True; only False is read"),
        ({"use_one_hot_task_emb": True}, "use_one_hot_task_emb is True"),
        ({"emb_model": ""}, "emb_model and model_dir must be named"),
        ({"head_in_size": -3}, "head_in_size must be a whole number from 4 to 65536, got -3"),
    ],
)
def test_networks_of_other_kinds_are_refused(arguments: Any, message: str, make_folder: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        sakana.import_published(make_folder(**arguments), tmp_path / "checkpoint")


def test_other_bases_and_encoders_are_refused(make_folder: Any, make_sentence_folder: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not pool by its first token.*t2l import gte"):
        sakana.import_published(
            make_folder(), tmp_path / "out", encoder=str(make_sentence_folder("mean_tokens", window=512))
        )
    state = {name.replace("q_proj", "query"): value for name, value in weights("L").items()}
    with pytest.raises(SpecMismatchError, match="has no linear module 'query'"):
        sakana.import_published(make_folder(state=state), tmp_path / "out")


# ------------------------------------------------------------------------------------------------- at full shape


@pytest.mark.parametrize("base", sakana.BASES)
@pytest.mark.parametrize("variant", ["L", "published-M", "published-S"])
def test_the_published_bases_at_full_shape(
    base: str, variant: str, record_property: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No trained weights, no base model: what generating takes on a CPU, and how large a network and an adapter are."""
    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", lambda weight, **_: weight)  # drawing them takes longest
    config = AutoConfig.for_model(**sakana.BASES[base])
    # Sizes in the authors' training scripts: the two later bases have the larger network.
    width, head_size = (128, 512) if base.startswith("mistralai") else (512, 2048)
    published = sakana.Published(base, "gte", variant, width, head_size, False, 1.0, "description", 8, 16, True)
    spec = sakana.published_spec(
        {f"heads.{m}.weight": torch.ones(1) for m in ("q_proj", "v_proj")}, published, config, base
    )
    hypernet = sakana.new_hypernet(published, spec, 1024).eval().requires_grad_(False)
    started = time.perf_counter()
    lora = hypernet(normalize(torch.randn(1, 1024), dim=-1))
    seconds = time.perf_counter() - started
    numbers = sum(p.numel() for n, p in hypernet.named_parameters() if not n.startswith("shared_lora"))
    megabytes = 4 * numbers / 1e6
    print(
        f"{base} {variant}: {megabytes:.0f} MB, an adapter of {4 * spec.num_parameters / 1e6:.0f} MB in {seconds:.2f} s"
    )
    record_property("megabytes", megabytes)
    assert seconds < 20
    sizes = {"mistralai/Mistral-7B-Instruct-v0.2": 3_407_872, "meta-llama/Llama-3.1-8B-Instruct": 3_407_872}
    assert spec.num_parameters == sizes.get(base, 1_597_440)
    assert lora.a[0].shape == (1, spec.num_layers, 8, spec.targets[0].in_features)
    if base.startswith("mistralai"):  # the paper's figures: 55.3, 34.3 and 4.9 million parameters
        paper = {"L": 55.3e6, "published-M": 34.3e6, "published-S": 4.9e6}
        assert numbers == pytest.approx(paper[variant], rel=0.02)
