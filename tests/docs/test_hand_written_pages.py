"""What the pages of the documentation name exists: keys, losses, commands."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import typer.main

from dpo.cli import app
from dpo.config import PreferenceConfig, RewardConfig, SFTConfig
from dpo.config_files import known_keys
from dpo.evaluation_config import EvaluateConfig
from dpo.loss_config import LOSS_CONFIGS, OPTION_KEYS
from dpo.online_config import OnlineConfig, PPOConfig
from dpo.report.page import verdict

DOCS = Path(__file__).parents[2] / "docs"
PAGES = [DOCS / name for name in ("index.md", "method.md", "faq.md")]
PAGES += sorted((DOCS / "tutorials").glob("*.md"))
SCHEMAS = (SFTConfig, PreferenceConfig, RewardConfig, EvaluateConfig, OnlineConfig, PPOConfig)
KEYS = {key for schema in SCHEMAS for key in known_keys(schema)} | {*OPTION_KEYS, "loss.mix"}
DOTTED = re.compile(
    r"\b(?:loss|optimizer|batch|data|evaluation|adapter|kl|sampling|distributed)\.\w+"
)
FILES = re.compile(r"\.(?:csv|jsonl|json|yaml|md|py)\b")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))


def code(page: Path) -> list[str]:
    """What stands in backticks in the running text, and the lines of shell blocks."""
    text = page.read_text(encoding="utf-8")
    shell = [
        line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in [block]
    ]
    return shell + re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def test_the_pages_name_something():
    assert len([key for page in PAGES for text in code(page) for key in DOTTED.findall(text)]) > 60


@each_page
def test_keys_that_a_page_names_exist(page):
    named = {key for text in code(page) if not FILES.search(text) for key in DOTTED.findall(text)}
    assert named - {"data.columns"} - {k for k in named if k.startswith("data.columns.")} <= KEYS
    plain = {m for text in code(page) for m in re.findall(r"^([a-z_]+)=[\w.]+$", text)}
    assert plain <= {key.split(".")[0] for key in KEYS}


@each_page
def test_losses_that_a_page_names_exist(page):
    named = {name for text in code(page) for name in re.findall(r"loss\.name=(\w+)", text)}
    assert named <= LOSS_CONFIGS.keys()


@each_page
def test_commands_that_a_page_names_exist(page):
    known = typer.main.get_command(app).commands
    for text in code(page):
        for word, inner in re.findall(r"^dpo ([a-z]+)(?: ([a-z]+)\b)?", text, re.MULTILINE):
            assert word in known, text
            assert not inner or inner in getattr(known[word], "commands", [inner]), text


def test_verdicts_that_a_tutorial_explains_are_those_of_the_page():
    source = inspect.getsource(verdict)
    sentences = re.sub(r'"\s*\n\s*f?"', "", source)
    page = (DOCS / "tutorials" / "report-page.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| (?:\.\.\. )?\*([^*]+)\*", page, flags=re.MULTILINE)
    assert len(quoted) == 4
    for text in quoted:
        assert re.split(r" \d", text)[0] in sentences, text


def test_betas_that_the_faq_compares_are_the_defaults():
    assert LOSS_CONFIGS["simpo"]().beta == 2
    assert LOSS_CONFIGS["length_normalised_dpo"]().beta == 5
    assert LOSS_CONFIGS["dpo"]().beta == 0.1


def test_losses_that_the_faq_calls_free_of_a_reference_are():
    from dpo.loss_config import takes_reference

    assert not any(takes_reference(LOSS_CONFIGS[name]()) for name in ("simpo", "orpo", "cpo"))
