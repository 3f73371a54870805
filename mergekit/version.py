"""The version, as recorded in plans and model cards."""

__version__ = "0.2.0"
