"""The package's version, which setup.py reads and which model files name."""

__version__ = "0.1.0"
