"""Loads data sets from the Hugging Face Hub or a folder, patiently. Knows nothing of what is in them."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2l.errors import DataError, DownloadError
from t2l.io import sha256

Say = Callable[[str], None]


class MissingError(Exception):
    """A dataset that is not on the Hub."""


@dataclass(frozen=True)
class Fetched:
    """A dataset as `datasets` gives it, and where it came from."""

    splits: Mapping[str, Any]
    origin: dict[str, Any]


def fetch(dataset: str, config: str | None, revision: str | None, name: str, template: str | None) -> Fetched:
    """Loads one dataset, from the Hub or from the local folder that the template names.

    Raises:
        MissingError: if there is no such dataset.
        OSError and others: as the Hub's client raises them.
    """
    import datasets

    if template is not None:
        local = Path(template.replace("{task}", name)).expanduser()
        if local.is_dir():
            return _fetch_local(local)
        if template.startswith((".", "~")) or Path(template).is_absolute():
            raise MissingError(str(local))
        dataset, config, revision = template.replace("{task}", name), None, None
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        commit = HfApi().dataset_info(dataset, revision=revision).sha
        loaded = datasets.load_dataset(dataset, config, revision=revision or commit)
    except (RepositoryNotFoundError, datasets.exceptions.DatasetNotFoundError) as error:
        raise MissingError(dataset) from error
    origin = {"dataset": dataset, "revision": commit}
    return Fetched(loaded, origin if config is None else {**origin, "config": config})


def _fetch_local(folder: Path) -> Fetched:
    """A folder of train.jsonl, valid-00000-of-00001.parquet and the like: what stands before a dash is the split."""
    import datasets

    kinds = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
    files = sorted(path for path in folder.rglob("*") if path.suffix in kinds)
    if not files:
        raise DataError(f"{folder} holds no .jsonl, .json or .parquet files")
    found = {kinds[path.suffix] for path in files}
    if len(found) > 1:
        raise DataError(f"{folder} holds both JSON and Parquet files; keep one kind")
    by_split: dict[str, list[str]] = {}
    for path in files:
        by_split.setdefault(path.stem.partition("-")[0], []).append(str(path))
    digest = hashlib.sha256("".join(f"{path.name}\0{sha256(path)}\n" for path in files).encode()).hexdigest()
    loaded = datasets.load_dataset(found.pop(), data_files=by_split)
    return Fetched(loaded, {"dataset": f"local:{folder.name}", "revision": f"sha256:{digest}"})


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def status_of(error: BaseException) -> int | None:
    """The HTTP status behind an error, wherever in its chain the client left it."""
    for link in _chain(error):
        status = getattr(getattr(link, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    return 429 if any("429" in str(link) and "Too Many Requests" in str(link) for link in _chain(error)) else None


def _asked_delay(error: BaseException) -> float | None:
    for link in _chain(error):
        headers = getattr(getattr(link, "response", None), "headers", None)
        value = None if headers is None else headers.get("Retry-After")
        if value is not None and str(value).isdecimal():
            return float(value)
    return None


def attempts_for(error: BaseException) -> int:
    """How often to try at most: a rate limit passes, a lost connection may, anything else does not."""
    if any("Offline" in type(link).__name__ for link in _chain(error)):
        return 1
    status = status_of(error)
    if status == 429:
        return 10  # at 5, 10, … 300 seconds: longer than the five minutes over which the Hub counts
    if status is not None:
        return 5 if status >= 500 else 1
    lost = ("ConnectError", "ReadTimeout", "ConnectTimeout", "ReadError", "RemoteProtocolError")
    transient = any(isinstance(x, ConnectionError | TimeoutError) or type(x).__name__ in lost for x in _chain(error))
    return 3 if transient else 1


def patiently(load: Callable[[], Fetched], what: str, *, say: Say, sleep: Callable[[float], None]) -> Fetched:
    """Loads, and tries again with growing pauses where that can help.

    Raises:
        DownloadError: naming what could not be had and why.
    """
    attempt = 0
    while True:
        attempt += 1
        try:
            return load()
        except (MissingError, DataError):
            raise
        except Exception as error:  # the client raises half a dozen unrelated types
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if attempt >= attempts_for(error):
                tries = f" after {attempt} attempts" if attempt > 1 else ""
                raise DownloadError(f"Cannot load {what}{tries}: {reason}") from error
            # Not a random pause: one process asks for one dataset at a time.
            delay = _asked_delay(error) or min(300.0, 5.0 * 2 ** (attempt - 1))
            say(f"{what}: {reason}; trying again in {delay:.0f} s")
            sleep(min(delay, 900.0))


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Hides the bars that `datasets` draws for each of its files."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
