"""What the tests of data share: small sources in the layout of the Hub, and the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from t2l import cli

datasets = pytest.importorskip("datasets")


def t2l(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def own_rows(name: str = "mine", number: int = 12, **more: Any) -> list[dict[str, Any]]:
    return [
        {
            "task": name,
            "description": "Say yes or no.",
            "input": f"{name} {i} apples are there",
            "output": "no" if i % 3 else "yes",
        }
        | more
        for i in range(number)
    ]
