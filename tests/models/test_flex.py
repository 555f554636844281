"""The GPU's attention of packed rows: its mask is what each sequence alone would see; torch's
uncompiled form of it gives what the trees' own attention gives, gradients too.

Only the tests marked `gpu` run the compiled kernel. The others run on a CPU, where torch has the
uncompiled form alone, and refuses gradients of that for want of a kernel, not of a formula.
"""

from __future__ import annotations

import copy
import importlib
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from dpo.data.pack import Tree, group_by_prompt, pack
from dpo.data.tokenize import TokenSequence
from dpo.models import flex
from dpo.models.attention import Layout, packed_attention, tree_attention
from dpo.models.plan import scoring_plan
from dpo.models.recompute import enable_recomputation, recompute_without_dropout
from dpo.models.scoring import response_logps
from models.test_packed import SIZES, gradient, make, random_trees

VOCAB = 40
CPU = torch.device("cpu")
SHAPES = {
    "gpt2": {"heads": 4, "groups": 4},
    "llama": {"heads": 6, "groups": 2},
    "gemma2": {"heads": 4, "groups": 2, "window": 40, "softcap": 3.0, "scaling": 0.4},
}
"""Attention as these models call it. Window and cap are small enough to matter."""
ROW = (Tree(40, (30, 20, 0)), Tree(150, (0,)), Tree(1, (3, 4, 5)), Tree(60, (70, 1)))
"""384 tokens: three tiles, exactly; with an empty branch and a tree of one sequence."""
ODD_ROW = (*ROW, Tree(3, (2, 2)))


quiet = pytest.mark.filterwarnings("ignore")  # torch's compiler warns of what it does itself


@contextmanager
def uncompiled(kernel: Callable[..., Tensor] = torch_flex.flex_attention) -> Iterator[None]:
    """Inside, packed attention is flex attention in torch's uncompiled form, on a CPU too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "serves", lambda *args, **kwargs: True)
        patch.setattr(flex, "kernel", lambda: kernel)
        patch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
        patch.setattr(torch_flex, "_validate_device", lambda *args: None)
        flex.block_mask.cache_clear()
        yield


def seen(trees: tuple[Tree, ...], window: int | None) -> Tensor:
    """The mask of a row, (T, T): query by key."""
    row = torch.arange(sum(tree.num_tokens for tree in trees))
    zero = torch.tensor(0)
    return flex.mask_mod(trees, window, CPU)(zero, zero, row[:, None], row)


def seen_by_sequences(sequences: list[TokenSequence], window: int | None) -> Tensor:
    """The same from the sequences: where each one's tokens stand, and who precedes whom in it."""
    places: list[list[int]] = []
    end = 0
    for members in group_by_prompt(sequences).values():
        inputs = [sequences[i].ids[:-1] for i in members]
        columns = zip(*inputs, strict=False)
        shared = sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, columns))
        stem = list(range(end, end + shared))
        end += shared
        for tokens in inputs:
            own = len(tokens) - shared
            places.append([*stem, *range(end, end + own)])
            end += own
    allowed = torch.zeros(end, end, dtype=torch.bool)
    for own_places in places:
        for n, query in enumerate(own_places):
            for distance, key in enumerate(reversed(own_places[: n + 1])):
                if window is None or distance < window:
                    allowed[query, key] = True
    return allowed


