"""One piece of work on many workers, by Ray Data. Actors hold what is slow to load; a dead one's job is done again.

So doing a job twice must be doing it once: by content hash, or by a saved state that it goes on from. Without Ray the
same jobs are done by one process, and nothing of this is imported. Knows Ray only: no adapters, no files.
"""

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from t2l import errors
from t2l.errors import ConfigError, T2LError
from t2l.io import parse_json


class _Actor:
    """A worker inside Ray: one block of one row in, one out."""

    def __init__(self, make: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...]) -> None:
        self.make, self.arguments = make, arguments
        self.work: Callable[[Any], Any] | None = None

    def __call__(self, block: dict[str, Any]) -> dict[str, Any]:
        return {"result": [json.dumps(self.do(parse_json(job, "a job"))) for job in block["job"]]}

    def do(self, job: Any) -> dict[str, Any]:
        """What a job returns, or the error that was raised on purpose: Ray would pass on its text alone."""
        try:
            self.work = self.work or self.make(*self.arguments)
            return {"returned": self.work(job)}
        except T2LError as error:
            return {"raised": type(error).__name__, "said": str(error)}


def run(
    make: Callable[..., Callable[[Any], Any]],
    arguments: tuple[Any, ...],
    jobs: Iterable[Any],
    *,
    workers: int,
    device: str,
) -> Iterator[Any]:
    """Does jobs on workers; a worker that dies is replaced, and its job is done again.

    Args:
        make: Makes, once in each worker, the function that does a job.
        arguments: What `make` takes.
        jobs: What JSON can hold, one for each call.
        workers: How many workers; each has one core, and one GPU if the device is one.
        device: `cuda` or `cpu`.

    Yields:
        What the jobs return, in whatever order they are done.

    Raises:
        ConfigError: if Ray is not installed.
        T2LError: what a job raised.
    """
    try:
        import pyarrow as pa
        import ray
        import ray.data
    except ImportError as error:
        raise ConfigError(
            "--workers needs Ray: pip install 'text-to-lora[ray]'; without it one process works"
        ) from error
    started = not ray.is_initialized()
    if started:
        # A cluster that RAY_ADDRESS names has its own sizes; on this machine workers may be more than cores.
        own = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": max(workers, os.cpu_count() or 1)}
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR", **own)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        # Ray's store takes the jobs, and spills what it has no room for; this process holds none of them.
        blocks = [ray.put(pa.table({"job": [json.dumps(job)]})) for job in jobs]
        if not blocks:
            return
        done = ray.data.from_arrow_refs(blocks).map_batches(
            _Actor,
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(blocks))),
            fn_constructor_args=(make, arguments),
            num_cpus=1,
            num_gpus=int(device == "cuda"),
        )
        for row in done.iter_rows():
            result = parse_json(row["result"], "a job's result")
            if "raised" in result:
                raise getattr(errors, result["raised"])(result["said"])
            yield result["returned"]
    finally:
        if started:
            ray.shutdown()
