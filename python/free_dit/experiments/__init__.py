"""Measurements of bundled and trained models: comparisons, model cards, sweeps, figures."""
