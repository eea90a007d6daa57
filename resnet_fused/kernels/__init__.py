"""Triton kernels: one file per family, kernel then launcher. Imported only where Triton runs."""
