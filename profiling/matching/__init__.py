"""Which compiled collective is which declared one, and what became of each.

Imports `declared` and `hlo`.
"""
