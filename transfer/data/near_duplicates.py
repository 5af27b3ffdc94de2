"""Near-duplicate detection: finds copies of an image, including re-encoded and resized ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import scipy.fft
import scipy.linalg
import scipy.sparse.csgraph
import scipy.spatial

_SAME = 4.0  # maximum mean absolute difference of two thumbnails in gray levels,
_SAME_CONTRAST = 0.4  # and in standard deviations, because textures have little contrast
_FLAT = 2.0  # standard deviation below which a thumbnail is considered blank
_HASH = 8  # low frequencies per axis in the perceptual hash
_ALIKE = 16  # maximum Hamming distance of the 64-bit hashes
_BLOCKS = 4  # per axis of a thumbnail, from whose sums the search starts
_NEAREST = 64  # at most this many neighbours of an image are compared with it
_BUCKET_AXES = 4  # axes by which images are put into buckets
_IMAGES_AT_ONCE = 4096
_PAIRS_AT_ONCE = 4096
_PAIRS_PER_MERGE = 2**16
_LIMIT = _SAME * 32 * 32  # maximum L1 distance of two thumbnails


def near_duplicates(prints: np.ndarray) -> list[list[int]]:
    """Groups of positions of near-duplicates: the same file, or copies of other size or quality.

    Two images are near-duplicates if the mean absolute difference of their thumbnails is at most 4
    gray levels and at most 0.4 standard deviations, and their perceptual hashes are similar (the
    signs of the lowest frequencies of a cosine transform: Zauner, "Implementation and Benchmarking
    of Perceptual Image Hash Functions", 2010, section 3.2.1). Groups are connected components.

    Not all pairs are compared. The L1 distance of two thumbnails bounds the difference of any sums
    and differences of their blocks, so that a k-d tree of the Walsh transform of the block sums
    finds all pairs within 4 gray levels. Two exceptions bound the work. Where an image has more
    than 64 neighbours, e.g. frames of a camera that does not move, images that show the same
    picture as another one are represented by it. And images without coarse structure, such as
    noise, are compared only if each axis differs by at most one gray level, as it does in copies of
    other size or quality.

    Args:
        prints: ``fingerprints.FINGERPRINT`` ``[num_images]``.

    Returns:
        Sorted, disjoint groups of two or more positions.
    """
    # As strings, which ignore trailing zeros: at a fixed length, digests still differ.
    digests = np.ascontiguousarray(prints["sha256"]).view("S32")
    component = np.unique(digests, return_inverse=True)[1].ravel()
    same = [np.zeros((2, 0), np.int64)]
    for pairs in _candidates(prints):
        pairs = pairs[:, component[pairs[0]] != component[pairs[1]]]
        for start in range(0, pairs.shape[1], _PAIRS_AT_ONCE):
            some = pairs[:, start : start + _PAIRS_AT_ONCE]
            same.append(some[:, _are_same(*prints["thumbnail"][some])])
        if sum(part.shape[1] for part in same) > _PAIRS_PER_MERGE:
            component, same = _merged(component, same), same[:1]
    component = _merged(component, same)
    order = np.argsort(component, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(component[order])) + 1)
    return sorted(group.tolist() for group in groups if len(group) > 1)


def _candidates(prints: np.ndarray) -> Iterator[np.ndarray]:
    """Pairs of positions that may be near-duplicates, int64 ``[2, pairs]``, the smaller first."""
    positions, points, keys = _points(prints)
    if not len(positions):
        return
    # Of images with equal thumbnails, one stands for all: a k-d tree cannot separate equal points.
    order = np.argsort(keys, kind="stable")
    is_copy = np.append(False, np.diff(keys[order]) == 0)
    yield positions[np.stack([order[:-1], order[1:]])[:, is_copy[1:]]]
    rest = np.sort(order[~is_copy])
    positions, points = positions[rest], points[rest]
    represented = np.zeros(len(positions), bool)
    for bucket in _full_buckets(points):
        for pairs in _with_representatives(prints["thumbnail"], positions[bucket]):
            yield pairs
            represented[np.searchsorted(positions, pairs[1])] = True
    positions, points = positions[~represented], points[~represented]
    tree = scipy.spatial.cKDTree(points)
    # Images without coarse structure, such as noise, are close to one another in all axes: a search
    # with the full limit would visit most of them.
    is_uniform = (points[:, 1:] ** 2).mean(1) < _LIMIT**2
    for mask, limit in ((~is_uniform, _LIMIT), (is_uniform, _LIMIT / 4)):
        chosen = np.flatnonzero(mask)
        for start in range(0, len(chosen), _IMAGES_AT_ONCE):
            some = chosen[start : start + _IMAGES_AT_ONCE]
            distances, neighbours = tree.query(
                points[some], _NEAREST + 1, p=np.inf, distance_upper_bound=limit + 1, workers=-1
            )
            row, column = np.nonzero(distances <= limit)
            first, other = some[row], neighbours[row, column]
            yield np.sort(positions[np.stack([first, other])[:, first != other]], axis=0)


def _points(prints: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For readable images that are not blank: positions, int64 ``[n]``; the Walsh transform of the
    block sums of their thumbnails, float64 ``[n, blocks]``, of which the first is the sum of all;
    and hashes of their thumbnails, uint64 ``[n]``."""
    height, width = prints["thumbnail"].shape[1:]
    factors = np.random.default_rng(0).integers(2**64, size=height * width // 8, dtype=np.uint64)
    signs = scipy.linalg.hadamard(_BLOCKS)
    parts = []
    for start in range(0, max(1, len(prints)), _IMAGES_AT_ONCE):
        some = prints[start : start + _IMAGES_AT_ONCE]
        chosen = np.flatnonzero(some["readable"] & (some["thumbnail"].std((1, 2)) > _FLAT))
        thumbnails = some["thumbnail"][chosen]
        keys = (thumbnails.reshape(-1, height * width).view(np.uint64) * (factors | 1)).sum(1)
        blocks = thumbnails.reshape(-1, _BLOCKS, height // _BLOCKS, _BLOCKS, width // _BLOCKS)
        sums = signs @ blocks.sum((2, 4), dtype=np.float64) @ signs
        parts.append((start + chosen, sums.reshape(-1, _BLOCKS**2), keys))
    positions, points, keys = map(np.concatenate, zip(*parts, strict=True))
    return positions, points, keys


def _full_buckets(points: np.ndarray) -> Iterator[np.ndarray]:
    """Positions of points in each cell of a coarse grid that has more than ``_NEAREST`` points."""
    axes = np.argsort(-points.std(0))[:_BUCKET_AXES]
    cells = np.floor(points[:, axes] / _LIMIT).astype(np.int64)
    _, cell, counts = np.unique(cells, axis=0, return_inverse=True, return_counts=True)
    order = np.argsort(cell.ravel(), kind="stable")
    ends = np.cumsum(counts)
    for number in np.flatnonzero(counts > _NEAREST):
        yield order[ends[number] - counts[number] : ends[number]]


def _with_representatives(thumbnails: np.ndarray, bucket: np.ndarray) -> Iterator[np.ndarray]:
    """Pairs of a representative and an image of the bucket that shows the same picture, as long as
    a representative has more than ``_NEAREST`` such images."""
    while len(bucket) > _NEAREST:
        first, others = bucket[0], bucket[1:]
        is_same = np.concatenate(
            [
                _are_same(thumbnails[[first]], thumbnails[others[start : start + _PAIRS_AT_ONCE]])
                for start in range(0, len(others), _PAIRS_AT_ONCE)
            ]
        )
        if is_same.sum() <= _NEAREST:
            return
        yield np.stack([np.full(is_same.sum(), first), others[is_same]])
        bucket = others[~is_same]


def _are_same(first: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Whether two thumbnails show the same picture, bool ``[pairs]``.

    Args:
        first: uint8 ``[pairs, height, width]``, or ``[1, height, width]``.
        other: uint8 ``[pairs, height, width]``.
    """
    first, other = first.astype(np.float32), other.astype(np.float32)
    limit = np.minimum(_SAME, _SAME_CONTRAST * first.std((1, 2)))
    is_same = np.abs(first - other).mean((1, 2)) <= limit
    first = np.broadcast_to(first, other.shape)
    differing = _hashes(first[is_same]) != _hashes(other[is_same])
    is_same[is_same] = differing.sum(-1) <= _ALIKE
    return is_same


def _hashes(thumbnails: np.ndarray) -> np.ndarray:
    """Perceptual hashes, bool ``[num_images, 64]``."""
    if not len(thumbnails):
        return np.zeros((0, _HASH**2), bool)
    low = scipy.fft.dctn(thumbnails, axes=(1, 2))[:, :_HASH, :_HASH].reshape(len(thumbnails), -1)
    return low > np.median(low, axis=1, keepdims=True)


def _merged(component: np.ndarray, same: Iterable[np.ndarray]) -> np.ndarray:
    """Number of the component of each image, int ``[num_images]``, after merging the components
    of pairs of images."""
    ends = component[np.concatenate([*same], axis=1)]
    graph = scipy.sparse.coo_matrix((np.ones(len(ends[0]), bool), ends), 2 * component.shape)
    return scipy.sparse.csgraph.connected_components(graph, directed=False)[1][component]
