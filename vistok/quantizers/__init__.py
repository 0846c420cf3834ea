"""Quantizers: one file each, all in float32 whatever the autocast."""
