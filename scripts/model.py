"""Finds or makes the model that demo and tests serve."""

from __future__ import annotations

from pathlib import Path

import host

TINY = host.ROOT / ".models" / "tiny"


def tiny(python: Path) -> Path:
    """The tiny random model; `python` must have numpy and tokenizers."""
    host.call(python, host.ROOT / "scripts" / "make_model.py", TINY)
    return TINY
