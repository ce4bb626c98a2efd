"""The processes that train one run together: one alone, or several that Accelerate has brought together.

    accelerate launch -m t2l train … ─▶ a process for each device ─▶ each computes its share of every batch

What is trained stands in every process, and DDP adds the gradients up; a frozen base stands there whole, or sharded by
FSDP2. Batches follow from seed and step alone, so every process knows all of each batch, and a run is the same on any
number of processes. Knows devices, modules and tensors. Knows no tasks.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from t2l import hub
from t2l.errors import ConfigError, TrainingError

Sharding = Literal["off", "full_shard"]
"""Whether a frozen base is sharded over the processes; named as Transformers names it."""
OTHER_ENGINES = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM")
"""What Accelerate's launcher sets for engines that shard what is trained; here that is small, and stands whole."""


class Processes(AbstractContextManager["Processes"]):
    """This process and those that train with it; alone, everything here does nothing and needs no Accelerate.

    Entered, it names what the loss of another process looks like from this one, and takes the group apart at the end.

    Args:
        device: Where this process trains.
        accelerator: Accelerate's, where there are several processes.
        timeout: Seconds after which a process that does not answer is given up.
    """

    def __init__(
        self, device: torch.device | None = None, accelerator: Any = None, *, timeout: float = 0.0, own: bool = False
    ) -> None:
        self.device = device or torch.device("cpu")
        self.accelerator, self.timeout, self._own = accelerator, timeout, own
        self.rank: int = 0 if accelerator is None else accelerator.process_index
        self.number: int = 1 if accelerator is None else accelerator.num_processes
        self._host: Any = None
        if accelerator is not None:  # what hosts agree on must not wait for a GPU
            self._host = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.accelerator is None:
            return
        if error is None and self._own:  # after an error others may be gone, and taking it apart would wait for them
            from accelerate.state import AcceleratorState

            torch.distributed.destroy_process_group()
            AcceleratorState._reset_state(reset_partial_state=True)
        if isinstance(error, RuntimeError) and _is_of_communication(error):
            raise TrainingError(
                f"Process {self.rank} of {self.number}: another process has ended, or has not answered for "
                f"{self.timeout:g} s (train.ddp_timeout). Its own message says why; --resume goes on from the last "
                f"saved state ({str(error).splitlines()[0]})"
            ) from error

    @property
    def main(self) -> bool:
        """Whether this process is the one that logs and writes."""
        return self.rank == 0

    # ------------------------------------------------------------------------------------- what they tell each other

    def sum(self, values: Tensor) -> Tensor:
        """Adds up, element by element, what all processes have; what is on a GPU stays there, and nobody waits."""
        if self.accelerator is None:
            return values
        if values.device.type != "cpu":
            return self.accelerator.reduce(values, reduction="sum")
        total = values.clone()
        torch.distributed.all_reduce(total, group=self._host)
        return total

    def collect(self, values: Tensor, places: Sequence[int], number: int) -> Tensor:
        """Puts together what the processes have of `number` things.

        Args:
            values: (n, ...) what this process has.
            places: The n positions that it belongs to; every position is one process's.
            number: How many there are in all.

        Returns:
            (number, ...), alike in all processes.
        """
        if self.accelerator is None:
            return values
        everything = values.new_zeros(number, *values.shape[1:])
        everything[list(places)] = values
        return self.sum(everything)

    def broadcast(self, values: Tensor, source: int) -> Tensor:
        """What one process has, on the CPU; the others give a tensor of its shape and type, which stays as it is."""
        if self.accelerator is None:
            return values
        found = values if self.rank == source else torch.empty_like(values)
        torch.distributed.broadcast(found, src=source, group=self._host)
        return found

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag whether any process has raised it; waits for all processes, and for no device."""
        if self.accelerator is None:
            return flags
        raised = torch.tensor(flags, dtype=torch.int32)
        torch.distributed.all_reduce(raised, op=torch.distributed.ReduceOp.MAX, group=self._host)
        return tuple(map(bool, raised.tolist()))

    def wait(self) -> None:
        """Waits until all processes have come here."""
        self.any(False)

    def main_first(self, compute: Callable[[], int]) -> int:
        """A number that the main process computes before any other goes on; an error there ends all of them."""
        return int(self.broadcast(torch.tensor(compute() if self.main else 0), 0))

    # ------------------------------------------------------------------------------------------------ what they train

    def share(self, number: int) -> range:
        """The positions, among so many, that this process computes: every so-manieth."""
        return range(self.rank, number, self.number)

    def seed(self, seed: int, step: int) -> None:
        """Makes the random numbers of a step differ from process to process; alone, they go on from the step before."""
        if self.accelerator is not None:
            torch.manual_seed((seed << 32) + step * self.number + self.rank)

    def prepare(self, module: Any) -> Any:
        """The module with its gradients added up over all processes (DDP); alone, the module itself."""
        if self.accelerator is None:
            return module
        with warnings.catch_warnings():  # torch 2.13 renames `broadcast_buffers`; 2.11 does not know the new name
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            return self.accelerator.prepare_model(module)

    def accumulating(self, module: Any, more: bool) -> AbstractContextManager[None]:
        """While entered, gradients of a prepared module stay in this process if `more` of the batch is to come."""
        return self.accelerator.no_sync(module) if self.accelerator is not None and more else nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Computes gradients of a loss that is this process's part of a sum over all of them."""
        (loss * self.number).backward()  # DDP takes the mean

    def shard(self, base: nn.Module, layers: Iterable[nn.Module]) -> None:
        """Shards a frozen base over the processes (FSDP2): each holds a part of every layer and gathers it when needed.

        The input embeddings stay whole, for they are also read outside of the base's own forward pass.

        Args:
            base: The base, on any device; it is moved to this process's, a layer at a time.
            layers: Its decoder layers.

        Raises:
            ConfigError: with one process, or where torch is too old.
        """
        if self.accelerator is None:
            raise ConfigError(
                "train.fsdp shards the base over several processes, and there is one; leave it out, or start the run "
                "with accelerate launch"
            )
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.number,))
        embeddings: nn.Module = base.get_input_embeddings()  # type: ignore[operator]
        if not next(embeddings.parameters()).is_meta:  # made without weights, which come later
            embeddings.to(self.device)
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        try:
            fully_shard(base, mesh=mesh, ignored_params=set(embeddings.parameters()))
        except TypeError as error:
            raise ConfigError(f"train.fsdp needs torch 2.7 or newer; this is {torch.__version__}") from error


