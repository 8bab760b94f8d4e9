"""The version of txcore, below all that names it."""

VERSION = "0.1.0"
