import transfer


def test_public_names_are_these():
    assert transfer.__all__ == [
        "Backbone",
        "Card",
        "Classifier",
        "Features",
        "FineTuneResult",
        "ForbiddenOpError",
        "Head",
        "MetaGraph",
        "Prediction",
        "Preprocess",
        "build_head",
        "convert",
        "evaluate",
        "export",
        "extract_features",
        "fine_tune",
        "load_meta_graph",
        "open_source",
        "predict",
        "save_meta_graph",
    ]
    assert sorted(dir(transfer)) == sorted(transfer.__all__)
    assert all(getattr(transfer, name).__doc__ for name in transfer.__all__)
