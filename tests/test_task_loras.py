"""Task LoRAs: many at once are what each alone would be, and what PEFT with AdamW makes of the same rows."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import full_disk, make_base
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from t2l import peft_io
from t2l.checkpoint import load_checkpoint, save_checkpoint
from t2l.config import LoraConfig
from t2l.errors import ConfigError, OutputError, SpecMismatchError, TrainingError
from t2l.library import AdapterLibrary
from t2l.spec import AdapterSpec
from t2l.train import task_loras
from t2l.train.loop import schedule
from t2l.train.packing import Stream
from t2l.train.slots import Slots, adamw
from t2l.train.task_config import TaskLorasConfig, TaskLorasDataConfig, TaskLorasTrainConfig
from t2l.train.task_data import load_tasks, tokenize_tasks
from t2l.train.task_loras import BROKEN, Trainer, train_task_loras

ANSWERS = {"always_no": "no", "always_yes": "yes", "digit": "{n}", "shout": "Is it {n}!"}
TOKENS, ANSWER_TOKENS = 110, 40


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four tasks with the same inputs; only the last has validation examples of its own."""
    rows = [
        {
            "task": name,
            "description": f"Do {name}.",
            "input": f"Is it {n}?",
            "output": answer.format(n=n),
            "split": "val" if name == "shout" and n > 60 else "train",
        }
        for name, answer in ANSWERS.items()
        for n in range(30, 70)
    ]
    path = tmp_path_factory.mktemp("tasks") / "own.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def config(base_folder: Path, jsonl: Path) -> TaskLorasConfig:
    return TaskLorasConfig(
        base=str(base_folder),
        seed=5,
        lora=LoraConfig(target_modules=("q_proj", "v_proj", "down_proj"), r=2, lora_alpha=4),
        data=TaskLorasDataConfig(tasks=(str(jsonl),), validation_examples=6),
        train=TaskLorasTrainConfig(
            max_steps=16,
            tasks_per_batch=3,
            max_seq_length=TOKENS,
            max_target_length=ANSWER_TOKENS,
            learning_rate=1e-2,
            eval_steps=4,
            eval_rows=2,
            early_stopping_patience=2,
            save_steps=1000,
            report_to="none",
        ),
    )


def quiet(_: str) -> None:
    pass


def changed(config: TaskLorasConfig, **changes: Any) -> TaskLorasConfig:
    return replace(config, train=replace(config.train, **changes))


def only(config: TaskLorasConfig, *names: str) -> TaskLorasConfig:
    return replace(config, data=replace(config.data, only=names))


def run(config: TaskLorasConfig, folder: Path, **options: Any) -> AdapterLibrary:
    return train_task_loras(config, folder, device="cpu", log=quiet, **options)


def largest_difference(one: AdapterLibrary, other: AdapterLibrary, name: str) -> float:
    mine, theirs = one.stack([name]), other.stack([name])
    pairs = zip((*mine.a, *mine.b), (*theirs.a, *theirs.b), strict=True)
    return max((x - y).abs().max().item() for x, y in pairs)


@pytest.fixture(scope="module")
def together(config: TaskLorasConfig, tmp_path_factory: pytest.TempPathFactory) -> AdapterLibrary:
    """All four tasks in three slots."""
    return run(config, tmp_path_factory.mktemp("together") / "run")


def test_many_at_once_are_what_each_alone_is(config: TaskLorasConfig, together: AdapterLibrary, tmp_path: Path) -> None:
    """In other slots, beside other tasks, after others or first: the same adapter, steps and losses."""
    assert together.names == tuple(sorted(ANSWERS))
    for name in together.names:
        alone = run(only(config, name), tmp_path / name)
        assert largest_difference(alone, together, name) <= 1e-5
        mine, theirs = alone.index[name], together.index[name]
        assert {k: v for k, v in mine.items() if isinstance(v, str | list)} == {
            k: v for k, v in theirs.items() if isinstance(v, str | list)
        }
        for key in ("steps", "stopped_at", "examples", "validation_examples", "loss", "start_loss", "exact_match"):
            assert mine[key] == pytest.approx(theirs[key], abs=1e-4)
        assert mine["steps"] > 0 and mine["loss"] < mine["start_loss"]
    adapters = together.stack()
    assert (adapters.b[0][0] - adapters.b[0][1]).abs().max() > 1e-3  # and not all the same one


