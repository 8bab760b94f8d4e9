"""The gate: blocks in which nothing may be compiled that communicates unasked.

Imports `audit` and below.
"""
