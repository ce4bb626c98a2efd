"""One process of a test with several: takes runs of any trainer from a plan, one after another.

Started with the plan's path; see `test_processes`. Only the main process can write files.
"""

import json
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # which torch 2.7 would import with its optimiser, and write a file of its own then

from t2l.config import build
from t2l.errors import TrainingError
from t2l.train.processes import join


def trainer_of(name: str) -> tuple[type, Any]:
    """The settings' class of a trainer, and the function that trains."""
    if name == "sft":
        from t2l.train.sft import SftConfig, train

        return SftConfig, train
    if name == "reconstruction":
        from t2l.train.reconstruction import ReconstructionConfig, train_reconstruction

        return ReconstructionConfig, train_reconstruction
    from t2l.train.task_loras import TaskLorasConfig, train_task_loras

    return TaskLorasConfig, train_task_loras


def main() -> None:
    torch.set_num_threads(1)
    with join("cpu", timeout=60) as processes:
        most = resource.getrlimit(resource.RLIMIT_FSIZE)
        if not processes.main:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, most[1]))
        for item in json.loads(Path(sys.argv[1]).read_text()):
            settings, train = trainer_of(item["trainer"])
            config = build(settings, item["config"])
            try:
                train(config, Path(item["run"]), device="cpu", log=lambda line: None, **item["options"])
            except TrainingError as error:  # task LoRAs that are stopped before any is finished
                if "No adapter was finished" not in str(error):
                    raise
            except BaseException:
                resource.setrlimit(resource.RLIMIT_FSIZE, most)  # what went wrong is written to a file
                raise


if __name__ == "__main__":
    main()
