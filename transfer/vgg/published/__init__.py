"""Conversion of published weights of VGG networks.

``containers`` reads weight files, ``layouts`` identifies their layout and converts it to a common
one, ``conversion`` writes the model, and ``download`` downloads the files of the ``catalogue``.
"""
