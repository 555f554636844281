"""Executable theory: every statement of the report, as code that measures it.

Each chapter of the report is a module here, each statement a function. `run` measures them,
`render` shows the result, `write_results` stores it for the report's margins.
"""

# Importing a chapter registers its checks: the order is the report's.
# ruff: isort: off
from dpo.theory import preferences, rlhf, optimum, equivalence, comparison, variants

# ruff: isort: on
from dpo.theory.registry import Check, CheckResult, checks, run
from dpo.theory.results import render, source_hash, write_results

CHAPTERS = (preferences, rlhf, optimum, equivalence, comparison, variants)

__all__ = [
    "CHAPTERS",
    "Check",
    "CheckResult",
    "checks",
    "render",
    "run",
    "source_hash",
    "write_results",
]
