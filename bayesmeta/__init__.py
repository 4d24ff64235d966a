"""Bayesian meta-learning for people with many small, related data sets."""

__version__ = "0.1.0"
