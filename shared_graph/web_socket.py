"""The WebSocket under Starlette: many requests at once on each, answered by their ids."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketDisconnected

from shared_graph.bodies import HttpBody
from shared_graph.cluster import Cluster
from shared_graph.http_api import Call, may_open_socket, own_error
from shared_graph.messages import BadMessage, error_text, read_message, result_text

RESTARTING = 1012  # why a WebSocket is closed when the server ends


class WebSockets:
    """Those that are open. ``start`` gives the cluster, which it starts if need be."""

    def __init__(self, start: Callable[[], Cluster]):
        self._start = start
        self._readers: dict[asyncio.Task, asyncio.Task] = {}  # by the task of a socket, the one that reads from it

    async def serve(self, websocket: WebSocket) -> None:
        """Until it is closed."""
        cluster = self._start()
        if not may_open_socket(cluster.options, websocket.headers.get("origin"), websocket.headers.get("host")):
            return await websocket.close()  # before it is open: 403
        await websocket.accept()
        try:
            async with asyncio.TaskGroup() as requests:  # a client that goes away takes all of its requests along
                task = asyncio.current_task()
                self._readers[task] = requests.create_task(self._read(websocket, cluster, requests))
            await websocket.close(RESTARTING)
        except* (WebSocketDisconnect, WebSocketDisconnected):  # the second one: answers behind the first that failed
            pass
        finally:
            self._readers.pop(task, None)

    async def finish(self, timeout_s: float) -> None:
        """Read no more; returns when all that is under way is answered and the sockets are closed."""
        for reader in self._readers.values():
            reader.cancel()
        if self._readers:
            await asyncio.wait(list(self._readers), timeout=timeout_s)

    async def _read(self, websocket: WebSocket, cluster: Cluster, requests: asyncio.TaskGroup) -> None:
        slots = asyncio.Semaphore(cluster.options.max_queue)
        while True:
            await slots.acquire()  # one that does not read its answers is not read from either
            event = await websocket.receive()
            if event["type"] == "websocket.disconnect":
                raise WebSocketDisconnect
            message = event.get("bytes")
            if message is None:
                message = event["text"].encode("utf-8", "surrogatepass")
            answering = requests.create_task(self._answer(websocket, cluster, message))
            answering.add_done_callback(lambda _: slots.release())

    async def _answer(self, websocket: WebSocket, cluster: Cluster, message: bytes) -> None:
        identity, call = "null", Call("", None, "")
        try:
            identity, call, value = read_message(message)
            if call.verb == "add":
                result = await cluster.add_async(value)
            else:
                result = await cluster.request_async(call.model, call.verb, HttpBody(message), call.version)
            text = result_text(identity, result)
        except Exception as error:
            identity = error.identity if isinstance(error, BadMessage) else identity
            text = error_text(identity, own_error(error, cluster.status, call.model, call.verb))
        await websocket.send_text(text)
