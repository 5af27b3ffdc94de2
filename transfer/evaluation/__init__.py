"""Evaluation of a classifier: predictions, metrics, explanations."""
