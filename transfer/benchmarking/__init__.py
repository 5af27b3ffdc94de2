"""Benchmarks of cuts: the machine's limits, a baseline with ``keras.Model.fit``, the report."""
