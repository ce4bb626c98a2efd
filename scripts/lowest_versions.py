"""Prints constraints that hold each requirement of pyproject.toml at the lowest version that it allows."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = project["optional-dependencies"]
lowest: dict[str, str] = {}
for requirement in (*project["dependencies"], *(line for extra in extras.keys() - {"dev"} for line in extras[extra])):
    name, version = re.match(r"([\w-]+)(?:\[\w+\])?>=([\w.]+)", requirement).groups()
    lowest[name] = max(lowest.get(name, version), version, key=lambda text: [int(n) for n in text.split(".")])
for name, version in sorted(lowest.items()):
    print(f"{name}=={version}")
