"""Names that come from other people's files and become folders. Knows texts only."""

from collections.abc import Iterable

from t2l.errors import T2LError


def require_folder_names(names: Iterable[str], what: str, error: type[T2LError]) -> None:
    """Checks names that come from a file and become folders, before anything is computed or written.

    A name that is a path would lead out of the folder that it is meant for, and what stands there be replaced.

    Args:
        names: The names.
        what: What they name, for the message, such as "an adapter".
        error: Which error is raised.

    Raises:
        error: if a name is no text, is empty or longer than 200 bytes, begins with a dot or ends with a dot or space,
            or has a slash, a backslash, a colon or a sign that cannot be printed.
    """
    for name in names:
        sound = (
            isinstance(name, str)
            and 0 < len(name.encode("utf-8", "replace")) <= 200
            and name[0] != "."
            and name[-1] not in ". "
            and not set(name) & set("/\\:")
            and name.isprintable()
        )
        if not sound:
            shown = repr(name) if len(repr(name)) <= 80 else f"{repr(name)[:80]}..."
            raise error(
                f"{shown} cannot name {what}: it becomes the name of a folder, so it must be 1 to 200 bytes of "
                "printable text without a slash, backslash or colon, and neither begin nor end with a dot; rename it"
            )
