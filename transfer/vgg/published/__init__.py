"""Published weights of VGG networks, from the files that they come in.

``containers`` reads files, ``layouts`` tells what is in them and brings it into one layout,
``conversion`` writes that as a model, and ``download`` gets files that Keras publishes.
"""
