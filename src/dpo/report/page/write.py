"""`index.html` of a folder: written at the end of a command, and again by `dpo report`."""

from __future__ import annotations

import logging
from pathlib import Path

import yaml
from pydantic import BaseModel

from dpo.atomic import write_text
from dpo.errors import reason_of
from dpo.report.page.folders import STUDY_FILE, Gathered, RunFolder, StudyFolder, gather
from dpo.report.page.images import draw_evaluation, draw_run
from dpo.report.page.layout import page_of
from dpo.report.page.render import render

PAGE = "index.html"

log = logging.getLogger("dpo")


def write_page(folder: Path) -> Path:
    """Write the page of a run, an evaluation or a study from its files, and those of the runs in
    it; returns the file.

    Raises:
        InputError: the folder holds none of them.
        StorageError: the page cannot be written.
    """
    found = gather(folder)
    file = _write(found)
    if isinstance(found, StudyFolder):
        for run in found.runs:
            _write(run)
    return file


def _write(found: Gathered) -> Path:
    if isinstance(found, RunFolder):
        draw_run(found)
    elif not isinstance(found, StudyFolder):
        draw_evaluation(found)
    file = found.folder / PAGE
    html = render(page_of(found))
    if not file.is_file() or file.read_bytes() != html.encode():  # the same again is no new file
        write_text(file, html)
    return file


def leave_page(folder: Path, study: BaseModel | None = None) -> None:
    """Write the page of what is finished; where that fails, say so in one line and go on: the
    result is there, and `dpo report` can write its page later.

    Args:
        study: the configuration of a study, which is left in `study.yaml` as it was given, to be
            run again. (Its full form is in study.json; but there a setting that has no effect
            stands beside those that were given, and would be refused.)
    """
    try:
        if study is not None:
            given = study.model_dump(mode="json", exclude_unset=True)
            write_text(folder / STUDY_FILE, yaml.safe_dump(given, sort_keys=False))
        log.info("Page: %s", write_page(folder))
    except Exception as error:
        log.warning("%s: the page could not be written (%s).", folder / PAGE, reason_of(error))
