"""Ascent: post-train the models behind agents and prove every step by measurement."""

__version__ = "0.1.0"