def test_rows_of_one_task_share_its_adapter(config: TaskLorasConfig, tmp_path: Path) -> None:
    """Two rows a task and step: again the same together and alone, and other adapters than with one row."""
    two = changed(config, rows_per_task=2, tasks_per_batch=2, max_steps=8)
    both = run(only(two, "digit", "shout"), tmp_path / "both")
    alone = run(only(two, "shout"), tmp_path / "alone")
    one_row = run(only(changed(config, max_steps=8), "shout"), tmp_path / "one")
    assert largest_difference(both, alone, "shout") <= 1e-5
    assert largest_difference(both, one_row, "shout") > 1e-3


@pytest.mark.parametrize("in_prompt", [False, True])
def test_peft_and_adamw_make_the_same_adapter(
    in_prompt: bool,
    config: TaskLorasConfig,
    tiny_config: LlamaConfig,
    tiny_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    """A plain loop over the same rows, document by document, with torch's optimiser, clipping and one adapter."""
    config = replace(
        only(config, "digit", "always_yes"), prompt=replace(config.prompt, description_in_prompt=in_prompt)
    )
    # All steps are taken and the last weights are the best, so there is nothing but the optimiser to compare.
    rate = 1e-3  # Adam divides rounding by rounding where a gradient is nearly zero; that error grows with the rate
    config = changed(config, max_steps=8, eval_steps=8, max_grad_norm=0.7, weight_decay=0.1, learning_rate=rate)
    library = run(config, tmp_path / "run")
    assert library.index["digit"]["steps"] == 8
    train, data = config.train, tokenize_tasks(load_tasks(config), config, tiny_tokenizer)
    for task in data:
        name = task.task.name
        model = get_peft_model(
            make_base(tiny_config),
            PeftLoraConfig(
                r=2,
                lora_alpha=4,
                target_modules=["q_proj", "v_proj", "down_proj"],
                lora_dropout=0,
                task_type="CAUSAL_LM",
            ),
        )
        slots = Slots(library.spec, 1, torch.device("cpu"))
        slots.start(0, name, seed=5, shared=True)
        start = {
            key: slots.weights[m + 3 * (part == "B")][0, position]
            for m, target in enumerate(library.spec.targets)
            for position, layer in enumerate(library.spec.layers)
            for part in "AB"
            for key in [peft_io.tensor_name(target, layer, part)]
        }
        parameters = {k.replace(".default", ""): p for k, p in model.named_parameters() if p.requires_grad}
        assert parameters.keys() == start.keys()
        with torch.no_grad():
            for key, value in start.items():
                parameters[key].copy_(value)
        optimizer = torch.optim.AdamW(parameters.values(), lr=1.0, weight_decay=0.1)
        stream = Stream(name, task.train, tokens=TOKENS, answer_tokens=ANSWER_TOKENS, seed=5)
        store, clipped = task.train, 0
        for step in range(8):
            optimizer.param_groups[0]["lr"] = rate * schedule(step, train.max_steps, train.warmup_ratio)
            losses = []
            for document in stream.row():
                begin, prompt, answer = (int(x[document]) for x in (store.start, store.prompt, store.answer))
                tokens = torch.from_numpy(store.pool[begin : begin + prompt + answer])
                logits = model(tokens[None, :-1]).logits[0, prompt - 1 :]
                losses.append(F.cross_entropy(logits, tokens[prompt:]))
            optimizer.zero_grad()
            torch.stack(losses).mean().backward()
            clipped += float(torch.nn.utils.clip_grad_norm_(parameters.values(), 0.7)) > 0.7
            optimizer.step()
        assert clipped > 0
        trained = peft_io.to_state_dict(library.stack([name]).unbind()[0], library.spec)
        assert max((trained[key] - parameters[key]).abs().max().item() for key in trained) <= 1e-5
        assert max((trained[key] - start[key]).abs().max().item() for key in trained) > 1e-3


# ----------------------------------------------------------------------------------------------- stopping early


def contrary(jsonl: Path, folder: Path) -> Path:
    """A task whose validation examples say the opposite of its training examples."""
    rows = [json.loads(line) for line in jsonl.read_text().splitlines()]
    rows += [
        {"task": "contrary", "description": "x", "input": f"Is it {n}?", "output": out, "split": split}
        for split, out, numbers in (("train", "yes", range(30, 60)), ("val", "Is it", range(60, 66)))
        for n in numbers
    ]
    path = folder / "contrary.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_early_stop_keeps_the_best_weights(config: TaskLorasConfig, jsonl: Path, tmp_path: Path) -> None:
    """A task that only gets worse stops after `patience` looks and keeps what it had; the others go on."""
    own = replace(config, data=replace(config.data, tasks=(str(contrary(jsonl, tmp_path)),)))
    # Nothing is learned before it gets worse: the rate is at its peak from the first step.
    library = run(changed(only(own, "contrary", "digit"), warmup_ratio=0.0, learning_rate=3e-2), tmp_path / "run")
    bad, good = library.index["contrary"], library.index["digit"]
    assert bad["stopped_by"] == "no better validation loss" and bad["stopped_at"] == bad["steps"] + 8
    assert good["stopped_at"] == 16
    if bad["steps"] == 0:  # then it is the adapter that does nothing
        assert bad["loss"] == bad["start_loss"]
        assert all(not b.any() for b in library.stack(["contrary"]).b)


def test_patience_begins_anew_with_every_better_look(
    config: TaskLorasConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two bad looks in a row end it, not two in all; the first loss is the base's."""
    script = iter((5.0, 4.0, 4.5, 3.0, 3.5, 3.6))

    def scripted(self: Trainer) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor([next(script)]), torch.tensor([0.25])

    monkeypatch.setattr(Trainer, "validate", scripted)
    facts = run(changed(only(config, "digit"), max_steps=40), tmp_path / "run").index["digit"]
    assert (facts["start_loss"], facts["loss"], facts["steps"], facts["stopped_at"]) == (5.0, 3.0, 12, 20)


def test_a_task_that_breaks_is_left_out_and_named(
    config: TaskLorasConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its gradient is not finite from the first step; the library is without it, the others are as ever."""

    names = sorted(ANSWERS)
    place = names.index("digit")

    def breaking(weights: Any, gradients: Any, *rest: Any) -> None:
        gradients[0][place] = float("nan")
        adamw(weights, gradients, *rest)

    together = run(changed(config, tasks_per_batch=4), tmp_path / "sound")
    monkeypatch.setattr(task_loras, "adamw", breaking)
    lines: list[str] = []
    library = train_task_loras(changed(config, tasks_per_batch=4), tmp_path / "run", device="cpu", log=lines.append)
    assert library.names == tuple(name for name in names if name != "digit")
    assert any("left out" in line and line.endswith("digit") for line in lines)
    assert json.loads((tmp_path / "run/finished/digit/facts.json").read_text())["stopped_by"] == BROKEN
    for name in library.names:
        assert largest_difference(library, together, name) == 0


# ------------------------------------------------------------------------------------------ saving and resuming


def same_but_for_time(one: AdapterLibrary, other: AdapterLibrary) -> bool:
    def timeless(library: AdapterLibrary) -> dict[str, Any]:
        return {name: {k: v for k, v in facts.items() if k != "seconds"} for name, facts in library.index.items()}

    return one.checksum == other.checksum and timeless(one) == timeless(other)


def test_stopped_by_the_clock_and_resumed(config: TaskLorasConfig, together: AdapterLibrary, tmp_path: Path) -> None:
    """One segment a call: the library is the uninterrupted one's, bit for bit, and grows on the way."""
    sizes = []
    with pytest.raises(TrainingError, match=r"No adapter was finished within 0\.0 minutes; go on with --resume"):
        run(config, tmp_path / "run", max_minutes=0.0)
    for _ in range(20):
        try:
            library = run(config, tmp_path / "run", resume=True, max_minutes=0.0)
        except TrainingError as error:
            if "is finished: all 4" in str(error):
                break
            assert "No adapter was finished" in str(error)
        else:
            sizes.append(len(library.names))
    assert sizes[0] < sizes[-1] == 4
    assert same_but_for_time(library, together)


def test_killed_between_saves_and_resumed(config: TaskLorasConfig, together: AdapterLibrary, tmp_path: Path) -> None:
    """Work since the last state is done again, with the same result, also where an adapter was finished since."""

    class Killed(Exception):
        pass

    def dying(after: int) -> Any:
        def log(line: str) -> None:
            nonlocal after
            after -= line.startswith("step")
            if not after:
                raise Killed

        return log

    with pytest.raises(TrainingError, match="No adapter was finished"):
        run(config, tmp_path / "run", max_minutes=0.0)
    for after in (1, 3, 5):
        with pytest.raises(Killed):
            train_task_loras(config, tmp_path / "run", resume=True, device="cpu", log=dying(after))
    assert same_but_for_time(run(config, tmp_path / "run", resume=True), together)


def test_ctrl_c_saves_between_two_evaluations(
    config: TaskLorasConfig, together: AdapterLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step that runs is finished, the state saved, the way on told; the library is the uninterrupted run's."""
    step, taken = Trainer.step, 0

    def interrupted(self: Trainer, *given: Any) -> torch.Tensor:
        nonlocal taken
        taken += 1
        if taken in (2, 7, 21):
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *given)

    monkeypatch.setattr(Trainer, "step", interrupted)
    lines: list[str] = []
    for times in range(3):
        with pytest.raises(KeyboardInterrupt):
            train_task_loras(config, tmp_path / "run", resume=times > 0, device="cpu", log=lines.append)
        assert lines[-1].startswith("interrupted: the state is saved") and lines[-1].endswith("go on with --resume")
        assert json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])["step"] == taken
    assert same_but_for_time(run(config, tmp_path / "run", resume=True), together)


def test_a_run_killed_before_its_library_writes_it_when_resumed(
    config: TaskLorasConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And leaves nothing of what was half written."""

    class Killed(Exception):
        pass

    def dying(*_: Any, **__: Any) -> None:
        raise Killed

    config = changed(only(config, "digit"), max_steps=4)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(task_loras, "save_library", dying)
        run(config, tmp_path / "run")
    (tmp_path / "run/.state.safetensors.123").write_text("half a state")
    assert run(config, tmp_path / "run", resume=True).names == ("digit",)
    assert not list((tmp_path / "run").rglob(".*"))
    with pytest.raises(TrainingError, match="is finished: all 1"):
        run(config, tmp_path / "run", resume=True)


@pytest.mark.parametrize(("method", "target"), [("_finish", "finished/digit"), ("save", "state.safetensors")])
def test_a_full_disk_is_an_error_of_ours(
    method: str, target: str, config: TaskLorasConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a finished adapter or a state is written; nothing half-written stays."""
    original = getattr(Trainer, method)

    def limited(*given: Any) -> None:
        with full_disk():
            original(*given)

    monkeypatch.setattr(Trainer, method, limited)
    config = changed(only(config, "digit"), max_steps=4 if method == "_finish" else 8)
    with pytest.raises(OutputError, match=f"Cannot write {tmp_path / 'run' / target}"):
        run(config, tmp_path / "run", max_minutes=0.0)
    assert not (tmp_path / "run" / target).exists()
    assert not list((tmp_path / "run").rglob(".*"))


def test_a_run_is_not_mixed_with_another(config: TaskLorasConfig, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="holds no saved state"):
        run(config, tmp_path / "run", resume=True)
    with pytest.raises(TrainingError, match="No adapter was finished"):
        run(config, tmp_path / "run", max_minutes=0.0)
    with pytest.raises(TrainingError, match="is not empty"):
        run(config, tmp_path / "run")
    with pytest.raises(TrainingError, match=r"train\.max_steps was 16, is 20"):
        run(changed(config, max_steps=20), tmp_path / "run", resume=True)


def test_the_base_is_left_as_it_was(
    config: TaskLorasConfig, tiny_base: LlamaForCausalLM, together: AdapterLibrary
) -> None:
    fresh = LlamaForCausalLM.from_pretrained(config.base)
    for one, other in zip(fresh.parameters(), tiny_base.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_compiled_is_the_same(config: TaskLorasConfig, together: AdapterLibrary, tmp_path: Path) -> None:
    """The step and the optimiser, compiled, over changing tasks in the slots.

    One graph for the first layer, whose input has no gradient, one for all others, one each for losses and optimiser.
    """
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    compiled = run(changed(config, torch_compile=True), tmp_path / "run")
    assert counters["stats"]["unique_graphs"] == 4
    for name in together.names:
        assert largest_difference(compiled, together, name) <= 1e-4


# ------------------------------------------------------------------------------------------- from a multi-task LoRA


def test_adapters_start_from_a_multi_task_lora(
    config: TaskLorasConfig, make_checkpoint: Callable[..., Path], tiny_config: LlamaConfig, tmp_path: Path
) -> None:
    """With steps too small to count they are that LoRA; with real ones each becomes better than it.

    The LoRA has its targets in another order than the run."""
    spec = AdapterSpec.from_config(tiny_config, config.base, config.lora)
    spec = replace(spec, targets=spec.targets[::-1])
    folder = make_checkpoint(tmp_path / "multitask", spec=spec, variant="none")
    loaded = load_checkpoint(folder)
    with torch.no_grad():
        for b in loaded.hypernet.shared_lora.b:
            b.normal_(std=0.02)
    save_checkpoint(folder, loaded.hypernet, spec, loaded.config, card="A LoRA.\n", overwrite=True, dtype=torch.float32)
    still = run(changed(config, init_from=str(folder), learning_rate=1e-9, max_steps=4), tmp_path / "still")
    origin_a, origin_b = loaded.hypernet.shared_lora()
    for name in still.names:
        found = still.stack([name])
        for mine, origin in zip((*found.a, *found.b), (*origin_a[::-1], *origin_b[::-1]), strict=True):
            torch.testing.assert_close(mine[0], origin.detach(), atol=1e-6, rtol=0)
    library = run(changed(config, init_from=str(folder)), tmp_path / "run")
    assert all(facts["loss"] < facts["start_loss"] for facts in library.index.values())
    assert [facts["start_loss"] for facts in library.index.values()] == pytest.approx(
        [facts["start_loss"] for facts in still.index.values()], abs=1e-5
    )


@pytest.mark.parametrize("origin", ["fresh", "checkpoint"])
def test_an_a_that_is_not_trained_is_all_adapters_own(
    origin: str, config: TaskLorasConfig, make_checkpoint: Callable[..., Path], tiny_config: LlamaConfig, tmp_path: Path
) -> None:
    """It is the A of their start, bit for bit, whatever the weight decay; each adapter learns by its B alone.

    Stopped and resumed is the same library again.
    """
    still = only(changed(config, freeze_a=True, weight_decay=0.5, max_grad_norm=0.1), "digit", "shout")
    spec = AdapterSpec.from_config(tiny_config, config.base, config.lora)
    start = Slots(spec, 1, torch.device("cpu"))
    if origin == "fresh":
        start.start(0, "any", seed=5, shared=True)
    else:
        folder = make_checkpoint(tmp_path / "multitask", spec=spec, variant="none")
        still = changed(still, init_from=str(folder), shared_init=False)
        start.start(0, "any", seed=5, shared=False, origin=load_checkpoint(folder).hypernet.shared_adapter())
    library = run(still, tmp_path / "run")
    for name in library.names:
        found = library.stack([name])
        for m in range(3):
            assert torch.equal(found.a[m], start.weights[m])
            assert (found.b[m] - start.weights[3 + m]).abs().max() > 1e-3
        assert library.index[name]["loss"] < library.index[name]["start_loss"]
    with pytest.raises(TrainingError, match="No adapter was finished"):
        run(still, tmp_path / "parts", max_minutes=0.0)
    assert same_but_for_time(run(still, tmp_path / "parts", resume=True), library)


def test_what_adapters_cannot_start_from_is_named(
    config: TaskLorasConfig, make_checkpoint: Callable[..., Path], tiny_config: LlamaConfig, tmp_path: Path
) -> None:
    spec = AdapterSpec.from_config(tiny_config, config.base, config.lora)
    reads = make_checkpoint(tmp_path / "reads", spec=spec)
    with pytest.raises(ConfigError, match="variant 'L'; adapters start from a multi-task LoRA"):
        run(changed(config, init_from=str(reads)), tmp_path / "a")
    other = make_checkpoint(tmp_path / "other", variant="none")
    with pytest.raises(SpecMismatchError, match=r"This run is for .* is "):
        run(changed(config, init_from=str(other)), tmp_path / "b")
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()
