"""The version, where the package, its build and the files of a run read it."""

__version__ = "0.1.0"
