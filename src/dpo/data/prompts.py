"""The one template of a run: training, generation and evaluation all write their prompts with
it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from dpo.data.rows import Message, Prompt
from dpo.errors import InputError, did_you_mean

TEMPLATES = {
    "plain": "{prompt}",
    "alpaca": (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{prompt}\n\n### Response:\n"
    ),
    "hh": "\n\nHuman: {prompt}\n\nAssistant:",
    "question": "Question: {prompt}\nAnswer:\n",
}
"""Named text templates; `{prompt}` stands for the prompt, and the response follows directly."""

CHAT = "chat"
"""The name of the tokenizer's own chat template."""

TEMPLATE_FILE = "prompt_template.json"
"""Saved beside a model's weights, so that evaluation prompts it as training did."""


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """How a prompt becomes the text that a response follows; `text` is None for the chat
    template.
    """

    name: str
    text: str | None

    def __str__(self) -> str:
        return self.name if self.text is None or self.name in TEMPLATES else repr(self.text)


def resolve_template(template: str) -> PromptTemplate:
    """The template of that name, or the text itself where it holds `{prompt}` exactly once.

    Raises:
        InputError: neither a name nor a text with `{prompt}`.
    """
    if template == CHAT:
        return PromptTemplate(CHAT, None)
    if template in TEMPLATES:
        return PromptTemplate(template, TEMPLATES[template])
    if template.count("{prompt}") == 1:
        return PromptTemplate("custom", template)
    names = [*TEMPLATES, CHAT]
    raise InputError(
        f"data.template: {template!r} is neither one of {', '.join(names)} "
        "nor a text with {prompt} in it exactly once" + (did_you_mean(template, names) or ".")
    )


def default_template(shape: str, *, conversational: bool) -> PromptTemplate:
    """Chat for conversations, alpaca for instruction rows, otherwise the prompt as it stands."""
    if conversational:
        return resolve_template(CHAT)
    return resolve_template("alpaca" if "instruction" in shape else "plain")


def render_text(template: PromptTemplate, prompt: str) -> str:
    """The text that the response follows. Braces inside the prompt are left alone.

    >>> render_text(resolve_template("question"), "Why {so}?")
    'Question: Why {so}?\\nAnswer:\\n'
    """
    assert template.text is not None
    return template.text.replace("{prompt}", prompt)


def as_messages(prompt: Prompt) -> tuple[Message, ...]:
    """A conversation as it stands; a text as the user's one message."""
    return (Message("user", prompt),) if isinstance(prompt, str) else prompt


def as_text(prompt: Prompt) -> str:
    """A prompt for people to read: text as it stands, a conversation one turn a line."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message.role}: {message.content}" for message in prompt)


def render_chat(
    tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool = True
) -> str:
    """The conversation through the tokenizer's chat template, as text.

    Raises:
        InputError: the tokenizer has no chat template, or the template refuses the conversation.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "Conversations and data.template=chat go through a chat template but the tokenizer has "
            "no chat template: name a model that has one, or use text prompts and a text template."
        )
    turns = [{"role": m.role, "content": m.content} for m in messages]
    try:
        return cast(
            str,
            tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=add_generation_prompt
            ),
        )
    except Exception as error:  # jinja raises its own types, and templates raise what they like
        raise InputError(
            f"The tokenizer's chat template refuses a conversation: {error}"
        ) from error


def save_template(template: PromptTemplate, folder: Path) -> None:
    """Write the template beside the model's weights."""
    text = json.dumps({"name": template.name, "text": template.text}, indent=2)
    (folder / TEMPLATE_FILE).write_text(text + "\n", encoding="utf-8")


def load_template(folder: Path) -> PromptTemplate | None:
    """The template that a model was trained with, or None where its folder does not say."""
    file = folder / TEMPLATE_FILE
    if not file.is_file():
        return None
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        name, text = fields["name"], fields["text"]
        sound = text is None if name == CHAT else text.count("{prompt}") == 1
        if not sound or not isinstance(name, str):
            raise ValueError("neither chat nor a text with {prompt} in it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{file}: expected a prompt template written by dpo; it is damaged."
        ) from error
    return PromptTemplate(name, text)
