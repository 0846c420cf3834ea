"""Generators over tokens: a transformer backbone, an adapter for the token layout, a condition."""
