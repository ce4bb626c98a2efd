"""A library of adapters as one checkpoint, and what that is worth: sizes, errors, scores, the curve over networks.

Scores are teacher-forced: the loss of each held-out example's answer, and whether every token of it is the model's
first choice, which is what a greedy answer equal to it means. Everything in a report follows from the lines of
`scores.jsonl` and the networks' errors. Knows libraries, checkpoints and tasks; the tasks come from the caller.
Shape letters as in `spec.py`.
"""

import json
import random
import shutil
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from t2l import checkpoint
from t2l.apply import hooked
from t2l.config import PromptConfig, build
from t2l.errors import ConfigError, DataError, TrainingError
from t2l.hypernet import Hypernet
from t2l.io import new_folder, write_text
from t2l.library import AdapterLibrary
from t2l.lora import LoraTensors
from t2l.spec import AdapterSpec
from t2l.tasks import Task
from t2l.text_to_lora import TextToLora
from t2l.train.dataset import short_random_text
from t2l.train.loss import answer_losses
from t2l.train.packing import TaskDocuments, document_scores, fixed_rows, pack, tokenize_examples
from t2l.train.reconstruction import (
    ReconstructionConfig,
    basis_of_library,
    read_descriptions,
    saved_config,
    train_reconstruction,
)
from t2l.train.reconstruction_data import Descriptions
from t2l.train.reconstruction_losses import compare, principal_directions
from t2l.train.resume import read_progress

Kind = Literal["trained", "held-out", "random", "other"]
KINDS: tuple[Kind, ...] = ("trained", "held-out", "random", "other")
"""What a network reads for a task: a description it was trained on, one that was held out, made-up words, or another
task's description (the paper's table 5)."""
HEAD_SIZES = (128, 256, 512, 1024, 2048)
LEAST_BASIS = 32
"""Adapters that a network mixes at least, if there are more, however small it was to be."""

# ---------------------------------------------------------------------------------------------------- the scores


@dataclass(frozen=True)
class Scores:
    """How one row of the report did on one task."""

    row: str
    task: str
    ids: list[str]
    """Examples, in the same order in every row."""
    loss: list[float]
    """Mean loss of each example's answer tokens."""
    exact_match: list[int]
    """1 where every token of the answer is the model's first choice."""


@dataclass(frozen=True)
class Scored:
    """Held-out examples of a library's tasks, tokenised, and the model that answers them.

    Args:
        model: The base model.
        spec: The adapters' shape.
        documents: Task to its documents.
        tokens: T, of the rows they are packed into.
        answer_tokens: A.
        rows_at_once: B.
    """

    model: Any
    spec: AdapterSpec
    documents: dict[str, TaskDocuments]
    tokens: int
    answer_tokens: int
    rows_at_once: int

    @torch.no_grad()
    def score(self, row: str, lora: LoraTensors | None, names: Sequence[str]) -> list[Scores]:
        """Scores one row of the report: each task under its own adapter.

        Args:
            row: The row's name.
            lora: A batch with one adapter for each name; None for the base alone.
            names: Tasks; those without documents are passed over.
        """
        device = next(self.model.parameters()).device
        dtype = next(self.model.parameters()).dtype
        sizes = {"tokens": self.tokens, "answer_tokens": self.answer_tokens}
        listed = [
            (0 if lora is None else n, name, found)
            for n, name in enumerate(names)
            if name in self.documents
            for found in fixed_rows(self.documents[name], **sizes)
        ]
        lora = (lora or _nothing(self.spec)).map(lambda x: x.to(device, dtype))
        answers: dict[str, dict[int, tuple[float, int]]] = {name: {} for _, name, _ in listed}
        with hooked(self.model, self.spec) as slots:
            function = answer_losses(self.model, slots)
            for start in range(0, len(listed), self.rows_at_once):
                chunk = listed[start : start + self.rows_at_once]
                packed = [(self.documents[name], found) for _, name, found in chunk]
                rows = pack(packed, tokens=self.tokens, answer_tokens=self.answer_tokens, groups=[0] * len(chunk)).to(
                    device
                )
                used = lora.select(torch.tensor([n for n, *_ in chunk], device=device))
                by_token = function(rows, used)
                loss, hit, _ = document_scores(by_token[0], by_token[1], rows)
                for (_, name, found), values, hits in zip(chunk, loss.float().tolist(), hit.tolist(), strict=True):
                    answers[name] |= {d: (values[i], int(hits[i])) for i, d in enumerate(found)}
        result = []
        for name, known in answers.items():
            store = self.documents[name]
            mine = [known[variants[0]] for variants in store.variants]
            result.append(Scores(row, name, list(store.ids), [round(x, 5) for x, _ in mine], [y for _, y in mine]))
        return result


