"""Native Keras: networks as Keras models of stock layers, which run on any backend of Keras.

``conversion.to_keras`` walks the nodes of a network in order. Tensors that do not depend on the
content of the images (weights, arithmetic on weights, shapes) are evaluated once (``values``); all
others become Keras tensors, by one rule for each operation (``linear``, ``normalization``,
``elementwise``, ``reshaping``, ``pooling``). The result is compared with its source
(``checking``) before it is returned.
"""
