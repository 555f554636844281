import importlib.util
import json
import re
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from dpo.errors import InputError
from dpo.theory import checks, run, write_results

pytest.importorskip("typst")
REPORT = Path(__file__).resolve().parents[2] / "report"


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("report_build", REPORT / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "theory.json")
    return module


def test_missing_results_are_said(build: ModuleType) -> None:
    with pytest.raises(InputError, match=r"theory\.json is missing; run: dpo theory"):
        build.build()


def test_stale_results_are_refused(build: ModuleType) -> None:
    write_results(run(["P03"]), build.RESULTS)
    stored = json.loads(build.RESULTS.read_text())
    stored["source_sha256"] = "0" * 64
    build.RESULTS.write_text(json.dumps(stored))
    with pytest.raises(InputError, match="older than the theory code"):
        build.build()


def test_partial_and_damaged_results_are_refused(build: ModuleType) -> None:
    write_results(run(["P03"]), build.RESULTS)
    with pytest.raises(InputError, match="lacks P01-pl-normalised"):
        build.build()
    build.RESULTS.write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        build.build()


def test_a_study_recorded_with_other_settings_or_missing_is_refused(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build.require_studies()
    (tmp_path / "results" / "exact").mkdir(parents=True)
    studies = REPORT.parent / "studies"
    shutil.copy(studies / "exact.yaml", tmp_path / "exact.yaml")
    monkeypatch.setattr(build, "STUDIES_FOLDER", tmp_path)
    monkeypatch.setattr(build, "STUDIES", {"exact": build.STUDIES["exact"]})
    with pytest.raises(InputError, match=r"exact/study\.json is missing; run: python studies/rec"):
        build.require_studies()
    for file in ("study.json", "tables.json"):
        shutil.copy(studies / "results/exact" / file, tmp_path / "results/exact" / file)
    build.require_studies()
    recorded = tmp_path / "results/exact/study.json"
    whole = recorded.read_text()
    recorded.write_text(whole.replace('"pairs": 20000', '"pairs": 20001'))
    with pytest.raises(InputError, match="recorded with pairs=20001"):
        build.require_studies()
    study = json.loads(whole)
    study["config"]["seeds"] = study["config"]["seeds"][1:]
    recorded.write_text(json.dumps(study))
    with pytest.raises(InputError, match="recorded with seeds="):
        build.require_studies()


def test_settings_are_compared_by_their_dotted_keys(build: ModuleType) -> None:
    nested = {"a": {"b": 1, "c.d": 2}, "e": [3]}
    assert dict(build.flat(nested)) == {"a.b": 1, "a.c.d": 2, "e": [3]}


def test_every_check_stands_beside_a_statement_and_every_note_has_a_check() -> None:
    text = "".join(file.read_text() for file in sorted((REPORT / "chapters").glob("*.typ")))
    groups = re.findall(r"check(?:s: |ed)\(([^)]*)\)", text)
    noted = {name for group in groups for name in re.findall(r'"([A-Z]\d\d)"', group)}
    assert noted == {item.id.split("-")[0] for item in checks()}


def test_every_bibliography_entry_is_cited_and_every_citation_has_an_entry() -> None:
    text = "".join(file.read_text() for file in sorted((REPORT / "chapters").glob("*.typ")))
    bibliography = (REPORT / "bibliography.yml").read_text()
    entries = set(re.findall(r"^([a-z]+\d{4}[a-z]*):", bibliography, flags=re.MULTILINE))
    assert entries == set(re.findall(r"@([a-z]+\d{4}[a-z]*)", text))


def test_no_semicolon_is_swallowed_after_a_call() -> None:
    for file in sorted((REPORT / "chapters").glob("*.typ")):
        calls = re.findall(r"#[\w-]+\((?:[^()]|\([^()]*\))*\);", file.read_text())
        assert calls == [], f"{file.name}: Typst ends a call with ';' and does not print it"
