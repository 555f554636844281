"""The list of executable statements and the machinery that runs them.

A check is a function that returns how far a claimed formula is from an independent computation of
the same quantity: enumeration, numerical optimisation, finite differences, quadrature or sampling.
It takes one argument, `factor`, which multiplies the claimed constant. With the default 1 the check
must pass; the tests run it with another factor and require that it fails, so no check passes by
comparing a formula with itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from dpo.errors import InputError, did_you_mean

Z_LIMIT = 4.5
"""Sampling checks compare a z-score with this. One true score exceeds it once in 150,000 seeds; a
check reports the largest of a few, at most 24.
"""


@dataclass(frozen=True, slots=True)
class Measurement:
    """What a check found: its error, and the numbers of its example, by name, for the report."""

    error: float
    values: Mapping[str, float] = field(default_factory=dict[str, float])


class CheckFunction(Protocol):
    """A statement as code."""

    __name__: str
    __module__: str

    def __call__(self, *, factor: float = 1.0) -> Measurement:
        """Measure the statement whose constant is multiplied by `factor`."""
        ...


@dataclass(frozen=True, slots=True)
class Check:
    """A registered statement. `sampling` says that the error is a z-score."""

    id: str
    statement: str
    tolerance: float
    sampling: bool
    function: CheckFunction

    @property
    def chapter(self) -> str:
        """The module that holds the statement: `preferences`, `optimum`, ..."""
        return self.function.__module__.rsplit(".", 1)[-1]


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One line of `dpo theory`."""

    id: str
    chapter: str
    statement: str
    tolerance: float
    error: float
    sampling: bool
    passed: bool
    seconds: float
    values: Mapping[str, float]


_REGISTRY: dict[str, Check] = {}


def check(
    id: str, statement: str, *, tolerance: float | None = None
) -> Callable[[CheckFunction], CheckFunction]:
    """Register a check. Without a tolerance its error is a z-score, held against `Z_LIMIT`."""

    def register(function: CheckFunction) -> CheckFunction:
        if id in _REGISTRY:
            raise ValueError(f"two checks are called {id}")
        sampling = tolerance is None
        limit = Z_LIMIT if tolerance is None else tolerance
        _REGISTRY[id] = Check(id, statement, limit, sampling, function)
        return function

    return register


def checks(names: Sequence[str] | None = None) -> list[Check]:
    """The checks whose id, number or chapter is named, in order; all of them without names."""
    if names is None:
        return list(_REGISTRY.values())
    chosen: dict[str, Check] = {}
    for name in names:
        found = {
            key: value
            for key, value in _REGISTRY.items()
            if name in (key, key.split("-", 1)[0], value.chapter)
        }
        if not found:
            raise InputError(
                f"no theory check is called {name!r}; the ids are {', '.join(_REGISTRY)}, "
                f"the chapters {', '.join(sorted({c.chapter for c in _REGISTRY.values()}))}"
                f"{did_you_mean(name, _REGISTRY)}"
            )
        chosen.update(found)
    return [value for key, value in _REGISTRY.items() if key in chosen]


def run_check(item: Check) -> CheckResult:
    """Run one check; an error that is not a number counts as failed."""
    start = time.perf_counter()
    found = item.function()
    return CheckResult(
        id=item.id,
        chapter=item.chapter,
        statement=item.statement,
        tolerance=item.tolerance,
        error=found.error,
        sampling=item.sampling,
        passed=found.error <= item.tolerance,
        seconds=time.perf_counter() - start,
        values=dict(found.values),
    )


def run(names: Sequence[str] | None = None) -> list[CheckResult]:
    """Run the named checks (ids, numbers such as `P03`, or chapters), or all of them, in order."""
    return [run_check(item) for item in checks(names)]
