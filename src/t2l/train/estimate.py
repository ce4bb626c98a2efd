"""What a training will need, from a few steps that are really taken: memory, time to the end, disk.

Knows steps as functions, bytes and seconds. Knows no trainer, and of settings only names.
"""

import gc
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from t2l.errors import TrainingError
from t2l.pace import duration
from t2l.train.metrics import peak_bytes

ROOM = 0.95
"""Share of a device's memory that settings are advised to use: what is left are gaps between tensors."""
MOST_STEPS = 20
"""Steps that are measured at most."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """A training that is ready to begin, as an estimate sees it."""

    device: torch.device
    setting: str
    """The setting that says how many rows a step has, such as `train.tasks_per_batch`."""
    rows: int
    tokens: int
    """Tokens of a row; 1 where rows have none."""
    step: Callable[[int, int], None]
    """Takes one real optimiser step of so many rows of so many tokens, with all that the run's loop does for it."""
    steps: int
    """Steps of the whole run."""
    evaluate: Callable[[], None] | None
    """Does the part of an evaluation that is repeated; None if the run has no evaluation."""
    evaluations: int
    """How often the whole run does that."""
    passes: int
    """Forward passes of a step's batch in it, about."""
    trained: int
    """Parameters."""
    frozen: int
    held: Mapping[str, int]
    """Bytes of what is in memory throughout, by what it is."""
    disk: Callable[[], Mapping[str, int]]
    """Says, once steps were taken, how many bytes the run writes, by what they are."""
    setup_seconds: float = 0.0
    added_seconds: float = 0.0
    """Time that each step takes in the run beyond `step`."""
    least_seconds: float = 0.0
    """Time that each step takes at least, because its batch is built meanwhile."""
    compiled: bool = False
    """Whether the first step of every shape takes long, so that no other shape is tried where it can be helped."""
    least: int = 1
    """The fewest rows that a step can have, of which all numbers of rows that are measured are multiples."""
    turns: int = 0
    """In how many turns a step computes its rows (train.gradient_accumulation_steps); 0 where there is no such
    setting."""
    remedies: tuple[str, ...] = ()
    """Other settings that would save memory, as one gives them on the command line."""


class Measured(NamedTuple):
    """Some steps of one shape."""

    rows: int
    tokens: int
    number: int
    first: float
    """Seconds of the first one, compilation included."""
    seconds: float
    """Of each of the others."""
    peak: int
    """Most bytes that were in memory."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a training will need."""

    device: str
    trained: int
    frozen: int
    memory: Mapping[str, int]
    """Bytes at the peak, by what they are; the peak is their sum."""
    available: int
    """Bytes of the device that this process can have."""
    steps: int
    seconds_per_step: float
    time: Mapping[str, float]
    """Seconds of the whole run, by what they are spent on."""
    disk: Mapping[str, int]
    rows: int
    measured: Measured
    """The largest steps that were taken."""
    advice: str = ""
    """Which setting to change, and to what, where memory will not do; else how far it would go."""
    fits: bool = True
    on_gpu: bool = False

    @property
    def peak(self) -> int:
        """Most bytes in memory."""
        return sum(self.memory.values())

    @property
    def seconds(self) -> float:
        """From the start to the checkpoint."""
        return sum(self.time.values())

    def line(self) -> str:
        """All of it in one line."""
        largest = max(self.memory, key=lambda name: self.memory[name])
        line = (
            f"{count(self.trained)} parameters are trained, {count(self.frozen)} are frozen; "
            f"{size(self.peak)} of {size(self.available)} memory, {size(self.memory[largest])} of it {largest}; "
            f"{duration(self.seconds_per_step)} a step, {duration(self.seconds)} for {self.steps:,} steps; "
            f"{size(sum(self.disk.values()))} on disk"
        )
        return line if self.fits else f"{line}. {self.advice}"

    def table(self) -> str:
        """All of it as a small table, what dominates first in each row."""
        taken = f"{self.measured.number} steps measured"
        if self.measured.rows < self.rows:
            taken += f" with {self.measured.rows} of {self.rows} rows, the rest is computed from them"
        rows = [
            ("device", self.device),
            ("parameters", f"{count(self.trained)} trained, {count(self.frozen)} frozen"),
            ("memory", f"{size(self.peak)} of {size(self.available)}: {_parts(self.memory, size)}"),
            ("step", f"{duration(self.seconds_per_step)} ({taken})"),
            ("time", f"{duration(self.seconds)} for {self.steps:,} steps: {_parts(self.time, duration)}"),
            ("disk", f"{size(sum(self.disk.values()))}: {_parts(self.disk, size)}"),
            ("fits" if self.fits else "too large", self.advice),
        ]
        return "\n".join(f"{name:<12}{text}" for name, text in rows if text)

    def plain(self) -> dict[str, object]:
        """All of it for JSON."""
        own = {name: value for name, value in vars(self).items() if name != "measured"}
        own |= {"memory": dict(self.memory), "time": dict(self.time), "disk": dict(self.disk)}
        return own | {"peak": self.peak, "seconds": self.seconds, "measured": self.measured._asdict()}


