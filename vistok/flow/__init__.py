"""Rectified flow as pure functions: paths, time sampling, solvers, guidance."""
