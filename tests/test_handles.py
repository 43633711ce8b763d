"""What is told of Ray's failures when an actor is looked for, or called."""

import asyncio

import pytest
import ray

from shared_graph.errors import ActorUnavailable, Error, Unavailable
from shared_graph.handles import Actor, find_actor

TRACE = """Traceback (most recent call last):
  File "worker.py", line 3, in <module>
ModuleNotFoundError: No module named 'shared_graph'
"""


@pytest.fixture(autouse=True)
def ray_runs(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: True)


def call(remote) -> None:
    """Of an actor whose handle does this."""

    class Handle:
        class start:
            pass

    Handle.start.remote = staticmethod(remote)
    asyncio.run(Actor(Handle).call("start", b"argument"))


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
def test_of_an_actor_that_cannot_be_made_the_reason_is_told(error, sentence, is_final):
    async def fail(*arguments):
        raise error

    with pytest.raises(ActorUnavailable) as caught:
        call(fail)
    assert sentence in str(caught.value) and caught.value.is_final == is_final
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


def test_of_an_error_that_nobody_foresaw_it_is_told_and_not_where_ray_saw_it():
    error = ray.exceptions.RayTaskError("ray::Worker.start()", TRACE, OSError(28, "No space left"))

    async def fail(*arguments):
        raise error.as_instanceof_cause()

    with pytest.raises(Error, match="No space left") as caught:
        call(fail)
    assert type(caught.value) is Error and "\x1b" not in str(caught.value)


def test_where_ray_has_no_room_for_the_arguments_that_is_told():
    def fail(*arguments):
        raise ray.exceptions.OutOfDiskError("Local disk is full\nThe object cannot be created.")

    with pytest.raises(Unavailable, match="Local disk is full") as caught:
        call(fail)
    assert not isinstance(caught.value, ActorUnavailable) and "created" not in str(caught.value)


def test_where_ray_has_no_room_for_the_result_that_is_told():
    error = ray.exceptions.RayTaskError(
        "ray::Worker.start()", TRACE, ray.exceptions.OutOfDiskError("Local disk is full")
    )

    async def fail(*arguments):
        raise error

    with pytest.raises(Unavailable, match="Local disk is full") as caught:
        call(fail)
    assert not isinstance(caught.value, ActorUnavailable)


def test_an_actor_of_which_ray_cannot_tell_just_now_is_unavailable(monkeypatch):
    """A shared cluster did not end any more after that."""

    def get_actor(name: str, namespace: str):
        raise ray.exceptions.GetTimeoutError("There was timeout in getting the actor handle")

    monkeypatch.setattr(ray, "get_actor", get_actor)
    with pytest.raises(ActorUnavailable):
        asyncio.run(find_actor("worker 0", "namespace"))
