"""Run the benchmarks of some papers, or of all, one after the other; with ``--store`` keep their ratios."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from posterity.papers import get, papers

ROOT = Path(__file__).parent.parent


def main() -> None:
    """Run; with ``--store`` the races of a paper are written into its evidence, which its page shows."""
    slugs = [word for word in sys.argv[1:] if word != "--store"]
    store = "--store" in sys.argv[1:]
    failed: list[str] = []
    if not slugs and not store:
        run("benchmarks.command_line", failed)
    for paper in [get(slug) for slug in slugs] or [p for p in papers().values() if p.implemented]:
        module = f"benchmarks.{paper.domain}.{paper.module.rsplit('.', 1)[-1]}"
        if (ROOT / f"{module.replace('.', '/')}.py").is_file():
            races = run(module, failed)
            if store and module not in failed:
                keep(ROOT / "evidence" / f"{paper.slug}.json", races)
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


if __name__ == "__main__":
    main()
