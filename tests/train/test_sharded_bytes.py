"""What processes with a model in parts hold and send is what the formulas say, to the byte."""

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dpo.config import DistributedConfig
from dpo.core import scaling
from dpo.data.tokenize import TokenSequence
from dpo.models import parts
from dpo.models.counts import transformer_layers
from dpo.models.scoring import response_logps
from dpo.train import ranks
from dpo.train.in_parts import InParts
from dpo.train.schedule import adamw
from tiny_models import make
from train.several_ranks import on_ranks

SEQUENCES = [TokenSequence((5, 6, 7, 8, 9), 2), TokenSequence((5, 6, 10, 11), 2)]
VOCAB = 301  # odd: the parts are not equal


def held(tensors):
    local = [parts.local(tensor) for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


class Watched(TorchDispatchMode):
    """Adds up what is gathered and scattered inside."""

    def __init__(self):
        super().__init__()
        self.gathered = self.scattered = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output, given, *_ = (*args, None, None)
        if "allgather_base" in function.name():
            self.gathered += output.nbytes
        if "reduce_scatter_base" in function.name():
            self.scattered += given.nbytes
        return function(*args, **(kwargs or {}))


def measure(rank, name, folder):
    with ranks.joined(DistributedConfig(kind="fsdp")):
        policy = InParts().make(lambda: make(name, VOCAB))
        optimizer = adamw(policy, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.0)
        with Watched() as sent:
            (-response_logps(policy, SEQUENCES).sum()).backward()
        parts.settle(policy)
        optimizer.step()
        parameters = list(policy.parameters())
        moments = [
            state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")
        ]
        found = {
            "weights": held(parameters),
            "gradients": held([p.grad for p in parameters]),
            "optimizer": held(moments),
            "gathered": sent.gathered,
            "scattered": sent.scattered,
        }
    (folder / f"{rank}.json").write_text(json.dumps(found))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_two_processes_hold_and_send_what_the_formulas_say_to_the_byte(name, tmp_path):
    assert on_ranks(2, lambda rank: measure(rank, name, tmp_path)) == [0, 0]
    model = make(name, VOCAB)
    blocks = [[tuple(p.shape) for p in b.parameters()] for b in transformer_layers(model)]
    inside = {p for block in transformer_layers(model) for p in block.parameters()}
    outside = [tuple(p.shape) for p in model.parameters() if p not in inside]
    shapes = [shape for block in blocks for shape in block] + outside
    sent = scaling.sent_in_pass(blocks, outside, ranks=2)
    total = 0
    for rank in range(2):
        numbers = scaling.numbers_of_rank(shapes, ranks=2, rank=rank)
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found == {
            "weights": 4 * numbers,
            "gradients": 4 * numbers,
            "optimizer": 8 * numbers,
            "gathered": sent.gathered,
            "scattered": sent.scattered,
        }
        total += numbers
    assert total == sum(torch.Size(shape).numel() for shape in shapes)
