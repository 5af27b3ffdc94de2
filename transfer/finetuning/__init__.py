"""``fine_tune``: from a pretrained network and labelled images to a classifier."""
