"""From settings to batches: which tasks are trained on, with which descriptions, and what the hypernetwork reads.

    load ─▶ filter what does not fit ─▶ hold descriptions out ─▶ augment ─▶ pools and batches ─▶ summary

Knows tasks and tokenizers. Knows no base model, no encoder but its count of tokens, and no hypernetwork.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from t2l.errors import ConfigError, DataError
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
from t2l.train.augment import (
    WORDS,
    AnswerCheck,
    FormatVariation,
    LabelRemap,
    Variant,
    answer_variants,
    answers_of,
    auxiliary_tasks,
    vocabulary,
)
from t2l.train.batches import Batches, Pool
from t2l.train.computed import computed_tasks
from t2l.train.config import KINDS_OF_DESCRIPTIONS, DataConfig, SftConfig
from t2l.train.filtering import CountTokens, Fitting, filter_tasks
from t2l.train.options import ListedChoice, listed_choices, terse_descriptions

SUBSET_SEED = 0
"""Seed of `held_out_tasks`, `max_tasks` and the augmentations, apart from the run's: runs of several seeds train on the
same tasks."""


@dataclass(frozen=True)
class RunData:
    """Batches of a run, and the texts they point to."""

    texts: list[str]
    """What the hypernetwork reads: descriptions, inputs or names of tasks."""
    train: Batches
    evaluation: dict[str, Batches]
    """Batches for evaluation: tasks seen in training with new examples and descriptions, and held-out tasks."""
    summary: dict[str, Any]

    def told(self) -> list[str]:
        """The summary for people: how much there is, what is left out, and what the settings ask for in vain."""
        summary = self.summary
        lines = [", ".join(f"{summary[what]:,} {what}" for what in ("tasks", "examples", "descriptions"))]
        if summary["held_out_tasks"]:
            lines[0] += f"; {len(summary['held_out_tasks'])} other tasks for evaluation alone"
        for key, why in (("tasks_too_long", "an example"), ("tasks_without_description_in_window", "a description")):
            if summary[key]:
                lines.append(
                    f"{len(summary[key])} tasks are left out, without {why} that fits: {', '.join(summary[key])}"
                )
        for what in ("descriptions", "inputs"):
            if over := summary[f"{what}_over_window"]:
                lines.append(f"{over:,} {what} exceed encoder.max_tokens and are left out")
        if summary["tasks"] == 1:
            lines.append("A single task: all descriptions will do the same; `t2l tune` trains one adapter for one task")
        if not self.evaluation:
            lines.append(
                'No example is of split "val": nothing will be evaluated; mark some lines so to see how it goes'
            )
        return [*lines, *(f"Without effect, {reason}" for reason in summary["without_effect"])]


# ----------------------------------------------------------------------------------------------------- loading


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
        # Evaluated with the descriptions that settings are chosen by, which are never trained on.
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
    train, more = _take_out(train, config.held_out_tasks)
    if config.max_tasks is not None and config.max_tasks < len(train):
        order = random.Random(f"{SUBSET_SEED}/max_tasks").sample(range(len(train)), len(train))
        train = [train[n] for n in sorted(order[: config.max_tasks])]
    empty = [task.name for task in train if not task.examples.get("train")]
    if empty:
        raise DataError(f"No training examples for {', '.join(empty[:5])}; take them out or give them some")
    return train, [*held_out, *more]


def load_source(source: str) -> list[Task]:
    """Training tasks of one of `data.extra_tasks`, each of which names the source.

    Raises:
        DataError: if data are missing, hold no training example, or hold a task that may not be trained on.
    """
    if source == "t0":
        tasks = load_t0()
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
    """Tasks with the wanted kind of descriptions; those that have none of it are left out."""
    kind = config.descriptions
    if kind == "own" or not tasks:
        return tasks
    if kind == "random":
        texts = {task.name: short_random_text(random.Random(f"description/{task.name}")) for task in tasks}
        return [replace(task, descriptions=(texts[task.name],)) for task in tasks]
    if kind in ("definitions", "paraphrases"):
        both = [task for task in tasks if task.definition and set(task.descriptions) - {task.definition}]
        if not both:
            raise DataError(f"data.descriptions '{kind}': no task of {config.tasks} has a definition and other texts")
        if kind == "definitions":
            return [replace(task, descriptions=(task.definition or "",)) for task in both]
        return [
            replace(task, descriptions=tuple(text for text in task.descriptions if text != task.definition))
            for task in both
        ]
    found = load_descriptions(Path(kind))
    if trained and not any(task.name in found for task in tasks):
        raise DataError(
            f"{kind} describes none of the tasks, such as {tasks[0].name}. Name another file in data.descriptions, or "
            "none: --set data.descriptions=own"
        )
    # A task's last descriptions may be held out for evaluation; those of a file never are, so they come first.
    return [
        replace(task, descriptions=tuple(dict.fromkeys((*found.get(task.name, ()), *task.descriptions))))
        for task in tasks
    ]


def short_random_text(draw: random.Random) -> str:
    """Random words in the length of a short description."""
    return as_sentence(made_up_words(draw, words=(8, 16), letters=(2, 7)))


def _random_texts(count_tokens: CountTokens, window: int) -> list[str]:
    """Texts of random words in any length, as far as the encoder can read them."""
    draw = random.Random("made_up")
    texts = [as_sentence(made_up_words(draw, words=(4, 24), letters=(2, 9))) for _ in range(512)]
    return [text for text, length in zip(texts, count_tokens(texts), strict=True) if length <= window]


def _take_out(tasks: list[Task], number: int) -> tuple[list[Task], list[Task]]:
    """(rest, `number` tasks): one of each category in turn, categories and their tasks in random order."""
    if not number:
        return tasks, []
    if number >= len(tasks):
        raise DataError(f"data.held_out_tasks is {number}, of {len(tasks)} training tasks; some must remain")
    draw = random.Random(f"{SUBSET_SEED}/hold_out")
    groups: dict[str, list[Task]] = {}
    for task in draw.sample(tasks, len(tasks)):
        groups.setdefault(task.category or "", []).append(task)
    in_turn = [task for row in zip_longest(*groups.values()) for task in row if task is not None]
    taken = {task.name for task in in_turn[:number]}
    return [t for t in tasks if t.name not in taken], [t for t in tasks if t.name in taken]


# -------------------------------------------------------------------------------------------------- augmenting


@dataclass(frozen=True)
class _Trained:
    """A task as it is trained on."""

    task: Task
    """With the descriptions that are trained on."""
    held_out_descriptions: tuple[str, ...]
    variants: tuple[Variant, ...]
    auxiliary: tuple[Variant, ...]
    terse: tuple[str, ...] = ()
    """Texts that say next to nothing of the task."""


def _augment(tasks: list[Task], config: SftConfig, count_tokens: CountTokens) -> tuple[list[_Trained], list[str]]:
    """Holds descriptions out, and makes variants and auxiliary tasks of the others.

    Returns:
        The tasks, and what the settings ask for and no task allows, as a sentence each.
    """
    data, window = config.data, config.encoder.max_tokens
    split = [held_out_descriptions(task, data.held_out_descriptions) for task in tasks]
    read = [replace(task, descriptions=trained) for task, (trained, _) in zip(tasks, split, strict=True)]
    # Thousands of words are not learnt by heart, as a short list is; but few tasks have few words in common.
    words = vocabulary(read) if data.label_remap_prob else ()
    words = words if len(words) > len(WORDS) else WORDS
    variants = [answer_variants(task, SUBSET_SEED, words=words) if _variant_prob(task, data) else [] for task in read]
    auxiliary = [_auxiliary(task, data) for task in read]
    kinds = {type(variant.augmentation) for made in variants for variant in made}
    idle = []
    if data.label_remap_prob and LabelRemap not in kinds:
        idle.append("data.label_remap_prob: no task has a few short answers that other words could stand for")
    if data.format_variation_prob and FormatVariation not in kinds:
        idle.append("data.format_variation_prob: every task has a few short answers, for data.label_remap_prob")
    variants, auxiliary = (_readable(made, count_tokens, window) for made in (variants, auxiliary))
    if data.auxiliary_task_prob and not any(auxiliary):
        idle.append(
            "data.auxiliary_task_prob: no task has different short answers, and descriptions that leave room for a "
            f"sentence in encoder.max_tokens ({window})"
        )
    terse = _terse(read, count_tokens, window) if data.terse_description_prob else [()] * len(read)
    return [
        _Trained(task, held_out, tuple(some), tuple(more), few)
        for task, (_, held_out), some, more, few in zip(read, split, variants, auxiliary, terse, strict=True)
    ], idle


def _auxiliary(task: Task, config: DataConfig) -> list[Variant]:
    """The auxiliary tasks of a task; where options may stand in inputs, choices among listed answers too."""
    if not config.auxiliary_task_prob:
        return []
    listed = listed_choices(task, SUBSET_SEED) if config.option_placement_prob else []
    return [*auxiliary_tasks(task, SUBSET_SEED), *listed]


def _terse(tasks: list[Task], count_tokens: CountTokens, window: int) -> list[tuple[str, ...]]:
    """For each task the texts that say next to nothing of it and that the encoder can read."""
    made = [terse_descriptions(task) for task in tasks]
    texts = sorted({text for found in made for text in found})
    counts = dict(zip(texts, count_tokens(texts), strict=True))
    return [tuple(text for text in found if counts[text] <= window) for found in made]


def _variant_prob(task: Task, config: DataConfig) -> float:
    """Share of the task's rows that have other answers: other words for a few short ones, or another form."""
    return config.label_remap_prob if answers_of(task) else config.format_variation_prob


