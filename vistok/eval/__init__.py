"""Metrics with a stated protocol: ``python -m vistok.eval --help``."""
