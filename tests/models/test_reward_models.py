"""A reward is what a plain forward pass gives for a sequence alone, in whatever company and layout
it is computed, and in whatever library the folder is opened."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    CohereConfig,
    CohereForCausalLM,
    FalconConfig,
    FalconForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForSequenceClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import tiny_models
from dpo.data.prompts import resolve_template
from dpo.data.tokenize import Encoder, TokenSequence
from dpo.errors import InputError
from dpo.models import reward
from dpo.models.load import find_model, load_model
from dpo.models.recompute import enable_recomputation, recompute_without_dropout
from dpo.models.reward import (
    PADDING,
    from_causal,
    give_padding,
    open_reward_model,
    save_reward_model,
    sequence_scores,
)
from models.scored_data import VOCAB, random_sequences
from models.test_packed import SIZES, random_trees

END = 0
TEMPLATE = resolve_template("question")


def causal(name: str, vocab_size: int = VOCAB) -> nn.Module:
    if name in tiny_models.ARCHITECTURES:
        return tiny_models.make(name, vocab_size)
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**{**SIZES, "vocab_size": vocab_size})).eval()


def reward_model(name: str, *, pad: int | None = VOCAB - 1) -> nn.Module:
    """With a padding that no sequence of the tests holds."""
    model = from_causal(causal(name), seed=0)
    model.config.get_text_config().pad_token_id = pad
    return model


def without_padding(sequences: list[TokenSequence]) -> list[TokenSequence]:
    return [
        TokenSequence(tuple(i % (VOCAB - 1) for i in s.ids), s.prompt_length) for s in sequences
    ]


def all_sequences() -> list[TokenSequence]:
    return without_padding(random_trees() + random_sequences())


def plain(model: nn.Module, sequences: list[TokenSequence]) -> Tensor:
    """An independent way: transformers' own forward, one sequence at a time."""
    found = [model(input_ids=torch.tensor([s.ids])).logits[0] for s in sequences]
    return torch.stack(found).double()


NAMES = ["gpt2", "llama", "qwen2", "neox", "gemma2"]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_packed_and_padded_scores_equal_a_plain_forward_of_each_sequence(name, monkeypatch) -> None:
    model, sequences = reward_model(name), all_sequences()
    expected = plain(model, sequences)[:, 0]
    assert expected.std() > 0.3  # rewards of unit size, so that 1e-5 means something
    torch.testing.assert_close(sequence_scores(model, sequences), expected, rtol=0, atol=1e-5)
    assert reward._readings[model] == reward._Reading(packed=True)
    reward._readings[model] = reward._Reading(packed=False)
    torch.testing.assert_close(sequence_scores(model, sequences), expected, rtol=0, atol=1e-5)
    reward._readings[model] = None
    torch.testing.assert_close(sequence_scores(model, sequences), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@torch.no_grad()
def test_neighbours_order_and_groups_change_nothing(name) -> None:
    model, sequences = reward_model(name), all_sequences()
    together = sequence_scores(model, sequences)
    alone = torch.cat([sequence_scores(model, [s]) for s in sequences])
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-6)
    backwards = sequence_scores(model, sequences[::-1]).flip(0)
    torch.testing.assert_close(together, backwards, rtol=0, atol=2e-6)
    for max_tokens in (1, 30):
        small = sequence_scores(model, sequences, max_tokens=max_tokens)
        torch.testing.assert_close(together, small, rtol=0, atol=2e-6)


@torch.no_grad()
def test_the_last_token_counts_and_the_boundary_does_not() -> None:
    model = reward_model("llama")
    whole, cut = TokenSequence((5, 6, 7, 8, END), 2), TokenSequence((5, 6, 7, 8), 2)
    other, moved = TokenSequence((5, 6, 7, 8, 9), 2), TokenSequence((5, 6, 7, 8, END), 3)
    scores = sequence_scores(model, [whole, cut, other, moved]).tolist()
    assert scores[0] == pytest.approx(scores[3], abs=1e-6)
    assert min(abs(scores[0] - scores[1]), abs(scores[0] - scores[2])) > 1e-3


