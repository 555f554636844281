"""The run's template: names, texts, chat, and its copy beside the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo.data.prompts import (
    TEMPLATE_FILE,
    TEMPLATES,
    PromptTemplate,
    as_messages,
    as_text,
    default_template,
    load_template,
    render_chat,
    render_text,
    resolve_template,
    save_template,
)
from dpo.data.rows import Message
from dpo.errors import InputError

CONVERSATION = (Message("system", "Be brief."), Message("user", "Why?"))


class Tokenizer:
    """The part of a tokenizer that renders chats."""

    def __init__(self, chat_template: str | None) -> None:
        self.chat_template = chat_template

    def apply_chat_template(self, turns: list[dict[str, str]], **options: object) -> str:
        if self.chat_template == "refuse":
            raise ValueError("Conversation roles must alternate")
        assert options["tokenize"] is False
        mark = "|go" if options["add_generation_prompt"] else ""
        return "|".join(f"{t['role']}={t['content']}" for t in turns) + mark


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_named_template_holds_the_prompt_once_and_resolves(name: str) -> None:
    assert TEMPLATES[name].count("{prompt}") == 1
    template = resolve_template(name)
    assert (template.name, template.text) == (name, TEMPLATES[name])
    assert str(template) == name


def test_the_course_template_is_alpacas() -> None:
    assert render_text(resolve_template("alpaca"), "Say hi.") == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nSay hi.\n\n### Response:\n"
    )


def test_a_text_with_the_prompt_in_it_is_a_template_of_its_own() -> None:
    template = resolve_template("Q: {prompt} {braces} A:")
    assert render_text(template, "x") == "Q: x {braces} A:"
    assert str(template) == "'Q: {prompt} {braces} A:'"


@given(st.text())
def test_whatever_the_prompt_spells_is_left_alone(prompt: str) -> None:
    text = "<{prompt}>"
    assert render_text(resolve_template(text), prompt) == f"<{prompt}>"


def test_a_prompt_that_spells_the_placeholder_is_left_alone() -> None:
    assert render_text(resolve_template("hh"), "{prompt}") == "\n\nHuman: {prompt}\n\nAssistant:"


@pytest.mark.parametrize(
    "asked", ["", "alpacca", "no placeholder", "{prompt} {prompt}", "{Prompt}"]
)
def test_anything_else_is_refused_with_what_there_is(asked: str) -> None:
    with pytest.raises(InputError) as error:
        resolve_template(asked)
    end = "; did you mean alpaca?" if asked == "alpacca" else "."
    assert str(error.value) == (
        f"data.template: {asked!r} is neither one of plain, alpaca, hh, question, chat "
        f"nor a text with {{prompt}} in it exactly once{end}"
    )


def test_the_default_follows_the_data() -> None:
    assert default_template("instruction", conversational=False).name == "alpaca"
    assert default_template("prompt, chosen", conversational=False).name == "plain"
    assert default_template("instruction", conversational=True) == PromptTemplate("chat", None)


def test_a_text_is_one_user_message_and_a_conversation_is_itself() -> None:
    assert as_messages("Why?") == (Message("user", "Why?"),)
    assert as_messages(CONVERSATION) is CONVERSATION
    assert as_text("Why?") == "Why?"
    assert as_text(CONVERSATION) == "system: Be brief.\nuser: Why?"


def test_a_chat_is_rendered_with_roles_in_order() -> None:
    tokenizer = Tokenizer("some template")
    assert render_chat(tokenizer, CONVERSATION) == "system=Be brief.|user=Why?|go"
    whole = render_chat(tokenizer, CONVERSATION, add_generation_prompt=False)
    assert whole == "system=Be brief.|user=Why?"


@pytest.mark.parametrize("missing", [None, ""])
def test_a_missing_chat_template_is_said(missing: str | None) -> None:
    with pytest.raises(InputError) as error:
        render_chat(Tokenizer(missing), CONVERSATION)
    assert str(error.value) == (
        "Conversations and data.template=chat go through a chat template but the tokenizer has no "
        "chat template: name a model that has one, or use text prompts and a text template."
    )


def test_a_refusing_chat_template_is_quoted() -> None:
    with pytest.raises(InputError) as error:
        render_chat(Tokenizer("refuse"), CONVERSATION)
    assert str(error.value) == (
        "The tokenizer's chat template refuses a conversation: Conversation roles must alternate"
    )


@pytest.mark.parametrize("asked", [*TEMPLATES, "chat", 'Süß: {prompt}\r\n{"a": 1} \\ '])
def test_the_template_comes_back_as_it_was_saved(asked: str, tmp_path: Path) -> None:
    template = resolve_template(asked)
    save_template(template, tmp_path)
    assert load_template(tmp_path) == template


def test_a_folder_without_one_says_nothing(tmp_path: Path) -> None:
    assert load_template(tmp_path) is None
    assert load_template(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b'{"name": "hh"}',
        b'{"name": 1, "text": "{prompt}"}',
        b'{"name": "hh", "text": "no placeholder"}',
        b'{"name": "hh", "text": "{prompt}{prompt}"}',
        b'{"name": "hh", "text": 3}',
        b'{"name": "hh", "text": null}',
        b'{"name": "chat", "text": "{prompt}"}',
        b'{"name": "hh", "text": "\xff{prompt}"}',
    ],
)
def test_a_damaged_copy_is_refused_and_never_replaced_by_a_default(
    damaged: bytes, tmp_path: Path
) -> None:
    (tmp_path / TEMPLATE_FILE).write_bytes(damaged)
    with pytest.raises(InputError) as error:
        load_template(tmp_path)
    assert str(error.value) == (
        f"{tmp_path / TEMPLATE_FILE}: expected a prompt template written by dpo; it is damaged."
    )
