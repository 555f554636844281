"""Which page a folder has."""

from __future__ import annotations

from dpo.report.page.blocks import Page
from dpo.report.page.evaluation_page import evaluation_page
from dpo.report.page.folders import EvaluationFolder, Gathered, RunFolder
from dpo.report.page.run_page import run_page
from dpo.report.page.study_page import study_page


def page_of(found: Gathered) -> Page:
    """The page of whatever the folder is."""
    if isinstance(found, RunFolder):
        return run_page(found)
    if isinstance(found, EvaluationFolder):
        return evaluation_page(found)
    return study_page(found)
