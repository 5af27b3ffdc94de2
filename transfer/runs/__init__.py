"""Runs: their folders, their images, and their interruption."""
