"""What a user can put right before anything is served. Imports nothing."""

from __future__ import annotations


class ModelRefused(Exception):
    """The model cannot be served; the text says why and what to do."""
