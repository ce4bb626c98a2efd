"""Writes the list of jobs that research/run_jobs.py runs: candidates for the default checkpoint and their evaluation.

    python research/default_jobs.py jobs.json --far ../shared/data/far_dev.jsonl
    python research/run_jobs.py jobs.json

Run from the repository's root, with T2L_DATA set. For each seed, all on the same data: the multi-task LoRA whose
prompts show the description in half of the rows, the one whose prompts always do, and T2L on top of the first, which
stays as it is; or, with `--shared-steps 1500`, on top of one of so few steps, which leaves more for reading to learn.
Answers come to runs/NAME-far.jsonl, -choosing.jsonl and -seen.jsonl, for default_rule.py.
"""

import argparse
import json
from pathlib import Path
from typing import Any

CONFIGS = "configs/smollm2-135m"
T2L = ",".join(f"t2l{which}{form}" for which in ("", "-wrong", "-random") for form in ("", "+description"))
MULTITASK = "multitask,multitask+description"
MEMORY = {"t2l": 45, "multitask": 24, "evaluation": 12}
"""GB that a job may take."""
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


def jobs(far: str, seeds: tuple[int, ...], steps: int, shared_steps: int | None = None) -> list[dict[str, Any]]:
    """All jobs, trainings first; with `shared_steps` the shared LoRA is a shorter run's than the baseline."""
    trainings, evaluated = [], []
    for seed in seeds:
        multitask, shown, made = f"multitask-{seed}", f"shown-{seed}", f"frozen{shared_steps or ''}-{seed}"
        common = (f"seed={seed}", f"train.max_steps={steps}")
        shared = f"multitask{shared_steps or ''}-{seed}"
        if shared_steps:
            short = (*common, f"train.max_steps={shared_steps}")
            trainings.append(training(shared, "default-multitask", "multitask", *short))
        start = f"train.init_from=runs/{shared}/checkpoint"
        trainings += [
            training(multitask, "default-multitask", "multitask", *common),
            training(shown, "default-multitask", "multitask", *common, "train.description_in_prompt_prob=1"),
            training(made, "default", "t2l", *common, start, after=(shared,)),
        ]
        evaluated += [
            *evaluations(multitask, "multitask", far),
            *evaluations(shown, "multitask", far),
            *evaluations(made, "t2l", far),
        ]
    return [*trainings, *evaluated]


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--far", required=True, help="far_dev.jsonl")
    parser.add_argument("--seeds", default="0", help="with commas")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--shared-steps", type=int, help="of the frozen shared LoRA; by default it has all steps")
    given = parser.parse_args()
    made = jobs(given.far, tuple(map(int, given.seeds.split(","))), given.steps, given.shared_steps)
    given.out.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    print(f"{len(made)} jobs: {', '.join(job['name'] for job in made)}")


if __name__ == "__main__":
    main()
