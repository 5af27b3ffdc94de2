"""Labelled images: sources, splits, batches and checks."""
