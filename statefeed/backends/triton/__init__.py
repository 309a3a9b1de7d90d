"""The fused kernels of a GPU, in Triton: imported at first use on a CUDA device, never with the package."""
