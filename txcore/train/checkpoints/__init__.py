"""Checkpoints: saved while a run goes on, checked before they are used.

Imports `launch` and `optim`.
"""