def _readable(made: list[list[Variant]], count_tokens: CountTokens, window: int) -> list[list[Variant]]:
    """The variants without the descriptions that exceed the encoder's window; one that then has none is left out."""
    said = sorted({text for some in made for variant in some for text in variant.descriptions})
    counts = dict(zip(said, count_tokens(said), strict=True)) if said else {}
    fitting = [
        [v._replace(descriptions=tuple(text for text in v.descriptions if counts[text] <= window)) for v in some]
        for some in made
    ]
    return [[variant for variant in some if variant.descriptions] for some in fitting]


# --------------------------------------------------------------------------------------------- pools and batches


def prepare_data(config: SftConfig, tokenizer: Any, count_tokens: CountTokens, *, gap: int = 0) -> RunData:
    """Loads tasks, checks that everything fits, and lays out batches.

    Args:
        config: Settings.
        tokenizer: The base's.
        count_tokens: Counts the tokens of texts as the encoder does.
        gap: Tokens between two documents of a row, see `t2l.train.loss.document_gap`.

    Raises:
        DataError: if data are missing or forbidden, nothing fits, or tasks cannot be told apart where the settings
            compare them.
        ConfigError: if early stopping has nothing to go by.
    """
    fitting = filter_tasks(*load_tasks(config.data), config, tokenizer, count_tokens)
    trained, idle = _augment(fitting.train, config, count_tokens)
    descriptions = sorted(
        {text for task in (*fitting.train, *fitting.held_out) for text in task.descriptions}
        | {text for task in trained for variant in (*task.variants, *task.auxiliary) for text in variant.descriptions}
    )
    number = len(descriptions)
    if config.data.random_description_prob:  # after all others, whose places then do not depend on them
        descriptions += _random_texts(count_tokens, config.encoder.max_tokens)
    random_texts = range(number, len(descriptions))
    descriptions += sorted({text for task in trained for text in task.terse} - set(descriptions))
    texts = _texts_to_read(config, fitting, descriptions)
    pools = _Pools(config, texts, descriptions)
    in_prompt = config.train.description_in_prompt_prob
    training = _batches(
        [pools.training(task) for task in trained],
        descriptions,
        tokenizer,
        config,
        gap,
        in_prompt=in_prompt,
        seed=config.seed,
        random_texts=random_texts,
        augmented=True,
    )
    suites = {
        "seen": [pools.of(t.task, "val", t.held_out_descriptions or t.task.descriptions) for t in trained],
        # A task that was never trained on has no number of its own.
        "validation": [pools.of(t, "val", t.descriptions) for t in fitting.held_out]
        if config.conditioning != "task"
        else [],
    }
    modes = [mode for mode, used in (("adapter", in_prompt < 1), ("adapter+prompt", in_prompt > 0)) if used]
    evaluation = {
        f"{name}/{mode}": _batches(
            filled, descriptions, tokenizer, config, gap, in_prompt=float(mode != "adapter"), seed=1
        )
        for name, some in suites.items()
        if (filled := [pool for pool in some if pool.examples])
        for mode in modes
    }
    _check_comparisons(config, training, evaluation)
    return RunData(texts, training, evaluation, _summary(fitting, trained, idle))


