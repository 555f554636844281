"""Bytes and operations of a step, derived by hand."""

from dataclasses import replace

import pytest

from dpo.core import cost
from dpo.core.cost import (
    DecodingSpeed,
    ModelSize,
    PassSize,
    Sampling,
    StepCounts,
    StepSettings,
)

MODEL = ModelSize(
    parameters=100,
    trained=100,
    layers=2,
    layer_parameters=30,
    layer_trained=30,
    layer_products=24,
    attention_width=4,
    width=4,
    vocab=10,
    tied=True,
    head_trained=True,
    largest=40,
    embedding_trained=40,
)
PASS = PassSize(
    tokens=5,
    predicted=3,
    layer_kept=1000,
    layer_copies=0,
    outside_kept=50,
    layer_passing=300,
)


def settings(**changes):
    start = {
        "precision": "fp32",
        "checkpointing": False,
        "in_backward": False,
        "passes": 1,
        "max_logit_bytes": 10**9,
    }
    return StepSettings(**start | changes)


def test_a_trained_parameter_takes_16_bytes_in_all_but_8_bit_optimizers():
    for precision in ("fp32", "bf16", "pure_bf16"):
        per = cost.stored(precision=precision)
        assert per.weight + per.gradient + per.state == 16
    eight = cost.stored(precision="fp32", optimizer="paged_adamw_8bit")
    assert eight.weight + eight.gradient + eight.state == pytest.approx(10, abs=0.05)


def test_the_fullest_moment_is_where_all_activations_meet_the_first_gradients():
    peak = cost.step_peak(MODEL, PASS, settings())
    assert peak.moment == "last layer"
    assert peak.optimizer == 8 * 100
    assert peak.gradients == 4 * (10 * 4)  # the head's, which is the embedding's
    assert peak.activations == 50 + 2 * 1000 + 300
    assert peak.total == 800 + 160 + 2350


def test_a_second_pass_finds_the_gradients_of_the_first():
    one, two = (cost.step_peak(MODEL, PASS, settings(passes=n)) for n in (1, 2))
    assert two.gradients - one.gradients == 4 * 100


def test_recomputation_keeps_a_layers_input_and_one_layer():
    peak = cost.step_peak(MODEL, PASS, settings(checkpointing=True))
    inputs = 5 * 4 * 4
    assert (peak.moment, peak.activations) == ("first layer", 50 + inputs + 1300)
    assert peak.gradients == 4 * (10 * 4) + 4 * 30


def test_with_updates_in_the_backward_pass_there_is_never_more_than_the_largest_gradient():
    peak = cost.step_peak(MODEL, PASS, settings(in_backward=True))
    assert peak.gradients <= 4 * (40 + 40)


def test_large_logits_make_the_head_the_fullest_moment_and_parts_bound_them():
    size = PassSize(5, 10**6, 10, 0, 0, 10)
    whole = cost.step_peak(MODEL, size, settings())
    parts = cost.step_peak(MODEL, size, settings(max_logit_bytes=2 * 10**7))
    assert whole.moment == parts.moment == "head"
    assert whole.head - parts.head == 4 * 10 * 10**6 - 2 * 10**7


def test_an_adapter_keeps_float32_state_beside_bfloat16_weights():
    adapter = settings(precision="pure_bf16", adapter=True)
    assert adapter.per_trained == cost.stored(precision="fp32")


def test_operations_are_those_of_three_products_and_of_recomputation():
    counts = StepCounts(tokens=5, attended=15, predicted=3)
    forward = 2 * 2 * 24 * 5 + 2 * 2 * 2 * 4 * 15
    plain = cost.operations(MODEL, counts, checkpointing=False, head_in_parts=False)
    again = cost.operations(MODEL, counts, checkpointing=True, head_in_parts=True)
    assert (plain.trunk, plain.head) == (3 * forward, 3 * 2 * 40 * 3)
    assert (again.trunk, again.head) == (4 * forward, 4 * 2 * 40 * 3)


def test_time_is_products_at_their_speed_and_the_update_at_the_memorys():
    work = cost.Operations(trunk=4e12, head=1e12)
    found = cost.seconds(
        work,
        trunk_tflops=2,
        head_tflops=1,
        utilisation=0.5,
        update_bytes=28e9,
        gb_per_second=7,
    )
    assert found == (2 + 1) / 0.5 + 4
    per = cost.stored(precision="fp32")
    assert cost.update_bytes(MODEL, per) == 28 * 100


# -- other heads, and sampling -------------------------------------------------------------------


def test_a_reward_model_has_a_head_of_one_row_in_place_of_its_own():
    tied = cost.with_reward_head(MODEL)  # its head was the embedding, which stays
    assert (tied.parameters, tied.trained, tied.head) == (104, 104, 4)
    apart = cost.with_reward_head(replace(MODEL, tied=False))
    assert (apart.parameters, apart.trained) == (100 - 40 + 4, 100 - 40 + 4)
    frozen = cost.with_reward_head(replace(MODEL, trained=8, tied=False, head_trained=False))
    assert (frozen.parameters, frozen.trained) == (64, 12)


def test_a_critic_is_a_head_and_a_trunk_if_it_has_its_own():
    shared = cost.with_critic(MODEL, own_trunk=False)
    assert (shared.parameters, shared.trained, shared.layers) == (105, 105, 2)
    apart = cost.with_critic(replace(MODEL, tied=False), own_trunk=True)
    assert (apart.parameters, apart.trained, apart.layers) == (100 + 60 + 5, 165, 4)
    assert apart.vocab == MODEL.vocab


def test_a_forward_pass_is_a_third_of_a_step():
    counts = StepCounts(tokens=5, attended=15, predicted=3)
    step = cost.operations(MODEL, counts, checkpointing=False, head_in_parts=False)
    once = cost.forward_operations(MODEL, counts)
    assert (3 * once.trunk, 3 * once.head) == (step.trunk, step.head)
    assert once.trunk == 2 * 2 * (24 * 5 + 2 * 4 * 15)
    assert once.head == 2 * 40 * 3


SAMPLING = Sampling(responses=5, at_once=2, prompt=3.0, tokens=4)


def test_samples_are_scored_each_with_its_own_prompt():
    assert SAMPLING.counts == StepCounts(tokens=5 * 7, attended=5 * 28, predicted=5 * 4)


def test_sampling_holds_two_caches_and_three_rows_of_logits():
    keys_and_values = 2 * 2 * 4 * 7  # two of them, in two layers of width 4, for 7 tokens
    assert cost.sampling_bytes(MODEL, SAMPLING) == 2 * 4 * (2 * keys_and_values + 3 * 10)


def test_sampling_takes_products_reading_and_layers():
    speed = DecodingSpeed(products=0.5, memory=0.25, layer_seconds=1e-3)
    found = cost.sampling_seconds(MODEL, SAMPLING, speed, tflops=1e-9, gb_per_second=1e-6)
    at_once = 5 / 3  # three batches
    products = 2 * 2 * (24 * at_once + 2 * 4 * at_once * 5) + 2 * 40 * at_once
    token = products / (0.5 * 1e3) + 4 * 100 / (0.25 * 1e3) + 2 * 1e-3
    assert found == pytest.approx(3 * 4 * token)


def test_offloaded_parts_leave_the_device_what_is_gathered():
    peak = cost.step_peak(MODEL, PASS, settings())
    found = cost.with_offload(peak, MODEL, cost.stored(precision="fp32"))
    assert found.gradients == 4 * (40 + 30)  # outside the layers, and one layer
    assert (found.optimizer, found.activations) == (0, peak.activations)
