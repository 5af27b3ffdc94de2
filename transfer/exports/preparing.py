"""Image files as the input of an exported model, without TensorFlow.

READMEs contain the source of these functions, which therefore use nothing else of this package.
The result is that of ``Preprocess.resize`` within 0.01 gray levels, except for JPEGs, of which
TensorFlow and Pillow decode some pixels a few gray levels apart.
"""

import numpy as np
from PIL import Image, ImageOps


def read(path: str) -> Image.Image:
    """An image file as an upright RGB image."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode.startswith("I"):  # 16 bits of gray, which convert would clip
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    return image.convert("RGBA" if image.mode == "LA" else "RGB").convert("RGB")


def prepare(path: str, height: int, width: int, gray: bool = False) -> np.ndarray:
    """float32 [1, height, width, channels] in 0..255, resized to cover the size and cropped."""
    image = read(path).convert("L" if gray else "RGB")
    sides = (width, image.width), (height, image.height)
    covering, side = max(sides, key=lambda pair: pair[0] / pair[1])
    size = [round(length * covering / side) for length in image.size]
    # In floats: Pillow rounds the pixels of an RGB image, twice.
    bands = [band.convert("F").resize(size, Image.Resampling.BILINEAR) for band in image.split()]
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    crop = (left, top, left + width, top + height)
    return np.stack([np.array(band.crop(crop)) for band in bands], -1)[np.newaxis]
