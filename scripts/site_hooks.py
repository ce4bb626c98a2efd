"""What MkDocs does not do by itself: notebooks become pages, and links that leave docs/ lead to copies in the site.

A link such as `../configs/own.yaml` works where the repository is read. In the site the linked file stands under its
path in the repository (`configs/own.yaml`): Markdown as a page, all else as it is. Read by mkdocs.yml.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"\[(?P<text>[^\[\]]*)\]\((?P<target>[^)#\s:]+)(?P<anchor>#[^)\s]*)?\)")
NOTEBOOK, PAGE = ".ipynb", ".md"


def notebook_as_markdown(text: str) -> str:
    """The cells of a notebook one below the other; what code printed stands under it."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        printed = "".join("".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")
        if printed:
            parts.append(f"```text\n{printed.rstrip()}\n```")
    return "\n\n".join(parts)


def in_site(path: Path) -> str:
    """Where a file of the repository stands in the site; a notebook is a page there."""
    path = path.with_suffix(PAGE) if path.suffix == NOTEBOOK else path
    return str(path.relative_to(DOCS if path.is_relative_to(DOCS) else ROOT))


def target_of(page: Path, link: re.Match[str]) -> Path | None:
    """The file that a link leads to; a folder's README stands for the folder. None where there is no such file here."""
    target = (page.parent / link["target"]).resolve()
    target = target / "README.md" if target.is_dir() else target
    return target if target.is_file() and target.is_relative_to(ROOT) else None


def markdown_of(page: Path) -> tuple[str, set[Path]]:
    """A page's source with its links as the site has them, and the files that it leads to."""
    text = page.read_text(encoding="utf-8")
    text = notebook_as_markdown(text) if page.suffix == NOTEBOOK else text
    folder, found = Path(in_site(page)).parent, set()

    def lead(link: re.Match[str]) -> str:
        target = target_of(page, link)
        if target is None:  # a folder without a page is named; of a missing file MkDocs says that it is missing
            return link["text"] if (page.parent / link["target"]).is_dir() else link[0]
        found.add(target)
        return f"[{link['text']}]({os.path.relpath(in_site(target), folder)}{link['anchor'] or ''})"

    return LINK.sub(lead, text), found


def on_files(files: Files, config: Any) -> Files:
    """Adds the notebooks as pages, and all that pages link to outside docs/."""
    waiting = {path for path in DOCS.rglob("*") if path.suffix in (PAGE, NOTEBOOK)}
    done: set[Path] = set()
    while waiting:
        path = waiting.pop()
        done.add(path)
        for name in {in_site(path), str(path.relative_to(DOCS)) if path.is_relative_to(DOCS) else in_site(path)}:
            if (plain := files.get_file_from_path(name)) is not None:
                files.remove(plain)
        if path.suffix not in (PAGE, NOTEBOOK):
            files.append(File.generated(config, in_site(path), abs_src_path=str(path)))
            continue
        text, found = markdown_of(path)
        files.append(File.generated(config, in_site(path), content=text))
        waiting |= found - done
    return files
