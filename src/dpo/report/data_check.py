"""`dpo data check`: what is in the data, before anything is trained on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from dpo.data.audit import Audit, audit, preview, render
from dpo.data.prompts import default_template, load_template, resolve_template
from dpo.data.sources import LoadedRows, load_rows
from dpo.data.tokenize import Encoder

WHOLE = 2**30
"""A length at which nothing is cut."""


@dataclass(frozen=True, slots=True)
class Check:
    """Valid rows and what was counted; `encoder` is None where no tokenizer was named."""

    loaded: LoadedRows
    audit: Audit
    encoder: Encoder | None

    def as_result(self) -> dict[str, Any]:
        """The counts by name, ready for JSON."""
        return {
            "kind": self.loaded.kind,
            "shape": self.loaded.shape,
            "sha256": self.loaded.sha256,
            "ignored_columns": self.loaded.ignored_columns,
            "template": None if self.encoder is None else str(self.encoder.template),
            **asdict(self.audit),
        }


def check_data(
    files: Sequence[str],
    *,
    tokenizer: str | None,
    template: str | None,
    max_length: int,
    test: str | None,
    split: str | None,
    columns: Mapping[str, str],
) -> Check:
    """Validate and count the rows; with a tokenizer, in tokens too.

    Raises:
        InputError: the data cannot be used, with the first problems; or there is no such tokenizer.
    """
    loaded = load_rows(list(files), columns=columns, split=split)
    test_rows = None if test is None else load_rows(test, columns=columns).rows
    if tokenizer is None:
        return Check(loaded, audit(loaded.rows, test_rows=test_rows), None)
    encoder = _encoder(tokenizer, template, loaded, max_length)
    found = audit(
        loaded.rows,
        encode=replace(encoder, max_length=WHOLE).encode,
        merges=encoder.merges_across_boundary,
        test_rows=test_rows,
        max_length=max_length,
    )
    return Check(loaded, found, encoder)


def print_check(check: Check, *, num_shown: int) -> None:
    """Print counts, lengths and a few rows as they will be tokenised."""
    console = Console()
    console.print(Text(str(check.loaded)))
    encoder = check.encoder
    if encoder is None:
        console.print(render(check.audit))
        console.print("Name a --tokenizer to count tokens and to see rows as they are tokenised.")
        return
    console.print(Text(f"Template: {encoder.template}"))
    console.print(render(check.audit))
    if num_shown:
        shown = preview(
            check.loaded.rows,
            num_shown,
            encode=encoder.encode,
            token_text=lambda token: str(encoder.tokenizer.decode([token])),
        )
        console.print(shown)


def _encoder(name: str, template: str | None, loaded: LoadedRows, max_length: int) -> Encoder:
    from dpo.models.load import find_tokenizer, load_tokenizer

    source = find_tokenizer(name)
    own = load_template(Path(source.path)) if source.local else None
    if template is not None:
        chosen = resolve_template(template)
    else:
        conversational = not isinstance(loaded.rows[0].prompt, str)
        chosen = own or default_template(loaded.shape, conversational=conversational)
    return Encoder(load_tokenizer(source), chosen, max_length)
