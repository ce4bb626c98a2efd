"""Every number of a settings dataclass is checked by its type when the dataclass is made."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from t2l.config import Count, Positive, Range, Seed, Share, check_ranges
from t2l.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Settings:
    steps: Count = 1
    share: Share | None = None
    layers: tuple[Count, ...] | None = (1, 2)
    rate: Positive = 1.0
    free: float = 0.0
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_ranges(self, "train")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, r"train\.steps must be at least 1, got 0"),
        ({"share": 1.5}, r"train\.share must be at least 0 and at most 1, got 1\.5"),
        ({"layers": (1, 0)}, r"train\.layers\[1\] must be at least 1, got 0"),
        ({"rate": 0.0}, r"train\.rate must be above 0, got 0\.0"),
        ({"rate": math.nan}, r"train\.rate must be a finite number, got nan"),
        ({"free": math.inf}, r"train\.free must be a finite number, got inf"),
        ({"seed": 10**400}, r"train\.seed must be at least 0 and at most 2147483647"),
        ({"steps": -1, "seed": -1}, r"train\.steps must be at least 1, got -1\ntrain\.seed must be"),
    ],
    ids=str,
)
def test_a_number_out_of_its_range_is_named_with_its_value(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Settings(**values)


@given(st.floats(), st.floats(-9, 9), st.floats(-9, 9))
def test_a_range_holds_what_lies_between_its_bounds(value: float, low: float, high: float) -> None:
    assert (value in Range(at_least=low, at_most=high)) == (low <= value <= high)
    assert (value in Range(above=low, below=high)) == (low < value < high)
