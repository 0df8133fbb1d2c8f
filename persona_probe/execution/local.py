"""Tasks one after another, in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from persona_probe.errors import InputError
from persona_probe.execution.tasks import Done, Failure, Results, Task, Worker


def run_local(
    tasks: Iterable[Task],
    open_worker: Callable[[], Worker],
    results: Results,
    progress: Callable[[int], None] | None = None,
) -> Done:
    """Do every task whose result is not there yet.

    `open_worker` (which loads models) is called when the first such task comes up. `progress` is
    told the number of each task that is done with.
    """
    worker: Worker | None = None
    computed = found = 0
    failures: list[Failure] = []
    for task in tasks:
        if task.key in results:
            found += 1
        else:
            worker = worker or open_worker()
            try:
                result = worker(task.payload())
            except InputError as error:
                failures.append(Failure(task.number, error.message, error.fix))
            else:
                results.write(task.key, result)
                computed += 1
        if progress is not None:
            progress(task.number)
    return Done(computed, found, tuple(failures))
