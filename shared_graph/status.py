"""What this process knows of the cluster, and tells."""

from __future__ import annotations

import dataclasses
from typing import Any

from shared_graph.batcher import Line


@dataclasses.dataclass(eq=False)
class Member:
    """What this process knows of one actor."""

    kind: str  # "parameter server" or "worker"
    index: int
    state: str = "starting"  # ready, hung
    restarts: int = 0
    pid: int | None = None  # of its last life
    about: dict[str, Any] = dataclasses.field(default_factory=dict)  # this life
    edition: int = 0  # of what the first parameter server has
    actor: Any = None
    line: Line | None = None  # to a worker

    def __str__(self) -> str:
        return f"{self.kind} {self.index}"
