"""The CPU backend: fused C++ kernels, compiled at first use."""
