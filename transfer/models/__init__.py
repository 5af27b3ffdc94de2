"""Models on disk: file formats, cards, checkpoints and inspection."""
