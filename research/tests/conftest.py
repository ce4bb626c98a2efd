"""The laboratory's tests use the tiny models of the library's own tests, and import the scripts beside this folder."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "research"), str(ROOT / "tests")]

_spec = importlib.util.spec_from_file_location("library_conftest", ROOT / "tests" / "conftest.py")
assert _spec is not None and _spec.loader is not None
_library = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_library)
globals().update({name: value for name, value in vars(_library).items() if not name.startswith("_")})


@pytest.fixture
def import_script() -> Callable[[str], ModuleType]:
    """Imports a script by its name, as it runs: with its neighbours in reach."""
    return importlib.import_module
