"""The report on a compressed library: one table of networks, one of conditions, as JSON and Markdown.

Everything in it follows from `scores.jsonl` and from the networks' errors. Knows scores and networks.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from t2l.compress.networks import Network
from t2l.compress.scores import Scores
from t2l.eval import stats
from t2l.io import write_text
from t2l.library import AdapterLibrary


def recovered(scores: Sequence[Scores], condition: str) -> stats.Estimate | None:
    """Computes the share of the task LoRAs' gain over the base that a condition keeps, each task weighing the same.

    (mean of the condition - mean of the base) / (mean of the task LoRAs - mean of the base), in exact match, over the
    tasks of the condition. None where there are none, or where the task LoRAs gain nothing on them.
    """
    table = {(s.condition, s.task): float(np.mean(s.exact_match)) for s in scores}
    tasks = [task for name, task in table if name == condition]
    mine = {task: table[condition, task] - table["base", task] for task in tasks}
    gain = {task: table["task-lora", task] - table["base", task] for task in tasks}
    return stats.share(mine, gain) if sum(gain.values()) > 0 else None


def make_report(library: AdapterLibrary, networks: Sequence[Network], scores: Sequence[Scores]) -> dict[str, Any]:
    """Puts together everything a reader needs, as plain data."""
    conditions = list(dict.fromkeys(s.condition for s in scores))
    shares = {name: _plain(recovered(scores, name)) for name in conditions if name != "base"}
    tasks: dict[str, dict[str, Any]] = {s.task: {} for s in scores}
    for s in scores:
        tasks[s.task][s.condition] = {"n": len(s.ids), "exact_match": float(np.mean(s.exact_match))}
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
                **asdict(network),
                "share": network.size / network.library_size,
                "share_one_a": network.size / network.library_size_one_a,
                "recovered": {kind: shares.get(f"{network.label}, {kind}") for kind in network.errors},
            }
            for network in networks
        ],
        "conditions": {
            name: _condition([s for s in scores if s.condition == name]) | {"recovered": shares.get(name)}
            for name in conditions
        },
        "tasks": tasks,
    }


def _condition(mine: Sequence[Scores]) -> dict[str, Any]:
    """Means over tasks, with intervals over tasks, for a condition."""
    return {
        "tasks": len(mine),
        "n": sum(len(s.ids) for s in mine),
        "exact_match": _plain(stats.estimate({s.task: {"mean": [float(np.mean(s.exact_match))]} for s in mine})),
        "loss": _plain(stats.estimate({s.task: {"mean": [float(np.mean(s.loss))]} for s in mine})),
    }


def _plain(found: stats.Estimate | None) -> list[float] | None:
    return None if found is None else [found.mean, found.low, found.high]


def markdown(plain: Mapping[str, Any]) -> str:
    """Writes the report for people."""
    about = plain["library"]
    parts = [
        f"# {about['adapters']} adapters in one network: {', '.join(one['label'] for one in plain['networks'])}\n",
        f"The library holds {about['adapters']} adapters for {about['base']}, {about['parameters_each']:,} parameters "
        f"each, {about['bytes_fp16'] / 1e6:.1f} MB in fp16 (sha256 `{about['sha256']}`).\n",
        "A network's size is that of its weights in fp16, without the encoder, which is a model of its own. Errors are "
        "of ΔW over all layers and modules of an adapter, the mean over adapters: relative Frobenius distance and "
        "cosine. *Recovered* is the share of the adapters' gain over the base in exact match that is left.\n",
        *_sizes(plain["networks"]),
        "| network | adapters | reads | parameters | MB | of their size | relative error | cosine | recovered |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for network in plain["networks"]:
        size = f"{network['parameters']:,} | {network['size'] / 1e6:.1f} | {network['share']:.0%}"
        for kind, errors in network["errors"].items():
            found = f"{errors['relative']:.3f} | {errors['cosine']:.3f} | {_percent(network['recovered'][kind])}"
            parts.append(f"| {network['label']} | {len(network['adapters'])} | {kind} | {size} | {found} |")
    if plain["conditions"]:
        parts += [
            "\nExact match and loss are teacher-forced, on held-out examples; each task weighs the same, and intervals "
            "are 95 % bootstrap intervals over tasks. *Components* are as many principal components of the adapters as "
            "the first network has room for: mixtures of them are the best linear compression to its size.\n",
            "| condition | tasks | n | exact match | loss | recovered |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
    for name, found in plain["conditions"].items():
        scores = f"{_spread(found['exact_match'])} | {_spread(found['loss'])} | {_percent(found['recovered'])}"
        parts.append(f"| {name} | {found['tasks']} | {found['n']} | {scores} |")
    return "\n".join(parts) + "\n"


def _sizes(networks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sentences on networks whose adapters have one A, and on networks that compress nothing."""
    return [
        f"The {len(network['adapters'])} adapters of “{network['label']}” have one A: with it kept once they are "
        f"{network['library_size_one_a'] / 1e6:.1f} MB, of which the network is {network['share_one_a']:.0%}.\n"
        for network in networks
        if network["library_size_one_a"] < network["library_size"]
    ] + [
        f"**Nothing is compressed by “{network['label']}”**: it is larger than its adapters.\n"
        for network in networks
        if network["size"] >= network["library_size_one_a"]
    ]


def _percent(values: Sequence[float] | None) -> str:
    return "–" if values is None else f"{values[0]:.1%} [{values[1]:.1%}, {values[2]:.1%}]"


def _spread(values: Sequence[float]) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(*values)


def write_report(
    folder: Path, library: AdapterLibrary, networks: Sequence[Network], scores: Sequence[Scores]
) -> dict[str, Any]:
    """Writes `report.md`, `report.json` and, if there are any, the scores of every example in `scores.jsonl`."""
    plain = make_report(library, networks, scores)
    write_text(folder / "report.json", json.dumps(plain, indent=1, ensure_ascii=False) + "\n")
    write_text(folder / "report.md", markdown(plain))
    if scores:
        lines = [json.dumps(asdict(s), ensure_ascii=False) + "\n" for s in scores]
        write_text(folder / "scores.jsonl", "".join(lines))
    return plain
