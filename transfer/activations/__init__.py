"""Activations at a cut, computed once and cached."""
