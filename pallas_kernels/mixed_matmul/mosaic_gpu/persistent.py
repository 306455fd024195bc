"""What the signed and the unsigned kernel have in common: the launch, and who does what in a block.

One block runs on each multiprocessor and walks over its tiles (see tiles.py). Its warpgroups have roles from the start
to the end, and meet at barriers alone:

    warpgroup 0 .. compute_warpgroups - 1      compute 64 channels each of every tile
    the last warpgroup, warp 0                 keeps the ring of stages full
                        warps 1 to 3           idle, or store the tiles that are handed over to them
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.activations import QuantizedActivations
from pallas_kernels.mixed_matmul.mosaic_gpu.config import CHANNELS_PER_WARPGROUP, MosaicGpuConfig
from pallas_kernels.mixed_matmul.mosaic_gpu.operands import COMPILER_PARAMS, Index, Ref
from pallas_kernels.mixed_matmul.mosaic_gpu.tiles import Tile, TiledKernel
from pallas_kernels.packing import PackedWeight

COMPUTE_REGISTERS, LOADER_REGISTERS = 240, 24
"""Registers of a thread: 2 x 240 + 24 is what the 512 of a multiprocessor's 65536 / 128 allow."""


def launch(
    kernel_type: type[PersistentKernel],
    activations: QuantizedActivations,
    weight: PackedWeight,
    bias: jax.Array | None,
    out_dtype: jnp.dtype,
    config: MosaicGpuConfig,
    multiprocessors: int,
) -> jax.Array:
    """Quantised linear layer `[tokens, out_features]`; see `pallas_kernels.mixed_matmul.api.mixed_matmul`.

    Args:
        kernel_type: The kernel that the settings are for.
        activations: In the layout that it takes.
        weight: `[out_features, in_features]`, with the sums of its codes where the kernel wants them.
        bias: Float `[out_features]`, or None.
        out_dtype: bfloat16, float16 or float32.
        config: Settings.
        multiprocessors: Of the device.
    """
    config = config.fitted(activations.tokens)
    sizes = (activations.tokens, weight.n4, weight.n8, weight.num_groups, weight.group_size)
    kernel = kernel_type(*sizes, out_dtype.itemsize, config)
    operands = kernel.operands(activations, weight) | kernel.output_operands(weight, bias)
    run = plgpu.kernel(
        functools.partial(kernel.body, tuple(operands)),
        out_type=jax.ShapeDtypeStruct((activations.tokens, weight.out_features), out_dtype),
        scratch_types=kernel.scratch(),
        grid=(kernel.blocks(multiprocessors),),
        grid_names=("multiprocessor",),
        num_threads=config.compute_warpgroups + 1,
        thread_name="warpgroup",
        kernel_name="mixed_matmul_mosaic_gpu",
        compiler_params=COMPILER_PARAMS,
    )
    return run(*operands.values())


@dataclasses.dataclass(frozen=True)
class PersistentKernel(TiledKernel, abc.ABC):
    """The kernel of one problem, but for what its loading and its computing warps do with a tile."""

    @abc.abstractmethod
    def scratch(self) -> dict[str, Any]:
        """Shared memory: the ring's stages and their barriers, and room for finished tiles."""

    @abc.abstractmethod
    def load_tile(self, inputs: dict[str, Ref], scratch: dict[str, Any], tile: Tile) -> None:
        """Copy the groups of a tile into the ring, each as soon as its slot is empty; called by one warp."""

    @abc.abstractmethod
    def compute_tile(
        self, inputs: dict[str, Ref], out: Ref, scratch: dict[str, Any], first_channel: Index, tile: Tile
    ) -> None:
        """Compute 64 channels of a tile, from `first_channel` on, and store them; called by one warpgroup."""

    def visitor_that_stores(
        self, inputs: dict[str, Ref], out: Ref, scratch: dict[str, Any]
    ) -> Callable[[Tile], None] | None:
        """What the warps that do not load do with each tile, if anything."""
        return None

    def body(self, names: tuple[str, ...], *refs: Ref, **scratch: Any) -> None:
        """The kernel: the first warpgroups compute, one warp of the last one loads."""
        inputs, out = dict(zip(names, refs[:-1], strict=True)), refs[-1]
        warpgroup, multiprocessor = lax.axis_index("warpgroup"), lax.axis_index("multiprocessor")
        multiprocessors = lax.axis_size("multiprocessor")

        @pl.when(warpgroup == self.config.compute_warpgroups)
        def _loader() -> None:
            plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")

            # One warp, since the instructions of the other three would take issue slots from the compute warps.
            @plgpu.warp_map
            def _warps(warp: Index) -> None:
                @pl.when(warp == 0)
                def _first_warp() -> None:
                    self.for_each_tile(
                        multiprocessor, multiprocessors, functools.partial(self.load_tile, inputs, scratch)
                    )

                visit = self.visitor_that_stores(inputs, out, scratch)
                if visit is not None:
                    pl.when(warp > 0)(lambda: self.for_each_tile(multiprocessor, multiprocessors, visit))

        @pl.when(warpgroup < self.config.compute_warpgroups)
        def _compute() -> None:
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            self.for_each_tile(
                multiprocessor,
                multiprocessors,
                functools.partial(self.compute_tile, inputs, out, scratch, warpgroup * CHANNELS_PER_WARPGROUP),
            )
