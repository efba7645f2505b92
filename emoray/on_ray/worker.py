"""What each training worker runs: its place among the others, the loop, and the end of the run on worker 0."""

from __future__ import annotations

import time
from typing import Any

import ray
import torch

from emoray.errors import InterruptedRunError, StorageError
from emoray.on_ray.train_metrics import TrainMetrics
from emoray.process import set_up_torch
from emoray.run import Attempt
from emoray.storage import Storage
from emoray.world import World

_BLAME_S = 10.0
"""How long a worker that was broken off keeps quiet, so that Ray finds the dead one first, in seconds."""


def run_worker(job: dict[str, Any]) -> None:
    """Train in one Ray Train worker.

    Args:
        job: `task` and `state` as references into the object store, `run` the run's location, `attempt` the
            attempt's number, `channel` the actor's handle, `cpus` this worker's threads, `pause_after` the evaluation
            to pause after, or None.
    """
    # Seconds, of which the drivers that hand this function on have no use.
    from ray.train import get_context
    from ray.train.torch import get_device

    from emoray.finish import finish
    from emoray.model import as_tensors
    from emoray.on_ray.worker_control import Leaving, WorkerControl
    from emoray.training import train

    context = get_context()
    world = World(context.get_world_rank(), context.get_world_size(), get_device())
    set_up_torch(job["cpus"], world.device)
    control = WorkerControl(job["channel"], asks=world.writes, leaving=Leaving(), metrics=TrainMetrics(job["run"]))
    try:
        attempt = _next_attempt(Attempt(Storage(job["run"]), job["attempt"]), world)
        task, state = ray.get([job["task"], job["state"]])
        learner, progress = train(task, as_tensors(state), world, attempt, control, job["pause_after"])
        results = finish(learner, progress, attempt)
    except InterruptedRunError as error:
        # No failure: Ray must not try again what a person stopped.
        if world.writes:
            control.tell({"kind": "stopped", "text": str(error)})
        return
    except StorageError as error:
        raise StorageError(f"Node {world.host} ({ray.util.get_node_ip_address()}): {error}", error.passing) from error
    except RuntimeError as error:
        if _broken_off(error):
            time.sleep(_BLAME_S)
        raise
    if results is not None:
        control.tell({"kind": "results", "results": results})


def _next_attempt(attempt: Attempt, world: World) -> Attempt:
    """An attempt of these workers' own: workers before them may live on, cut off by a broken network."""
    attempt.must_be_seen("set run.storage_path to a place that every node can write")
    number = world.broadcast(attempt.again().number if world.writes else 0)
    return Attempt(attempt.run, number)


def _broken_off(error: RuntimeError) -> bool:
    """Whether an exchange between workers failed since another one died: that one is to blame, and Ray sees it soon."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()