TOKENS = st.integers(0, VOCAB - 1)
PROMPTS_WITH_RESPONSES = st.lists(
    st.tuples(
        st.lists(TOKENS, min_size=1, max_size=10),
        st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=150)
@given(prompts=PROMPTS_WITH_RESPONSES, window=st.none() | st.integers(1, 12))
def test_a_token_sees_what_it_sees_in_its_own_sequence(prompts, window) -> None:
    sequences = [
        TokenSequence((*prompt, *response), len(prompt))
        for prompt, responses in prompts
        for response in responses
    ]
    trees = pack(sequences).trees
    assert trees is not None
    assert torch.equal(seen(trees, window), seen_by_sequences(sequences, window))


def test_positions_are_those_of_the_packed_batch() -> None:
    batch = pack(random_trees())
    assert batch.trees is not None
    *_, positions = flex.token_numbers(batch.trees)
    assert positions.tolist() == batch.positions[0].tolist()


def listed(numbers: Tensor, indices: Tensor) -> list[list[int]]:
    """The tiles of each row of tiles."""
    rows = zip(numbers[0, 0].tolist(), indices[0, 0].tolist(), strict=True)
    return [sorted(row[:number]) for number, row in rows]


@pytest.mark.parametrize(
    ("trees", "window"),
    [
        (ROW, None),
        (ROW, 40),
        (ODD_ROW, None),
        (ODD_ROW, 40),
        ((Tree(5, (1, 2)),), None),
        ((Tree(500, (300, 200)),), None),
        ((Tree(100, (29,)),), None),  # a tile of which one pair is seen
        ((Tree(256, (0,)),), 255),  # and one of which one pair is not
    ],
)
def test_tiles_are_those_that_torch_finds_in_the_whole_mask(trees, window) -> None:
    found = flex.block_mask(trees, window, CPU)
    length = flex.bucket(sum(tree.num_tokens for tree in trees))
    sees = flex.mask_mod(trees, window, CPU)
    expected = torch_flex.create_block_mask(sees, None, None, length, length, device="cpu")
    assert found.shape == expected.shape
    for kind in ("kv", "full_kv", "q", "full_q"):
        numbers, indices = f"{kind}_num_blocks", f"{kind}_indices"
        mine = listed(getattr(found, numbers), getattr(found, indices))
        assert mine == listed(getattr(expected, numbers), getattr(expected, indices))


def test_tiles_between_trees_and_between_branches_are_skipped() -> None:
    two_trees = flex.block_mask((Tree(128, (0,)), Tree(128, (0,))), None, CPU)
    assert two_trees.to_dense()[0, 0].tolist() == [[1, 0], [0, 1]]
    branches = flex.block_mask((Tree(128, (128, 128)),), None, CPU)
    assert branches.to_dense()[0, 0].tolist() == [  # 384 tokens, padded to 512
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 0, 1, 0],
        [0, 0, 0, 1],
    ]


def test_a_padded_place_sees_itself_and_is_seen_by_nobody_else() -> None:
    """So a tile of padding is one diagonal, and only tiles on the mask's diagonal have any."""
    for trees in (ROW, ODD_ROW, (Tree(5, (1, 2)),)):
        for window in (None, 40):
            tokens = sum(tree.num_tokens for tree in trees)
            row, zero = torch.arange(flex.bucket(tokens)), torch.tensor(0)
            mask = flex.mask_mod(trees, window, CPU)(zero, zero, row[:, None], row)
            assert mask.any(1).all()
            assert torch.equal(mask[:tokens, :tokens], seen(trees, window))
            padding = torch.arange(tokens, len(row))
            assert torch.equal(mask[tokens:, tokens:], torch.eye(len(padding), dtype=torch.bool))
            assert not mask[tokens:, :tokens].any()
            assert not mask[:tokens, tokens:].any()


def test_rows_of_all_lengths_have_few() -> None:
    lengths = {tokens: flex.bucket(tokens) for tokens in range(1, 4097)}
    assert set(lengths.values()) == {128, 256, 512, 1024, 2048, 4096}
    for tokens, length in lengths.items():
        assert tokens <= length
        assert length < 2 * tokens or length == flex.TILE


def inputs(trees, dtype, *, heads, groups, channels=16) -> list[Tensor]:
    """Queries, keys and values strided as a model's are."""
    torch.manual_seed(0)
    tokens = sum(tree.num_tokens for tree in trees)
    made = (torch.randn(1, tokens, n, channels, dtype=dtype) for n in (heads, groups, groups))
    return [x.transpose(1, 2).requires_grad_(torch.is_grad_enabled()) for x in made]


