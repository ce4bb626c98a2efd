"""From settings to batches: which tasks, which descriptions of them, what the hypernetwork reads, laid out in rows.

Knows tasks, tokenizers and encoders. Knows no base model and no hypernetwork.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from t2l.encoder import Encoded, Encoder
from t2l.errors import ConfigError, DataError
from t2l.pace import Pace
from t2l.prompt import render, token_ids
from t2l.tasks import (
    Task,
    as_sentence,
    held_out_descriptions,
    load_descriptions,
    load_own,
    load_sni,
    load_splits,
    load_t0,
    made_up_words,
    require_trainable,
    written_descriptions,
)
from t2l.train.batches import Batches, Pool, answer_text, without_long
from t2l.train.computed import computed_tasks
from t2l.train.derive import Check, Choose, derived
from t2l.train.options import Pick, picks, terse_descriptions
from t2l.train.relabel import MOST_ANSWERS, Form, Words, answers_of, variants, vocabulary
from t2l.train.settings import DataConfig, SftConfig

Lengths = Callable[[list[str]], list[int]]
Change = TypeVar("Change")


@dataclass(frozen=True)
class RunData:
    """Batches of a run, and the texts they point to."""

    texts: list[str]
    """What the hypernetwork reads: descriptions, inputs or names of tasks."""
    train: Batches
    judged: dict[str, Batches]
    """Batches for watching: tasks seen in training with new examples and descriptions, and held-out tasks."""
    summary: dict[str, Any]


def load_tasks(config: DataConfig) -> tuple[list[Task], list[Task]]:
    """(training tasks, held-out tasks), with the descriptions that the settings ask for.

    Raises:
        DataError: if data are missing or empty, or hold a task that may not be trained on.
    """
    if config.tasks == "sni":
        splits = load_splits()
        names = sorted(splits.train - splits.held_back)
        require_trainable(names)
        chosen_on = splits.validation | splits.held_back
        train = load_sni(names, splits=("train", "val"))
        # Watched with the descriptions that settings are chosen by, which are never trained on.
        written = written_descriptions("choosing")
        held_out = [
            replace(task, descriptions=written.get(task.name, task.descriptions))
            for task in load_sni(chosen_on, splits=("val",))
        ]
    else:
        tasks = load_own(config.tasks)
        require_trainable(task.name for task in tasks)
        train = [task for task in tasks if task.examples.get("train")]
        held_out = [task for task in tasks if not task.examples.get("train") and task.examples.get("val")]
        if not train:
            raise DataError(f"{config.tasks} has no task with examples of split 'train'")
        held_out = _with_descriptions(held_out, config, trained=False)
    train = [*train, *(task for source in config.extra_tasks for task in load_source(source))]
    names = [task.name for task in train]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise DataError(f"data.extra_tasks: {', '.join(twice[:5])} come from two sources; rename one of each")
    train = _with_descriptions(train, config)
    train, more = _take_out(train, config.hold_out, config.seed)
    if config.only:
        absent = sorted(set(config.only) - {task.name for task in train})
        if absent:
            raise DataError(
                f"data.only names {', '.join(absent[:5])}, which {config.tasks} does not offer for training"
            )
        train, held_out = [task for task in train if task.name in config.only], []
    if config.max_tasks is not None and config.max_tasks < len(train):
        order = random.Random(f"{config.seed}/max_tasks").sample(range(len(train)), len(train))
        train = [train[n] for n in sorted(order[: config.max_tasks])]
    empty = [task.name for task in train if not task.examples.get("train")]
    if empty:
        raise DataError(f"No training examples for {', '.join(empty[:5])}; take them out or give them some")
    return train, [*held_out, *more]


def load_source(source: str) -> list[Task]:
    """Training tasks of one of `data.extra_tasks`, each with `source` as where it comes from.

    Raises:
        DataError: if data are missing, hold no training example, or hold a task that may not be trained on.
    """
    if source == "t0":
        tasks = load_t0(splits=("train", "val"))
    elif source == "computed":
        tasks = computed_tasks()
    else:
        tasks = load_own(source)
    require_trainable(task.name for task in tasks)
    tasks = [replace(task, source=source) for task in tasks if task.examples.get("train")]
    if not tasks:
        raise DataError(f"data.extra_tasks: {source} has no task with examples of split 'train'")
    return tasks


def _with_descriptions(tasks: list[Task], config: DataConfig, *, trained: bool = True) -> list[Task]:
    """Tasks with the wanted kind of descriptions; those that have none of it are left out.

    Held-out tasks that a file does not describe keep their own descriptions.
    """
    if config.with_definition:
        tasks = [task for task in tasks if task.definition and set(task.descriptions) - {task.definition}]
    if config.descriptions == "own" or not tasks:
        return tasks
    found: dict[str, tuple[str, ...]]
    if config.descriptions == "definitions":
        found = {task.name: (task.definition,) for task in tasks if task.definition}
    elif config.descriptions == "paraphrases":
        found = {task.name: tuple(x for x in task.descriptions if x != task.definition) for task in tasks}
    elif config.descriptions == "random":
        found = {task.name: (random_text(random.Random(f"description/{task.name}")),) for task in tasks}
    else:
        found = load_descriptions(Path(config.descriptions))
        if trained and not any(task.name in found for task in tasks):
            raise DataError(f"{config.descriptions} describes none of the tasks, such as {tasks[0].name}")
        if config.keep_descriptions:
            # A task's last descriptions may be held out for judging; those of a file never are.
            both = {task.name: (*found.get(task.name, ()), *task.descriptions) for task in tasks}
            found = {name: tuple(dict.fromkeys(texts)) for name, texts in both.items()}
        elif not trained:
            found = {task.name: found.get(task.name, task.descriptions) for task in tasks}
    kept = [replace(task, descriptions=found[task.name]) for task in tasks if found.get(task.name)]
    if not kept:
        raise DataError(f"data.descriptions '{config.descriptions}': no task of {config.tasks} has any")
    return kept


def random_text(draw: random.Random) -> str:
    """Made-up words in the length of a short description."""
    return as_sentence(made_up_words(draw, words=(8, 16), letters=(2, 7)))


def _take_out(tasks: list[Task], number: int, seed: int) -> tuple[list[Task], list[Task]]:
    """(rest, `number` tasks): one of each category in turn, categories and their tasks in random order."""
    if not number:
        return tasks, []
    if number >= len(tasks):
        raise DataError(f"data.hold_out is {number}, of {len(tasks)} training tasks; some must remain")
    draw = random.Random(f"{seed}/hold_out")
    groups: dict[str, list[Task]] = {}
    for task in draw.sample(tasks, len(tasks)):
        groups.setdefault(task.category or "", []).append(task)
    in_turn = [task for row in zip_longest(*groups.values()) for task in row if task is not None]
    taken = {task.name for task in in_turn[:number]}
    return [t for t in tasks if t.name not in taken], [t for t in tasks if t.name in taken]


# ------------------------------------------------------------------------------------------------- laying out


def prepare_data(config: SftConfig, tokenizer: Any, lengths: Lengths) -> RunData:
    """Loads tasks, checks that everything fits, and lays out batches.

    Args:
        config: Settings.
        tokenizer: The base's.
        lengths: Counts a text's tokens as the encoder does.

    Raises:
        DataError: if data are missing or forbidden, a task has nothing that fits, or tasks cannot be told apart where
            the settings compare them.
        ConfigError: if early stopping has nothing to go by.
    """
    window = config.encoder.max_tokens
    train, validation = load_tasks(config.data)
    if config.data.with_definition:
        train, validation = (_with_readable_definition(tasks, lengths, window) for tasks in (train, validation))
    descriptions = sorted({text for task in (*train, *validation) for text in task.descriptions})
    counts = dict(zip(descriptions, lengths(descriptions), strict=True))
    train, lost, dropped = without_long(train, counts, window)
    validation, _, _ = without_long(validation, counts, window)
    if not train:
        raise DataError(f"No task has a description within encoder.max_tokens ({window})")
    unread = 0
    if config.reads == "input":
        train, unread = _with_readable_inputs(train, lengths, window)
        validation, _ = _with_readable_inputs(validation, lengths, window)
        if not train:
            raise DataError(f"No training input is within encoder.max_tokens ({window}); raise it")
    too_long = _too_long(train, config, tokenizer)
    if too_long and not config.data.drop_long_tasks:
        raise DataError(
            f"{len(too_long)} tasks have no example within train.sequence_tokens ({config.train.sequence_tokens}) and "
            f"train.answer_tokens ({config.train.answer_tokens}): {'; '.join(list(too_long.values())[:3])}. "
            "Raise them, or leave these tasks out with data.drop_long_tasks"
        )
    train = [task for task in train if task.name not in too_long]
    if not train:
        raise DataError("No task is left: all of them are too long")

    kept = {task.name: held_out_descriptions(task, config.data.held_out_descriptions) for task in train}
    read_in_training = [replace(task, descriptions=kept[task.name][0]) for task in train]
    others = _variants(read_in_training, config.data, lengths, window)
    asked = _derived(read_in_training, config.data, lengths, window)
    descriptions = sorted(
        {text for task in (*train, *validation) for text in task.descriptions}
        | {text for found in others.values() for _, texts in found for text in texts}
        | {text for found in asked.values() for _, texts in found for text in texts}
    )
    # After all others, whose places then do not depend on them.
    made_up = _made_up(lengths, window) if config.data.made_up else []
    descriptions += made_up
    terse_of = _terse(read_in_training, lengths, window) if config.data.terse_description_prob else {}
    known = set(descriptions)
    descriptions += sorted({text for texts in terse_of.values() for text in texts} - known)
    texts = _texts_to_read(config, train, validation, descriptions)
    place, read = {text: i for i, text in enumerate(descriptions)}, {text: i for i, text in enumerate(texts)}
    share = config.data.file_share
    preferred = load_descriptions(Path(config.data.descriptions)) if share else {}

    def pool(task: Task, split: str, allowed: Sequence[str]) -> Pool:
        examples = task.examples[split]
        keys = {"description": (), "task": (task.name,), "input": [e.input.strip() for e in examples]}[config.reads]
        reads = tuple(read[key] for key in keys)
        return Pool(task.name, examples, tuple(place[t] for t in allowed), reads, task.category)

    def training_pool(task: Task) -> Pool:
        texts = _preferred(kept[task.name][0], preferred.get(task.name, ()), share)
        answers = answers_of(task)
        own = replace(
            pool(task, "train", texts),
            options=answers,
            terse=tuple(place[text] for text in terse_of.get(task.name, ())),
            source=("", *config.data.extra_tasks).index(task.source),
        )
        return replace(
            own,
            variant_share=_variant_share(task, config.data),
            variants=tuple(
                replace(
                    own,
                    descriptions=tuple(place[text] for text in said),
                    reword=reword,
                    options=tuple(map(reword, answers)),
                )
                for reword, said in others[task.name]
            ),
            derived_share=config.data.derive,
            derived=tuple(
                replace(
                    own,
                    examples=ask.examples,
                    descriptions=tuple(place[text] for text in said),
                    ask=ask,
                    options=(ask.right, ask.wrong) if isinstance(ask, Check) else (),
                    self_contained=isinstance(ask, Pick),
                )
                for ask, said in asked[task.name]
            ),
        )

    def batches(
        pools: list[Pool],
        *,
        in_prompt: float,
        seed: int,
        by_category: bool = False,
        teacher_tokens: int = 0,
        made_up: Sequence[int] = (),
        terse_share: float = 0.0,
        dropout: float = 0.0,
        option_placement: float = 0.0,
        source_weights: Sequence[float] = (),
    ) -> Batches:
        return Batches(
            pools,
            descriptions,
            tokenizer,
            rows=config.train.tasks_per_step,
            tokens=config.train.sequence_tokens,
            answer_tokens=config.train.answer_tokens,
            in_prompt=in_prompt,
            seed=seed,
            by_category=by_category,
            one_example=config.reads == "input",
            teacher_tokens=teacher_tokens,
            shots=config.train.distill_shots,
            relabel_unsaid=not config.blind,
            made_up=made_up,
            made_up_share=config.data.made_up,
            terse_share=terse_share,
            dropout=dropout,
            option_placement=option_placement,
            source_weights=source_weights,
            # Noise on the base's embeddings is drawn for each document by its own length.
            share_beginnings=not config.train.neftune_alpha,
            prompt=config.prompt,
        )

    in_prompt = config.train.description_in_prompt
    training = batches(
        [training_pool(task) for task in train],
        in_prompt=in_prompt,
        seed=config.seed,
        by_category=config.data.by_category,
        teacher_tokens=config.train.teacher_tokens if config.train.distill else 0,
        made_up=[place[text] for text in made_up],
        terse_share=config.data.terse_description_prob,
        dropout=config.train.conditioning_dropout,
        option_placement=config.data.option_placement_prob,
        source_weights=config.data.source_weights,
    )
    suites = {
        "seen": [pool(t, "val", kept[t.name][1] or kept[t.name][0]) for t in train if t.examples.get("val")],
        # A task that was never trained on has no number of its own.
        "validation": [pool(t, "val", t.descriptions) for t in validation if t.examples.get("val")]
        if config.reads != "task"
        else [],
    }
    modes = [mode for mode, used in (("adapter", in_prompt < 1), ("adapter+prompt", in_prompt > 0)) if used]
    judged = {
        f"{name}/{mode}": batches(pools, in_prompt=float(mode != "adapter"), seed=1)
        for name, pools in suites.items()
        if pools
        for mode in modes
    }
    _check_comparisons(config, training, judged)
    summary = {
        "tasks": len(train),
        "examples": sum(len(task.examples["train"]) for task in train),
        "descriptions": sum(len(trained) for trained, _ in kept.values()),
        "descriptions_over_window": dropped,
        "tasks_without_description_in_window": lost,
        "tasks_with_variants": sum(bool(found) for found in others.values()),
        "tasks_with_derived": sum(bool(found) for found in asked.values()),
        "tasks_too_long": sorted(too_long),
        "inputs_over_window": unread,
        "held_out_tasks": [task.name for task in validation],
    }
    return RunData(texts, training, judged, summary)


def _variant_share(task: Task, config: DataConfig) -> float:
    """Of its rows, those that have other answers: other words, or where it has no few short ones, another form."""
    return config.relabel if answers_of(task) else config.reform


def _variants(
    tasks: list[Task], config: DataConfig, lengths: Lengths, window: int
) -> dict[str, list[tuple[Words | Form, tuple[str, ...]]]]:
    """Variants of each task, with texts made of its descriptions."""
    made: dict[str, list[tuple[Words | Form, tuple[str, ...]]]] = {task.name: [] for task in tasks}
    words: tuple[str, ...] = ()
    if config.relabel_vocabulary:
        words = vocabulary(tasks)
        if len(words) < 2 * MOST_ANSWERS:
            raise DataError(
                f"data.relabel_vocabulary: {len(words)} words of four letters or more stand in descriptions of several "
                f"tasks; at least {2 * MOST_ANSWERS} are needed. Leave it out to draw from a list"
            )
    for task in tasks:
        if _variant_share(task, config):
            made[task.name] = variants(task, config.relabel_variants, config.seed, words=words)
    kinds = {type(change) for found in made.values() for change, _ in found}
    if config.relabel and Words not in kinds:
        raise DataError("data.relabel: no task has a few short answers that other words could take the place of")
    if config.reform and Form not in kinds:
        raise DataError("data.reform: every task has a few short answers, which data.relabel is for")
    return _readable(made, lengths, window)


def _derived(
    tasks: list[Task], config: DataConfig, lengths: Lengths, window: int
) -> dict[str, list[tuple[Check | Choose | Pick, tuple[str, ...]]]]:
    """What is derived of each task, with texts made of its descriptions.

    Where options may stand in inputs, half as many choices among listed answers come on top.
    """
    if not config.derive:
        return {task.name: [] for task in tasks}
    listed = (config.derive_variants + 1) // 2 if config.option_placement_prob else 0
    found: dict[str, list[tuple[Check | Choose | Pick, tuple[str, ...]]]] = {
        task.name: [*derived(task, config.derive_variants, config.seed), *picks(task, listed, config.seed)]
        for task in tasks
    }
    made = _readable(found, lengths, window)
    if not any(made.values()):
        raise DataError(
            "data.derive: no task has different short answers, and descriptions that leave room for a sentence in "
            f"encoder.max_tokens ({window})"
        )
    return made


def _readable(
    made: dict[str, list[tuple[Change, tuple[str, ...]]]], lengths: Lengths, window: int
) -> dict[str, list[tuple[Change, tuple[str, ...]]]]:
    """Without the texts that exceed the encoder's window, and what then has none."""
    said = sorted({text for found in made.values() for _, texts in found for text in texts})
    counts = dict(zip(said, lengths(said), strict=True)) if said else {}
    fitting = {
        name: [(change, tuple(text for text in texts if counts[text] <= window)) for change, texts in found]
        for name, found in made.items()
    }
    return {name: [variant for variant in found if variant[1]] for name, found in fitting.items()}


