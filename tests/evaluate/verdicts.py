"""Scored responses with the verdicts that a test asks for."""

from dataclasses import replace

import numpy as np

from dpo.evaluate.records import Generation
from dpo.evaluate.winrate import score_generations

CHOSEN, REJECTED = "w", "l"
TEXTS = {"win": "w", "loss": "l", "tie": "wl"}


def embed(texts):
    """Two axes: how many w and how many l. "w" is the chosen response, "l" the rejected one."""
    return np.array([[text.count("w"), text.count("l")] for text in texts], np.float32)


def generation(model, prompt_index, verdict, *, sample=0, temperature=0.7, **changes):
    made = Generation(
        model=model,
        temperature=temperature,
        prompt_index=prompt_index,
        sample=sample,
        prompt=f"prompt {prompt_index}",
        chosen=CHOSEN,
        rejected=REJECTED,
        generated=TEXTS[verdict],
        num_tokens=4,
        truncated=False,
    )
    return replace(made, **changes)


def scored(model, verdicts, **changes):
    records = [generation(model, i, verdict, **changes) for i, verdict in enumerate(verdicts)]
    return score_generations(records, embed)


A = ["win", "win", "win", "loss", "win", "tie", "win", "win"]
B = ["win", "loss", "loss", "win", "loss", "win", "tie", "loss"]
