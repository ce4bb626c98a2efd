"""Writes the list of jobs that research/run_jobs.py runs: candidates for the default checkpoint and their evaluation.

    python research/default_jobs.py jobs.json --far ../shared/data/far_dev.jsonl
    python research/run_jobs.py jobs.json

Run from the repository's root, with T2L_DATA set. For each seed: the multi-task LoRA of the data, T2L that is trained
along with its shared LoRA, and T2L whose shared LoRA is frozen at the multi-task LoRA, so that it does what that one
does where a description's change is off. Answers come to runs/NAME-far.jsonl, -choosing.jsonl and -seen.jsonl, for
default_rule.py.
"""

import argparse
import json
from pathlib import Path
from typing import Any

CONFIGS = "configs/smollm2-135m"
T2L = ",".join(f"t2l{which}{form}" for which in ("", "-wrong", "-random") for form in ("", "+description"))
MULTITASK = "multitask,multitask+description"
MEMORY = {"t2l": 50, "multitask": 24, "evaluation": 12}
"""GB that a job may take."""
FROZEN = ("hypernet.train_shared_lora=false", "train.conditioning_dropout=0")
EVALUATIONS = {
    "choosing": "--suite validation --suite held-back --seeds 0,1,2 --per-task 8",
    "seen": "--suite seen --seeds 0 --per-task 2",
}


def training(name: str, config: str, kind: str, *sets: str, after: tuple[str, ...] = ()) -> dict[str, Any]:
    """A training job; it does not evaluate along the way, as its checkpoint is evaluated afterwards."""
    common = ("train.report_to=none", "train.save_steps=99999", "train.eval_steps=99999", "train.eval_batches=4")
    options = " ".join(f"--set {setting}" for setting in (*common, *sets))
    command = f"t2l train sft --config {CONFIGS}/{config}.yaml --run runs/{name} {options}"
    return {"name": name, "command": command, "memory": MEMORY[kind], "after": list(after)}


def evaluations(name: str, kind: str, far: str) -> list[dict[str, Any]]:
    """Jobs that evaluate a trained checkpoint on every suite of the rule."""
    option, asked = ("--checkpoint", T2L) if kind == "t2l" else ("--multitask", MULTITASK)
    suites = {"far": f"--suite {far} --suite everyday --seeds 0 --full", **EVALUATIONS}
    return [
        {
            "name": f"{name}-{suite}",
            "command": f"t2l eval run {options} --conditions {asked} {option} runs/{name}/checkpoint "
            f"--batch-tokens 200000 --out runs/{name}-{suite}.jsonl",
            "memory": MEMORY["evaluation"],
            "after": [name],
        }
        for suite, options in suites.items()
    ]


def jobs(far: str, seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    """All jobs, trainings first."""
    trainings, evaluated = [], []
    for seed in seeds:
        multitask, joint, frozen = f"multitask-{seed}", f"joint-{seed}", f"frozen-{seed}"
        start = f"train.init_from=runs/{multitask}/checkpoint"
        trainings += [
            training(multitask, "default-multitask", "multitask", f"seed={seed}"),
            training(joint, "default", "t2l", f"seed={seed}"),
            training(frozen, "default", "t2l", f"seed={seed}", start, *FROZEN, after=(multitask,)),
        ]
        evaluated += [
            *evaluations(multitask, "multitask", far),
            *evaluations(frozen, "t2l", far),
            *evaluations(joint, "t2l", far),
        ]
    return [*trainings, *evaluated]


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--far", required=True, help="far_dev.jsonl")
    parser.add_argument("--seeds", default="0", help="with commas")
    given = parser.parse_args()
    made = jobs(given.far, tuple(map(int, given.seeds.split(","))))
    given.out.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    print(f"{len(made)} jobs: {', '.join(job['name'] for job in made)}")


if __name__ == "__main__":
    main()