def _terse(tasks: list[Task], lengths: Lengths, window: int) -> dict[str, tuple[str, ...]]:
    """Texts that say next to nothing of each task and that the encoder can read."""
    made = {task.name: terse_descriptions(task) for task in tasks}
    texts = sorted({text for found in made.values() for text in found})
    counts = dict(zip(texts, lengths(texts), strict=True))
    return {name: tuple(text for text in found if counts[text] <= window) for name, found in made.items()}


def _made_up(lengths: Lengths, window: int, number: int = 512) -> list[str]:
    """Texts of made-up words that the encoder can read."""
    draw = random.Random("made_up")
    texts = [as_sentence(made_up_words(draw, words=(4, 24), letters=(2, 9))) for _ in range(number)]
    return [text for text, length in zip(texts, lengths(texts), strict=True) if length <= window]


def _preferred(texts: Sequence[str], some: Sequence[str], share: float) -> tuple[str, ...]:
    """All of `texts`, those of `some` so often that one of them is drawn about as often as `share` says."""
    mine = [text for text in texts if text in some]
    rest = len(texts) - len(mine)
    more = round(share / (1 - share) * rest / len(mine)) - 1 if mine else 0
    return (*texts, *(mine * more))


def _texts_to_read(config: SftConfig, train: list[Task], held_out: list[Task], descriptions: list[str]) -> list[str]:
    if config.reads == "description":
        return descriptions
    if config.reads == "task":
        return sorted(task.name for task in train)
    examples = (e for task in (*train, *held_out) for some in task.examples.values() for e in some)
    return sorted({example.input.strip() for example in examples})


