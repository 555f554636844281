"""Build report.pdf from the Typst sources, with the numbers that `dpo theory` measured.

Usage: python report/build.py [--png DIRECTORY]

The chapters are the files in report/chapters, in the order of their names: to add a chapter, add a
file. The build stops when the theory results are missing, failed, or older than the code, and
when a study that the report prints is missing or was recorded with settings other than its file's.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import typst

from dpo.config import Section
from dpo.config_files import flat, read_config
from dpo.errors import DPOError, InputError
from dpo.experiment.exact_config import ExactStudyConfig
from dpo.experiment.frontier_config import FrontierConfig
from dpo.experiment.sentiment_config import SentimentConfig
from dpo.experiment.study_config import StudyConfig
from dpo.theory import checks, source_hash

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "theory.json"
STUDIES_FOLDER = HERE.parent / "studies"
REMEDY = "run: dpo theory --json report/results/theory.json"


def require_results() -> None:
    """Refuse to print numbers that do not belong to this code."""
    if not RESULTS.exists():
        raise InputError(f"report/results/theory.json is missing; {REMEDY}")
    try:
        stored = json.loads(RESULTS.read_text(encoding="utf-8"))
        found, digest = stored["checks"], stored["source_sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"report/results/theory.json is damaged; {REMEDY}") from error
    if digest != source_hash():
        raise InputError(f"report/results/theory.json is older than the theory code; {REMEDY}")
    missing = [item.id for item in checks() if item.id not in found]
    if missing:
        raise InputError(f"report/results/theory.json lacks {', '.join(missing)}; {REMEDY}")
    failed = [name for name, result in found.items() if not result["passed"]]
    if failed:
        raise InputError(f"these statements failed their checks: {', '.join(failed)}")


STUDIES: dict[str, type[Section]] = {
    "exact": ExactStudyConfig,
    "frontier": FrontierConfig,
    "sentiment-small": SentimentConfig,
    "instruction-small": StudyConfig,
    "hh-small": StudyConfig,
}
"""Studies that the report prints, each with the schema of its file."""

FREE = ("out", "processes", "data.path")
"""Settings that decide no number. More seeds than the file's may have been recorded, too."""


def require_studies() -> None:
    """Refuse to print a study that was recorded with other settings than its file has."""
    for name, schema in STUDIES.items():
        remedy = f"run: python studies/record.py {name} (make report-experiments records them all)"
        folder = STUDIES_FOLDER / "results" / name
        for file in ("study.json", "tables.json"):
            if not (folder / file).exists():
                raise InputError(f"studies/results/{name}/{file} is missing; {remedy}")
        text = (folder / "study.json").read_text(encoding="utf-8")
        recorded = dict(flat(json.loads(text)["config"]))
        config = read_config(schema, STUDIES_FOLDER / f"{name}.yaml").model_dump(mode="json")
        for key, value in flat(config):
            found = recorded.get(key)
            same = set(value) <= set(found or ()) if key == "seeds" else found == value
            if not same and key not in FREE:
                raise InputError(
                    f"studies/results/{name}: recorded with {key}={found}, but "
                    f"studies/{name}.yaml has {value}; {remedy}"
                )


def build(png: Path | None = None) -> Path:
    """Compile the report; with `png`, also write every page as a picture there."""
    require_results()
    require_studies()
    chapters = sorted(file.name for file in (HERE / "chapters").glob("*.typ"))
    inputs = {"chapters": ",".join(chapters)}
    fonts = typst.Fonts(include_system_fonts=False)
    compiler = typst.Compiler(
        str(HERE / "main.typ"), root=str(HERE.parent), font_paths=fonts, sys_inputs=inputs
    )
    output = HERE / "report.pdf"
    try:
        compiler.compile(output=str(output), format="pdf")
        if png is not None:
            png.mkdir(parents=True, exist_ok=True)
            compiler.compile(output=str(png / "page-{0p}.png"), format="png", ppi=80)
    except typst.TypstError as error:
        raise InputError(f"the report does not compile: {error}") from error
    return output


def main() -> int:
    """Build; on failure say why in one sentence."""
    parser = argparse.ArgumentParser(description="Build report/report.pdf.")
    parser.add_argument("--png", type=Path, help="also write the pages as pictures here")
    try:
        output = build(parser.parse_args().png)
    except DPOError as error:
        print(f"report: {error}", file=sys.stderr)
        return error.exit_code
    print(f"wrote {output.parent.name}/{output.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