def _nothing(spec: AdapterSpec) -> LoraTensors:
    """A batch of one adapter that does nothing."""
    depth = len(spec.layers)
    return LoraTensors(
        tuple(torch.zeros(1, depth, spec.rank, t.in_features) for t in spec.targets),
        tuple(torch.zeros(1, depth, t.out_features, spec.rank) for t in spec.targets),
        spec.scaling,
    )


def prepare_scores(
    library: AdapterLibrary,
    tasks: Sequence[Task],
    base: tuple[Any, Any],
    *,
    tokens: int = 512,
    answer_tokens: int = 384,
    limit: int | None = None,
    rows_at_once: int = 32,
) -> Scored:
    """Tokenises the held-out examples of a library's tasks, with prompts as the adapters were trained on.

    Args:
        library: Whose adapters are scored.
        tasks: With examples of split `test`, or `val` where there are none.
        base: The base model and its tokenizer.
        tokens: Longest example.
        answer_tokens: Longest answer.
        limit: Most examples of a task, the first ones.
        rows_at_once: Rows of a batch.

    Raises:
        DataError: if no task of the library has examples, or its adapters were trained on different prompts.
    """
    model, tokenizer = base
    prompts = {json.dumps(library.index[name].get("prompt")) for name in library.names}
    if len(prompts) > 1:
        raise DataError(
            f"{library.folder} holds adapters that were trained with the description in the prompt and without"
        )
    described = json.loads(prompts.pop()) or {}
    prompt = PromptConfig(**described)
    documents = {}
    for task in tasks:
        if task.name not in library.index:
            continue
        examples = (task.examples.get("test") or task.examples.get("val") or ())[:limit]
        found = tokenize_examples(
            task,
            examples,
            tokenizer,
            prompt,
            tokens=tokens,
            answer_tokens=answer_tokens,
            seed=0,
            first_answer=True,
        )
        if found.variants:
            documents[task.name] = found
    if not documents:
        raise DataError(
            f"None of the {len(tasks)} tasks to score has held-out examples and an adapter in {library.folder}"
        )
    return Scored(model, library.spec, documents, tokens, answer_tokens, rows_at_once)


# ------------------------------------------------------------------------------------------------- the networks


@dataclass(frozen=True)
class Network:
    """A trained network in the report."""

    label: str
    adapters: list[str]
    """What it was trained to write."""
    parameters: int
    size: int
    """Bytes of its weights on disk, in fp16."""
    library_size: int
    """Bytes of those adapters in fp16."""
    distinct_size: int
    """The same with A once, where all of them have one."""
    errors: dict[str, dict[str, list[float]]]
    """By what it reads: relative error, cosine and element L1 of each adapter."""
    settings: dict[str, Any] = field(default_factory=dict)


