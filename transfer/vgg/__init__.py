"""The VGG family: architectures, pretraining, published weights."""
