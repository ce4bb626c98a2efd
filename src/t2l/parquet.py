"""Other people's Parquet files: what pyarrow raises on damaged ones becomes an error of ours. Knows files only."""

from collections.abc import Iterator
from contextlib import contextmanager

from t2l.errors import DataError, T2LError


def require_pyarrow(what: str, extra: str) -> None:
    """Checks that pyarrow is installed.

    Args:
        what: What needs it, as the message begins.
        extra: The extra of this package that brings it.

    Raises:
        DataError: saying what to install, if it is not.
    """
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise DataError(f"{what} needs pyarrow: pip install 'text-to-lora[{extra}]'") from error


@contextmanager
def reading_parquet(where: object, way_out: str = "", error: type[T2LError] = DataError) -> Iterator[None]:
    """Turns what pyarrow raises on damaged files into one error; it looks at texts only when they are taken out.

    Args:
        where: What is read, as messages name it.
        way_out: What to do about it, as the message ends.
        error: The class of what is raised.

    Raises:
        T2LError: of the class `error`, for whatever the block raises because of what it reads.
    """
    import pyarrow as pa

    try:
        yield
    except T2LError:  # some of them are OSErrors too, and already say what is wrong
        raise
    except (OSError, pa.ArrowException, UnicodeDecodeError) as cause:
        said = " ".join(str(cause).split())[:200]
        raise error(f"{where} is damaged or no Parquet file ({said}){'; ' * bool(way_out)}{way_out}") from cause