def with_gradients(output: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(1)
    weights = torch.randn(output.shape, dtype=output.dtype, device=output.device)
    return [output, *torch.autograd.grad((output * weights).sum(), tensors)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", SHAPES)
def test_outputs_and_gradients_are_those_of_the_trees(name: str, dtype: torch.dtype) -> None:
    options = dict(SHAPES[name])
    tensors = inputs(ODD_ROW, dtype, heads=options.pop("heads"), groups=options.pop("groups"))
    layout = Layout(ODD_ROW, options.pop("window", None))
    expected, _ = packed_attention(nn.Module(), *tensors, layout, **options)
    with uncompiled():
        found, _ = packed_attention(nn.Module(), *tensors, layout, **options)
    # The trees' attention caps scores in float32 whatever the model's type.
    exact = dtype == torch.float64 and "softcap" not in options
    pairs = zip(with_gradients(found, tensors), with_gradients(expected, tensors), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12 if exact else 1e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_in_float64_it_is_the_equation(name: str) -> None:
    """Softmax over the keys of each query's own sequence, a square of all scores at once."""
    options = dict(SHAPES[name])
    heads, groups = options.pop("heads"), options.pop("groups")
    tensors = inputs(ODD_ROW, torch.float64, heads=heads, groups=groups)
    query, key, value = tensors
    key, value = (x.repeat_interleave(heads // groups, dim=1) for x in (key, value))
    scores = query @ key.mT * options.get("scaling", 16**-0.5)
    if cap := options.get("softcap"):
        scores = cap * torch.tanh(scores / cap)
    hidden = ~seen(ODD_ROW, options.get("window"))
    expected = (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value).transpose(1, 2)
    layout = Layout(ODD_ROW, options.pop("window", None))
    with uncompiled():
        found, _ = packed_attention(nn.Module(), *tensors, layout, **options)
    pairs = zip(with_gradients(found, tensors), with_gradients(expected, tensors), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


@torch.no_grad()
def test_under_autocast_all_three_are_rounded_as_torch_rounds_them() -> None:
    """Queries and keys come in float32 from rotary embeddings, values in bfloat16."""
    query, key, value = inputs(ODD_ROW, torch.float32, heads=4, groups=2)
    rounded = [x.bfloat16().float() for x in (query, key, value)]
    options = {"scaling": None, "softcap": None}
    expected = tree_attention(*rounded, Layout(ODD_ROW, None), dropout=0.0, **options)
    with uncompiled(), torch.autocast("cpu", torch.bfloat16):
        found, _ = packed_attention(
            nn.Module(), query, key, value.bfloat16(), Layout(ODD_ROW, None), **options
        )
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=2e-2)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2"])
def test_a_model_gives_the_same_log_probabilities_and_gradients(name: str) -> None:
    model, sequences = make(name), random_trees()
    expected = response_logps(model, sequences)
    wanted = gradient(expected.sum(), model)
    with uncompiled():
        other = copy.deepcopy(model)  # its trial too runs with flex attention
        found = response_logps(other, sequences)
        mine = gradient(found.sum(), other)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=2e-5)
    assert (mine - wanted).norm() <= 2e-6 * wanted.norm()


def with_both_kinds_of_layers() -> nn.Module:
    kinds = ["sliding_attention", "full_attention"] * 2
    sizes = {**SIZES, "num_hidden_layers": 4}
    config = Gemma3TextConfig(head_dim=8, sliding_window=5, layer_types=kinds, **sizes)
    return Gemma3ForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("build", "masks"), [(lambda: make("gpt2"), 1), (with_both_kinds_of_layers, 2)]
)
def test_a_mask_is_made_once_a_row_and_window_whatever_asks_for_it(build, masks: int) -> None:
    """All layers, their repetition under gradient checkpointing, and a second model."""
    model, sequences = build(), random_trees()
    expected = gradient(response_logps(model, sequences).sum(), model)
    with uncompiled():
        for each in (model, other := copy.deepcopy(model)):
            enable_recomputation(each)
            recompute_without_dropout(each)
            scoring_plan(each)  # its trial has a row of its own
        flex.block_mask.cache_clear()
        for each in (model, other):
            found = gradient(response_logps(each, sequences).sum(), each)
            assert (found - expected).norm() <= 2e-6 * expected.norm()
        assert flex.block_mask.cache_info().misses == masks


@pytest.mark.slow
@quiet
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for a CPU with g++")
@torch.no_grad()
def test_compiled_for_a_cpu_its_outputs_are_those_of_the_trees() -> None:
    """The kernel itself, as far as a CPU has one: forward alone, other code than a GPU's."""
    torch._dynamo.reset()
    flex.kernel.cache_clear()
    options = dict(SHAPES["gemma2"])
    tensors = inputs(ROW, torch.float32, heads=options.pop("heads"), groups=options.pop("groups"))
    with torch._dynamo.config.patch(recompile_limit=8):  # put back afterwards
        found = flex.row_attention(*tensors, ROW, **options)
        assert torch._dynamo.config.recompile_limit == 64
    layout = Layout(ROW, options.pop("window"))
    expected = tree_attention(*tensors, layout, dropout=0.0, **options)
    torch.testing.assert_close(found.transpose(1, 2), expected, rtol=0, atol=1e-5)


def rows_of_many_lengths(number: int) -> list[tuple[Tree, ...]]:
    """Rows of different lengths, the last one of a bucket's own, in three buckets."""
    draw = random.Random(0)
    rows = [
        tuple(
            Tree(draw.randint(10, 60), (draw.randint(1, 30), draw.randint(0, 30)))
            for _ in range(draw.randint(1, 6))
        )
        for _ in range(number - 1)
    ]
    return [*rows, (Tree(200, (50, 6)),)]


@pytest.mark.slow
@quiet
def test_it_is_traced_once_for_each_bucket_whatever_the_lengths_and_windows() -> None:
    """Traced as for a GPU, forward and backward, but run by torch's own operations."""
    torch._dynamo.reset()
    traced = CompileCounterWithBackend("aot_eager")
    kernel = flex.compiled(backend=traced)
    rows = rows_of_many_lengths(12)
    lengths = [sum(tree.num_tokens for tree in trees) for trees in rows]
    buckets = {flex.bucket(length) for length in lengths}
    assert len(set(lengths)) >= 10
    assert buckets == {128, 256, 512}
    assert lengths[-1] in buckets
    for trees, window in zip(rows, [None, 20, 30] * 4, strict=True):
        tensors = inputs(trees, torch.float32, heads=4, groups=2)
        layout = Layout(trees, window)
        with uncompiled(kernel):
            found, _ = packed_attention(nn.Module(), *tensors, layout)
        expected, _ = packed_attention(nn.Module(), *tensors, layout)
        pairs = zip(with_gradients(found, tensors), with_gradients(expected, tensors), strict=True)
        for mine, theirs in pairs:
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    assert traced.frame_count == len(buckets)


@pytest.mark.slow
@quiet
def test_it_is_traced_under_gradient_checkpointing_with_a_soft_cap() -> None:
    """Where the score has a gradient of its own, which is traced amid the recomputed layer."""
    model, sequences = make("gemma2"), random_trees()
    expected = gradient(response_logps(model, sequences).sum(), model)
    torch._dynamo.reset()
    kernel = flex.compiled(backend="aot_eager")
    enable_recomputation(model)
    recompute_without_dropout(model)
    with uncompiled(kernel):
        found = gradient(response_logps(model, sequences).sum(), model)
    assert (found - expected).norm() <= 2e-6 * expected.norm()


def on_gpu(**changes) -> SimpleNamespace:
    """What `serves` asks of a tensor."""
    return SimpleNamespace(
        **{"is_cuda": True, "dtype": torch.bfloat16, "shape": (1, 4, 9, 64)} | changes
    )


@pytest.mark.parametrize(
    ("query", "value", "dropout", "served"),
    [
        (on_gpu(), on_gpu(), 0.0, True),
        (on_gpu(dtype=torch.float32), on_gpu(), 0.0, True),
        (on_gpu(is_cuda=False), on_gpu(), 0.0, False),
        (on_gpu(), on_gpu(), 0.1, False),
        (on_gpu(dtype=torch.float64), on_gpu(), 0.0, False),
        (on_gpu(shape=(1, 4, 9, 8)), on_gpu(), 0.0, False),
        (on_gpu(), on_gpu(shape=(1, 4, 9, 256)), 0.0, False),
    ],
)
def test_the_kernel_serves_gpus_without_dropout(query, value, dropout, served, monkeypatch) -> None:
    monkeypatch.setattr(flex, "has_triton", lambda: True)
    assert flex.serves(query, value, dropout=dropout) is served
    monkeypatch.setattr(flex, "has_triton", lambda: False)
    assert not flex.serves(query, value, dropout=dropout)


def test_a_cpu_never_asks_for_the_kernel(monkeypatch) -> None:
    monkeypatch.setattr(flex, "row_attention", lambda *args, **kwargs: pytest.fail("asked"))
    response_logps(make("gpt2"), random_trees())


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("attention")


def test_the_benchmark_compares_kernels_that_give_the_same(benchmark, monkeypatch) -> None:
    monkeypatch.setattr(benchmark, "WARMUP_ROUNDS", 1)
    monkeypatch.setattr(benchmark, "LAYERS", 1)
    layout, shape = benchmark.Trees(2, 30, 2, 10), benchmark.Shape(4, 2, 16)
    with uncompiled():
        case = benchmark.compare(layout, shape, torch.float32, CPU, rounds=1, seed=0)
    assert case["difference"] <= 1e-5
    assert {name: len(benchmark.timed(case, name)) for name in case["milliseconds"]} == {
        "flex": 1,
        "trees": 1,
        "padded": 1,
    }
    benchmark.show([{"layout": "pairs", "shape": "tiny", "precision": "fp32", **case}])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_benchmark_needs_a_gpu_and_says_so(benchmark, tmp_path, capsys) -> None:
    assert benchmark.main(["--out", str(tmp_path)]) == 2
    assert "GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def wide(name: str) -> nn.Module:
    """A tiny model whose heads have the 16 channels that the kernel needs."""
    if name == "gpt2":
        return make(name)
    torch.manual_seed(0)
    sizes = {**SIZES, "head_dim": 16, "max_position_embeddings": 256}
    model: nn.Module
    if name == "llama":
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    else:
        model = Gemma2ForCausalLM(
            Gemma2Config(**sizes, sliding_window=20, attn_logit_softcapping=3.0)
        )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(4)
    return model.eval()


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """Filled with the lengths of the rows that the kernel was given."""
    found: list[int] = []
    row_attention = flex.row_attention

    def counted(query, *args, **kwargs):
        found.append(query.shape[2])
        return row_attention(query, *args, **kwargs)

    monkeypatch.setattr(flex, "row_attention", counted)
    return found


@pytest.mark.gpu
@needs_gpu
@quiet
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_on_a_gpu_log_probabilities_and_gradients_are_those_of_a_cpu(
    name: str, checkpointing: bool, calls: list[int]
) -> None:
    """In float32, over several rows of different lengths, with the products in full precision."""
    model = wide(name)
    on_device = copy.deepcopy(model).cuda()
    assert scoring_plan(on_device).packed
    if checkpointing:
        enable_recomputation(on_device)
        recompute_without_dropout(on_device)
    for seed in range(3):
        sequences = random_trees(seed)
        for max_tokens in (10_000, 60):
            expected = response_logps(model, sequences, max_tokens=max_tokens)
            found = response_logps(on_device, sequences, max_tokens=max_tokens)
            torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-4)
            wanted = gradient(expected.sum(), model)
            mine = gradient(found.sum(), on_device).cpu()
            assert (mine - wanted).norm() <= 2e-5 * wanted.norm()
    assert max(calls) > flex.TILE
    assert min(calls) < flex.TILE


@pytest.mark.gpu
@needs_gpu
@quiet
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_on_a_gpu_bfloat16_is_as_far_from_float32_as_the_trees_attention(
    name: str, calls: list[int], monkeypatch
) -> None:
    model, sequences = wide(name).cuda(), random_trees()
    exact = response_logps(model, sequences)
    rounded = response_logps(model, sequences, precision="bf16")
    assert calls
    monkeypatch.setattr(flex, "serves", lambda *args, **kwargs: False)
    trees = response_logps(model, sequences, precision="bf16")
    assert (rounded - exact).norm() <= 2 * (trees - exact).norm()


@pytest.mark.gpu
@needs_gpu
@quiet
@pytest.mark.parametrize("name", SHAPES)
def test_on_a_gpu_outputs_and_gradients_are_those_of_the_trees(name: str) -> None:
    options = dict(SHAPES[name])
    made = inputs(ODD_ROW, torch.float32, heads=options.pop("heads"), groups=options.pop("groups"))
    tensors = [x.detach().cuda().requires_grad_() for x in made]
    layout = Layout(ODD_ROW, options.pop("window", None))
    found, _ = packed_attention(nn.Module(), *tensors, layout, **options)
    settings = {"scaling": None, "softcap": None, "dropout": 0.0} | options
    expected = tree_attention(*tensors, layout, **settings)
    pairs = zip(with_gradients(found, tensors), with_gradients(expected, tensors), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


@pytest.mark.gpu
@needs_gpu
@quiet
def test_on_a_gpu_it_is_compiled_once_for_each_bucket() -> None:
    torch._dynamo.reset()
    flex.kernel.cache_clear()
    compiled = torch._dynamo.utils.counters["stats"]
    compiled.clear()
    rows = rows_of_many_lengths(40)
    for trees in rows:
        made = inputs(trees, torch.float32, heads=4, groups=2)
        tensors = [x.detach().cuda().requires_grad_() for x in made]
        output, _ = packed_attention(nn.Module(), *tensors, Layout(trees, None))
        with_gradients(output, tensors)
    buckets = {flex.bucket(sum(tree.num_tokens for tree in trees)) for trees in rows}
    assert compiled["unique_graphs"] == len(buckets)
