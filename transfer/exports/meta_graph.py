"""Meta graphs of fine-tuned models, without and with preprocessing in the graph."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import tensorflow as tf
from tensorflow.core.framework.graph_pb2 import GraphDef

from transfer.core.files import write_names
from transfer.graph import SEED, canonical, cut, extract, is_seeded, split_tensor_name
from transfer.graph.network_function import as_input, output_shape
from transfer.images.preprocess import Preprocess, for_card
from transfer.layers.classifier import Classifier
from transfer.layers.graph_layer import GraphLayer
from transfer.layers.head import Head, build_head
from transfer.models.card import Card
from transfer.models.saver import save_meta_graph

tf1 = tf.compat.v1


def save_classifier(classifier: Classifier, prefix: str | Path, card: Card, **options: Any) -> None:
    """Write a classifier as meta graph, checkpoint, card and ``labels.txt``.

    The graph keeps the tensor names of the pretrained graph up to the tap, followed by
    ``head/logits:0`` and ``head/probabilities:0``. It takes preprocessed images and has no dropout.
    Variables are reference variables, which all TensorFlow versions can restore.

    Args:
        classifier: a classifier with a ``Head`` and a backbone made from a meta graph, or one from
            ``Classifier.load`` or ``Classifier.from_model``.
        prefix: checkpoint prefix, the path without ``.meta``.
        card: description of the model; inputs, outputs and preprocessing are filled in.
        **options: step and retention of checkpoints; see ``save_meta_graph``.

    Raises:
        TypeError: if it is another kind of classifier.
    """
    prefix = Path(prefix)
    graph, tensors, values = _to_graph(classifier)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    labels = prefix.with_name("labels.txt")
    write_names(labels, classifier.labels)
    card = replace(
        card,
        input=tensors["input"],
        tap=tensors["tap"],
        feeds={},
        keep_dropout=is_seeded(classifier.backbone.network.graph_def),
        outputs={name: tensors[name] for name in ("logits", "probabilities")},
        image_size=classifier.preprocess.size,
        preprocess=for_card(classifier.preprocess.mode),
        labels=labels.name,
    )
    save_meta_graph(graph, prefix, values, card, **options)


def check_savable(classifier: Classifier) -> None:
    """Check that ``save_classifier`` can write a classifier and ``Classifier.load`` can read it, by
    building the graph without writing files.

    Raises:
        ValueError: if not, with the reason.
    """
    try:
        graph, tensors, _ = _to_graph(classifier)
        written = graph.as_graph_def(add_shapes=True)
        cut(extract(written, tensors["logits"], tensors["input"]), tensors["tap"])
    except (ValueError, TypeError, KeyError, tf.errors.OpError) as error:
        raise ValueError(
            f"a model fine-tuned from this graph cannot be written: {error}"
        ) from error


def save_with_preprocessing(model: Classifier | str | Path, prefix: str | Path) -> Card:
    """Write a classifier as a meta graph with preprocessing in the graph.

    The graph maps ``pixels:0``, float32 ``[batch, height, width, channels]`` in 0..255, of any
    size, to ``probabilities:0``, float32 ``[batch, num_classes]``. ``labels.txt`` is written to the
    same folder.

    Args:
        model: a classifier that ``save_classifier`` can write, or that was loaded from one of its
            files; or the path of such files.
        prefix: checkpoint prefix, the path without ``.meta``.

    Returns:
        The card of the written model.

    Raises:
        FileNotFoundError, ValueError: if the model does not exist.
        TypeError: if it is another kind of classifier.
    """
    classifier = model if isinstance(model, Classifier) else Classifier.load(model)
    if isinstance(classifier.head, Head):
        with tempfile.TemporaryDirectory() as folder:
            save_classifier(classifier, Path(folder) / "model", classifier.card)
            return save_with_preprocessing(Path(folder) / "model", prefix)
    prefix, network = Path(prefix), _whole(classifier)
    graph = tf.Graph()
    with graph.as_default():
        _import_backbone(network, classifier.preprocess, from_pixels=True)
        logits = graph.get_tensor_by_name(network.network.output)
        probabilities = tf.nn.softmax(tf.cast(logits, tf.float32), name="probabilities")
    prefix.parent.mkdir(parents=True, exist_ok=True)
    labels = prefix.with_name("labels.txt")
    write_names(labels, classifier.labels)
    card = replace(
        classifier.card,
        input="pixels:0",
        tap=classifier.backbone.network.output,
        feeds={},
        keep_dropout=is_seeded(network.network.graph_def),
        outputs={"logits": logits.name, "probabilities": probabilities.name},
        image_size=classifier.preprocess.size,
        preprocess="none",
        labels=labels.name,
        sha256={},
    )
    save_meta_graph(graph, prefix, network.values(), card)
    return card


def _whole(classifier: Classifier) -> GraphLayer:
    """Join the backbone and head of a classifier that are parts of one graph.

    Raises:
        TypeError: if they are not parts of one graph.
    """
    first, second = classifier.backbone, classifier.head
    is_cut = isinstance(first, GraphLayer) and isinstance(second, GraphLayer)
    if not is_cut or first.network.output != second.network.input or first.pooling is not None:
        raise TypeError(
            "can save a classifier with a Head, or one from Classifier.load or "
            f"Classifier.from_model; got a {type(first).__name__} with a {type(second).__name__}"
        )
    graph_def = GraphDef()
    graph_def.CopyFrom(first.network.graph_def)
    names = {node.name for node in graph_def.node}
    # Both parts may contain the same constants.
    graph_def.node.extend(n for n in second.network.graph_def.node if n.name not in names)
    layers = {
        name: (known, variable)
        for part in (first, second)
        for name, known, variable in zip(
            part.variable_names, part.network.variables, part.graph_variables, strict=True
        )
    }
    network = replace(
        first.network,
        graph_def=graph_def,
        training=None,
        output=second.network.output,
        variables=tuple(known for known, _ in layers.values()),
    )
    return GraphLayer(network, {name: variable for name, (_, variable) in layers.items()})


def _to_graph(classifier: Classifier) -> tuple[tf.Graph, dict[str, str], dict[str, Any]]:
    """The classifier as a TF1 graph, with the names of its tensors and values of its variables."""
    backbone, head = classifier.feature_extractor, classifier.head
    if not isinstance(head, Head):
        return _whole_to_graph(classifier)
    graph = tf.Graph()
    with graph.as_default():
        input_name = _import_backbone(backbone, classifier.preprocess)
        tap_name = backbone.network.output
        if tap_name == backbone.network.input:
            tap_name = input_name
        features = graph.get_tensor_by_name(tap_name)
        example = graph.get_tensor_by_name(input_name).shape[1:]
        features.set_shape(output_shape(backbone.network, example.as_list()))
        if backbone.pooling == "max" and features.shape.rank == 4:
            features = tf.reduce_max(features, [1, 2], name="max_over_space")
            tap_name = features.name
        elif backbone.pooling == "avg_max" and features.shape.rank == 4:
            parts = [tf.reduce_mean(features, [1, 2]), tf.reduce_max(features, [1, 2])]
            features = tf.concat(parts, -1, name="avg_max_over_space")
            tap_name = features.name
        with tf1.variable_scope("", use_resource=False):
            symbolic: Any = build_head(
                features,
                head.num_classes,
                hidden=head.hidden,
                return_probabilities=True,
            )
    logits, probabilities = symbolic
    names = {"input": input_name, "tap": tap_name}
    names |= {"logits": logits.name, "probabilities": probabilities.name}
    scope = logits.name.rpartition("/")[0]
    values = backbone.values() | {f"{scope}/{name}": v for name, v in head.values().items()}
    return graph, names, values


def _whole_to_graph(classifier: Classifier) -> tuple[tf.Graph, dict[str, str], dict[str, Any]]:
    """The same for a classifier whose head is a part of the graph."""
    whole, features = _whole(classifier), classifier.backbone.network.output
    graph = tf.Graph()
    with graph.as_default():
        input_name = _import_backbone(whole, classifier.preprocess)
        logits = graph.get_tensor_by_name(whole.network.output)
        probabilities = tf.nn.softmax(tf.cast(logits, tf.float32), name="probabilities")
    tap_name = input_name if features == whole.network.input else features
    names = {"input": input_name, "tap": tap_name}
    names |= {"logits": logits.name, "probabilities": probabilities.name}
    return graph, names, whole.values()


def _import_backbone(
    backbone: GraphLayer, preprocess: Preprocess, *, from_pixels: bool = False
) -> str:
    """Import a backbone into the default graph with its original names; returns the input tensor.

    With ``from_pixels`` the input is ``pixels:0``, raw images, which are preprocessed in the graph.

    The graph and its variables are imported at once: names such as ``fc7`` and ``fc7/weights`` are
    both kept only if neither is in the graph before the other.
    """
    network = backbone.network
    operation, index = split_tensor_name(network.input)
    with tf.Graph().as_default() as leaves:
        if from_pixels:
            shape: tuple[int | None, ...] = (None, None, preprocess.channels)
            pixels = tf1.placeholder(tf.float32, [network.batch_size, *shape], name="pixels")
            with tf1.name_scope("preprocess"):
                images = as_input(network, preprocess(pixels))
        else:
            shape = preprocess.shape
            if network.input_shape is not None and len(network.input_shape) == 2:
                shape = network.input_shape[1:]
            images = tf1.placeholder(
                network.input_dtype or tf.float32,
                [network.batch_size, *shape],
                name=operation if index == 0 else "images",
            )
        values = {network.input: images.name}
        if is_seeded(network.graph_def):  # kept dropout: a new seed in each session.run call
            seed = tf1.random.uniform([2], maxval=2**31 - 1, dtype=tf.int32, name="dropout_seed")
            values[SEED] = seed.name
        for name, variable in zip(backbone.variable_names, backbone.graph_variables, strict=True):
            reference = tf1.get_variable(
                name,
                variable.shape,
                tf.as_dtype(variable.dtype),
                tf1.zeros_initializer(),
                trainable=variable.trainable,
                use_resource=False,
            )
            values[canonical(name)] = tf.convert_to_tensor(reference).name
        meta = tf1.train.export_meta_graph(graph=leaves)
    for node in network.graph_def.node:
        copy = meta.graph_def.node.add()
        copy.CopyFrom(node)
        copy.input[:] = [values.get(canonical(edge), edge) for edge in node.input]
    meta.graph_def.versions.CopyFrom(network.graph_def.versions)
    tf1.train.import_meta_graph(meta)
    return images.name
