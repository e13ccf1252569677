"""All tasks by name: the values of `data.task`."""

from __future__ import annotations

from typing import Literal

from drpo.data.tasks import demo, hh, own, tldr
from drpo.data.tasks.task import Task

TASKS: dict[str, Task] = {task.name: task for task in (demo.TASK, tldr.TASK, hh.TASK, own.TASK)}
TaskName = Literal[tuple(TASKS)]
