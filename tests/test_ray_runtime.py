"""What is told of Ray's failures; the rest of this module is in every test with a cluster."""

import asyncio

import pytest
import ray

from shared_graph import ray_runtime
from shared_graph.errors import ActorUnavailable

TRACE = """Traceback (most recent call last):
  File "worker.py", line 3, in <module>
ModuleNotFoundError: No module named 'shared_graph'
"""
IN_CREATION = ray.exceptions.RayTaskError(
    "Worker.__init__", TRACE, ModuleNotFoundError("No module named 'shared_graph'")
)


@pytest.mark.parametrize(
    "error, sentence, is_final",
    [
        (ray.exceptions.ActorDiedError(IN_CREATION), "ModuleNotFoundError: No module named 'shared_graph'", True),
        (ray.exceptions.ActorUnavailableError("It is away.", None), "It is away.", False),
    ],
)
def test_of_an_actor_that_cannot_be_made_the_reason_is_told(monkeypatch, error, sentence, is_final):
    async def fail(*arguments):
        raise error

    class Handle:
        class start:
            remote = fail

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    with pytest.raises(ActorUnavailable) as caught:
        asyncio.run(ray_runtime.Actor(Handle).call("start"))
    assert sentence in str(caught.value) and caught.value.is_final == is_final
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)