def _with_readable_definition(tasks: list[Task], lengths: Lengths, window: int) -> list[Task]:
    counts = lengths([task.definition or "" for task in tasks]) if tasks else []
    return [task for task, count in zip(tasks, counts, strict=True) if count <= window]


def _with_readable_inputs(tasks: list[Task], lengths: Lengths, window: int) -> tuple[list[Task], int]:
    """The tasks with the examples whose input the encoder can read, and how many it cannot."""
    kept, dropped = [], 0
    for task in tasks:
        examples = {}
        for split, some in task.examples.items():
            fits = [bool(e.input.strip()) for e in some]
            counts = iter(lengths([e.input for e, fit in zip(some, fits, strict=True) if fit]) if any(fits) else ())
            examples[split] = tuple(e for e, fit in zip(some, fits, strict=True) if fit and next(counts) <= window)
            dropped += len(some) - len(examples[split])
        if any(examples.values()):
            kept.append(replace(task, examples=examples))
    return [task for task in kept if task.examples.get("train") or task.examples.get("val")], dropped


def _too_long(tasks: list[Task], config: SftConfig, tokenizer: Any) -> dict[str, str]:
    """Tasks none of whose training examples fits into a row, with the reason."""
    train, found = config.train, {}
    prompt = config.prompt.asked(train.description_in_prompt == 1)
    for task in tasks:
        description = min(task.descriptions, key=len)
        shortest: tuple[int, int] | None = None
        examples = task.examples["train"]
        # Nearly always one of the first few fits.
        for start in range(0, len(examples), 16):
            some = examples[start : start + 16]
            prompts = token_ids(tokenizer, [render(tokenizer, description, e.input, prompt) for e in some])
            answers = token_ids(tokenizer, [answer_text(e.outputs[0], tokenizer.eos_token or "", prompt) for e in some])
            sizes = [(len(p) + len(a) - 1, len(a)) for p, a in zip(prompts, answers, strict=True)]
            if any(row <= train.sequence_tokens and answer <= train.answer_tokens for row, answer in sizes):
                break
            shortest = min([*sizes, shortest] if shortest else sizes)
        else:
            if shortest is None:
                found[task.name] = f"{task.name} has no examples"
            else:
                found[task.name] = f"{task.name} needs at least {shortest[0]} tokens, {shortest[1]} of them its answer"
    return found


