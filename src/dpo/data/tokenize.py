"""From a prompt and its responses to token ids, with the boundary between what is given and what
is scored.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dpo.data.prompts import PromptTemplate, as_messages, as_text, render_chat, render_text
from dpo.data.rows import Message, Prompt
from dpo.errors import InputError


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """A prompt and one response: `ids[prompt_length:]` are scored, the end-of-sequence token
    included.
    """

    ids: tuple[int, ...]
    prompt_length: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_scored(self) -> int:
        return len(self.ids) - self.prompt_length


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """The sequences of one prompt's responses, and what was cut to make them fit."""

    sequences: tuple[TokenSequence, ...]
    prompt_truncated: bool
    responses_truncated: int


# The sentinel that stands for the content of message i while a chat template is rendered.
_SENTINEL = "\x00{}\x00"
_SENTINEL_PATTERN = re.compile("\x00(\\d+)\x00")


@dataclass(frozen=True)
class Encoder:
    """Tokenises rows for one model with one template.

    What it promises, whatever the tokenizer adds by itself:

    - The prompt and the response are tokenised apart and then joined, so the boundary is where
      generation starts too: no prompt token is scored, and none is lost to a merge across it.
    - Exactly one beginning-of-sequence token where the tokenizer or the template uses one, also
      where a prompt's beginning is cut; and a prompt is never empty.
    - Exactly one end-of-sequence (or end-of-turn) token after a response, scored; none after a cut
      one.
    - Text in the user's data that spells a special token is plain text.
    - All responses to a prompt see the same prompt tokens, and each keeps at least one scored
      token.
    """

    tokenizer: Any
    template: PromptTemplate
    max_length: int

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise InputError(
                "The tokenizer has no end-of-sequence token; without one a response has no end. "
                "Set eos_token in its tokenizer_config.json."
            )
        if self.max_length < 2:
            raise InputError(f"data.max_length: expected at least 2 tokens, got {self.max_length}.")

    # -- pieces ---------------------------------------------------------------------------------

    @cached_property
    def bos_ids(self) -> list[int]:
        """What the tokenizer puts before a text by itself: usually one BOS token, or nothing."""
        bare = self.tokenizer("a", add_special_tokens=False).input_ids
        full = self.tokenizer("a").input_ids
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return list(full[:start])
        return []

    @cached_property
    def _special_texts(self) -> tuple[str, ...]:
        added = self.tokenizer.added_tokens_decoder.values()
        return tuple({str(t) for t in added if t.special} | set(self.tokenizer.all_special_tokens))

    def _has_special_text(self, text: str) -> bool:
        return any(special in text for special in self._special_texts)

    def _ids(self, text: str, *, special: bool) -> list[int]:
        """Ids of a text; `special` says whether special-token text in it stands for the token."""
        return list(
            self.tokenizer(
                text, add_special_tokens=False, split_special_tokens=not special, verbose=False
            ).input_ids
        )

    @cached_property
    def _turn(self) -> tuple[list[int], list[int]]:
        """What the template writes before and after a response: (ids before it, ids that end
        it).
        """
        eos = [int(self.tokenizer.eos_token_id)]
        if self.template.text is not None:
            return [], eos
        question, mark = Message("user", "q"), _SENTINEL.format(0)
        prompt = render_chat(self.tokenizer, [question])
        whole = render_chat(
            self.tokenizer, [question, Message("assistant", mark)], add_generation_prompt=False
        )
        if not whole.startswith(prompt) or whole.count(mark) != 1:
            return [], eos
        before, after = whole[len(prompt) :].split(mark)
        ending = self._ids(after.rstrip(), special=True)
        if not ending or ending[-1] not in {*eos, *self.tokenizer.added_tokens_decoder}:
            ending = eos
        return self._ids(before, special=True), ending

    @cached_property
    def stop_ids(self) -> list[int]:
        """The tokens that end a response in generation."""
        return sorted({int(self.tokenizer.eos_token_id), self._turn[1][-1]})

    # -- prompts and responses ------------------------------------------------------------------

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The whole prompt, never cut, never empty.

        Raises:
            InputError: a conversation under a text template, or one that the chat template refuses.
        """
        ids = self._chat_ids(prompt) if self.template.text is None else self._text_ids(prompt)
        if ids[: len(self.bos_ids)] != self.bos_ids:
            ids = self.bos_ids + ids
        if not ids:
            bos = self.tokenizer.bos_token_id
            ids = [int(self.tokenizer.eos_token_id if bos is None else bos)]
        return ids

    def _text_ids(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            raise InputError(
                f"data.template: {self.template} is a text template but a prompt is a "
                "conversation; leave data.template out, or set it to 'chat'."
            )
        if not self._has_special_text(prompt):
            return self._ids(render_text(self.template, prompt), special=True)
        assert self.template.text is not None
        before, after = self.template.text.split("{prompt}")
        return (
            self._ids(before, special=True)
            + self._ids(prompt, special=False)
            + self._ids(after, special=True)
        )

    def _chat_ids(self, prompt: Prompt) -> list[int]:
        messages = as_messages(prompt)
        if not any(self._has_special_text(m.content) for m in messages):
            return self._ids(render_chat(self.tokenizer, messages), special=True)
        marked = [Message(m.role, _SENTINEL.format(i)) for i, m in enumerate(messages)]
        pieces = _SENTINEL_PATTERN.split(render_chat(self.tokenizer, marked))
        ids: list[int] = []
        for position, piece in enumerate(pieces):  # template text and message numbers alternate
            if position % 2 == 0:
                ids += self._ids(piece, special=True)
            else:
                ids += self._ids(messages[int(piece)].content, special=False)
        return ids

    def response_ids(self, response: str) -> list[int]:
        """The whole response with the token that ends it."""
        before, ending = self._turn
        return before + self._ids(response, special=False) + ending

    def encode(self, prompt: Prompt, responses: Sequence[str]) -> EncodedRow:
        """Each response after the prompt, cut to `max_length` tokens.

        A prompt that does not fit beside its longest response loses its *beginning*, down to half
        of `max_length`; a response that still does not fit loses its end and, with it, the end
        token.
        """
        prompt_ids = self.prompt_ids(prompt)
        bodies = [self.response_ids(response) for response in responses]
        room = max(self.max_length - max(len(body) for body in bodies), self.max_length // 2)
        kept_prompt = self._keep_end(prompt_ids, room)
        room_for_response = self.max_length - len(kept_prompt)
        sequences = tuple(
            TokenSequence(tuple(kept_prompt + body[:room_for_response]), len(kept_prompt))
            for body in bodies
        )
        return EncodedRow(
            sequences,
            prompt_truncated=len(kept_prompt) < len(prompt_ids),
            responses_truncated=sum(len(body) > room_for_response for body in bodies),
        )

    def encode_prompt(
        self, prompt: Prompt, *, max_new_tokens: int, max_positions: int
    ) -> list[int]:
        """The prompt's ids for generation; its beginning is cut where the model has no room for
        both.

        Raises:
            InputError: the model has no room for `max_new_tokens` and one prompt token.
        """
        room = max_positions - max_new_tokens
        if room < 1:
            raise InputError(
                f"max_new_tokens: {max_new_tokens} leaves no room for a prompt in the model's "
                f"{max_positions} positions; use at most {max_positions - 1}."
            )
        return self._keep_end(self.prompt_ids(prompt), room)

    def _keep_end(self, prompt_ids: list[int], room: int) -> list[int]:
        """The last `room` ids of a prompt, its beginning-of-sequence token first where it has
        one: models that are trained with it go astray without.
        """
        if len(prompt_ids) <= room:
            return prompt_ids
        has_bos = prompt_ids[0] == self.tokenizer.bos_token_id and room > 1
        kept = prompt_ids[:1] if has_bos else []
        return kept + prompt_ids[len(kept) - room :]

    def merges_across_boundary(self, prompt: Prompt, response: str) -> bool:
        """Whether tokenising prompt and response as one text would join characters of both into a
        token.
        """
        if self.template.text is None:
            return False
        text = render_text(self.template, as_text(prompt))
        joined = self._ids(text + response, special=False)
        return joined != self._ids(text, special=False) + self._ids(response, special=False)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated ids, special tokens left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
