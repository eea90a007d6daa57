"""Registers, instructions and times of Triton kernels; not part of the package."""