def _check_comparisons(config: SftConfig, training: Batches, judged: dict[str, Batches]) -> None:
    """What compares tasks needs at least two that can be told apart; what stops a run needs something to go by."""
    if config.train.contrast and not training.told_apart:
        raise DataError(
            f"train.contrast needs two tasks or more, each with descriptions of its own, to compare; there are "
            f"{len(training.pools)}"
        )
    if config.train.early_stop == "margin":
        held_out = [suite for name, suite in judged.items() if name.startswith("validation/")]
        if not held_out or not held_out[0].told_apart:
            number = len(held_out[0].pools) if held_out else 0
            raise ConfigError(
                "train.early_stop 'margin' needs two held-out tasks or more with validation examples and descriptions "
                f"of their own; there are {number}. Set data.hold_out, or stop on 'loss'"
            )
    if config.train.early_stop == "loss" and not judged:
        raise ConfigError("train.early_stop 'loss' needs examples of split 'val'; the data hold none")


# ------------------------------------------------------------------------------------------ what is read


class DescriptionBank:
    """Every text the hypernetwork reads in a run, encoded once; hands out padded batches of one static shape.

    Without a GPU this can take longer than the steps do, so `log` hears of it every `every` seconds.
    """

    def __init__(
        self,
        encoder: Encoder,
        texts: Sequence[str],
        *,
        chunk: int = 256,
        log: Callable[[str], None] = lambda text: None,
        every: float = 20.0,
    ) -> None:
        self.kind, self.width, self.window = encoder.kind, encoder.embedding_size, encoder.max_tokens
        states, lengths = [], []
        # In order of length, so that little of a chunk is padding.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        pace = Pace(len(texts), "texts read", log, work=sum(map(len, texts)), every=every)
        for start in range(0, len(order), chunk):
            part = [texts[i] for i in order[start : start + chunk]]
            encoded = encoder.encode(part)
            pace.add(len(part), sum(map(len, part)))
            if encoded.mask is None:
                states.append(encoded.states)
            else:
                states.append(encoded.states[encoded.mask].bfloat16())
                lengths.append(encoded.mask.sum(1))
        self.states = torch.cat(states)
        place = torch.empty(len(order), dtype=torch.long)
        place[torch.tensor(order)] = torch.arange(len(order))
        self.place = place.to(self.states.device)
        if lengths:
            self.lengths = torch.cat(lengths)
            self.starts = self.lengths.cumsum(0) - self.lengths

    def __getitem__(self, index_N: Tensor) -> Encoded:
        """Texts by their position in the run's list: (N, E), or (N, window, E) with a mask."""
        place = self.place[index_N]
        if self.kind == "sentence":
            return Encoded(self.states[place])
        offsets = torch.arange(self.window, device=place.device)
        mask = offsets < self.lengths[place][:, None]
        where = (self.starts[place][:, None] + offsets).clamp_max(self.states.shape[0] - 1)
        return Encoded(self.states[where].float() * mask[..., None], mask)

    def sample(self, index_N: Tensor, *, most: int = 4096) -> Tensor:
        """Encodings of some texts, evenly spaced among those at these positions: (K, E), of tokens a row each."""
        some = index_N[:: -(-len(index_N) // most)].to(self.place.device)
        encoded = [self[part] for part in some.split(256)]
        return torch.cat([e.states if e.mask is None else e.states[e.mask] for e in encoded])
