"""What can be wrong with the content that a config names."""

from __future__ import annotations


class DataError(ValueError):
    """Data that cannot be used; the message counts what is wrong, shows some of it, and names the setting."""


class ModelError(ValueError):
    """A base model that cannot be loaded or built as configured; the message names the fix."""


class ContentError(ValueError):
    """Content that changed while a run was being prepared; the message names what."""
