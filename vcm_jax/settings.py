"""Settings: dataclasses whose fields declare which values they accept.

    @dataclasses.dataclass(frozen=True)
    class Optimizer:
      learning_rate: float = setting(1e-4, number(above=0))

      def __post_init__(self):
        check(self, "optimizer")

`ranges(Optimizer)` is the table of all ranges, for anyone who wants to check or print them.
"""

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Range:
    """The values that a setting accepts.

    Attributes:
      text: completes the sentence "NAME must be ...".
      holds: whether a value is one of them; it accepts a value of any type.
    """

    text: str
    holds: Callable[[Any], bool]


def _bounds(low, high, above, below) -> tuple[str, Callable[[Any], bool]]:
    """The text of an interval ("" without bounds), and whether a number lies in it."""
    start = low if above is None else above
    end = high if below is None else below
    if start is None and end is None:
        text = ""
    elif end is None:
        text = f"{'>=' if above is None else '>'} {start}"
    elif start is None:
        text = f"{'<=' if below is None else '<'} {end}"
    else:
        text = f"in {'[' if above is None else '('}{start}, {end}{']' if below is None else ')'}"

    def holds(value) -> bool:
        return (
            (low is None or value >= low)
            and (high is None or value <= high)
            and (above is None or value > above)
            and (below is None or value < below)
        )

    return text, holds


def number(low=None, high=None, *, above=None, below=None) -> Range:
    """Finite numbers; `low` and `high` are accepted themselves, `above` and `below` are not."""
    text, inside = _bounds(low, high, above, below)

    def holds(value) -> bool:
        real = isinstance(value, numbers.Real) and not isinstance(value, bool)
        return real and math.isfinite(value) and inside(value)

    return Range(text or "a finite number", holds)


def integer(low=None, high=None) -> Range:
    """Integers from `low` to `high`, both included."""
    text, inside = _bounds(low, high, None, None)

    def holds(value) -> bool:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool) and inside(value)

    return Range(f"an integer {text}".rstrip(), holds)


def power_of_two(low: int, high: int) -> Range:
    """Powers of 2 from `low` to `high`."""
    whole = integer(low, high)

    def holds(value) -> bool:
        return whole.holds(value) and value & (value - 1) == 0

    return Range(f"a power of 2 in [{low}, {high}]", holds)


def choice(*names: str) -> Range:
    """One of several names."""
    return Range(f"one of {', '.join(names)}", lambda value: value in names)


def patterns(least: int = 0) -> Range:
    """A tuple of at least so many strings, none of them empty."""

    def holds(value) -> bool:
        return (
            isinstance(value, tuple | list)
            and len(value) >= least
            and all(isinstance(text, str) and text for text in value)
        )

    return Range("a tuple of patterns" + f", at least {least}" * (least > 0), holds)


def _is_interval(value) -> bool:
    inside = number(0, 1).holds
    if not isinstance(value, tuple | list) or len(value) != 2 or not all(map(inside, value)):
        return False
    return value[0] <= value[1]


BOOLEAN = Range("True or False", lambda value: isinstance(value, bool))
TEXT = Range("a string", lambda value: isinstance(value, str))
TIME_INTERVAL = Range("two times 0 <= low <= high <= 1", _is_interval)


def setting(default=dataclasses.MISSING, accepts: Range | None = None):
    """A dataclass field with a range; without `default` the setting must be given."""
    return dataclasses.field(default=default, metadata={"range": accepts})


def ranges(cls) -> dict[str, Range]:
    """{setting: its range} of a dataclass; fields that declare none are left out."""
    declared = {field.name: field.metadata.get("range") for field in dataclasses.fields(cls)}
    return {name: accepts for name, accepts in declared.items() if accepts is not None}


def check(settings, section: str) -> None:
    """Raises ValueError for the first setting whose value is out of its range.

    Args:
      settings: a dataclass instance.
      section: where the config has these settings; the error names SECTION.SETTING.
    """
    for name, accepts in ranges(settings).items():
        value = getattr(settings, name)
        if not accepts.holds(value):
            raise ValueError(f"{section}.{name} must be {accepts.text}, not {value!r}")
