"""The structure: imports go one way, nothing unsafe is called, and importing the package stays light."""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "t2l"
RESEARCH = SOURCE.parents[1] / "research"
FILES = sorted(SOURCE.rglob("*.py"))


def documented_rows() -> dict[str, int]:
    """Module to its row, from the table in docs/architecture.md, the one place that has it."""
    text = (SOURCE.parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
    return {name: int(row) for row, name in re.findall(r"^\| (\d+) \| `(\w+)(?:/\*)?` \|", text, re.MULTILINE)}


# A module imports only from rows above its own, that is, of a lower number.
ROWS = documented_rows()
# Modules of one package may use each other, without a circle.
PACKAGES = ("train", "eval", "data", "compress", "serve", "cli")


def module_name(path: Path) -> str:
    """`train.sft` for t2l/train/sft.py; the package's own __init__ is the empty name."""
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


@functools.cache
def imported(path: Path) -> frozenset[str]:
    """Modules of t2l that a file imports, anywhere in it, and also for types only."""
    known = {module_name(file) for file in FILES}
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name.removeprefix("t2l.") in known else str(node.module) for name in names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.partition(".")[2] for name in names if name.partition(".")[0] == "t2l"}
    return frozenset(found - {""})


def may_import(importer: str, target: str) -> bool:
    one, other = importer.partition(".")[0], target.partition(".")[0]
    if one == other and one in PACKAGES:
        return True
    return ROWS[other] < ROWS[one]


def test_every_module_has_a_row_and_every_row_a_module() -> None:
    found = {module_name(path).partition(".")[0] for path in FILES} - {""}
    assert found == ROWS.keys(), "every module has a row in docs/architecture.md, and every row a module"


@pytest.mark.parametrize("path", [p for p in FILES if module_name(p)], ids=module_name)
def test_imports_go_one_way(path: Path) -> None:
    name = module_name(path)
    assert [target for target in sorted(imported(path)) if not may_import(name, target)] == []


def test_no_circles() -> None:
    graph = {module_name(path): imported(path) for path in FILES if module_name(path)}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"{' imports '.join((*trail, name))}"
        if name not in done:
            for target in graph.get(name, set()):
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_the_check_itself_finds_what_it_looks_for() -> None:
    assert "checkpoint" in imported(SOURCE / "text_to_lora.py")
    assert "hub" in imported(SOURCE / "text_to_lora.py")  # from t2l import hub
    assert {"text_to_lora", "apply"} <= imported(SOURCE / "__init__.py")  # under TYPE_CHECKING
    assert not may_import("train.sft", "eval.metrics")
    assert not may_import("hypernet", "encoder")
    assert not may_import("apply", "text_to_lora")


def packages_of(path: Path) -> set[str]:
    """Top-level packages that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).partition(".")[0])
    return found


@pytest.mark.parametrize("folder", ["src", "tests", "benchmarks", "scripts"])
def test_the_library_never_imports_the_laboratory(folder: str) -> None:
    laboratory = {path.stem for path in RESEARCH.glob("*.py")} | {"research"}
    assert {"decide", "make_splits"} < laboratory
    for path in (RESEARCH.parent / folder).rglob("*.py"):
        assert not packages_of(path) & laboratory, path


def test_the_laboratory_imports_the_library_and_what_it_requires() -> None:
    own = {path.stem for path in RESEARCH.glob("*.py")}
    known = own | set(sys.stdlib_module_names) | {"t2l", "torch", "safetensors", "numpy", "pyarrow"}
    for path in RESEARCH.glob("*.py"):
        assert packages_of(path) <= known, path


def test_the_distribution_is_named_as_it_is() -> None:
    """`t2l` is the import and the command; on the package index that name is somebody else's."""
    from importlib.metadata import version

    import t2l

    assert version("text-to-lora") == t2l.__version__
    root = SOURCE.parents[1]
    old = re.compile(r"\bt2l\\?\[|pip install (?:-\S+ )*t2l\b|install t2l again")
    folders = [root / name for name in ("src", "tests", "docs", "benchmarks", "scripts", "configs", "research")]
    files = [*root.glob("*.md"), *root.glob("*.toml"), root / "Makefile"]
    files += [
        path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".md", ".yaml", ".txt")
    ]
    assert [str(path) for path in files if path != Path(__file__) and old.search(path.read_text("utf-8"))] == []


