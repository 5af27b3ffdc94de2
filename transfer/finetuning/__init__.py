"""``fine_tune``: fine-tunes a pretrained network on labelled images."""
