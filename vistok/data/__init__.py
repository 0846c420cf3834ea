"""Data sets, shards, cached codes, and the loader that orders their samples."""
