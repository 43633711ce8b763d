"""Loads, switches and unloads the versions of models."""

from __future__ import annotations

import glob
import os

from shared_graph.models import ModelSource


def stamp_of(source: ModelSource) -> list[tuple]:
    """The files of a version, with their sizes and times."""
    paths = glob.glob(f"{glob.escape(source.folder)}/**", recursive=True) if source.folder else ()
    return [(path, os.path.getsize(path), os.path.getmtime(path)) for path in sorted(paths)]
