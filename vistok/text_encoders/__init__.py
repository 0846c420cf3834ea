"""Frozen text encoders: captions and prompts -> the states that a generator is conditioned on."""
