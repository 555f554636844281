import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from dpo.theory import render, results, run, source_hash, write_results
from dpo.theory.registry import CheckResult, Measurement, check


def test_results_carry_the_hash_of_their_sources(tmp_path: Path) -> None:
    found = run(["P03", "O08"])
    write_results(found, tmp_path / "deep" / "theory.json")
    stored = json.loads((tmp_path / "deep" / "theory.json").read_text())
    assert stored["source_sha256"] == source_hash()
    assert list(stored["checks"]) == ["P03-bt-is-k2", "O08-dpo-at-reference"]
    assert stored["checks"]["P03-bt-is-k2"]["error"] == found[0].error
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["theory.json"]


def test_the_hash_changes_with_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "theory").mkdir()
    (tmp_path / "core").mkdir()
    for name in ("theory/a.py", "core/exact.py", "core/rewards.py"):
        (tmp_path / name).write_text("one")
    monkeypatch.setattr(results, "_PACKAGE", tmp_path)
    before = source_hash()
    (tmp_path / "core" / "rewards.py").write_text("two")
    assert source_hash() != before


def _result(*, error: float, sampling: bool) -> CheckResult:
    return CheckResult(
        "X01-test", "test", "A claim [s − t].", 1e-9, error, sampling, error <= 1e-9, 0.5, {}
    )


def test_the_table_shows_what_failed() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(render([_result(error=0.0, sampling=False), _result(error=2.0, sampling=True)]))
    text = console.export_text()
    assert "FAILED" in text
    assert "A claim [s − t]." in text
    assert "z 2" in text
    assert "2 statements, 1 failed, 1.0 s" in text


def test_nan_counts_as_failed() -> None:
    from dpo.theory.registry import Check, run_check

    def broken(*, factor: float = 1.0) -> Measurement:
        return Measurement(float("nan"))

    assert not run_check(Check("X02-nan", "A claim.", 1.0, False, broken)).passed


def test_two_checks_cannot_share_an_id() -> None:
    with pytest.raises(ValueError, match="two checks are called P03-bt-is-k2"):
        check("P03-bt-is-k2", "A claim.")(lambda *, factor=1.0: Measurement(factor))
