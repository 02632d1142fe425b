"""Settings that declare their ranges."""

import dataclasses

import numpy as np
import pytest

from vcm_jax.settings import (
    TEXT,
    TIME_INTERVAL,
    check,
    choice,
    integer,
    number,
    power_of_two,
    ranges,
    setting,
)

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "accepts, text, good, bad",
    [
        (number(), "a finite number", [-1.5, 0, np.float32(2)], [NAN, INF, "1", None, True]),
        (number(0), ">= 0", [0, 1e9], [-1e-9, NAN]),
        (number(high=2), "<= 2", [2, -1], [2.1]),
        (number(above=0), "> 0", [1e-9], [0, -1]),
        (number(below=1), "< 1", [0.9], [1]),
        (number(0, 1), "in [0, 1]", [0, 1, 0.5], [-0.1, 1.1]),
        (number(0, below=1), "in [0, 1)", [0, 0.9], [1, -0.1]),
        (number(above=0, high=1), "in (0, 1]", [1, 0.1], [0, 1.1]),
        (integer(), "an integer", [-3, 0, np.int64(2)], [1.0, "1", True, None]),
        (integer(1), "an integer >= 1", [1, 7], [0, 1.5]),
        (
            power_of_two(2, 128),
            "a power of 2 in [2, 128]",
            [2, 4, 128],
            [1, 3, 96, 0, -2, 4.0, 256],
        ),
        (choice("a", "b"), "one of a, b", ["a", "b"], ["c", "", None, 1]),
        (TEXT, "a string", ["", "x"], [None, 1]),
        (
            TIME_INTERVAL,
            "two times 0 <= low <= high <= 1",
            [(0, 1), [0.5, 0.5]],
            [(0.6, 0.5), (0.5,), (0, 1.1), (-0.1, 1), (0, 1, 1), 0.5, None, ("0", "1"), (0, NAN)],
        ),
    ],
)
def test_ranges(accepts, text, good, bad):
    assert accepts.text == text
    for value in good:
        assert accepts.holds(value), value
    for value in bad:
        assert not accepts.holds(value), value


@dataclasses.dataclass(frozen=True)
class Example:
    size: int = setting(accepts=integer(1))
    rate: float = setting(0.5, number(0, 1))
    free: object = None


def test_a_dataclass_of_settings():
    assert list(ranges(Example)) == ["size", "rate"] == list(ranges(Example(1)))
    check(Example(3), "example")
    with pytest.raises(ValueError, match="^example.rate must be in .0, 1., not 'fast'$"):
        check(Example(3, rate="fast"), "example")
    with pytest.raises(TypeError):
        Example()
