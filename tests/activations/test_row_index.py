import numpy as np

from transfer.activations.row_index import RowIndex


def random_ids(generator, count):
    return np.frombuffer(generator.bytes(16 * count), "S16")


def test_finds_what_a_dictionary_finds():
    generator = np.random.default_rng(0)
    ids = random_ids(generator, 500)[generator.integers(0, 500, 2000)]  # with duplicates
    usable = generator.permutation(2000)[:1500]
    index = RowIndex(ids, usable)
    asked = np.concatenate([ids, random_ids(generator, 100)])
    first = {}
    for row in usable.tolist():
        first.setdefault(ids[row], row)
    expected = [first.get(id_, -1) for id_ in asked]
    np.testing.assert_array_equal(index.find(asked), expected)
    forgotten = np.unique(index.find(asked))[:300]
    index.forget(forgotten)
    remaining = [row for row in usable.tolist() if row not in {*forgotten.tolist()}]
    again = RowIndex(ids, np.array(remaining))
    np.testing.assert_array_equal(index.find(asked), again.find(asked))


def test_ids_with_the_same_hash_are_told_apart():
    factors = [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F]
    inverse = pow(factors[0], -1, 2**64)
    halves = [((5 - n * factors[1]) * inverse % 2**64, n) for n in range(10)]  # all hash to 5
    ids = np.array(halves, np.uint64).reshape(-1).view("S16")
    index = RowIndex(ids[:8], np.arange(8))
    np.testing.assert_array_equal(index.find(ids), [*range(8), -1, -1])


def test_empty_index_and_empty_question():
    nothing = np.zeros(0, "S16")
    index = RowIndex(nothing, np.zeros(0, np.int64))
    assert index.find([b"a" * 16]).tolist() == [-1]
    assert RowIndex(np.array([b"a" * 16]), np.arange(1)).find([]).tolist() == []
    assert index.find(nothing).tolist() == []
