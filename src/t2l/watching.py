"""What a person sees of a training: what it will need, before its first step, and now and then three answers.

Knows trainings and greedy decoding. Leaves weights, optimisers and random state as they are.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from t2l.apply import not_compiled
from t2l.errors import TrainingError
from t2l.eval.decode import greedy
from t2l.prompt import render, token_ids
from t2l.train.batches import Batches
from t2l.train.dry_run import preview_reconstruction, preview_sft, preview_task_loras
from t2l.train.estimate import Estimate

if TYPE_CHECKING:
    from t2l.train import reconstruction, task_loras
    from t2l.train.sft import Session, Trainer

WIDTH = 72
"""Characters of a text that are shown."""
MOST_TOKENS = 48
"""Of an answer that is shown."""
MEASURING = "taking a few steps to see what the run needs; they are undone …"


def watch_sft(session: "Session", trainer: "Trainer", step: int, log: Callable[[str], None]) -> None:
    """Shows a run of fine-tuning; a `t2l.train.sft.Watch`."""
    if step:
        for line in samples(session, trainer, step // session.config.train.eval_steps - 1):
            log(line)
        return
    log(MEASURING)
    _tell(preview_sft(session, trainer), log)
    if not session.config.unconditional:
        log(
            "right answers: of questions that are not trained on; another's: the same questions with another task's "
            "description in the adapter, far fewer where the description counts"
        )


def watch_reconstruction(trainer: "reconstruction.Trainer", log: Callable[[str], None]) -> None:
    """Shows what a run of reconstruction will need."""
    log(MEASURING)
    _tell(preview_reconstruction(trainer), log)


def watch_task_loras(trainer: "task_loras.Trainer", log: Callable[[str], None]) -> None:
    """Shows what a run of task LoRAs will need; a `t2l.train.task_loras.Watch`."""
    log(MEASURING)
    _tell(preview_task_loras(trainer), log)


def _tell(found: Estimate, log: Callable[[str], None]) -> None:
    """Says what a run will need.

    Raises:
        TrainingError: if it is more than the GPU has, which is certain; a process may still swap.
    """
    log(found.line())
    if not found.fits and found.on_gpu:
        raise TrainingError(f"The run does not fit into the GPU's memory: {found.advice}. Begin it in another folder")


def samples(session: "Session", trainer: "Trainer", number: int) -> list[str]:
    """One question and its answers: with the right description in the adapter, with another task's, by the base.

    Args:
        session: What the run has.
        trainer: What takes its steps.
        number: How many were shown before, so that tasks take turns.
    """
    config = session.config
    suites = [session.data.evaluation[x] for x in sorted(session.data.evaluation, reverse=True)]  # validation, seen
    if not suites or config.conditioning != "description" or trainer.hooks is None:
        return []
    batches = suites[0]
    place = number % len(batches.pools)
    pool = batches.pools[place]
    example = pool.examples[number // len(batches.pools) % len(pool.examples)]
    shown = config.prompt.with_description(config.train.description_in_prompt_prob == 1)
    right, other = pool.descriptions[0], _another(batches, place)
    prompt = render(session.tokenizer, batches.texts[right], example.input, shown)
    said = _answers(session, trainer, prompt, [right, other])
    names = ["right description", "another's", "base"]
    if config.unconditional:
        names, said = ["trained", "base"], [said[0], said[-1]]
    lines = [f"  {_short(example.input)}  (right: {_short(example.outputs[0])})"]
    told = {"right description": batches.texts[right], "another's": batches.texts[other]}
    for name, text in zip(names, said, strict=True):
        about = f"  ← {_short(told[name])}" if name in told else ""
        lines.append(f"    {name:<18} {_short(text) or '(nothing)'}{about}")
    return lines


def _another(batches: Batches, place: int) -> int:
    """A description of the next task, which is not one of this task's."""
    own = set(batches.pools[place].descriptions)
    others = [*batches.pools[place + 1 :], *batches.pools[:place]]
    return next((x for pool in others for x in pool.descriptions if x not in own), batches.pools[place].descriptions[0])


def _answers(session: "Session", trainer: "Trainer", prompt: str, read: list[int]) -> list[str]:
    """Greedy answers under the adapters written from some texts, and the base's own, without any of the hooks' doing.

    By the training's own hooks: hooks of another use would have everything compiled once more. Compiled layers run as
    they are meanwhile, or they would be compiled for every length of an answer.
    """
    hooks, network = trainer.hooks, trainer.hypernet
    assert hooks is not None
    network.eval()
    (ids,) = token_ids(session.tokenizer, [prompt])
    with torch.no_grad(), not_compiled(session.base):
        written = trainer.adapters(torch.tensor(read, device=trainer.device), learning=False)
        answers = []
        for lora in [*written.unbind(), None]:
            hooks.lora = lora
            answers += greedy(session.base, session.tokenizer, [ids], None, max_new_tokens=MOST_TOKENS)
        hooks.lora = None
    network.train()
    return answers


def _short(text: str) -> str:
    """A text in one line of some width."""
    line = " ".join(text.split())
    return line if len(line) <= WIDTH else line[: WIDTH - 1] + "…"
