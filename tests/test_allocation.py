"""The allocation of 8-bit channels: exact counts, defined order on ties, and what each method may choose."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixllm_jax.quantization.allocation import (
    Segment,
    allocate,
    allocate_global,
    segment_quotas,
    split_by_linear,
)

# A fixed length keeps the number of compilations small; few distinct values make ties the rule.
scores_with_ties = st.lists(st.sampled_from([0.0, 1e-30, 0.25, 0.5, 7.0]), min_size=24, max_size=24)


def segments_of(sizes: list[int]) -> list[Segment]:
    return [
        Segment(layer=i // 2, linear=f"linear{i % 2}", kind=f"kind{i}", channels=n, in_features=64)
        for i, n in enumerate(sizes)
    ]


@given(scores=scores_with_ties, count=st.integers(0, 24))
@settings(max_examples=200, deadline=None)
def test_global_matches_a_sort_in_python(scores: list[float], count: int) -> None:
    chosen = np.asarray(allocate_global(np.array(scores, np.float32), count))
    expected = sorted(range(24), key=lambda i: (-scores[i], i))[:count]
    assert sorted(np.flatnonzero(chosen)) == sorted(expected)


@given(scores=scores_with_ties, share=st.floats(0, 1), sizes=st.sampled_from([[24], [8, 16], [5, 1, 11, 7]]))
@settings(max_examples=200, deadline=None)
def test_per_layer_takes_the_best_of_each_segment(scores: list[float], share: float, sizes: list[int]) -> None:
    chosen = allocate(np.array(scores, np.float32), segments_of(sizes), share, "per-layer")
    count = round(share * 24)
    assert chosen.sum() == count
    start = 0
    for size in sizes:
        part = chosen[start : start + size]
        assert abs(part.sum() - count * size / 24) < 1
        best = sorted(range(size), key=lambda i: (-scores[start + i], i))[: part.sum()]
        assert sorted(np.flatnonzero(part)) == sorted(best)
        start += size


@given(sizes=st.lists(st.integers(1, 10**7), min_size=1, max_size=9), share=st.floats(0, 1))
@settings(deadline=None)
def test_quotas_are_exact_for_models_of_any_size(sizes: list[int], share: float) -> None:
    count = round(share * sum(sizes))
    quotas = segment_quotas(sizes, count)
    assert quotas.sum() == count
    assert all(0 <= quota <= size for quota, size in zip(quotas, sizes, strict=True))


def test_global_concentrates_where_per_layer_cannot() -> None:
    scores = np.array([9, 8, 7, 6, 1, 1, 1, 1], np.float32)
    segments = segments_of([4, 4])
    assert allocate(scores, segments, 0.5, "global").tolist() == [True] * 4 + [False] * 4
    assert allocate(scores, segments, 0.5, "per-layer").tolist() == [True, True, False, False] * 2


def test_a_larger_budget_keeps_the_channels_of_a_smaller_one() -> None:
    scores = np.random.default_rng(0).random(1000).astype(np.float32)
    small, large = (allocate(scores, segments_of([1000]), share) for share in (0.1, 0.2))
    assert small.sum() == 100
    assert large.sum() == 200
    assert (large | small == large).all()


def test_random_depends_on_the_seed_and_ignores_scores() -> None:
    segments = segments_of([500])
    up, down = np.arange(500, dtype=np.float32), np.arange(500, 0, -1, dtype=np.float32)
    first = allocate(up, segments, 0.1, "random", seed=1)
    assert first.sum() == 50
    assert (first == allocate(down, segments, 0.1, "random", seed=1)).all()
    assert (first != allocate(up, segments, 0.1, "random", seed=2)).any()


def test_another_budget_does_not_compile_again() -> None:
    scores = np.random.default_rng(0).random(77).astype(np.float32)
    allocate_global(scores, 3)
    with jax.log_compiles(False):
        before = allocate_global._cache_size()
        allocate_global(scores, 50)
        assert allocate_global._cache_size() == before


def test_split_by_linear_joins_the_segments_of_a_fused_linear() -> None:
    segments = [Segment(0, "qkv_proj", "q", 2, 8), Segment(0, "qkv_proj", "k", 1, 8), Segment(1, "o_proj", "o", 2, 8)]
    split = split_by_linear(np.arange(5), segments)
    assert {key: value.tolist() for key, value in split.items()} == {(0, "qkv_proj"): [0, 1, 2], (1, "o_proj"): [3, 4]}


@pytest.mark.parametrize(
    ("scores", "method", "message"),
    [
        ([1.0], "global", "1 scores for 2"),
        ([1.0, float("nan")], "global", "not finite"),
        ([1.0, 2.0], "best", "unknown"),
    ],
)
def test_bad_arguments(scores: list[float], method: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        allocate(np.array(scores, np.float32), segments_of([2]), 0.5, method)
