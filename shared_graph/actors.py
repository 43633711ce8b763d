"""Makes the two kinds of actors in Ray, under their names, each with its share of the GPUs."""

from __future__ import annotations

import math
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from shared_graph.handles import Actor
from shared_graph.options import Options
from shared_graph.parameter_server import ParameterServer
from shared_graph.worker import Worker

CLASSES = {"parameter server": ParameterServer, "worker": Worker}


def create_actor(options: Options, namespace: str, kind: str, index: int, *arguments: Any) -> Actor:
    """The actor of this name, made if there is none: Ray keeps it alive, and there is only one, whoever made it. Takes
    until Ray has it; ``arguments`` are what its class takes behind the namespace."""
    is_worker, is_primary = kind == "worker", kind != "worker" and index == 0
    gpus, sharers = int(ray.cluster_resources().get("GPU", 0)), options.workers
    if options.placement == "shared":
        sharers += options.parameter_servers
    elif not is_worker:
        gpus = 0
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    handle = (
        ray.remote(CLASSES[kind])
        .options(
            name=f"{kind} {index}",
            namespace=namespace,
            get_if_exists=True,
            max_restarts=-1,
            max_concurrency=10_000,
            lifetime="detached" if options.address else None,
            num_cpus=0.001,
            num_gpus=gpu_share(gpus, sharers),
            scheduling_strategy=here if is_primary else "SPREAD",  # where the folder is
            enable_task_events=False,  # of which Ray would keep 100,000: half a gigabyte
        )
        .remote(index, options, namespace, *arguments)
    )
    return Actor(handle)


def gpu_share(gpus: int, actors: int) -> float:
    """How many GPUs each actor gets, such that all of them fit: whole ones, or a part of one."""
    return math.floor(10_000 / math.ceil(actors / gpus)) / 10_000 if gpus else 0
