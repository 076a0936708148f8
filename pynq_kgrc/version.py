"""The version, which setup.py reads as text. It is right without an installed copy too."""

VERSION = "0.1.0"
