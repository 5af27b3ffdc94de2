"""Image files to pixels: decoding, orientation, preprocessing, data augmentation."""