@torch.no_grad()
def test_where_the_padding_is_the_end_token_it_reads_what_transformers_reads() -> None:
    """One token too far left, as public models that were trained so expect it."""
    model, sequence = reward_model("gpt2", pad=END), TokenSequence((5, 6, 7, END), 2)
    expected = plain(model, [sequence])[0]
    torch.testing.assert_close(sequence_scores(model, [sequence]), expected, rtol=0, atol=1e-5)
    before = TokenSequence((5, 6, 7), 2)
    torch.testing.assert_close(sequence_scores(model, [before]), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("packed", [True, False])
def test_the_gradient_is_that_of_finite_differences_in_float64(packed) -> None:
    """On GPT-2: the norm of Llama works in float32 whatever it is given."""
    model = reward_model("gpt2").double()
    sequences = all_sequences()[:6]
    sequence_scores(model, sequences[:1])
    reward._readings[model] = reward._Reading(packed=packed)
    weights = torch.arange(1.0, 7.0, dtype=torch.float64)

    def value() -> Tensor:
        return weights @ sequence_scores(model, sequences)

    value().backward()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        slope = (parameter.grad * direction).sum().item()
        with torch.no_grad():
            parameter += 1e-5 * direction
            above = value().item()
            parameter -= 2e-5 * direction
            below = value().item()
            parameter += 1e-5 * direction
        assert slope == pytest.approx((above - below) / 2e-5, rel=1e-5, abs=1e-7), name


def test_packed_gradients_equal_those_of_plain_forwards_and_of_recomputation() -> None:
    model, sequences = reward_model("gpt2"), all_sequences()

    def gradient(total: Tensor) -> Tensor:
        found = torch.autograd.grad(total, list(model.parameters()))
        return torch.cat([g.flatten().double() for g in found])

    expected = gradient(plain(model, sequences).sum())
    found = gradient(sequence_scores(model, sequences).sum())
    assert (found - expected).norm() <= 2e-6 * expected.norm()
    enable_recomputation(model)
    recompute_without_dropout(model)
    assert (gradient(sequence_scores(model, sequences).sum()) - found).norm() <= (
        1e-6 * found.norm()
    )


@torch.no_grad()
def test_in_bf16_the_trunk_alone_is_rounded() -> None:
    model, sequences = reward_model("llama"), all_sequences()
    exact = sequence_scores(model, sequences)
    rounded = sequence_scores(model, sequences, precision="bf16")
    assert rounded.dtype == torch.float64
    assert 1e-5 < (rounded - exact).abs().max() < 0.3


# -- from a language model ----------------------------------------------------------------------


def test_the_head_is_a_function_of_the_seed_and_of_unit_size() -> None:
    one, same, other = (from_causal(causal("llama"), seed=s).score.weight for s in (3, 3, 4))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    shape = GPT2Config(vocab_size=8, n_positions=8, n_embd=1024, n_layer=1, n_head=1)
    wide = from_causal(GPT2LMHeadModel(shape), seed=0).score.weight
    assert wide.std().item() == pytest.approx(1025**-0.5, rel=0.1)


def test_the_trunk_is_the_models_own_and_random_numbers_are_left_alone(tokenizer) -> None:
    model = causal("gpt2", len(tokenizer))
    state = torch.get_rng_state()
    classifier = from_causal(model, seed=0)
    give_padding(classifier, copy.deepcopy(tokenizer), ends=[tokenizer.eos_token_id])
    assert torch.equal(torch.get_rng_state(), state)
    assert classifier.base_model is model.base_model
    assert not any(p.is_meta for p in classifier.parameters())


def test_an_architecture_without_a_classifier_is_refused_in_a_sentence() -> None:
    model = CohereForCausalLM(CohereConfig(**SIZES))
    with pytest.raises(InputError, match="CohereForCausalLM cannot become a reward model"):
        from_causal(model, seed=0)


def test_padding_is_added_where_it_is_the_end_token_and_kept_where_it_is_not(tokenizer) -> None:
    own = copy.deepcopy(tokenizer)
    own.pad_token = own.eos_token
    model = from_causal(causal("gpt2", len(own)), seed=0)
    rows = len(own)
    give_padding(model, own, ends=[own.eos_token_id])
    assert (own.pad_token, own.pad_token_id) == (PADDING, rows)
    assert model.config.pad_token_id == rows
    embeddings = model.get_input_embeddings().weight
    assert len(embeddings) == rows + 1
    assert not embeddings[rows].any()
    give_padding(model, own, ends=[own.eos_token_id])  # it has one now
    assert len(model.get_input_embeddings().weight) == rows + 1
    spare = copy.deepcopy(tokenizer)
    roomy = from_causal(causal("gpt2", rows + 10), seed=0)
    give_padding(roomy, spare, ends=[spare.eos_token_id])
    assert len(roomy.get_input_embeddings().weight) == rows + 10  # there was room


# -- the folder ---------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["gpt2", "llama", "qwen2"])
def saved(request, tokenizer, tmp_path_factory):
    """Architecture, folder, encoder, texts encoded, and their scores."""
    folder = tmp_path_factory.mktemp(request.param)
    own = copy.deepcopy(tokenizer)
    model = from_causal(causal(request.param, len(own)), seed=0)
    encoder = Encoder(own, TEMPLATE, 64)
    give_padding(model, own, ends=encoder.stop_ids)
    save_reward_model(model, own, TEMPLATE, folder, card="A card.")
    rows = [
        encoder.encode("What is the capital of Peru?", ["Lima.", "The capital of Peru is Lima."]),
        encoder.encode("Name the young of the cat.", ["", "kitten", "<|pad|> is plain text"]),
    ]
    sequences = [s for row in rows for s in row.sequences]
    with torch.no_grad():
        return request.param, folder, encoder, sequences, sequence_scores(model, sequences)


@torch.no_grad()
def test_transformers_gives_the_same_scores_for_the_saved_folder(saved) -> None:
    _, folder, _, sequences, expected = saved
    theirs = AutoModelForSequenceClassification.from_pretrained(folder)
    assert theirs.config.num_labels == 1
    assert all(s.ids[-1] == END for s in sequences)
    torch.testing.assert_close(plain(theirs, sequences)[:, 0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_and_in_batches_padded_on_either_side(saved, side) -> None:
    """GPT-2's absolute positions count left padding unless they are given, in transformers too."""
    name, folder, _, sequences, expected = saved
    theirs = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.padding_side == "right"
    tokenizer.padding_side = side
    batch = tokenizer.pad({"input_ids": [list(s.ids) for s in sequences]}, return_tensors="pt")
    if name == "gpt2" and side == "left":
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    scores = theirs(**batch).logits[:, 0].double()
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_our_own_loader_gives_the_same_scores_and_the_template(saved) -> None:
    _, folder, _, sequences, expected = saved
    model, tokenizer, template = open_reward_model(str(folder))
    assert template == TEMPLATE
    again = Encoder(tokenizer, template, 64)
    assert again.encode("Name the young of the cat.", ["kitten"]).sequences[0] == sequences[3]
    torch.testing.assert_close(sequence_scores(model, sequences), expected, rtol=0, atol=1e-5)
    assert [f.name for f in folder.glob("*.safetensors")] == ["model.safetensors"]


@torch.no_grad()
def test_the_usage_on_the_card_gives_the_score(saved) -> None:
    _, folder, _, _, expected = saved
    tokenizer = AutoTokenizer.from_pretrained(folder)
    values = {
        "prompt_text": "Question: Name the young of the cat.\nAnswer:\n",
        "response_text": "kitten",
    }
    code = reward.USAGE.format(end=tokenizer.eos_token_id).split("```")[1].removeprefix("python\n")
    exec(code.replace("path/to/this/folder", str(folder)), values)
    assert values["reward"].item() == pytest.approx(expected[3].item(), abs=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's own, of its arguments
def test_trl_gives_the_same_scores_and_the_same_loss(saved, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="needs TRL, to compare with (pip install trl)")
    datasets = pytest.importorskip("datasets")
    from dpo.core.reward_losses import pair_loss

    _, folder, _, sequences, expected = saved
    pairs = [(0, 1), (2, 3), (4, 2)]
    rows = [
        {
            "chosen_ids": list(sequences[a].ids),
            "rejected_ids": list(sequences[b].ids),
            "margin": float(i),
        }
        for i, (a, b) in enumerate(pairs)
    ]
    trainer = trl.RewardTrainer(
        model=str(folder),
        args=trl.RewardConfig(
            output_dir=str(tmp_path),
            report_to="none",
            use_cpu=True,
            bf16=False,
            center_rewards_coefficient=0.01,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
    )
    batch = trainer.data_collator(rows)
    trainer.model.eval()
    with torch.no_grad():
        loss, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
    chosen, rejected = (expected[torch.tensor(side)] for side in zip(*pairs, strict=True))
    theirs = outputs.logits[:, 0].double()
    torch.testing.assert_close(theirs, torch.cat([chosen, rejected]), rtol=0, atol=1e-5)
    ours = pair_loss(chosen, rejected, margins=torch.arange(3.0), centre=0.01).mean()
    assert loss.item() == pytest.approx(ours.item(), abs=1e-5)


def test_a_language_model_is_no_reward_model_and_the_other_way_round(saved, tmp_path) -> None:
    name, folder, encoder, *_ = saved
    causal(name, len(encoder.tokenizer)).save_pretrained(tmp_path)
    encoder.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"no reward model.*score\.weight"):
        open_reward_model(str(tmp_path))
    with pytest.raises(InputError, match="expected a causal language model"):
        load_model(find_model(str(folder)))


# -- other classifiers --------------------------------------------------------------------------

SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LABELS = {"id2label": {0: "negative", 1: "neutral", 2: "positive"}, "pad_token_id": VOCAB - 1}
OTHERS = {
    "gpt2": lambda: GPT2ForSequenceClassification(
        GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=2, **LABELS)
    ),
    "opt": lambda: OPTForSequenceClassification(
        OPTConfig(ffn_dim=64, max_position_embeddings=64, word_embed_proj_dim=32, **SMALL, **LABELS)
    ),
    "falcon alibi": lambda: FalconForSequenceClassification(
        FalconConfig(alibi=True, **SMALL, **LABELS)
    ),
    "bert": lambda: BertForSequenceClassification(
        BertConfig(intermediate_size=64, max_position_embeddings=64, **SMALL, **LABELS)
    ),
}


def classifier(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = OTHERS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(6)
    return model.eval()


@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_any_classifier_is_scored_as_its_own_forward_scores_it(name) -> None:
    model, sequences = classifier(name), all_sequences()
    logits = plain(model, sequences)
    assert logits.std() > 0.03
    scores = sequence_scores(model, sequences, label="positive", scale="logit")
    torch.testing.assert_close(scores, logits[:, 2], rtol=1e-5, atol=2e-5)
    assert (reward._readings[model] is None) == (name == "bert")


@torch.no_grad()
def test_the_scales_of_several_labels_and_how_a_label_is_named() -> None:
    model, sequences = classifier("gpt2"), all_sequences()[:5]
    p = plain(model, sequences).softmax(-1)[:, 2]
    for label in (2, "2", "positive"):
        found = sequence_scores(model, sequences, label=label)  # the log-odds
        torch.testing.assert_close(found, (p / (1 - p)).log(), rtol=1e-4, atol=1e-5)
    found = sequence_scores(model, sequences, label=2, scale="log_prob")
    torch.testing.assert_close(found, p.log(), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="name one of negative, neutral, positive"):
        sequence_scores(model, sequences)
    with pytest.raises(InputError, match="'good' is none of the classifier's: negative"):
        sequence_scores(model, sequences, label="good")
    model.config.problem_type = "multi_label_classification"
    logits = plain(model, sequences)[:, 2]
    found = sequence_scores(model, sequences, label=2)
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5)
    found = sequence_scores(model, sequences, label=2, scale="log_prob")
    torch.testing.assert_close(found, logits.sigmoid().log(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_classifier_without_padding_is_scored_one_sequence_at_a_time() -> None:
    model, sequences = classifier("bert"), all_sequences()
    expected = plain(model, sequences)[:, 0]
    model.config.pad_token_id = None
    found = sequence_scores(model, sequences, label=0, scale="logit")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_model_that_reads_more_than_its_last_token_takes_its_own_forward(caplog) -> None:
    """A `score` that is not what the forward ends with is found by the trial."""

    class Gated(GPT2ForSequenceClassification):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits.tanh()
            return output

    torch.manual_seed(0)
    model = Gated(classifier("gpt2").config)
    model.load_state_dict(classifier("gpt2").state_dict())
    sequences = all_sequences()
    with caplog.at_level(logging.INFO, logger="dpo"):
        found = sequence_scores(model.eval(), sequences, label=1, scale="logit")
    torch.testing.assert_close(found, plain(model, sequences)[:, 1], rtol=1e-5, atol=1e-5)
    assert "own forward pass" in caplog.text
