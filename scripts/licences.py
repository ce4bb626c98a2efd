"""Prints the licence of every package that an installation brings, as the packages say themselves.

`python scripts/licences.py [EXTRA...]` ends with an error where one does not go with Apache-2.0, or says nothing.
"""

import re
import sys
from importlib import metadata

# Who gives a program away with GPL code in it gives it away under the GPL; the LGPL asks that of the library alone.
UNFIT = re.compile(r"\bA?GPL|GNU (Affero )?General")


def requirements(name: str, extras: tuple[str, ...] = (), seen: dict[str, str] | None = None) -> dict[str, str]:
    """Every distribution that one needs, by name, with its licence; what is not installed here is left out."""
    seen = {} if seen is None else seen
    for line in metadata.requires(name) or ():
        needed, _, marker = line.partition(";")
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)", marker)
        found = re.match(r"[\w.-]+", needed)
        if (extra and extra[1] not in extras) or found is None:
            continue
        key = re.sub(r"[-_.]+", "-", found[0]).lower()
        inner = re.search(r"\[([\w,\s-]+)\]", needed)
        try:
            distribution = metadata.distribution(key)
        except metadata.PackageNotFoundError:
            continue
        if key in seen:
            continue
        seen[key] = licence(distribution)
        requirements(key, tuple(re.split(r"\s*,\s*", inner[1])) if inner else (), seen)
    return seen


def licence(distribution: metadata.Distribution) -> str:
    """What one says: an SPDX expression, else its classifiers, else the first line of its text."""
    about = distribution.metadata
    classifiers = [x.split(" :: ")[-1] for x in about.get_all("Classifier") or () if x.startswith("License ::")]
    text = (about.get("License") or "").strip().splitlines()
    # `cuda-toolkit` says nothing: its requirements, which are judged themselves, are all that it is.
    files = distribution.files or ()
    empty = bool(files) and all(file.parts[0].endswith(".dist-info") for file in files)
    said = about.get("License-Expression") or ", ".join(classifiers) or (text[0] if text else "")
    return said or ("nothing of its own" if empty else "not said")


def unfit(found: dict[str, str]) -> dict[str, str]:
    """Those that may not be part of an installation, with what they say."""
    return {name: words for name, words in found.items() if UNFIT.search(words) or words == "not said"}


if __name__ == "__main__":
    brought = requirements("text-to-lora", tuple(sys.argv[1:]))
    for package, words in sorted(brought.items()):
        print(f"{package:<28} {words}")
    if bad := unfit(brought):
        sys.exit(f"error: these licences do not go with Apache-2.0, or are not said: {bad}")
