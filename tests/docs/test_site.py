"""What the documentation site makes from the code: commands, configuration, navigation, links."""

from __future__ import annotations

import doctest
import importlib
import re
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
HOOKS = ROOT / "docs" / "hooks"


@pytest.fixture(autouse=True, scope="module")
def hooks():
    """The modules of docs/hooks can be imported, as mkdocs imports them."""
    pytest.importorskip("mkdocs")
    sys.path.insert(0, str(HOOKS))
    yield
    sys.path.remove(str(HOOKS))


@pytest.mark.parametrize("name", sorted(file.stem for file in HOOKS.glob("*.py")))
def test_examples_of_the_hooks_are_right(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_every_command_that_takes_settings_has_them_on_a_page():
    from commands import commands
    from configuration import SCHEMAS

    takers = [name for name, c in commands() if any(p.name == "settings" for p in c.params)]
    assert {name.removeprefix("dpo ") for name in takers} == SCHEMAS.keys()


def test_every_key_has_a_meaning():
    from configuration import SCHEMAS, sections

    for command, schema in SCHEMAS.items():
        for _, _, keys in sections(schema):
            missing = [k.name for k in keys if not k.meaning and k.name != "loss.name"]
            assert not missing, command


def test_the_reference_has_the_keys_and_defaults_of_the_configuration():
    from configuration import page

    from dpo.config import SFTConfig
    from dpo.config_files import known_keys, read_config

    shown = dict(
        re.findall(r"^\| `([\w.]+)` \| [^|]+ \| `?([^|`]+)`? \|", page("sft"), re.MULTILINE)
    )
    assert shown.keys() == set(known_keys(SFTConfig))
    config = read_config(SFTConfig, None, ["model=gpt2", "out=runs/sft"])
    assert shown["optimizer.learning_rate"] == str(config.optimizer.learning_rate)
    assert shown["epochs"] == str(config.epochs)
    assert shown["out"] == "required"


def test_a_section_is_shown_with_the_defaults_that_it_has_where_it_stands():
    from configuration import page

    text = page("experiment exact")
    assert "| `reference.steps` | whole number, ≥ 1 | `300` |" in text
    assert "| `reward_model.steps` | whole number, ≥ 1 | `1000` |" in text


def test_a_command_is_explained_as_its_help_explains_it():
    from commands import pages

    text = pages()["commands/train.md"]
    assert "**Examples**\n\n- `dpo train model=runs/sft data=prefs.jsonl" in text
    assert "`--trust-remote-code`" in text
    assert "../configuration/train.md" in text
    assert not re.search(r"\[/?(bold|cyan)\]", "".join(pages().values()))


def test_a_new_page_is_in_the_navigation_though_nobody_names_it():
    from events import expanded

    text = re.sub(r"!!python\S*", "", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    nav = yaml.safe_load(text)["nav"]
    new = ["brand-new.md", "losses/new.md", "losses/README.md", "somewhere/else.md", "api/new/x.md"]
    sections = {title: entries for part in expanded(nav, new) for title, entries in part.items()}
    assert sections["How to"][-2:] == ["brand-new.md", "somewhere/else.md"]
    assert sections["Losses"] == ["losses/README.md", "losses/new.md"]
    assert {"API": ["api/index.md", {"new": ["api/new/x.md"]}]} in sections["Reference"]


def test_links_to_code_lead_to_its_reference_and_other_files_are_shown():
    from repository import rewritten

    text = (
        "[`wilson_interval`](../src/dpo/core/stats.py), "
        "[it](../studies/exact.yaml), [b](losses/dpo.md)"
    )
    assert rewritten(text, "evaluation.md") == (
        "[`wilson_interval`](api/core/stats.md#dpo.core.stats.wilson_interval), "
        "[it](repository/studies/exact.yaml.md), [b](losses/dpo.md)"
    )
    assert rewritten("[r](../studies/)", "evaluation.md") == "[r](repository/studies/index.md)"
    fenced = "```text\n[it](../studies/exact.yaml)\n```\n"
    assert rewritten(fenced, "evaluation.md") == fenced


def test_a_copied_page_of_the_repository_leads_back_into_the_documentation():
    from repository import rewritten

    page = "repository/studies/results/README.md"
    assert rewritten("[f](../../docs/faq.md)", page) == "[f](../../../faq.md)"
    assert rewritten("[r](exact/README.md)", page) == "[r](exact/README.md)"
