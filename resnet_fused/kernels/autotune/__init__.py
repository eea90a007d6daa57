"""Which implementation of an op is fastest for a shape: measured at first use and cached on disk."""
