"""Steps: traced, refused or compiled, run, evaluated and proved.

Imports x.
"""