def estimate(work: Work, *, budget: float, fresh: bool = True) -> Estimate:
    """Takes a few steps and computes from them what the whole run will need.

    Args:
        work: The training. Its weights are other ones afterwards; see `unchanged`.
        budget: Seconds that may be spent on steps; where three whole steps take longer, smaller ones are taken.
        fresh: Whether the device's own record of its peak is begun anew, so that it tells steps from the set-up.
    """
    loading = peak_bytes(work.device)
    if fresh and work.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(work.device)
    available = memory_available(work.device)
    small, large, kept = _measure(work, budget, available)
    held = sum(work.held.values())
    per_row = kept or (large.peak - held) / large.rows
    seconds, peak = large.seconds, float(large.peak)
    if small is not None:  # both grow with the number of rows, and with that of their tokens
        grown = large.rows * large.tokens - small.rows * small.tokens
        left = work.rows * work.tokens - large.rows * large.tokens
        seconds += left * max(0.0, large.seconds - small.seconds) / grown
        peak += left * max(0, large.peak - small.peak) / grown
        per_row = work.tokens * max(0, large.peak - small.peak) / grown
    each = max(seconds + work.added_seconds, work.least_seconds)
    spent = {
        "steps": each * work.steps,
        "evaluations": _evaluation_seconds(work, large, each, budget) * work.evaluations,
        "set-up": work.setup_seconds + max(0.0, large.first - large.seconds),
    }
    rest = max(0, round(peak) - held)
    activations = min(rest, kept * work.rows) if kept else rest
    memory = dict(work.held) | {"activations": activations, "the program itself": rest - activations}
    if loading > peak:
        memory["only while loading"] = loading - sum(memory.values())
    fits = sum(memory.values()) <= available
    return Estimate(
        device=device_name(work.device),
        trained=work.trained,
        frozen=work.frozen,
        memory=memory,
        available=available,
        steps=work.steps,
        seconds_per_step=each,
        time=spent,
        disk=work.disk(),
        rows=work.rows,
        measured=large,
        advice=_advice(work, fits, peak, per_row, available),
        fits=fits,
        on_gpu=work.device.type == "cuda",
    )


def _advice(work: Work, fits: bool, peak: float, per_row: float, available: int) -> str:
    """What to set for memory to do, or how many rows it would do for."""
    fixed = peak - work.rows * per_row
    room = ROOM * available - fixed
    rows = math.floor(room / max(per_row, 1.0))
    if fits:
        return f"{work.setting} {work.rows}; there is room for about {max(rows, work.rows):,}"
    more = "".join(f"; --set {remedy} takes less too" for remedy in work.remedies)
    if rows >= work.least:
        same = math.ceil(max(1, work.turns) * work.rows / rows)
        turns = f"--set train.gradient_accumulation_steps={same} fits with the same batch, and " if work.turns else ""
        return f"{turns}--set {work.setting}={rows} in place of {work.rows} fits{more}"
    tokens = math.floor(work.tokens * room / max(per_row, 1.0))
    if work.tokens > 1 and tokens >= 16:
        fewer = f"--set train.max_seq_length={tokens} in place of {work.tokens}"
        return f"--set {work.setting}={work.least} {fewer} fits{more}"
    return f"{size(fixed)} are needed whatever the batch is{more}; take a smaller base or network, or a larger device"


# ----------------------------------------------------------------------------------------------------- measuring


def _measure(work: Work, budget: float, available: int) -> tuple[Measured | None, Measured, int]:
    """Steps of the run's own shape; or of two smaller ones, where memory or the budget does not allow the run's.

    Returns:
        The smaller of two shapes, if two had to do; the larger, or the only one; and how many bytes a row keeps for
        the backward pass, where the device's own record says too little of it.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # All processes must take the same steps, whatever their clocks say.
        return None, _steps(work, work.rows, work.tokens, number=2), 0
    if work.device.type == "cuda":
        try:
            return None, _steps(work, work.rows, work.tokens, seconds=min(budget, 5.0)), 0
        except torch.cuda.OutOfMemoryError:
            pass  # what the step held is freed only once the exception is gone
        return *_below(work, budget), 0
    if work.compiled:
        return None, _steps(work, work.rows, work.tokens, seconds=budget / 2), 0
    one, kept = _probe(work)
    needed = one.peak + kept * (work.rows - one.rows)
    each = one.seconds / one.rows
    if work.rows < 2 * one.rows or (needed <= ROOM * available and 3 * each * work.rows <= budget):
        return None, _steps(work, work.rows, work.tokens, seconds=budget / 2), kept
    rows = max(2 * one.rows, min(work.rows - 1, math.floor(budget / 3 / max(each, 1e-9))))
    some = _steps(work, rows, work.tokens, number=1)
    # The most that a process ever held says little of small steps; what they keep for the backward pass does.
    return one, some._replace(peak=one.peak + kept * (rows - one.rows)), kept


def _below(work: Work, budget: float) -> tuple[Measured, Measured]:
    """Steps of one and two rows, of fewer tokens where even one row is too large for the device."""
    tokens, least = work.tokens, work.least
    while True:
        _forget(work.device)
        try:
            small = _steps(work, least, max(1, tokens // 2), seconds=budget / 10)
            large = _steps(work, least, tokens, seconds=budget / 10)
            if tokens == work.tokens:
                small, large = large, _steps(work, 2 * least, tokens, seconds=budget / 10)
            return small, large
        except torch.cuda.OutOfMemoryError as error:
            if tokens < 4:
                raise TrainingError(
                    f"Not even one row of {tokens} tokens fits into the memory of {device_name(work.device)}: what is "
                    f"in it throughout takes {size(sum(work.held.values()))}. Take a smaller base or network"
                ) from error
        tokens //= 2


def _forget(device: torch.device) -> None:
    """Frees what a step that failed has left."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)


