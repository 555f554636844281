"""A policy and what it expects: a causal language model and a value for each of its tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dpo.data.pack import pack, pad
from dpo.data.tokenize import TokenSequence
from dpo.models.forward import token_states
from dpo.models.plan import as_evaluated, trial_sequences, why_not_packed
from dpo.models.scoring import MAX_LOGIT_BYTES, MAX_TOKENS, in_rows, score_groups, token_scores


class ActorCritic(nn.Module):
    """The policy with a value function `V(x, y_<t)`: a linear head on a trunk's hidden states.

    The state before token t is what predicts it, so that no value looks at its own token. The
    trunk is the policy's, whose hidden states both heads read, or one of its own. The head begins
    as 0 (as in the code of Ziegler et al. 2019): nothing is expected before anything was seen.
    """

    def __init__(self, policy: nn.Module, trunk: nn.Module | None = None) -> None:
        """
        Args:
            policy: a causal language model of transformers.
            trunk: the value function's own, a decoder without a head, on the same device; None:
                the policy's.
        """
        super().__init__()
        self.policy = policy
        self.trunk = trunk
        head = policy.get_output_embeddings().weight  # type: ignore[operator]
        width = head.shape[1]
        if trunk is not None:
            with as_evaluated(trunk):
                self.packed = why_not_packed(trunk, token_states) is None
                width = token_states(trunk, pad(trial_sequences(trunk))).shape[1]
        self.value_head = nn.Linear(width, 1).to(head)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.train(policy.training)

    def forward(
        self,
        sequences: Sequence[TokenSequence],
        *,
        max_tokens: int = MAX_TOKENS,
        max_logit_bytes: int = MAX_LOGIT_BYTES,
        precision: str = "fp32",
    ) -> tuple[Tensor, Tensor]:
        """`log pi(y_t | x, y_<t)` and `V(x, y_<t)` of each response token, (S, T) each, float64,
        0 after a response's end. Arguments as of `response_token_logps`, which gives the first.
        """
        groups = score_groups(self.policy, sequences, max_tokens=max_tokens)
        logps, values = [], []
        for group in groups:
            members = [sequences[i] for i in group]
            found = token_scores(
                self.policy,
                members,
                precision=precision,
                max_logit_bytes=max_logit_bytes,
                states=self.trunk is None,
            )
            states = found.states
            if self.trunk is not None:
                batch = (pack if self.packed else pad)(members)
                states = token_states(self.trunk, batch, precision=precision)
            logps.append(found.logps)
            values.append(self.value_head(states).squeeze(-1))
        return in_rows(logps, groups, sequences), in_rows(values, groups, sequences)


def token_mask(sequences: Sequence[TokenSequence]) -> Tensor:
    """Which places of a (S, T) tensor are tokens of a response: its own, the end token included."""
    lengths = torch.tensor([s.num_scored for s in sequences])
    return torch.arange(int(lengths.max())) < lengths.unsqueeze(-1)