def test_pages_name_tests_that_are_there_and_no_entries_of_the_log() -> None:
    root = SOURCE.parents[1]
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", (root / "docs" / "reliability.md").read_text("utf-8"))
    assert len(named) > 30
    missing = [f"{path}::{name}" for path, name in named if f"def {name}(" not in (root / path).read_text("utf-8")]
    assert missing == []
    page = (root / "docs" / "reliability.md").read_text("utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith(("| tried", "| ---"))]
    counts = re.compile(r"\| reader \|.*|\| [\w ]+( \| [\d,]+){3} \|")  # test_fuzz.py and test_http_fuzz.py read these
    rows = [row for row in rows if not counts.fullmatch(row)]
    assert [row for row in rows if "<br>`tests/" not in row] == []
    pages = [
        *root.glob("*.md"),
        *(root / "docs").glob("*.md"),
        *SOURCE.rglob("*.md"),
        *(root / "configs").rglob("*.yaml"),
    ]
    log = re.compile(r"\bentr(y|ies) \d")
    assert [str(page) for page in pages if log.search(page.read_text("utf-8"))] == []


def test_links_between_pages_lead_somewhere() -> None:
    root = SOURCE.parents[1]
    for page in (*root.glob("*.md"), *(root / "docs").glob("*.md"), *(root / "research").rglob("*.md")):
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text("utf-8")):
            if not target.startswith(("http:", "https:", "mailto:")):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_repository_stays_small() -> None:
    """Besides the shipped weights; answers and weights of experiments are named by their commit instead."""
    root = SOURCE.parents[1]
    if not (root / ".git").exists():
        pytest.skip("not a clone: what is tracked is not known")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True).stdout
    paths = [root / name for name in listed.split("\0") if name and not name.endswith("/hypernet.safetensors")]
    sizes = {path: path.stat().st_size for path in paths if path.is_file()}
    assert sum(sizes.values()) <= 8e6, sorted(sizes.items(), key=lambda item: -item[1])[:5]
    assert sum(size for path, size in sizes.items() if path.suffix == ".gz") <= 4e6


# ---------------------------------------------------------------------------------------------- what is not done


UNSAFE_CALLS = {"eval", "exec", "os.system", "os.popen", "yaml.unsafe_load", "yaml.full_load", "yaml.safe_load"}
"""The last one reads without bounds; `t2l.config.parse_yaml` has them."""
OWN_JSON = {"io", "eval._jail", "serve.store", "compress.scores", "train.metrics"}
"""Modules that may call `json.loads`: the bounded reader, and those that read only what they wrote themselves."""


def unsafe(tree: ast.AST) -> Iterator[tuple[int, str]]:
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    # Reads tensors and runs nothing; whoever calls it so has to check what it read.
    restricted = {
        call.func for call in calls if any(ast.unparse(word) == "weights_only=True" for word in call.keywords)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            for name in names:
                if name.partition(".")[0] in ("pickle", "cloudpickle", "dill", "joblib", "shelve"):
                    yield node.lineno, f"imports {name}"
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            yield node.lineno, "bare except"
        elif isinstance(node, ast.Attribute) and node.attr == "load" and node not in restricted:
            if isinstance(node.value, ast.Name) and node.value.id == "torch":
                yield node.lineno, "torch.load"
        elif isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant):
            if (node.arg, node.value.value) in (
                ("strict", False),
                ("trust_remote_code", True),
                ("weights_only", False),
                ("shell", True),
            ):
                yield node.value.lineno, f"{node.arg}={node.value.value}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in UNSAFE_CALLS:
            yield node.lineno, f"{ast.unparse(node.func)}()"


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_name(path) or "t2l")
def test_nothing_unsafe_is_called(path: Path) -> None:
    """No pickle, no remote code, no weights half-loaded in silence, no error swallowed whole."""
    assert list(unsafe(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_name(path) or "t2l")
def test_other_peoples_text_is_read_within_bounds(path: Path) -> None:
    """`t2l.io.parse_json` limits depth, digits and size; `t2l.config.parse_yaml` does for YAML."""
    calls = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)]
    found = {ast.unparse(call.func) for call in calls} & {"json.loads", "json.load", "yaml.load"}
    allowed = {"json.loads"} if module_name(path) in OWN_JSON else set()
    assert found <= (allowed | {"yaml.load"} if module_name(path) == "config" else allowed)


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_name(path) or "t2l")
def test_documented_arguments_are_those_of_the_signature(path: Path) -> None:
    """Where a docstring has a list of arguments, it names every one, in order."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        listed = re.search(r"^Args:\n((?:(?:    .*)?\n?)*)", ast.get_docstring(node) or "", re.MULTILINE)
        if listed is None:
            continue
        given = node.args
        names = [
            arg.arg for arg in (*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg) if arg
        ]
        if node.col_offset and names[:1] in (["self"], ["cls"]):  # a method; `cls` of a function is an argument
            names = names[1:]
        assert re.findall(r"^    (\w+): ", listed[1], re.MULTILINE) == names, f"{node.name}, line {node.lineno}"


def test_the_search_for_unsafe_calls_finds_them() -> None:
    code = (
        "import pickle\nfrom pickle import loads\ntorch.load(x)\nm.load_state_dict(s, strict=False)\n"
        "f(trust_remote_code=True)\ntry:\n    eval(x)\nexcept:\n    pass\nzip(a, b, strict=True)\n"
        "subprocess.run(x, shell=True)\nos.system(x)\ntorch.load(x, weights_only=True)\n"
    )
    assert [what for _, what in sorted(unsafe(ast.parse(code)))] == [
        "imports pickle",
        "imports pickle",
        "torch.load",
        "strict=False",
        "trust_remote_code=True",
        "eval()",
        "bare except",
        "shell=True",
        "os.system()",
    ]


@pytest.mark.parametrize("module", ["t2l", "t2l.cli", "t2l.config"])
def test_import_is_light(module: str) -> None:
    """`t2l --help` must not wait seconds for torch."""
    code = f"import sys, {module}; print([m for m in ('torch', 'transformers', 'peft', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
