"""The kernels of the mixed matmul for Hopper GPUs; `pallas_mosaic_gpu.py` beside this package picks one."""
