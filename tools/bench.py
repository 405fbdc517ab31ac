"""Run the benchmarks of some papers, or of all, one after the other; keep their ratios and write docs/speed.md."""

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from posterity.papers import get, papers
from tools.evidence import front

ROOT = Path(__file__).parent.parent
HEAD = """# How fast each method is

Every benchmark times both sides in turns in one process, on one thread, and the ratio of the medians says how many
times faster ours is. A target below 1 is a cost: ours does more than what it is timed against, such as a training
step without the method, and the target says how much more may be. `make bench` writes this page.

"""


def main() -> None:
    """Run; the races of a paper are written into its evidence, which its page shows, and onto one page."""
    failed: list[str] = []
    if not sys.argv[1:]:
        run("benchmarks.command_line", failed)
    for paper in [get(slug) for slug in sys.argv[1:]] or [p for p in papers().values() if p.implemented]:
        module = f"benchmarks.{paper.domain}.{paper.module.rsplit('.', 1)[-1]}"
        if (ROOT / f"{module.replace('.', '/')}.py").is_file():
            races = run(module, failed)
            if module not in failed:
                keep(ROOT / "evidence" / f"{paper.slug}.json", races)
    front()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def run(module, failed):
    """Run one benchmark and return its races: name, ratio, target; one that ends in an error joins ``failed``."""
    print(f"--- {module}", flush=True)
    with tempfile.NamedTemporaryFile("r", encoding="utf-8") as file:
        env = {**os.environ, "POSTERITY_RACES": file.name}
        if subprocess.run([sys.executable, "-m", module], cwd=ROOT, env=env).returncode:
            failed.append(module)
        return [json.loads(line) for line in file]


def keep(path, races):
    """Write the races of a paper into its evidence."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    if races:
        stored["speed"] = races
        path.write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def page() -> str:
    """Return the table of all races, and what falls short of its target."""
    rows = [
        (path.stem, race)
        for path in sorted((ROOT / "evidence").glob("*.json"))
        for race in json.loads(path.read_text(encoding="utf-8")).get("speed", [])
    ]
    mean = math.exp(sum(math.log(race["ratio"]) for _, race in rows) / len(rows))
    short = [row for row in rows if row[1]["ratio"] < row[1]["target"]]
    said = (
        f"{len(rows)} races of {len({slug for slug, _ in rows})} methods, of which {len(rows) - len(short)} reach "
        f"their targets; the geometric mean of all ratios is {mean:.2f}.\n\n"
    )
    lines = ["| method | work, and what it is timed against | ratio | target |", "|---|---|---|---|"]
    lines += [
        f"| `{slug}` | {race['name']} | {race['ratio']:g} | {race['target']:g} |" for slug, race in rows
    ]
    lines += ["", "## What falls short", ""]
    lines += [
        f"- `{slug}`: {race['name']}: {race['ratio']:g} for {race['target']:g}. {race.get('why', '')}".rstrip()
        for slug, race in short
    ]
    return HEAD + said + "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
