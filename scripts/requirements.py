"""Prints what the package and all its extras but `dev` ask for, a requirement a line.

`python scripts/requirements.py lowest` prints each at the lowest version that it allows, for pip's -c.
"""

import re
import sys
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = project["optional-dependencies"]
asked = [*project["dependencies"], *(line for extra in extras.keys() - {"dev"} for line in extras[extra])]
if "lowest" in sys.argv[1:]:
    lowest: dict[str, str] = {}
    for requirement in asked:
        name, version = re.match(r"([\w-]+)(?:\[\w+\])?>=([\w.]+)", requirement).groups()
        lowest[name] = max(lowest.get(name, version), version, key=lambda text: [int(n) for n in text.split(".")])
    asked = [f"{name}=={version}" for name, version in lowest.items()]
print("\n".join(sorted(set(asked))))
