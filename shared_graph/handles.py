"""Actors as others hold them: found by their names, called, and ended; and what an actor knows of itself.

A call after Ray's end would start another Ray with Ray's defaults, behind our back: so nobody calls it but this module,
``actors``, which makes them, and ``ray_runtime``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import warnings
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from shared_graph.errors import ActorUnavailable, Error, Unavailable, first_sentence
from shared_graph.threads import in_own_thread
from shared_graph.wire import ProcessInfo

WATCH_S = 60.0  # how long one ``death_watch`` lasts: the call of a caller that is gone is not to stay for ever


class Actor:
    """An actor, whose methods are called by name and awaited."""

    def __init__(self, handle: Any):
        self._handle = handle

    async def call(self, method: str, *arguments: Any) -> Any:
        """What the method returns. Raises the Error that it raised, ActorUnavailable, or Unavailable where Ray has no
        room for the arguments or the result."""
        _check_ray()
        try:
            reference = getattr(self._handle, method).remote(*arguments)
        except ray.exceptions.RayError as error:  # such as that there is no room for the arguments
            raise Unavailable(first_sentence(error)) from None
        try:
            return await reference
        except ray.exceptions.RayTaskError as error:
            kind = Unavailable if isinstance(error.cause, ray.exceptions.RayError) else Error  # no room for the result
            failure = error.cause if isinstance(error.cause, Error) else kind(first_sentence(error.cause))
        except ray.exceptions.RayError as error:
            is_final = isinstance(error, ray.exceptions.ActorDiedError)
            why = str(error).strip().rpartition("\n")[2] if is_final else error  # behind its traceback, if it has one
            failure = ActorUnavailable(first_sentence(why))
            failure.is_final = is_final
        try:
            raise failure.with_traceback(None)
        finally:
            del failure  # whose traceback holds this frame, and the arguments

    def end(self) -> None:
        """For good: Ray does not start it anew."""
        _check_ray()
        ray.kill(self._handle)


def _check_ray() -> None:
    if not ray.is_initialized():
        raise ActorUnavailable("Ray has ended.")


async def find_actor(name: str, namespace: str) -> Actor:
    """Raises ActorUnavailable when there is none."""
    _check_ray()
    try:
        return Actor(await asyncio.to_thread(ray.get_actor, name, namespace))
    except (ValueError, ray.exceptions.RayError):  # the second where Ray cannot tell just now
        raise ActorUnavailable(f"There is no {name}.") from None


def this_actor() -> Actor:
    return Actor(ray.get_runtime_context().current_actor)


def is_first_life() -> bool:
    """Has Ray not started this actor anew?"""
    with warnings.catch_warnings(action="ignore"):  # at what Ray itself calls for this
        return not ray.get_runtime_context().was_current_actor_reconstructed


def this_process() -> ProcessInfo:
    """What an actor is. Call it before TensorFlow is imported: it hides the GPUs, which Ray shows to actors that asked
    for none (ray#28215), and TensorFlow would take."""
    node, gpus = ray.get_runtime_context().get_node_id(), ray.get_gpu_ids()
    if not gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return ProcessInfo(os.getpid(), node, gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))


def node_address() -> str:
    return ray.util.get_node_ip_address()


async def kill_process(process: ProcessInfo, actor: Actor) -> None:
    """End the process of an actor that hears nothing, on its own node; Ray by itself would leave it as it is."""
    _check_ray()
    if process.node == ray.get_runtime_context().get_node_id():
        return _kill(process.pid)
    there = NodeAffinitySchedulingStrategy(process.node, soft=False)
    kill = ray.remote(num_cpus=0, scheduling_strategy=there)(_kill_if_silent).remote  # which waits for Ray
    with contextlib.suppress(ray.exceptions.RayError):  # the node is gone as well
        await (await in_own_thread(kill, process.pid, actor._handle))


def _kill_if_silent(pid: int, handle: Any) -> None:
    """On its own node: it may be the network between that and others that was cut, and is not any more."""
    try:
        ray.get(handle.ping.remote(0), timeout=2)
    except ray.exceptions.RayError:
        _kill(pid)


def _kill(pid: int) -> None:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline") as file:
        if file.read().startswith("ray::"):  # else it has ended, and its number is another's by now
            os.kill(pid, signal.SIGKILL)
