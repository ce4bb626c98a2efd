"""`t2l tune`: a generated adapter goes on learning from a few examples."""

import time
from enum import StrEnum
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer

from t2l.cli.common import (
    DEFAULT,
    BaseOption,
    CheckpointOption,
    DeviceOption,
    InPromptOption,
    JsonOption,
    app,
    checked_device,
    print_json,
    require_place,
    say,
)
from t2l.cli.export import SourceArgument, find_adapter


class Start(StrEnum):
    """What tuning begins with."""

    adapter = "adapter"
    scratch = "scratch"


@app.command()
def tune(
    source: SourceArgument,
    examples: Annotated[
        Path, typer.Option(metavar="FILE", help="JSON lines with input and output; some tens are a good number.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="PEFT folder to write.")],
    checkpoint: CheckpointOption = DEFAULT,
    base: BaseOption = None,
    start: Annotated[Start, typer.Option(help="Begin with the adapter, or with a fresh LoRA.")] = Start.adapter,
    learning_rate: Annotated[float, typer.Option(help="Largest step size.")] = 2e-4,
    max_epochs: Annotated[int, typer.Option(help="Most rounds over the examples.")] = 30,
    patience: Annotated[int, typer.Option(help="Rounds without a lower held-out loss before it stops.")] = 4,
    held_out: Annotated[float, typer.Option(help="Part of the examples that is held out.")] = 0.25,
    batch_size: Annotated[int, typer.Option(help="Examples of a step.")] = 8,
    seed: Annotated[int, typer.Option(help="Decides which examples are held out, and their order.")] = 0,
    description_in_prompt: InPromptOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Tune an adapter on a few examples of its task.

    The adapter with the lowest loss on held-out examples is written; that may be the one it began with.
    """
    require_place(output, "folder")
    started = time.perf_counter()
    from t2l.train import tune as tuning

    config = tuning.TuneConfig(
        learning_rate=learning_rate,
        max_epochs=max_epochs,
        patience=patience,
        held_out=held_out,
        batch_size=batch_size,
        seed=seed,
    )
    pairs = tuning.read_examples(examples)
    adapter, prompt = find_adapter(source, checkpoint, base), _prompt(checkpoint, description_in_prompt)
    tuned = tuning.tune(
        adapter,
        _base(base or adapter.spec.base_model, checked_device(device)),
        pairs,
        prompt=prompt,
        config=config,
        start=start.value,
        log=say,
    )
    losses = tuned.held_out_losses
    if tuned.interrupted and tuned.best_epoch == 0:
        say("interrupted before a round was better than the start: nothing is written")
        raise KeyboardInterrupt
    tuned.adapter.save_pretrained(output)
    if tuned.interrupted:
        say(
            f"interrupted in round {len(losses)}: the adapter of round {tuned.best_epoch} is saved in {output}; go on "
            f"from it with `t2l tune {quote(str(output))} --examples {quote(str(examples))} -o ANOTHER`"
        )
        raise KeyboardInterrupt
    if as_json:
        facts = {"path": str(output), "trained_on": tuned.trained_on, "best_epoch": tuned.best_epoch}
        print_json(facts | {"held_out_losses": losses, "seconds": round(time.perf_counter() - started, 3)})
        return
    print(output)
    if tuned.best_epoch == 0:
        say(f"no round lowered the loss on the held-out examples ({losses[0]:.4f}): the adapter is as it began")
    else:
        say(f"loss on the held-out examples {losses[0]:.4f} -> {min(losses):.4f} in round {tuned.best_epoch}")


def _prompt(checkpoint: str, description_in_prompt: bool | None) -> Any:
    """How the checkpoint renders prompts, or as asked for."""
    from t2l.checkpoint import read_config
    from t2l.text_to_lora import checkpoint_folder

    _, config = read_config(checkpoint_folder(checkpoint))
    return config.prompt.with_description(description_in_prompt)


def _base(reference: str, device: str | None) -> tuple[Any, Any]:
    """The base model and its tokenizer."""
    from t2l import hub

    device = hub.best_device(device)
    return hub.load_causal_lm(reference, device=device), hub.load_tokenizer(reference)
