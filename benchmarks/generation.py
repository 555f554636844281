"""Generation: our sampler, and `model.generate` of transformers as it is commonly called."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from scenario import WARMUP_STEPS, Scenario
from stepwise import Pause
from torch import Tensor, nn
from workload import Workload, make_stop_ids

from dpo.models.generate import generate

SETTINGS = {
    "ours": "dpo.models.generate.generate, batch_size={generation_batch}",
    "transformers": "model.generate on batches of {generation_batch} sequences in the data's "
    "order, padded on the left, num_return_sequences={samples}; bf16: weights in bfloat16",
}


def prompts_of(scenario: Scenario, workload: Workload, number: int) -> list[list[int]]:
    """The prompts of one round: those of one training batch."""
    room = scenario.positions - scenario.max_new_tokens
    return [
        list(pair.chosen.ids[: pair.chosen.prompt_length][-room:])
        for pair in workload.batch(number)
    ]


def our_loop(scenario: Scenario, workload: Workload, model: nn.Module) -> Callable[[Pause], None]:
    """Rounds of our sampler; every response has a random stream of its own."""
    stop_ids = make_stop_ids(scenario)

    def loop(pause: Pause) -> None:
        for number in range(scenario.steps + WARMUP_STEPS):
            prompts = prompts_of(scenario, workload, number)
            responses = generate(
                model,
                [prompt for prompt in prompts for _ in range(scenario.samples)],
                keys=[f"{i}/{j}" for i in range(len(prompts)) for j in range(scenario.samples)],
                temperature=1.0,
                max_new_tokens=scenario.max_new_tokens,
                stop_ids=stop_ids,
                seed=number,
                batch_size=scenario.generation_batch,
                precision=scenario.precision,
            )
            pause(sum(len(r.ids) + (not r.truncated) for r in responses))

    return loop


def transformers_loop(
    scenario: Scenario, workload: Workload, model: nn.Module
) -> Callable[[Pause], None]:
    """Rounds of `model.generate` at temperature 1 from the whole distribution."""
    stop_ids = make_stop_ids(scenario)
    stop = torch.tensor(stop_ids)
    if scenario.precision == "bf16":
        model = model.to(torch.bfloat16)
    size = max(1, scenario.generation_batch // scenario.samples)

    def loop(pause: Pause) -> None:
        for number in range(scenario.steps + WARMUP_STEPS):
            torch.manual_seed(number)
            prompts = prompts_of(scenario, workload, number)
            tokens = 0
            for start in range(0, len(prompts), size):
                ids, mask = pad_left(prompts[start : start + size], pad=stop_ids[0])
                output = model.generate(  # type: ignore[operator]
                    input_ids=ids,
                    attention_mask=mask,
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    num_return_sequences=scenario.samples,
                    max_new_tokens=scenario.max_new_tokens,
                    eos_token_id=stop_ids,
                    pad_token_id=stop_ids[0],
                )
                tokens += count_tokens(output[:, ids.shape[1] :], stop)
            pause(tokens)

    return loop


@torch.no_grad()
def greedy_agreement(scenario: Scenario, workload: Workload, model: nn.Module) -> float:
    """Share of one round's prompts to which both sides' greedy responses are the same tokens.

    Below 1 where rounding decides between two tokens: in bf16, say.
    """
    prompts = prompts_of(scenario, workload, 0)
    stop_ids = make_stop_ids(scenario)
    ours = generate(
        model,
        prompts,
        keys=[str(i) for i in range(len(prompts))],
        temperature=0.0,
        max_new_tokens=scenario.max_new_tokens,
        stop_ids=stop_ids,
        seed=0,
        precision=scenario.precision,
    )
    ids, mask = pad_left(prompts, pad=stop_ids[0])
    output = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=scenario.max_new_tokens,
        eos_token_id=stop_ids,
        pad_token_id=stop_ids[0],
    )
    theirs = output[:, ids.shape[1] :].tolist()
    same = [
        list(response.ids) == row[: len(response.ids)]
        for response, row in zip(ours, theirs, strict=True)
    ]
    return sum(same) / len(same)


def pad_left(prompts: Sequence[Sequence[int]], *, pad: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask, (B, T) each, padded on the left."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


def count_tokens(new: Tensor, stop: Tensor) -> int:
    """Generated tokens of (B, T) new ids: each row's up to and including its first stop token.

    >>> count_tokens(torch.tensor([[5, 9, 9], [5, 5, 5]]), torch.tensor([9]))
    5
    """
    stopped = torch.isin(new, stop)
    before = (stopped.cumsum(1) - stopped.long()) == 0
    return int(before.sum())
