"""Makespans of the three list schedulers on graphs of jobs, and after a precedence is deleted."""

import torch

from posterity.combinatorial import Jobs, Scheduling

AGAINST = (
    "the authors' code (github.com/Thinklab-SJTU/ROCO), its list schedulers; jobs numbered backwards where it breaks "
    "ties towards the higher number"
)


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    problem = Scheduling()
    for case in range(6):
        jobs = Jobs(*(stored[f"case{case}_{name}"] for name in ("duration", "resources", "before")))
        edits = [tuple(edit) for edit in stored[f"case{case}_deleted"].tolist()]
        instances = [jobs, *(problem.apply(jobs, edit) for edit in edits)]
        for (rule, solver), theirs in zip(
            problem.solvers.items(), stored[f"case{case}_makespans"], strict=True
        ):
            ours = [problem.value(each, solver(each)) for each in instances]
            yield f"case {case}: {rule}", torch.tensor(ours, dtype=torch.float64), theirs, 1e-12
