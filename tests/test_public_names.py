import transfer


def test_public_names_are_these():
    assert transfer.__all__ == [
        "Backbone",
        "Card",
        "Classifier",
        "ForbiddenOpError",
        "Head",
        "MetaGraph",
        "Preprocess",
        "build_head",
        "load_meta_graph",
        "save_meta_graph",
    ]
    assert all(hasattr(transfer, name) for name in transfer.__all__)
