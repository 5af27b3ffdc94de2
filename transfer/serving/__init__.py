"""A fine-tuned model behind HTTP: a page for people, and the REST API of TensorFlow Serving."""
