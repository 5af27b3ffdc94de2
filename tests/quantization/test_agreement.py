"""Comparison of int8 features with those of float32."""

from __future__ import annotations

import numpy as np
import pytest

from transfer.quantization.agreement import MAX_ERROR, Agreement, DisagreementError, feature_error


def test_error_is_the_root_of_the_unexplained_part_of_the_variance():
    from sklearn.metrics import r2_score

    generator = np.random.default_rng(0)
    expected = generator.normal(3, 1, [50, 7]).astype(np.float32)
    actual = expected + generator.normal(0, 0.2, expected.shape).astype(np.float32)
    of_all = r2_score(expected, actual, multioutput="variance_weighted")
    assert feature_error(expected, actual) == pytest.approx((1 - of_all) ** 0.5, rel=1e-5)


def test_maps_are_averaged_as_a_head_does():
    maps = np.random.default_rng(0).random([4, 3, 3, 2]).astype(np.float32)
    turned = maps[:, ::-1]
    assert feature_error(maps, turned) == pytest.approx(0, abs=1e-6)


def test_features_that_ignore_the_image_are_refused():
    features = 100 + np.random.default_rng(0).random([8, 2])
    constant = np.broadcast_to(features.mean(0), features.shape)
    with pytest.raises(DisagreementError, match=rf"by 1.00 of .* expected at most {MAX_ERROR}"):
        Agreement(feature_error(features, constant)).check()


def test_features_that_are_not_numbers_are_refused():
    features = np.random.default_rng(0).random([8, 2])
    with pytest.raises(DisagreementError, match="nan"):
        Agreement(feature_error(features, features * np.nan)).check()
