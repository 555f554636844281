"""A trained model as a Hugging Face folder: weights, tokenizer, template, card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import GenerationConfig

from dpo.data.prompts import PromptTemplate, save_template
from dpo.models.adapters import has_adapter, save_adapter

CARD_LIBRARY = "direct-preference-optimization"


def save_pretrained(
    model: nn.Module,
    tokenizer: Any,
    template: PromptTemplate,
    folder: Path,
    *,
    card: str,
    stop_ids: list[int],
) -> None:
    """Write what the transformers loaders and pipelines read, and the run's template.

    Weights are safetensors; of a model with an adapter the adapter alone, in peft's format. The
    generation config stops at the run's end tokens and samples from the whole distribution (left
    out, transformers would keep the 50 likeliest tokens only).
    """
    generation = GenerationConfig(
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        eos_token_id=stop_ids,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=stop_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )
    if has_adapter(model):
        save_adapter(model, folder)
        generation.save_pretrained(folder)
    else:
        own = model.generation_config
        model.generation_config = generation  # type: ignore[assignment]
        try:
            model.save_pretrained(folder)  # type: ignore[operator]
        finally:
            model.generation_config = own
    tokenizer.save_pretrained(folder)
    save_template(template, folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


GENERATION = """```python
from transformers import pipeline

generate = pipeline("text-generation", model="path/to/this/folder")
```"""


def model_card(
    *,
    title: str,
    base: str,
    data: str,
    template: PromptTemplate,
    method: str,
    settings: str,
    task: str = "text-generation",
    usage: str = GENERATION,
) -> str:
    """The folder's README: what it is, what it was made from, how to use it."""
    prompt = "{prompt}" if template.text is None else template.text
    how = (
        "Prompts go through the tokenizer's chat template."
        if template.text is None
        else f"Prompts are written as:\n\n```text\n{prompt}\n```"
    )
    return f"""---
library_name: transformers
pipeline_tag: {task}
tags: [{CARD_LIBRARY}]
---

# {title}

{method}

| | |
| --- | --- |
| started from | `{base}` |
| data | `{data}` |

{how}

{usage}

## Settings

```json
{settings}
```
"""
