"""Image files to pixels: decoding, orientation, preprocessing, random views."""
