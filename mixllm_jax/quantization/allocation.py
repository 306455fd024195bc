"""Which output channels get 8 bits: the global choice of the method, and two others to compare it with.

All are pure functions of the scores of all output channels of the model in one vector. The order of the vector
(layer, then linear, then channel) is also the order that breaks ties: the earlier channel wins.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import jax
import jax.numpy as jnp
import numpy as np

ALLOCATIONS = ("global", "per-layer", "random")


@dataclass(frozen=True)
class Segment:
    """A run of output channels that were one projection in the original model (``q``, ``k``, ..., ``down``).

    Attributes:
        layer: index of the decoder block.
        linear: name of the fused linear of the block, such as ``qkv_proj``.
        kind: name of the original projection, such as ``v``.
        channels: number of output channels.
        in_features: weights of each channel.
    """

    layer: int
    linear: str
    kind: str
    channels: int
    in_features: int


@jax.jit
def allocate_global(scores: jax.Array, count: jax.Array | int) -> jax.Array:
    """Gives 8 bits to the ``count`` channels with the highest scores of the whole model (paper section 3.2).

    Args:
        scores: float [channels], one score per output channel, finite, highest is most salient.
        count: number of channels to choose, 0..channels; traced, so that another budget does not recompile.

    Returns:
        bool [channels] with exactly ``count`` true; of equal scores the one with the lower index is chosen.
    """
    order = jnp.argsort(scores, descending=True, stable=True)
    chosen = jnp.arange(scores.shape[0]) < count
    return jnp.zeros(scores.shape, bool).at[order].set(chosen, unique_indices=True)


def segment_quotas(sizes: Sequence[int], count: int) -> np.ndarray:
    """How many of ``count`` channels each segment gets if all get the same share, int32 [segments].

    Quotas are differences of the rounded-down cumulative share, so that each is within one channel of its share and
    the total is exact: a comparison with :func:`allocate_global` is then one of equal size.
    """
    total = sum(sizes)
    bounds = [end * count // total for end in accumulate(sizes, initial=0)]
    return np.diff(np.array(bounds, dtype=np.int64)).astype(np.int32)


@jax.jit
def allocate_per_segment(scores: jax.Array, segments: jax.Array, quotas: jax.Array) -> jax.Array:
    """Gives 8 bits to the highest scores *within each segment* (no global competition).

    Args:
        scores: float [channels], finite.
        segments: int32 [channels], ascending, the segment each channel belongs to.
        quotas: int32 [segments], channels to choose in each, at most its size (:func:`segment_quotas`).

    Returns:
        bool [channels]; of equal scores the one with the lower index is chosen.
    """
    total = scores.shape[0]
    # Sorted by segment first and by falling score within it, a channel's rank is its distance from the segment start.
    order = jnp.lexsort((-scores, segments))
    rank = jnp.arange(total) - jnp.searchsorted(segments, segments)
    return jnp.zeros((total,), bool).at[order].set(rank < quotas[segments], unique_indices=True)


def allocate(
    scores: np.ndarray, segments: Sequence[Segment], share: float, method: str = "global", seed: int = 0
) -> np.ndarray:
    """Chooses the 8-bit channels of a model.

    Args:
        scores: float [channels], salience of every output channel, in the order of ``segments``.
        segments: the projections of all blocks, in order; their channels add up to ``len(scores)``.
        share: share of the channels that get 8 bits; the count is ``round(share * channels)``, exactly.
        method: ``global``, ``per-layer`` (the same share of every segment) or ``random`` (for comparison).
        seed: of the random choice.

    Returns:
        bool [channels], true where a channel gets 8 bits.

    Raises:
        ValueError: scores of another length than the segments, not finite, or an unknown method.
    """
    sizes = [segment.channels for segment in segments]
    if len(scores) != sum(sizes):
        raise ValueError(f"there are {len(scores)} scores for {sum(sizes)} output channels")
    if not np.isfinite(scores).all():
        raise ValueError(f"{int((~np.isfinite(scores)).sum())} of {len(scores)} salience scores are not finite")
    count = round(share * len(scores))
    if method == "global":
        return np.asarray(allocate_global(jnp.asarray(scores, jnp.float32), count))
    if method == "per-layer":
        owner = jnp.asarray(np.repeat(np.arange(len(sizes), dtype=np.int32), sizes))
        return np.asarray(allocate_per_segment(jnp.asarray(scores, jnp.float32), owner, segment_quotas(sizes, count)))
    if method == "random":
        drawn = jax.random.uniform(jax.random.key(seed), (len(scores),))
        return np.asarray(allocate_global(drawn, count))
    raise ValueError(f"unknown allocation {method!r}: expected one of {', '.join(ALLOCATIONS)}")


def split_by_linear(values: np.ndarray, segments: Sequence[Segment]) -> dict[tuple[int, str], np.ndarray]:
    """Cuts a vector over all channels into one array per fused linear, keyed by ``(layer, linear)``."""
    pieces: dict[tuple[int, str], list[np.ndarray]] = {}
    start = 0
    for segment in segments:
        pieces.setdefault((segment.layer, segment.linear), []).append(values[start : start + segment.channels])
        start += segment.channels
    return {key: np.concatenate(parts) for key, parts in pieces.items()}
