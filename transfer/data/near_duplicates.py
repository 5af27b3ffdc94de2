"""Near-duplicate detection: finds copies of an image, including re-encoded and resized ones."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import scipy.fft
import scipy.sparse.csgraph

_HASH = 8  # low frequencies per axis in the perceptual hash
_ALIKE = 16  # maximum Hamming distance of the 64-bit hashes of images to compare,
_NEAREST = 64  # each with at most this many others
_DISTANCES_AT_ONCE = 2**24
_PAIRS_AT_ONCE = 4096
_SAME = 4.0  # maximum mean absolute difference of two thumbnails in gray levels,
_SAME_CONTRAST = 0.4  # and in standard deviations, because textures have little contrast
_FLAT = 2.0  # standard deviation below which a thumbnail is considered blank


def near_duplicates(prints: np.ndarray) -> list[list[int]]:
    """Groups of positions of near-duplicates: the same file, or copies of other size or quality.

    Images are compared if their perceptual hashes are similar (the signs of the lowest frequencies
    of a cosine transform: Zauner, "Implementation and Benchmarking of Perceptual Image Hash
    Functions", 2010, section 3.2.1). They are near-duplicates if the mean absolute difference of
    their thumbnails is at most 4 gray levels and at most 0.4 standard deviations.

    Args:
        prints: ``fingerprints.FINGERPRINT`` ``[num_images]``.

    Returns:
        Sorted, disjoint groups of two or more positions.
    """
    # As strings, which ignore trailing zeros: at a fixed length, digests still differ.
    digests = np.ascontiguousarray(prints["sha256"]).view("S32")
    component = np.unique(digests, return_inverse=True)[1].ravel()
    is_comparable = prints["readable"] & (prints["thumbnail"].std((1, 2)) > _FLAT)
    thumbnails = prints["thumbnail"][is_comparable].astype(np.float32)
    positions = np.flatnonzero(is_comparable)
    for pairs in _candidates(_hashes(thumbnails)) if len(positions) else ():
        first, other = pairs[:, component[positions[pairs[0]]] != component[positions[pairs[1]]]]
        is_same = _is_same(thumbnails, first, other)
        if not is_same.any():
            continue
        ends = component[positions[first[is_same]]], component[positions[other[is_same]]]
        graph = scipy.sparse.coo_matrix((np.ones(len(ends[0])), ends), 2 * component.shape)
        component = scipy.sparse.csgraph.connected_components(graph, directed=False)[1][component]
    order = np.argsort(component, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(component[order])) + 1)
    return sorted(group.tolist() for group in groups if len(group) > 1)


def _hashes(thumbnails: np.ndarray) -> np.ndarray:
    """Perceptual hashes, bool ``[num_images, 64]``."""
    low = scipy.fft.dctn(thumbnails, axes=(1, 2))[:, :_HASH, :_HASH].reshape(len(thumbnails), -1)
    return low > np.median(low, axis=1, keepdims=True) if len(low) else low > 0


def _candidates(hashes: np.ndarray) -> Iterable[np.ndarray]:
    """Pairs of positions with similar hashes, int ``[2, pairs]``: each image with its nearest
    neighbours among later images."""
    signs = np.where(hashes, 1, -1).astype(np.float32)
    count = len(signs)
    rows = max(1, _DISTANCES_AT_ONCE // count)
    for start in range(0, count - 1, rows):
        first = np.arange(start, min(start + rows, count))
        agreement = signs[first] @ signs[start:].T  # equal bits minus different bits
        agreement[first[:, None] >= np.arange(start, count)] = -np.inf
        nearest = np.argpartition(-agreement, min(_NEAREST, agreement.shape[1]) - 1)[:, :_NEAREST]
        is_alike = np.take_along_axis(agreement, nearest, 1) >= signs.shape[1] - 2 * _ALIKE
        row, column = np.nonzero(is_alike)
        yield np.stack([first[row], start + nearest[row, column]])


def _is_same(thumbnails: np.ndarray, first: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Whether the thumbnails of each pair are nearly equal, bool ``[len(first)]``."""
    same = np.zeros(len(first), bool)
    for start in range(0, len(first), _PAIRS_AT_ONCE):
        chunk = slice(start, start + _PAIRS_AT_ONCE)
        pictures = thumbnails[first[chunk]]
        limit = np.minimum(_SAME, _SAME_CONTRAST * pictures.std((1, 2)))
        same[chunk] = np.abs(pictures - thumbnails[other[chunk]]).mean((1, 2)) <= limit
    return same
