"""The stages of ``benchmarks.gpu_check``: kernels against float64, what the device can do at most, training."""
