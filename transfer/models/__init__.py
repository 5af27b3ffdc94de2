"""Models on disk: formats, cards, checkpoints, and what is in them."""
