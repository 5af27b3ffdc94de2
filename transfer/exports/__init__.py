"""Model export: one module per format.

Inputs and outputs of each format:

* meta graph of a run (``meta_graph.save_classifier``): preprocessed images; for further training;
* exported meta graph (``meta_graph.save_with_preprocessing``): ``pixels`` of any size;
* SavedModel: encoded image files, or ``pixels`` of any size;
* TFLite, ONNX and Keras: ``pixels`` of the classifier's size. Their runtimes have no antialiased
  resizing, or not the same.

``pixels`` are RGB (gray if the network takes gray), 0..255, ``[batch, height, width, channels]``.
All formats return ``probabilities``, float32 ``[batch, num_classes]``, except Keras, which returns
logits, so that the model can be trained.

``writing.export`` writes them, and ``verification`` compares each with the classifier.
"""
