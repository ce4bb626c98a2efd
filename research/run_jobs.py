"""Runs a list of jobs on this machine's GPUs, several at a time where memory allows.

    python research/run_jobs.py jobs.json --logs logs

`jobs.json` is a list of objects: `name`, `command` (a shell command), `after` (names of jobs that must have succeeded),
`gpu` (-1: whichever is freer) and `memory` (GB that it may take). The file may grow while it is read. A job whose
predecessor failed is skipped. `status.json` beside the list says what is done, with exit codes, and what runs.
"""

import argparse
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

MOST_ON_A_GPU = 6
SPARE_GB = 4.0
SKIPPED = 99
"""Exit code that is written down for a job whose predecessor failed."""


class Runner:
    """Starts jobs as soon as they may and can.

    Args:
        jobs: The list's file.
        logs: Folder of one log a job.
        memory: GB of each GPU.
    """

    def __init__(self, jobs: Path, logs: Path, memory: list[float]) -> None:
        self.jobs, self.logs, self.memory = jobs, logs, memory
        self.done: dict[str, int] = {}
        self.running: dict[str, tuple[subprocess.Popen[bytes], int, float, float]] = {}
        self.begun = time.time()

    def log(self, text: str) -> None:
        """Prints with the seconds since the start."""
        print(f"{time.time() - self.begun:7.1f} {text}", flush=True)

    def turn(self) -> bool:
        """One look at all jobs; whether any is left."""
        try:
            listed: list[dict[str, Any]] = json.loads(self.jobs.read_text())
        except json.JSONDecodeError:  # being written just now
            return True
        for name, (process, _, start, _) in list(self.running.items()):
            if process.poll() is not None:
                del self.running[name]
                self.done[name] = process.returncode
                self.log(f"done {name}: {process.returncode} after {time.time() - start:.0f} s")
        for job in listed:
            self._consider(job)
        status = self.jobs.with_name("status.json")
        temporary = status.with_suffix(".new")
        temporary.write_text(json.dumps({"done": self.done, "running": list(self.running)}))
        os.replace(temporary, status)
        return any(job["name"] not in self.done for job in listed)

    def _consider(self, job: dict[str, Any]) -> None:
        name, after = job["name"], job.get("after", [])
        if name in self.done or name in self.running:
            return
        if any(self.done.get(other, 0) for other in after):
            self.done[name] = SKIPPED
            self.log(f"skipped {name}")
            return
        if any(other not in self.done for other in after):
            return
        used = [sum(job[3] for job in self.running.values() if job[1] == gpu) for gpu in range(len(self.memory))]
        count = [sum(job[1] == gpu for job in self.running.values()) for gpu in range(len(self.memory))]
        wanted = job.get("gpu", -1)
        fitting = [
            gpu
            for gpu in range(len(self.memory))
            if (wanted < 0 or wanted % len(self.memory) == gpu)
            and used[gpu] + job["memory"] <= self.memory[gpu] - SPARE_GB
            and count[gpu] < MOST_ON_A_GPU
        ]
        if not fitting:
            return
        gpu = min(fitting, key=lambda gpu: (used[gpu], count[gpu]))
        with (self.logs / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                ["bash", "-c", job["command"]],
                env=os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.running[name] = (process, gpu, time.time(), job["memory"])
        self.log(f"start {name} on {gpu}")


def main() -> None:
    """Runs until no job is left; with `--stay`, waits for further ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", type=Path)
    parser.add_argument("--logs", type=Path, default=Path("logs"))
    parser.add_argument("--stay", action="store_true", help="wait for more jobs when all are done")
    given = parser.parse_args()
    import torch

    count = torch.cuda.device_count()
    memory = [torch.cuda.get_device_properties(gpu).total_memory / 1e9 for gpu in range(count)]
    given.logs.mkdir(parents=True, exist_ok=True)
    runner = Runner(given.jobs, given.logs, memory)
    runner.log(f"{count} GPUs of {', '.join(f'{gb:.0f} GB' for gb in memory)}, {os.cpu_count()} cores")
    while runner.turn() or given.stay:
        time.sleep(0.5)


if __name__ == "__main__":
    main()
