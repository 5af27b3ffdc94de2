"""A classifier as files for others: a module a format.

What each format takes and gives, with ``size`` the classifier's image size:

* meta graph of a run (``meta_graph.save_classifier``): preprocessed images; to train on with;
* meta graph to be shipped (``meta_graph.save_with_preprocessing``): ``pixels``;
* SavedModel: encoded image files, or ``pixels`` of any size;
* TFLite and ONNX: ``pixels`` of the classifier's size. Their runtimes have no antialiased resizing;
* Keras: ``pixels`` of any size, to logits.

``pixels`` are RGB (gray where the network takes gray), 0..255, ``[batch, height, width,
channels]``. All but Keras give ``probabilities``, float32 ``[batch, num_classes]``.

``writing.export`` writes them, and ``verification`` compares each with the classifier.
"""
