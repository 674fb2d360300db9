"""Triton kernels of kmeans_route: imported lazily, only where Triton is installed."""