def load_base(ref: str, fsdp: Sharding, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """A frozen base on a device; one that is to be sharded in the host's memory, of the type that it keeps.

    Args:
        ref: Model reference.
        fsdp: Whether it is to be sharded.
        device: Where training happens.
        dtype: Of a base that is not sharded; None means float32.
    """
    if fsdp == "off":
        return hub.load_causal_lm(ref, device=str(device), dtype=dtype)
    return hub.load_causal_lm(ref, dtype=torch.bfloat16 if device.type == "cuda" else None)


def require_shares(processes: Processes, number: int, setting: str, steps: int = 1) -> None:
    """Checks that every process gets something of a batch, in each of its turns.

    Args:
        processes: All of them.
        number: What a batch has of what is dealt out.
        setting: The setting that says so.
        steps: `train.gradient_accumulation_steps`.

    Raises:
        ConfigError: if it does not.
    """
    parts = processes.number * steps
    if parts > number:
        raise ConfigError(
            f"{setting} is for all processes together and gives {number}; {processes.number} of them in {steps} turns "
            f"(train.gradient_accumulation_steps) need {parts} or more"
        )


def is_main() -> bool:
    """Whether this process was started as the main one of a run, before any of them has joined."""
    return _started() == 1 or os.environ.get("RANK", "0") == "0"


def _started() -> int:
    """How many processes the launcher has started for the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(device: str | None = None, *, timeout: float) -> Processes:
    """Meets the other processes of the run, as the launcher's variables say; a process that nobody launched is alone.

    Args:
        device: `cuda` or `cpu`; GPUs if there are any, one for each process.
        timeout: Seconds after which a process that does not answer is given up.

    Raises:
        ConfigError: if Accelerate is not installed, its configuration names another engine, or GPUs are too few.
        TrainingError: if the others do not come.
    """
    cuda = hub.best_device(device) == "cuda"
    if _started() == 1:
        return Processes(torch.device("cuda" if cuda else "cpu"))
    try:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
    except ImportError as error:
        raise ConfigError("Several processes need Accelerate: pip install 'text-to-lora[train]'") from error
    for name in OTHER_ENGINES:
        if os.environ.get(name, "").lower() == "true":
            raise ConfigError(
                f"{name} is set by accelerate's configuration, but only its plain multi-GPU mode fits here: "
                "accelerate launch --multi_gpu; the base is sharded with train.fsdp"
            )
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if cuda and local >= torch.cuda.device_count():
        raise ConfigError(
            f"Process {local} of this machine has no GPU: there are {torch.cuda.device_count()}. Start as many "
            "processes as there are GPUs"
        )
    own = not torch.distributed.is_initialized()
    try:
        accelerator = Accelerator(
            cpu=not cuda,
            mixed_precision="no",  # train.bf16 says it
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timedelta(seconds=timeout)),
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            ],
        )
        return Processes(accelerator.device, accelerator, timeout=timeout, own=own)
    except RuntimeError as error:
        if not _is_of_communication(error):
            raise
        raise TrainingError(
            f"The other processes of the run did not come within {timeout:g} s ({str(error).splitlines()[0]})"
        ) from error


def _is_of_communication(error: RuntimeError) -> bool:
    """Whether an error says that another process is gone; gloo's are plain RuntimeErrors."""
    distributed = torch.distributed.is_available() and isinstance(error, torch.distributed.DistError)
    return distributed or "gloo" in str(error) or "NCCL" in str(error)
