"""Inference of the frozen part in int8: full-integer quantization, compared with float32.

Weights are quantized per output channel, activations per tensor, with ranges from a few training
images. Two libraries do this: LiteRT (``litert``), a dependency of this project, and OpenVINO
(``openvino``), an extra, which is faster.
"""
