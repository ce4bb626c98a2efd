"""Every error this library raises on purpose. Knows nothing else.

One root, and each error also inherits the builtin it refines, so callers may catch either.
A message names the thing, the values on both sides and the way out.
"""

LINE = 1000
"""Most characters of a line of a message: what it quotes may come from other people's files, and have any length."""


class T2LError(Exception):
    """Root of all errors that t2l raises on purpose."""

    def __str__(self) -> str:
        lines = super().__str__().split("\n")
        return "\n".join(x if len(x) <= LINE else f"{x[:LINE]}… ({len(x):,} characters)" for x in lines)


class ConfigError(T2LError, ValueError):
    """A configuration has an unknown key, a wrong type or values that do not go together."""


class SpecMismatchError(T2LError, ValueError):
    """An adapter, a checkpoint and a model do not fit: other targets, layers, sizes or base."""


class DescriptionError(T2LError, ValueError):
    """A task description cannot be used: empty, too long, not text."""


class ModelNotFoundError(T2LError, FileNotFoundError):
    """A model reference leads nowhere: no such folder, package or Hub id."""


class DownloadError(T2LError, OSError):
    """A download failed or what came is not what was expected (checksum)."""


class UploadError(T2LError, OSError):
    """The Hugging Face Hub does not take an upload: no permission, no network, no such place."""


class CheckpointError(T2LError, ValueError):
    """A checkpoint or adapter file is damaged, tampered with, pickled or of another format."""


class TensorMismatchError(CheckpointError):
    """A sound tensor file holds other names or shapes than expected."""


class OutputError(T2LError, OSError):
    """An output folder or file cannot be written, or exists already."""


class DataError(T2LError, ValueError):
    """Training or evaluation data are missing, malformed or not allowed for this use."""


class AdapterNotAppliedError(T2LError, RuntimeError):
    """An adapter had no effect where it must have one, or was used on a batch it does not fit."""


class TrainingError(T2LError, RuntimeError):
    """Training cannot go on: a non-finite loss, a resume under another config."""


class SandboxError(T2LError, RuntimeError):
    """Code of a model is not run: nobody allowed it, or this system cannot isolate it."""


class EvaluationError(T2LError, RuntimeError):
    """A check of the evaluation itself failed: scores below chance, controls missing, no place to run code."""


class RequestError(T2LError, ValueError):
    """A request to the server cannot be served as it is: something in it is missing, malformed or too much."""


class AdapterNotFoundError(T2LError, LookupError):
    """The server has no adapter of this name."""


class StoreError(T2LError, OSError):
    """The server's adapters cannot be read or written. Clients read the message, so it names no place on the server."""


class BusyError(T2LError, RuntimeError):
    """The server takes no more at the moment: a queue is full or a limit is reached."""


class ClosingError(T2LError, RuntimeError):
    """The server is shutting down: nothing new is begun, and what takes too long is given up."""


class AnswerError(T2LError, RuntimeError):
    """An answer failed while it was written."""


class DeadlineError(AnswerError):
    """An answer took longer than it may."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for a message of ours."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
