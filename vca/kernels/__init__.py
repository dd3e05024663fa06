"""Both stages of Visual-Contrast Attention as fused operators, for CPUs and GPUs."""
