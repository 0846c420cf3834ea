"""The smallest models that implement the contracts, for tests of the rooms around models."""
