"""Prints the licences of everything that an installation of the package brings, as the packages say themselves."""

import re
from importlib import metadata


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
            about = metadata.metadata(key)
        except metadata.PackageNotFoundError:
            continue
        if key in seen:
            continue
        seen[key] = licence(about)
        requirements(key, tuple(re.split(r"\s*,\s*", inner[1])) if inner else (), seen)
    return seen


def licence(about: metadata.PackageMetadata) -> str:
    """What a distribution says: an SPDX expression, else its classifiers, else the first line of its text."""
    classifiers = [x.split(" :: ")[-1] for x in about.get_all("Classifier") or () if x.startswith("License ::")]
    text = (about.get("License") or "").strip().splitlines()
    return about.get("License-Expression") or ", ".join(classifiers) or (text[0] if text else "not said")


if __name__ == "__main__":
    for package, words in sorted(requirements("text-to-lora", ("embedded", "train", "data", "eval", "serve")).items()):
        print(f"{package:<28} {words}")
