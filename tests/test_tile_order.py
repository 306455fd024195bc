"""The order in which the Hopper kernels visit their tiles: on any machine, without running them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu", reason="needs a JAX with Mosaic GPU")

from pallas_kernels.mixed_matmul.mosaic_gpu.config import halved_tiles  # noqa: E402
from pallas_kernels.mixed_matmul.mosaic_gpu.tiles import balancing_turn, channel_tiles_in_order  # noqa: E402

MULTIPROCESSORS = 132
EXTRA = 0.25
"""Time that an 8-bit tile takes beyond a 4-bit one."""


@pytest.mark.parametrize(
    ("token_tiles", "channel_tiles", "band"), [(16, 33, 8), (5, 7, 8), (19, 5, 8), (11, 4, 3), (1, 9, 8)]
)
def test_order_is_that_of_the_kernel(token_tiles: int, channel_tiles: int, band: int):
    places = jnp.arange(token_tiles * channel_tiles)
    of_kernel = jax.vmap(lambda place: plgpu.planar_snake(place, (token_tiles, channel_tiles), 0, band)[1])(places)
    np.testing.assert_array_equal(channel_tiles_in_order(token_tiles, channel_tiles, band), of_kernel)


def busiest(tiles4: int, tiles8: int, token_tiles: int, turn: int) -> float:
    """Time of the multiprocessor with the most to do; every tile, or both its halves, must have one visitor."""
    channel_tiles = tiles4 + tiles8
    channel = channel_tiles_in_order(token_tiles, channel_tiles, 8)
    halved = halved_tiles(channel.size, 128, MULTIPROCESSORS)
    whole = channel.size - halved
    waves, rest = divmod(whole, MULTIPROCESSORS)
    visits, times = [], []
    for multiprocessor in range(MULTIPROCESSORS):
        last = (multiprocessor + waves * turn) % MULTIPROCESSORS
        own = [
            (wave * MULTIPROCESSORS + (multiprocessor + wave * turn) % MULTIPROCESSORS, 0, 1.0) for wave in range(waves)
        ]
        own += [(waves * MULTIPROCESSORS + last, 0, 1.0)] if last < rest else []
        own += [(whole + last // 2, 1 + last % 2, 0.6)] if last < 2 * halved else []
        is8 = [
            (channel[place] + 1) * tiles8 // channel_tiles != channel[place] * tiles8 // channel_tiles
            for place, *_ in own
        ]
        visits += [(place, half) for place, half, _ in own]
        times.append(sum(time * (1 + EXTRA * bool(eight)) for (*_, time), eight in zip(own, is8, strict=True)))
    expected = [(place, 0) for place in range(whole)] + [
        (place, half) for place in range(whole, channel.size) for half in (1, 2)
    ]
    assert sorted(visits) == expected
    return max(times)


@pytest.mark.parametrize(
    ("tiles4", "tiles8", "token_tiles", "gain"),
    [(29, 4, 32, 0.1), (29, 4, 16, 0.1), (101, 12, 32, 0.0), (101, 12, 4, 0.05), (44, 5, 4, 0.0), (267, 30, 32, 0.03)],
)
def test_no_multiprocessor_has_far_more_8_bit_tiles_than_others(
    tiles4: int, tiles8: int, token_tiles: int, gain: float
):
    halved = halved_tiles((tiles4 + tiles8) * token_tiles, 128, MULTIPROCESSORS)
    turn = balancing_turn(tiles4, tiles8, token_tiles, 8, halved, MULTIPROCESSORS, EXTRA)
    assert busiest(tiles4, tiles8, token_tiles, turn) <= (1 - gain) * busiest(tiles4, tiles8, token_tiles, 0)


@pytest.mark.parametrize(("tiles4", "tiles8"), [(32, 0), (0, 32)])
def test_tiles_of_one_kind_need_no_turn(tiles4: int, tiles8: int):
    assert balancing_turn(tiles4, tiles8, 16, 8, 0, MULTIPROCESSORS, EXTRA) == 0