@dataclass
class _Pools:
    """Turns tasks into pools, which name texts by their places."""

    config: SftConfig
    texts: list[str]
    descriptions: list[str]

    def __post_init__(self) -> None:
        self.place = {text: i for i, text in enumerate(self.descriptions)}
        self.read = {text: i for i, text in enumerate(self.texts)}
        data = self.config.data
        from_file = data.descriptions not in KINDS_OF_DESCRIPTIONS
        self.preferred = load_descriptions(Path(data.descriptions)) if from_file else {}

    def of(self, task: Task, split: str, descriptions: Sequence[str]) -> Pool:
        """The examples of a split with some descriptions."""
        examples = task.examples.get(split, ())
        keys = {"description": (), "task": (task.name,), "input": [e.input.strip() for e in examples]}
        reads = tuple(self.read[key] for key in keys[self.config.conditioning])
        return Pool(task.name, examples, self._places(descriptions), reads)

    def training(self, trained: _Trained) -> Pool:
        """A task that is trained on, with its variants and auxiliary tasks."""
        task, data = trained.task, self.config.data
        preferred = self.preferred.get(task.name, ())
        answers = answers_of(task)
        own = replace(
            self.of(task, "train", _half(task.descriptions, preferred)),
            options=answers,
            terse=self._places(trained.terse),
            source=("", *data.extra_tasks).index(task.source),
        )

        def variants(made: Sequence[Variant]) -> tuple[Pool, ...]:
            return tuple(
                replace(
                    own,
                    examples=v.examples,
                    descriptions=self._places(v.descriptions),
                    augmentation=v.augmentation,
                    options=_options(v, answers),
                    self_contained=isinstance(v.augmentation, ListedChoice),
                )
                for v in made
            )

        return replace(
            own,
            variants=variants(trained.variants),
            variant_prob=_variant_prob(task, data),
            auxiliary=variants(trained.auxiliary),
            auxiliary_prob=data.auxiliary_task_prob,
        )

    def _places(self, texts: Sequence[str]) -> tuple[int, ...]:
        return tuple(self.place[text] for text in texts)


