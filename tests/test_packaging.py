"""What is installed: the core needs no extra, the wheel holds what the package reads, licences go together."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path
from types import ModuleType

import pytest
from loading import load

from t2l.config import parse_yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def script(name: str) -> ModuleType:
    return load("scripts", name)


def test_the_core_imports_no_extra() -> None:
    """All of the core in a process in which no package of an extra can be imported."""
    check = script("package_check")
    packages = sorted({package for packages in check.EXTRAS.values() for package in packages} - {"accelerate"})
    code = f"""
import importlib, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {packages}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
for module in {check.CORE}:
    importlib.import_module("t2l." + module)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# Where a distribution's name is not its module's.
DISTRIBUTIONS = {"yaml": "pyyaml"}


def requirement(line: str) -> str:
    return re.match(r"[\w-]+", line)[0].replace("-", "_")


def test_what_is_imported_is_named_in_pyproject() -> None:
    """A package that another one happens to bring may leave with its next release."""
    known = {requirement(line) for line in PROJECT["dependencies"]}
    extras = {name: {requirement(x) for x in lines} for name, lines in PROJECT["optional-dependencies"].items()}
    seen = set()
    for path in (ROOT / "src" / "t2l").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for top in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"t2l"} - {"vllm"}:
                name = DISTRIBUTIONS.get(top, top)
                seen.add(name)
                extra = {"serve": "serve", "data": "data"}.get(path.parent.name)
                extra = "lm-eval" if path.stem == "lm_eval" else extra
                if extra and node.col_offset == 0:
                    assert name in known | extras[extra], f"{path} imports {name}, which extra {extra} does not name"
                assert name in known.union(*(extras[e] for e in extras.keys() - {"dev", "docs"})), f"{path}: {name}"
    assert known <= seen, f"named and not imported: {known - seen}"


def test_every_extra_is_tried_by_the_package_test() -> None:
    assert script("package_check").EXTRAS.keys() == PROJECT["optional-dependencies"].keys() - {"dev", "docs"}


def test_every_requirement_has_a_lowest_version() -> None:
    command = [sys.executable, ROOT / "scripts" / "requirements.py", "lowest"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert {"torch", "transformers", "peft", "gguf"} <= {line.split("==")[0] for line in done.stdout.splitlines()}


def test_licences_are_said_and_go_with_our_own() -> None:
    """What the package test asks in each environment, of all extras that are installed here."""
    licences = script("licences")
    found = licences.requirements("text-to-lora", tuple(PROJECT["optional-dependencies"].keys() - {"dev"}))
    assert len(found) > 30
    assert not licences.unfit(found)
    bad = {"a": "AGPL-3.0-only", "b": "GNU General Public License v3 (GPLv3)", "c": "not said", "d": "GPL-2.0"}
    assert licences.unfit(bad | {"e": "LGPL-2.1", "f": "MPL-2.0", "g": "MIT"}) == bad


@pytest.mark.parametrize(("held", "said"), [([], "nothing of its own"), (["toolkit.py"], "not said")])
def test_who_says_no_licence_may_hold_nothing_that_needs_one(tmp_path: Path, held: list[str], said: str) -> None:
    """NVIDIA's `cuda-toolkit`, which a plain torch brings, is a list of requirements."""
    folder = tmp_path / "toolkit-1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.4\nName: toolkit\nVersion: 1\n")
    for name in held:
        (tmp_path / name).write_text("")
    (folder / "RECORD").write_text("".join(f"{name},,\n" for name in ("toolkit-1.dist-info/METADATA", *held)))
    assert script("licences").licence(PathDistribution(folder)) == said


def test_the_workflow_tries_every_extra_and_calls_targets_that_there_are() -> None:
    jobs = parse_yaml((ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8"), ".github")["jobs"]
    tried = set(jobs["package"]["strategy"]["matrix"]["name"])
    assert tried == script("package_check").EXTRAS.keys() | {"core", "lowest"}
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    steps = [step.get("run", "") for job in jobs.values() for step in job["steps"]]
    assert (
        {"lint", "test", "audit"}
        <= {target for step in steps for target in re.findall(r"make ([\w-]+)", step)}
        <= targets
    )


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name.removeprefix("t2l/") for name in archive.namelist() if name.startswith("t2l/")}
    package = ROOT / "src" / "t2l"
    tracked = subprocess.run(["git", "ls-files", package], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {str((ROOT / line).relative_to(package)) for line in tracked.split("\n") if line} == held
