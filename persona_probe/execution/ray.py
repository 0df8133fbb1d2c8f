"""The same tasks on Ray actors: one worker (one copy of the models) per actor.

Results come back to the driver, which alone writes files. An actor that dies is replaced and its task
done again; a task that kills `ATTEMPTS` actors in a row ends the run, because no document can be named
for it. Where `ray.init` has not been called, a cluster is joined (at `address`, or at `$RAY_ADDRESS`), or
else started on this machine for as long as the run takes.

What tasks and workers name by path has to lie at that path on every machine of the cluster.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

from persona_probe.errors import InputError, MissingExtraError, PersonaProbeError
from persona_probe.execution.tasks import Done, Failure, Results, Task, Worker

ATTEMPTS = 3
_REACHED_WITHIN = 5.0
"""Seconds. Ray itself tries a wrong address for 40, and then ends the process."""


def run_ray(
    tasks: Iterable[Task],
    open_worker: Callable[[], Worker],
    results: Results,
    progress: Callable[[int], None] | None = None,
    *,
    actors: int | None = None,
    address: str | None = None,
    gpus: float | None = None,
    threads: int | None = None,
) -> Done:
    """`run_local` on a Ray cluster; `open_worker` is sent to every actor and must be picklable.

    Args:
        actors: how many; by default one per GPU of the cluster, one per CPU without any.
        address: of a running cluster (`auto`, `host:6379`); None is `$RAY_ADDRESS`, or starts one here.
        gpus: of each actor; by default one where the cluster has any.
        threads: of torch in each actor. Bit equality with another run needs the same.

    Raises `MissingExtraError` without ray, `InputError` for a cluster that cannot be joined.
    """
    ray = _ray()
    started = not ray.is_initialized()
    if started:
        _join(ray, address or os.environ.get("RAY_ADDRESS"))
    try:
        resources = ray.cluster_resources()
        gpus = (1.0 if resources.get("GPU", 0) else 0.0) if gpus is None else gpus
        count = actors or int(resources["GPU"] / gpus if gpus else resources.get("CPU", 1)) or 1
        pool = _Pool(ray, open_worker, gpus, threads)
        return pool.run(iter(tasks), results, count, progress)
    finally:
        if started:
            ray.shutdown()


class _Actor:
    """Lives in a process of its own; loads models once, then does tasks."""

    def __init__(self, open_worker: Callable[[], Worker], threads: int | None) -> None:
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        self._open = open_worker
        self._worker: Worker | None = None

    def do(self, number: int, payload: Any) -> bytes | Failure | PersonaProbeError:
        """The result; why the documents have none; or an error that is the run's."""
        try:
            self._worker = self._worker or self._open()
        except PersonaProbeError as error:
            return error
        try:
            return self._worker(payload)
        except InputError as error:
            return Failure(number, error.message, error.fix)


class _Pool:
    def __init__(self, ray: Any, open_worker: Callable[[], Worker], gpus: float, threads: int | None) -> None:
        self._ray = ray
        self._remote = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0)(_Actor)
        self._open = ray.put(open_worker)
        self._threads = threads

    def run(
        self,
        tasks: Iterable[Task],
        results: Results,
        count: int,
        progress: Callable[[int], None] | None,
    ) -> Done:
        ray = self._ray
        # Ray's monitor of memory ends an actor with an error of its own
        lost = (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError, ray.exceptions.NodeDiedError)
        waiting = iter(tasks)
        computed = found = 0
        failures: list[Failure] = []
        running: dict[Any, tuple[Any, Task, int]] = {}

        def begin(actor: Any, task: Task, attempt: int) -> None:
            running[actor.do.remote(task.number, task.payload())] = (actor, task, attempt)

        def new_tasks() -> Iterable[Task]:
            nonlocal found
            for task in waiting:
                if task.key not in results:
                    yield task
                    continue
                found += 1
                if progress is not None:
                    progress(task.number)

        to_do = iter(new_tasks())
        for task in islice(to_do, count):
            begin(self._actor(), task, 1)
        while running:
            ready, _ = ray.wait(list(running), num_returns=1)
            actor, task, attempt = running.pop(ready[0])
            try:
                result = ray.get(ready[0])
            except lost as error:
                ray.kill(actor)  # it may hold its CPU still
                if attempt == ATTEMPTS:
                    raise PersonaProbeError(
                        f"shard {task.number} ended {ATTEMPTS} Ray actors: {str(error).splitlines()[0]}",
                        fix="most often memory: use fewer actors, or smaller batches",
                    ) from error
                begin(self._actor(), task, attempt + 1)
                continue
            if isinstance(result, PersonaProbeError):
                raise result
            if isinstance(result, Failure):
                failures.append(result)
            else:
                results.write(task.key, result)
                computed += 1
            if progress is not None:
                progress(task.number)
            following = next(to_do, None)
            if following is None:
                ray.kill(actor)
            else:
                begin(actor, following, 1)
        return Done(computed, found, tuple(sorted(failures, key=lambda failure: failure.number)))

    def _actor(self) -> Any:
        return self._remote.remote(self._open, self._threads)


def _join(ray: Any, address: str | None) -> None:
    """Connect to the cluster at `address`; start one here for None."""
    options = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
    if address is None:
        ray.init(address="local", **options)  # None would join whichever was started last on this machine
        return
    host, _, port = address.rpartition(":")
    try:
        if host and port.isdigit() and "://" not in address:
            socket.create_connection((host, int(port)), _REACHED_WITHIN).close()
        ray.init(address=address, **options)
    except (OSError, ValueError, RuntimeError) as error:  # ConnectionError is an OSError
        raise InputError(
            f"there is no Ray cluster at {address}: {str(error).splitlines()[0]}",
            fix="give the host:port that `ray start --head` printed, and run in an environment with the "
            "RAY_AUTH_MODE and RAY_AUTH_TOKEN of the cluster; or none, to start one here",
            command="ray status",
        ) from error


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError.of("ray", "ray") from error
    return ray