def _options(variant: Variant, answers: Sequence[str]) -> tuple[str, ...]:
    """What may be answered in a variant of a task with these answers, where it is one of a few."""
    change = variant.augmentation
    if isinstance(change, LabelRemap):
        return tuple(change.new[answer] for answer in answers)
    return (change.right, change.wrong) if isinstance(change, AnswerCheck) else ()


def _half(texts: Sequence[str], some: Sequence[str]) -> tuple[str, ...]:
    """All of `texts`, those of `some` so often that one of them is drawn about as often as any other."""
    found = [text for text in texts if text in some]
    rest = len(texts) - len(found)
    more = round(rest / len(found)) - 1 if found else 0
    return (*texts, *(found * more))


def _batches(
    pools: list[Pool],
    descriptions: list[str],
    tokenizer: Any,
    config: SftConfig,
    gap: int,
    *,
    in_prompt: float,
    seed: int,
    random_texts: Sequence[int] = (),
    augmented: bool = False,
) -> Batches:
    data = config.data
    training: dict[str, Any] = {
        "terse_prob": data.terse_description_prob,
        "option_placement_prob": data.option_placement_prob,
        "source_weights": data.source_weights,
    }
    return Batches(
        pools,
        descriptions,
        tokenizer,
        rows=config.train.tasks_per_batch,
        tokens=config.train.max_seq_length,
        answer_tokens=config.train.max_target_length,
        in_prompt=in_prompt,
        seed=seed,
        one_example=config.conditioning == "input",
        augment_unsaid=not config.unconditional,
        random_texts=random_texts,
        random_text_prob=data.random_description_prob,
        **(training if augmented else {}),
        # Noise on the base's embeddings is drawn for each document by its own length.
        share_beginnings=not config.train.neftune_noise_alpha,
        gap=gap,
        prompt=config.prompt,
    )


def _texts_to_read(config: SftConfig, fitting: Fitting, descriptions: list[str]) -> list[str]:
    if config.conditioning == "description":
        return descriptions
    if config.conditioning == "task":
        return sorted(task.name for task in fitting.train)
    tasks = (*fitting.train, *fitting.held_out)
    return sorted({example.input.strip() for task in tasks for some in task.examples.values() for example in some})


def _check_comparisons(config: SftConfig, training: Batches, evaluation: dict[str, Batches]) -> None:
    """What compares tasks needs at least two that can be told apart; what stops a run needs something to go by."""
    if config.train.margin_loss_weight and not training.has_negatives:
        raise DataError(
            "train.margin_loss_weight needs two tasks or more to compare, each with descriptions of its own; there are "
            f"{len(training.pools)}"
        )
    if config.train.early_stopping_patience and not evaluation:
        raise ConfigError("train.early_stopping_patience needs examples of split 'val'; the data hold none")


def _summary(fitting: Fitting, trained: list[_Trained], idle: list[str]) -> dict[str, Any]:
    return {
        "tasks": len(trained),
        "examples": sum(len(t.task.examples["train"]) for t in trained),
        "descriptions": sum(len(t.task.descriptions) for t in trained),
        "descriptions_over_window": fitting.descriptions_over_window,
        "tasks_without_description_in_window": fitting.without_description,
        "tasks_with_variants": sum(bool(t.variants) for t in trained),
        "tasks_with_auxiliary_tasks": sum(bool(t.auxiliary) for t in trained),
        "tasks_too_long": fitting.too_long,
        "inputs_over_window": fitting.inputs_over_window,
        "held_out_tasks": [task.name for task in fitting.held_out],
        "without_effect": idle,
    }
