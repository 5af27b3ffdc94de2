"""The options of ``pretrain``, with their defaults. Imports no TensorFlow."""

# No `from __future__ import annotations`: command-line flags inherit from these options, and their
# types are looked up in the module of the subclass.
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PretrainOptions:
    """Options of ``pretrain``. ``None`` means the default that the option describes."""

    arch: str = "vgg_small"
    """Architecture: vgg_small (64 px), vgg11, vgg13, vgg16 or vgg19 (224 px)."""
    epochs: int = 30
    """Passes over the training images."""
    small_epochs: int = 0
    """Number of initial epochs on images of small_size: half as many pixels take half the time."""
    small_size: int | None = None
    """Height and width of these images in pixels. The output of the last pooling must have the same
    size as for full-size images: 33 to 64 pixels for vgg_small, 193 to 224 for the others."""
    fc_epochs: int = 0
    """Additional epochs for new fc6, fc7 and fc8 on frozen convolutions, without dropout and mixup.
    The accuracy is nearly the same, and fc7 transfers better."""
    batch_size: int = 128
    """Images per step."""
    learning_rate: float = 0.05
    """Peak learning rate of SGD with momentum: linear warm-up over half an epoch, then cosine decay
    to zero."""
    weight_decay: float = 5e-3
    """Decay of the kernels, times the learning rate per step. With momentum 0.9 it is equivalent to
    an L2 penalty of a tenth of it."""
    dropout: float = 0.2
    """Dropout rate after fc6 and fc7 in training."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes."""
    mixup: float = 0.2
    """Parameter of the Beta distribution of mixup; 0 turns it off."""
    preprocess: str = "torch"
    """Preprocessing: caffe, slim, torch, tf, unit or none."""
    augment: bool = True
    """Train on random shifts and flips."""
    seed: int = 0
    """Seed of weights, order and augmentation."""
    licence: str | None = None
    """Licence of the weights, for the card."""
