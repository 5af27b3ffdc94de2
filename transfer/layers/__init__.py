"""Keras layers: backbone, head and classifier."""
