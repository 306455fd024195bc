"""The kernels of the mixed matmul for Hopper GPUs; `pallas_mosaic_gpu.py` beside this package picks and launches one.

    split/      few tokens: warpgroups and clusters of blocks split the input channels of a tile
    signed/     more tokens: a warpgroup takes all groups of a tile; signed operands
    unsigned/   many tokens: the same with unsigned operands, and warps of their own that store

Words that all of them use:

- A tile is 64 or 128 output channels of one bit width x some tokens; a warpgroup computes 64 channels of it.
- A stage is what one group of a tile needs: codes, scales, zero points, activations and their scales. Loading warps
  bring stages into the slots of a ring, computing warpgroups read them there. The protocol is in `ring.py`.
- A part is what one dot (`wgmma`) computes of a tile: 64 channels x `tokens`. Its registers are in `fragments.py`.
- A block of groups, or a run of them, is what the loop has in straight-line code: its slots follow each other.
- A row of the weight is a packed row, one channel; its column of the output is `channel_order[row]`.

A kernel has three levels, each in modules of its own:

    loops and barriers      ring, tiles, persistent, */kernel, split/loop      Pallas: traced, once a launch shape
    calls                   calls, unsigned/calls, columns, unsigned/hand_over  `plgpu.inline_mgpu`: from Pallas to MLIR
    what a thread does      arithmetic, fragments, staging, */store, mlir       MLIR and PTX, with its own registers

The first two read as Python of one thread of a warp or a warpgroup. The last one computes nothing itself: its functions
emit code, in the order in which they are called.
"""
