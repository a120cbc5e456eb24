"""Worker process of our own contenders. What it measures is imported when the task is known: threads come first."""

from __future__ import annotations

from cropi.lab.bench.peers.wire import Engine, Task, serve


def load(task: Task) -> Engine:
    """The contender that the task's options name."""
    from cropi.lab.bench.contenders import contender

    return contender(task)


if __name__ == "__main__":
    serve(load)
