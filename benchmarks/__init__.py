"""Benchmarks: each op, and whole models, against eager PyTorch in the same process."""
