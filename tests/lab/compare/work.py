"""What the worker processes of the tests do, in a module that they can import."""

import os
import signal
import sys
import time
from pathlib import Path

from cropi.lab.compare.pool import Pool
from cropi.lab.compare.worker import Outcome, Task
from cropi.loading import load_config


def task(folder: Path, name: str) -> Task:
    """A task whose run's name says what is to happen."""
    return Task(load_config("quickstart", [f"run_dir={folder}", f"name={name}"]), None, None, False)


def by_name(given: Task) -> Outcome:
    """Die, sleep, or say which process this is."""
    name = given.config.name
    given.log.parent.mkdir(parents=True, exist_ok=True)
    given.log.write_text("the last words\n" if name.startswith("die") else f"{os.getpid()}\n")
    if name.startswith("die"):
        os.kill(os.getpid(), signal.SIGKILL)
    if name.startswith("sleep"):
        time.sleep(600)
    return Outcome(f"{os.getpid()} {given.config.name}")


if __name__ == "__main__":
    with Pool(1, by_name) as pool:
        pool.give(0, task(Path(sys.argv[1]), "sleep"))
        pool.wait(600)