def texts_for(kind: Kind, known: Descriptions, names: Sequence[str], fits: Callable[[str], bool]) -> list[str]:
    """What a network reads for each adapter.

    Args:
        kind: Which of `KINDS`.
        known: The descriptions it was trained on and those that were held out, adapter by adapter.
        names: The adapters.
        fits: Whether its encoder's window holds a text; made-up words are shortened until it does.
    """
    trained = [known.texts[mine[0]] for mine in known.trained]
    if kind == "trained":
        return trained
    if kind == "held-out":
        return [known.texts[i] for i in known.held_out]
    if kind == "other":
        # A half turn: neighbours in alphabetical order are often alike.
        turn = max(1, len(trained) // 2)
        return trained[turn:] + trained[:turn]
    made_up = []
    for name in names:
        text = short_random_text(random.Random(name))
        while not fits(text) and " " in text:
            text = text.rpartition(" ")[0]
        made_up.append(text)
    return made_up


def own_parameters(lora: LoraTensors) -> int:
    """How many numbers of each adapter are its own: those of B alone, where all have one A."""
    own = lora.b if lora.shares_a else (*lora.a, *lora.b)
    return sum(x[0].numel() for x in own)


def principal(lora: LoraTensors, number: int) -> LoraTensors:
    """Each adapter as the mean of all plus its projection on their first principal components.

    With 0 every adapter becomes the mean.

    Args:
        lora: A batch of N adapters.
        number: At most N.
    """
    n = lora.a[0].shape[0]
    mixture = torch.full((n, n), 1 / n, dtype=torch.double, device=lora.a[0].device)
    if number:
        kept = principal_directions(lora, number)
        mixture += kept @ kept.mT @ (torch.eye(n, dtype=torch.double, device=kept.device) - mixture)
    return lora.map(lambda x: torch.einsum("nm,m...->n...", mixture.to(x.dtype), x))


def score_controls(scored: Scored, library: AdapterLibrary, parameters: int) -> list[Scores]:
    """Rows that a network is to be compared with: base, oracles, their mean, and the principal components of its size.

    Args:
        scored: Examples and model.
        library: The adapters.
        parameters: Of the network.
    """
    names, everything = library.names, library.stack()
    number = min(parameters // own_parameters(everything), len(names) - 1)
    scores = scored.score("base", None, names) + scored.score("oracle", everything, names)
    scores += scored.score("mean of all", principal(everything, 0), names)
    if number:
        scores += scored.score(f"{number} components", principal(everything, number), names)
    return scores


def written_adapters(t2l: TextToLora, texts: Sequence[str]) -> LoraTensors:
    """Adapters for texts as one batch, on the CPU."""
    found = [a.lora.map(lambda x: x.cpu()) for i in range(0, len(texts), 32) for a in t2l.generate(texts[i : i + 32])]
    return LoraTensors.stack(found)


def judge_network(
    label: str,
    folder: Path,
    library: AdapterLibrary,
    scored: Scored | None,
    *,
    kinds: Sequence[Kind] = ("trained", "held-out"),
    device: str = "cpu",
) -> tuple[Network, list[Scores]]:
    """Errors and scores of one checkpoint on the adapters that it was trained to write.

    Raises:
        DataError: if the checkpoint was not trained to reconstruct adapters of this library.
    """
    t2l = TextToLora.from_pretrained(str(folder), device=device)
    training = t2l.config.training
    names = training.get("adapters")
    if training.get("library_sha256") != library.checksum or not isinstance(names, list):
        raise DataError(f"{folder} was not trained to reconstruct {library.folder}; its training names another library")
    wanted = library.stack(names)
    config = build(ReconstructionConfig, training["settings"], where=f"settings of {folder}")

    known = read_descriptions(config, library, names, t2l.encoder)
    if config.conditioning == "task":
        kinds = [kind for kind in kinds if kind in ("trained", "other")]

    def fits(text: str) -> bool:
        return t2l.encoder.count_tokens([text])[0] <= config.encoder.max_tokens

    errors: dict[str, dict[str, list[float]]] = {}
    scores: list[Scores] = []
    for kind in kinds:
        written = written_adapters(t2l, texts_for(kind, known, names, fits))
        errors[kind] = vars(compare(written, wanted))
        if scored is not None:
            scores += scored.score(f"{label}, {kind}", written, names)
    weights = folder / checkpoint.WEIGHTS
    each, own = library.spec.num_parameters, own_parameters(wanted)
    network = Network(
        label=label,
        adapters=list(names),
        parameters=sum(p.numel() for p in t2l.hypernet.parameters()),
        size=weights.stat().st_size,
        library_size=2 * len(names) * each,
        distinct_size=2 * (each + (len(names) - 1) * own),
        errors=errors,
        settings=training["settings"],
    )
    return network, scores


def judge_networks(
    folders: Sequence[tuple[str, Path]],
    library: AdapterLibrary,
    scored: Scored | None,
    *,
    kinds: Sequence[Kind],
    device: str,
    log: Callable[[str], None],
) -> tuple[list[Network], list[Scores]]:
    """`judge_network` of each (label, checkpoint); with examples, the rows that they are compared with come first."""
    networks, scores = [], list[Scores]()
    for label, folder in folders:
        network, found = judge_network(label, folder, library, scored, kinds=kinds, device=device)
        networks.append(network)
        scores += found
        log(f"network “{label}” judged")
    if scored is not None:
        scores = score_controls(scored, library, networks[0].parameters) + scores
    return networks, scores


# --------------------------------------------------------------------------------------------------- the report


def interval(values: Sequence[float], *, draws: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Mean and 95 % bootstrap interval over the values."""
    found = np.asarray(values, np.float64)
    picks = np.random.default_rng(seed).integers(len(found), size=(draws, len(found)))
    low, high = np.quantile(found[picks].mean(1), [0.025, 0.975])
    return float(found.mean()), float(low), float(high)


def recovered(scores: Sequence[Scores], row: str, names: Sequence[str]) -> tuple[float, float, float] | None:
    """Share of the adapters' gain over the base that a row keeps, with a 95 % bootstrap interval over tasks.

    (mean of the row - mean of the base) / (mean of the oracles - mean of the base), each task weighing the same; None
    where the oracles gain nothing.
    """
    table = {(s.row, s.task): float(np.mean(s.exact_match)) for s in scores}
    tasks = [name for name in names if (row, name) in table]
    if not tasks:
        return None
    base, oracle, mine = (np.array([table[r, name] for name in tasks]) for r in ("base", "oracle", row))
    if oracle.mean() <= base.mean():
        return None
    picks = np.random.default_rng(0).integers(len(tasks), size=(2000, len(tasks)))
    gain = np.maximum((oracle - base)[picks].mean(1), 1e-9)
    low, high = np.quantile((mine - base)[picks].mean(1) / gain, [0.025, 0.975])
    return float((mine - base).mean() / (oracle - base).mean()), float(low), float(high)


def report(library: AdapterLibrary, networks: Sequence[Network], scores: Sequence[Scores]) -> dict[str, Any]:
    """Everything a reader needs, as plain data."""
    rows = list(dict.fromkeys(s.row for s in scores))
    tasks = list(dict.fromkeys(s.task for s in scores))
    by_cell = {(s.row, s.task): s for s in scores}
    shares = {row: recovered(scores, row, tasks) for row in rows if row != "base"}
    return {
        "library": {
            "sha256": library.checksum,
            "adapters": len(library.names),
            "base": library.spec.base_model,
            "parameters_each": library.spec.num_parameters,
            "bytes_fp16": 2 * len(library.names) * library.spec.num_parameters,
        },
        "networks": [
            {
                **{k: v for k, v in asdict(network).items() if k != "errors"},
                "share": network.size / network.library_size,
                "distinct_share": network.size / network.distinct_size,
                "mean_errors": {
                    kind: {name: float(np.mean(values)) for name, values in found.items()}
                    for kind, found in network.errors.items()
                },
                "errors": network.errors,
                "recovered": {kind: shares.get(f"{network.label}, {kind}") for kind in network.errors},
            }
            for network in networks
        ],
        "rows": {
            row: {
                "tasks": len(mine := [by_cell[row, task] for task in tasks if (row, task) in by_cell]),
                "n": sum(len(s.ids) for s in mine),
                # Where there are few tasks the interval over them says little; the per-task ones are over examples.
                "exact_match": interval([float(np.mean(s.exact_match)) for s in mine]),
                "loss": interval([float(np.mean(s.loss)) for s in mine]),
                "recovered": shares.get(row),
            }
            for row in rows
        },
        "tasks": {
            task: {
                row: {"n": len(s.ids), "exact_match": interval(s.exact_match), "loss": float(np.mean(s.loss))}
                for row in rows
                if (s := by_cell.get((row, task))) is not None
            }
            for task in tasks
        },
    }


def markdown(plain: Mapping[str, Any], *, most_tasks: int = 40) -> str:
    """The report for people."""
    about = plain["library"]
    parts = [
        "# A library of adapters as one network\n",
        f"{about['adapters']} adapters for {about['base']}, {about['parameters_each']:,} parameters each, "
        f"{about['bytes_fp16'] / 1e6:.1f} MB in fp16 (library sha256 `{about['sha256']}`).\n",
        "Size is that of the network's weights in fp16, without the encoder, which is a model of its own. Errors are "
        "of ΔW over all layers and modules of an adapter, the mean over adapters: relative Frobenius distance, cosine. "
        "Recovered is the share of the adapters' gain over the base in exact match that is left, with a 95 % "
        "bootstrap interval over tasks. “Components” are as many principal components of the adapters as the first "
        "network has room for: mixtures of them are the best linear compression to its size.\n",
        *(
            f"The {len(network['adapters'])} adapters of “{network['label']}” have one A: with it kept once they are "
            f"{network['distinct_size'] / 1e6:.1f} MB, of which the network is {network['distinct_share']:.0%}.\n"
            for network in plain["networks"]
            if network["distinct_size"] < network["library_size"]
        ),
        "| network | adapters | reads | parameters | MB | of their size | relative error | cosine | recovered |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for network in plain["networks"]:
        for kind, errors in network["mean_errors"].items():
            share = network["recovered"][kind]
            cells = [
                network["label"],
                str(len(network["adapters"])),
                kind,
                f"{network['parameters']:,}",
                f"{network['size'] / 1e6:.1f}",
                f"{network['share']:.0%}",
                f"{errors['relative']:.3f}",
                f"{errors['cosine']:.3f}",
                _share(share),
            ]
            parts.append(f"| {' | '.join(cells)} |")
    if plain["rows"]:
        parts += [
            "\nTeacher-forced exact match and loss on held-out examples; 95 % bootstrap intervals, over tasks.\n",
            "| row | tasks | n | exact match | loss | recovered |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for row, found in plain["rows"].items():
            cells = [row, str(found["tasks"]), str(found["n"]), _spread(found["exact_match"]), _spread(found["loss"])]
            parts.append(f"| {' | '.join([*cells, _share(found['recovered'])])} |")
    if plain["tasks"]:
        rows = list(plain["rows"])
        shown = list(plain["tasks"])[:most_tasks]
        parts += [
            "\nExact match by task, 95 % bootstrap intervals over examples "
            f"({len(shown)} of {len(plain['tasks'])} tasks; all are in `report.json`).\n",
            f"| task | n | {' | '.join(rows)} |",
            f"| --- | --- |{' --- |' * len(rows)}",
        ]
        for task in shown:
            found = plain["tasks"][task]
            n = next(iter(found.values()))["n"]
            words = [_spread(found[row]["exact_match"]) if row in found else "–" for row in rows]
            parts.append(f"| {task} | {n} | {' | '.join(words)} |")
    single = [network for network in plain["networks"] if "trained" in network["errors"]]
    if single:
        network = max(single, key=lambda x: len(x["adapters"]))
        parts += [
            f"\nReconstruction error of each adapter by “{network['label']}”, the worst first.\n",
            "| adapter | relative error | cosine |",
            "| --- | --- | --- |",
        ]
        errors = network["errors"]["trained"]
        order = sorted(range(len(network["adapters"])), key=lambda i: -errors["relative"][i])
        parts += [
            f"| {network['adapters'][i]} | {errors['relative'][i]:.3f} | {errors['cosine'][i]:.3f} |"
            for i in order[:most_tasks]
        ]
    return "\n".join(parts) + "\n"


def _share(values: Sequence[float] | None) -> str:
    return "–" if values is None else f"{values[0]:.1%} [{values[1]:.1%}, {values[2]:.1%}]"


def _spread(values: Sequence[float]) -> str:
    mean, low, high = values
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def plot(plain: Mapping[str, Any], path: Path) -> None:
    """Two curves: recovered gain (or cosine, without scores) by number of adapters, and by the network's parameters."""
    from matplotlib.figure import Figure

    networks = [network for network in plain["networks"] if "trained" in network["mean_errors"]]
    with_scores = any(network["recovered"]["trained"] for network in networks)
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, key, title in zip(
        figure.subplots(1, 2),
        (lambda x: len(x["adapters"]), lambda x: x["parameters"]),
        ("adapters in one network", "parameters of the network"),
        strict=True,
    ):
        for kind in ("trained", "held-out"):
            points = sorted(
                (key(x), x["recovered"][kind] or (float("nan"),) * 3)
                if with_scores
                else (key(x), (x["mean_errors"][kind]["cosine"],) * 3)
                for x in networks
                if kind in x["mean_errors"]
            )
            xs, ys = [x for x, _ in points], [y[0] for _, y in points]
            axes.errorbar(
                xs,
                ys,
                yerr=[
                    [max(0.0, y - low) for _, (y, low, _) in points],
                    [max(0.0, high - y) for _, (y, _, high) in points],
                ],
                marker="o",
                linestyle="",
                capsize=3,
                label=f"{kind} descriptions",
            )
        axes.set_xscale("log")
        axes.set_xlabel(title)
        axes.set_ylabel("share of the adapters' gain" if with_scores else "cosine of ΔW")
        axes.axhline(1.0, color="gray", linewidth=0.8)
        axes.legend()
    figure.savefig(path, dpi=150)


def write_report(
    folder: Path, library: AdapterLibrary, networks: Sequence[Network], scores: Sequence[Scores]
) -> dict[str, Any]:
    """Writes `report.md`, `report.json`, `scores.jsonl` and, of several networks, `curve.png` where matplotlib is."""
    plain = report(library, networks, scores)
    write_text(folder / "report.json", json.dumps(plain, indent=1, ensure_ascii=False) + "\n")
    write_text(folder / "report.md", markdown(plain))
    write_text(folder / "scores.jsonl", "".join(json.dumps(asdict(s), ensure_ascii=False) + "\n" for s in scores))
    if len(networks) > 1 and find_spec("matplotlib"):
        plot(plain, folder / "curve.png")
    return plain


def read_scores(path: Path) -> list[Scores]:
    """What `write_report` wrote."""
    return [Scores(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


# -------------------------------------------------------------------------------------------------- compressing


def fitting_head(
    config: ReconstructionConfig, spec: AdapterSpec, number: int, embedding_size: int, *, share: float
) -> ReconstructionConfig:
    """The settings with the largest head whose network stays under a share of the adapters' own parameters.

    Args:
        config: Settings; their `hypernet.head_size` is replaced.
        spec: The adapters' shape.
        number: How many there are.
        embedding_size: E.
        share: Such as 0.25; where even the smallest head exceeds it, that one is taken.
    """
    basis = config.hypernet.variant == "basis"
    sizes = range(LEAST_BASIS, max(LEAST_BASIS + 1, number)) if basis else HEAD_SIZES

    def parameters(size: int) -> int:
        hypernet = replace(config.hypernet, head_size=size)
        with torch.device("meta"):
            network = Hypernet(
                spec,
                embedding_size=embedding_size,
                kind="tokens" if config.encoder.kind == "tokens" else "sentence",
                config=saved_config(hypernet),
            )
        return sum(p.numel() for p in network.parameters())

    fitting = bisect_left(sizes, share * number * spec.num_parameters, key=parameters)
    chosen = replace(config, hypernet=replace(config.hypernet, head_size=sizes[max(0, fitting - 1)]))
    return basis_of_library(chosen, number)


def subset(library: AdapterLibrary, number: int) -> tuple[str, ...]:
    """`number` adapters, in an order that is drawn once, so that a smaller subset is part of a larger one.

    Raises:
        ConfigError: if the library has fewer.
    """
    if not 1 <= number <= len(library.names):
        raise ConfigError(f"The curve asks for {number} adapters; {library.folder} holds {len(library.names)}")
    order = sorted(library.names, key=lambda name: random.Random(name).random())
    return tuple(sorted(order[:number]))


def compress(
    library: AdapterLibrary,
    out: Path,
    points: Mapping[str, ReconstructionConfig],
    *,
    tasks: Sequence[Task] = (),
    base: tuple[Any, Any] | None = None,
    kinds: Sequence[Kind] = ("trained", "held-out"),
    limit: int | None = None,
    max_minutes: float | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Trains a network for each point, judges them all, and leaves the first one's checkpoint with the report.

    Runs are kept in a folder beside `out` until all is done; called again, it goes on where it stopped.

    Args:
        library: The adapters.
        out: Where checkpoint and report go.
        points: Label to settings; the first is the checkpoint that is kept.
        tasks: Tasks of the library with held-out examples, for scores; none means errors only.
        base: The base model and its tokenizer, for scores.
        kinds: What the networks are given to read when judged.
        limit: Most held-out examples of a task.
        max_minutes: Wall time of all trainings together, after which the one that runs stops and is saved.
        device: Where it all happens.
        overwrite: Whether an existing `out` is replaced.
        log: Where progress lines go.

    Returns:
        The report as plain data.

    Raises:
        TrainingError: if time ran out; the runs can go on.
        DataError, ConfigError, OutputError: as those who read, train and write raise them.
    """
    started = time.monotonic()
    runs = out.parent / f"{out.name}.runs"
    for label, config in points.items():
        run = runs / label
        done = read_progress(run).step if (run / "state.safetensors").exists() else 0
        if done >= config.train.max_steps and (run / "checkpoint").exists():
            continue
        left = None if max_minutes is None else max(0.0, max_minutes - (time.monotonic() - started) / 60)
        log(f"network “{label}”: {len(config.data.adapters) or len(library.names)} adapters")
        resume = (run / "config.json").exists()
        train_reconstruction(config, run, resume=resume, max_minutes=left, device=device, log=log)
        done = read_progress(run).step
        if done < config.train.max_steps:
            raise TrainingError(
                f"Time ran out at step {done} of {config.train.max_steps} of network “{label}”; "
                "the same command goes on"
            )
    scored = None
    if tasks:
        assert base is not None, "scores need the base model"
        scored = prepare_scores(library, tasks, base, limit=limit)
    folders = [(label, runs / label / "checkpoint") for label in points]
    networks, scores = judge_networks(folders, library, scored, kinds=kinds, device=device, log=log)
    with new_folder(out, overwrite=overwrite) as temporary:
        kept = runs / next(iter(points)) / "checkpoint"
        shutil.copytree(kept, temporary, dirs_exist_ok=True)
        plain = write_report(temporary, library, networks, scores)
    shutil.rmtree(runs)
    return plain
