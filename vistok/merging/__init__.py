"""Fewer tokens in other people's vision transformers: merging, pruning, and bound tokens for text-to-image."""