def _steps(work: Work, rows: int, tokens: int, *, seconds: float = 0.0, number: int = 0) -> Measured:
    """Takes steps of one shape: two to warm up, then so many, or as many as fit into the time, three at least."""
    step = partial(work.step, rows, tokens)
    first, second = _seconds(work.device, step), _seconds(work.device, step)
    number = number or max(3, min(MOST_STEPS, math.floor(seconds / max(second, 1e-9))))
    each = _seconds(work.device, step, number) / number
    return Measured(rows, tokens, number, first, each, peak_bytes(work.device))


def _probe(work: Work) -> tuple[Measured, int]:
    """Two steps of a single row; also how many bytes a row keeps for its backward pass."""
    step, saved = partial(work.step, work.least, work.tokens), SavedBytes()
    with saved:
        first = _seconds(work.device, step)
    seconds = _seconds(work.device, step)
    one = Measured(work.least, work.tokens, 1, first, seconds, peak_bytes(work.device))
    return one, saved.total // work.least


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts, while it is entered, the bytes that forward passes keep for the backward pass, parameters left out."""

    def __init__(self) -> None:
        self.total = 0
        self._seen: set[int] = set()
        super().__init__(self._pack, lambda kept: kept)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        whole = tensor if tensor._base is None else tensor._base
        if storage.data_ptr() not in self._seen and not isinstance(whole, nn.Parameter):
            self._seen.add(storage.data_ptr())
            self.total += storage.nbytes()
        return tensor


def _evaluation_seconds(work: Work, measured: Measured, step: float, budget: float) -> float:
    """Seconds of the part of an evaluation that is repeated; a guess by its passes where it would take too long."""
    if work.evaluate is None or not work.evaluations:
        return 0.0
    if measured.rows < work.rows or work.passes * step > budget:
        return work.passes * step / 3  # a step passes forward, and backward for twice the work at most
    _seconds(work.device, work.evaluate)
    return _seconds(work.device, work.evaluate)  # the second one counts


def _seconds(device: torch.device, action: Callable[[], None], times: int = 1) -> float:
    """How long a device takes for something that is done so many times."""
    started = time.perf_counter()
    for _ in range(times):
        action()
    synchronize(device)
    return time.perf_counter() - started


# ------------------------------------------------------------------------------------------------- bytes and seconds


def synchronize(device: torch.device) -> None:
    """Waits for a device to finish."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_available(device: torch.device) -> int:
    """Bytes that this process can have: of the GPU what others leave, else the machine's or the container's memory."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device))
    limits = [2**63]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text(encoding="utf-8").strip()).isdigit():
        limits.append(int(text))
    return min(limits)


def device_name(device: torch.device) -> str:
    """What a device is called."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def tensor_bytes(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None, dtype: torch.dtype | None = None
) -> int:
    """The size of the safetensors file that would hold tensors, to the byte.

    Args:
        tensors: By their names.
        metadata: What the file says beside them, if anything.
        dtype: Type that they are saved in; their own, if absent.
    """
    kinds = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8", torch.int64: "I64"}
    sizes = {name: (dtype or x.dtype).itemsize for name, x in tensors.items()}
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    start = 0
    for name in sorted(tensors, key=lambda name: (-sizes[name], name)):
        end = start + sizes[name] * tensors[name].numel()
        kind = kinds[dtype or tensors[name].dtype]
        header[name] = {"dtype": kind, "shape": list(tensors[name].shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8 + start


def count(number: float) -> str:
    """A number of parameters."""
    for unit, least in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= least:
            return f"{number / least:.3g} {unit}"
    return f"{number:.0f}"


def size(number: float) -> str:
    """A number of bytes."""
    for unit, least in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if abs(number) >= least:
            return f"{number / least:.3g} {unit}"
    return f"{number / 1e3:.3g} kB"


def _parts(parts: Mapping[str, float], word: Callable[[float], str]) -> str:
    """What there is more of than nothing, the largest first."""
    total = sum(parts.values()) or 1
    shown = sorted(((value, name) for name, value in parts.items() if value > 0), reverse=True)
    return ", ".join(f"{name} {word(value)} ({value / total:.0%})" for value, name in shown)
