"""Standard questions: methods compete in them as entries, against strong ordinary choices.

A question is a file, named as the task: its kind of data, split and score, which it binds to
``TASK``, and its ordinary choices. An entry is ``fit(train, seed) -> predict``: it sees the
training part and a seed, and returns a function of the inputs of the test part. What these
are is said in the file. Entries register with `entry`: ordinary ones beside their task, a
paper's in its claims file.

A question may have settings (how many labels, how large a gap): keyword-only parameters of its
score, annotated as those of a claim are. ``posterity compare`` takes them after ``--set``.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from posterity._names import serve_files
from posterity.claims import Trial

__all__ = ["Entry", "Task", "entries", "entry", "get_task", "score_entry", "task_file", "task_names"]


@dataclass(frozen=True)
class Task:
    """A standard question.

    Attributes
    ----------
    name : str
    kind : annotation
        The kind of data it takes.
    metric : str
    better : {"lower", "higher"}
    data : str
        The default data.
    score : callable
        ``score(fit, seed, data, target, **settings)`` fits an entry and measures it: the metric, or a dict of
        figures, of which the first is the metric and the others stand beside it.
    takes_target : bool
        Whether a user may say which column is predicted.
    loading : dict
        What the loader of its data is told.
    needs : callable, optional
        ``needs(data, **settings)`` raises ``ValueError`` for data, as its loader gives it, on
        which the question cannot be asked.
    references : tuple of str
        Entries that are no choice, but say how far there is to go.
    """

    name: str
    kind: Any
    metric: str
    better: str
    data: str
    score: Callable[..., float | dict[str, float]]
    takes_target: bool = False
    loading: dict[str, Any] = field(default_factory=dict)
    needs: Callable[..., None] | None = None
    references: tuple[str, ...] = ()

    @property
    def settings(self) -> dict[str, inspect.Parameter]:
        """Parameters that a user may set, in order."""
        every = inspect.signature(self.score).parameters.values()
        return {each.name: each for each in every if each.kind is each.KEYWORD_ONLY}

    def options(self, target: str | None) -> dict[str, Any]:
        """Return what the loader of its data is told, the target among it."""
        if self.takes_target:
            return {**self.loading, "target": target}
        if target is not None:
            raise ValueError(f"{self.name} takes no target")
        return self.loading


@dataclass(frozen=True)
class Entry:
    """A competitor: its name, its paper (empty for an ordinary choice), how it is fitted, what must be asked for it."""

    task: str
    name: str
    paper: str
    fit: Callable[..., Callable[..., Any]]
    where: Mapping[str, Any] = field(default_factory=dict)


_ENTRIES: dict[tuple[str, str], Entry] = {}


def task_names() -> list[str]:
    """Return the name of every task.

    Returns
    -------
    list of str
    """
    return [path.stem.replace("_", "-") for path in sorted(Path(__file__).parent.glob("[!_]*.py"))]


def task_file(task: str) -> Path:
    """Return the file of a task, or say which tasks there are.

    Parameters
    ----------
    task : str

    Returns
    -------
    Path
    """
    if task not in task_names():
        raise ValueError(f"task must be one of {', '.join(task_names())}, got {task!r}")
    return Path(__file__).with_name(f"{task.replace('-', '_')}.py")


def get_task(task: str) -> Task:
    """Return a task by its name.

    Parameters
    ----------
    task : str

    Returns
    -------
    Task
    """
    return import_module(f"{__name__}.{task_file(task).stem}").TASK


def entry(
    task: str, name: str, *, paper: str = "", where: Mapping[str, Any] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function ``fit(train, seed) -> predict`` as an entry of a task.

    Parameters
    ----------
    task : str
        Its name.
    name : str
        What the ranking calls it.
    paper : str, default=""
        Its slug, empty for an ordinary choice.
    where : mapping of str to value, optional
        Settings of the question under which it can answer; under others it does not compete.

    Returns
    -------
    callable
        A decorator that returns the function as it is.
    """
    task_file(task)

    def keep(fit: Callable[..., Any]) -> Callable[..., Any]:
        _ENTRIES[task, name] = Entry(task, name, paper, fit, where or {})
        return fit

    return keep


def entries(task: str) -> dict[str, Entry]:
    """Return the registered entries of a task by name, ordinary choices first.

    Parameters
    ----------
    task : str

    Returns
    -------
    dict of str to Entry
    """
    found = {name: each for (of, name), each in _ENTRIES.items() if of == task}
    return dict(sorted(found.items(), key=lambda item: (item[1].paper != "", item[0])))


def score_entry(
    trial: Trial, task: str, entry: str, home: str, source: str, data: str, target: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> float:  # fmt: skip
    """Fit one entry on one seed's training part and return its score on the test part.

    Parameters
    ----------
    trial : Trial
    task, entry : str
        Names.
    home, source : str
        The modules that register the entry and, where it is generated, the data.
    data : str
    target : str, optional
    settings : mapping of str to value, optional
        Of the question.

    Returns
    -------
    float
    """
    for module in filter(None, (home, source)):
        import_module(module)
    found = get_task(task).score(entries(task)[entry].fit, trial.seed, data, target, **settings or {})
    if not isinstance(found, dict):
        return found
    metric, *others = found
    for name in others:
        trial.record(name, found[name])
    return found[metric]


__getattr__, __dir__ = serve_files(__name__)
