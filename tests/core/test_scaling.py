"""Parts, bytes and seconds of training on many GPUs, derived by hand."""

import pytest
import torch

from dpo.core import scaling
from dpo.core.cost import PassSize
from dpo.core.machines import Machine
from dpo.core.scaling import POLICIES, Cluster, Llama, Pairs

SHAPES = [(5, 3), (4,), (1, 2)]
TINY = Llama(layers=2, width=8, inner=16, heads=2, kv_heads=1, vocab=10)
GPU = Machine("tiny", 1, 1, 2, 1, 0.5)


def test_parts_are_those_of_torchs_chunks_and_add_up():
    for rows in (1, 4, 5, 7):
        for ranks in (1, 2, 3, 8):
            parts = [scaling.rows_of_rank(rows, ranks=ranks, rank=rank) for rank in range(ranks)]
            chunks = [len(chunk) for chunk in torch.arange(rows).chunk(ranks)]
            assert parts == chunks + [0] * (ranks - len(chunks))
    held = [scaling.numbers_of_rank(SHAPES, ranks=2, rank=rank) for rank in range(2)]
    assert held == [3 * 3 + 2 + 2, 2 * 3 + 2]
    assert scaling.padded(SHAPES, ranks=2) == 18 + 4 + 4


def test_a_pass_gathers_blocks_twice_and_the_rest_once_and_scatters_all():
    sent = scaling.sent_in_pass([[(4, 2)], [(4, 2)]], [(3,)], ranks=2)
    assert sent == scaling.Sent(gathered=4 * (2 * 16 + 4), scattered=4 * (16 + 4))


def test_known_policies_have_their_parameters():
    assert POLICIES["7B"].size.parameters == 6_738_415_616
    assert POLICIES["70B"].size.parameters == 70_553_706_496
    assert POLICIES["405B"].size.parameters == 405_853_388_800


def test_pairs_are_counted_as_packed_trees():
    from dpo.data.pack import pack
    from dpo.data.tokenize import TokenSequence

    pair = [TokenSequence((1, 2, 3, *(side,) * 4), 3) for side in (7, 8)]
    batch = pack(pair)
    counts = Pairs(5, prompt=3, response=4).counts
    assert counts.tokens == 5 * batch.ids.size
    assert counts.attended == 5 * batch.attended
    assert counts.predicted == 5 * len(batch.column)


def projected(ranks, **links):
    cluster = Cluster(GPU, 4, **({"node_gb_per_second": 2, "network_gb_per_second": 1} | links))
    size = PassSize(60, 30, 1000, 0, 50, 200)
    batch = Pairs(8, prompt=10, response=11)  # two pairs a pass
    return scaling.project(TINY.size, size, batch, cluster, ranks=ranks, max_logit_bytes=10**6)


def test_more_gpus_share_the_work_and_the_state_and_gather_the_same():
    two, four = projected(2), projected(4)
    assert (two.passes, four.passes) == (2, 1)
    assert two.computing == pytest.approx(2 * four.computing, rel=1e-3)
    assert two.parts == pytest.approx(2 * four.parts, rel=0.05)
    assert two.gathered == four.gathered
    size = TINY.size
    blocks = 2 * size.layer_parameters
    assert four.sent == 4 * (3 * blocks + 2 * (size.parameters - blocks)) * 3 / 4
    assert four.seconds == (max(four.computing, four.sending), four.computing + four.sending)


def test_beyond_a_node_the_network_is_the_slowest_link():
    inside, outside = projected(4), projected(8)
    assert inside.sending == pytest.approx(inside.sent / 2e9)
    assert outside.sending == pytest.approx(outside.sent / 1e9)
    assert projected(8, network_gb_per_second=0.5).sending == 2 * outside.sending
