"""Training losses that need more than a model's own output, each usable by any model."""
