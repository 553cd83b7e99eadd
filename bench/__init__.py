"""Benchmark of input-purification defenses against adversarial attacks, across tasks."""

__version__ = "0.1.0"
