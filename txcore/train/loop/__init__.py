"""The training loop: batches in, steps out, records to the loggers, signals between two steps.

Imports x.
"""
