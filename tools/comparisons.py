"""Write evidence/tasks/<task>.json: every entry of a task on its default set, ranked, by the code as it is."""

import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path

from posterity.engine.compare import advice, compare
from posterity.engine.run import execute
from posterity.engine.store import Store
from posterity.lab.tasks import get_task, task_names
from tools.evidence import LIBRARIES, rounded

FOLDER = Path(__file__).parent.parent / "evidence" / "tasks"


def codes(jobs):
    """Return the fingerprint of the code of each entry."""
    return {job.params["entry"]: job.code for job in jobs}


def same_versions(stored) -> bool:
    """Return whether a comparison was measured with the libraries that are installed."""
    return stored["libraries"] == {name: version(name) for name in LIBRARIES}


def current(path, jobs) -> bool:
    """Return whether a file has the seeds of these jobs, as the code as it is would measure them again."""
    if not path.is_file():
        return False
    stored = json.loads(path.read_text(encoding="utf-8"))
    seeds = sorted({job.seed for job in jobs})
    whole = not any("error" in row for row in stored["rows"])
    return same_versions(stored) and whole and stored["seeds"] == seeds and stored["code"] == codes(jobs)


def main() -> None:
    """Measure what is not current of some tasks, or of all."""
    for task in sys.argv[1:] or task_names():
        jobs, rank, _ = compare(task)
        path = FOLDER / f"{task}.json"
        if current(path, jobs):
            continue
        rows = rank([(job, outcome) for job, outcome, _ in execute(jobs, Store())])
        facts = {
            "task": task,
            "data": get_task(task).data,
            "seeds": sorted({job.seed for job in jobs}),
            "python": platform.python_version(),
            "libraries": {name: version(name) for name in LIBRARIES},
            "code": codes(jobs),
            "advice": advice(rows),
            "rows": rounded(rows),
        }
        FOLDER.mkdir(exist_ok=True)
        path.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{task}: {facts['advice']}", flush=True)


if __name__ == "__main__":
    main()
