"""Run the benchmarks of some papers, or of all, one after the other."""

import subprocess
import sys
from pathlib import Path

from posterity.papers import get, papers


def main() -> None:
    chosen = [get(slug) for slug in sys.argv[1:]] or [p for p in papers().values() if p.implemented]
    modules = ["benchmarks.command_line"] if not sys.argv[1:] else []
    for paper in chosen:
        module = f"benchmarks.{paper.domain}.{paper.module.rsplit('.', 1)[-1]}"
        if Path(module.replace(".", "/") + ".py").is_file():
            modules.append(module)
    for module in modules:
        print(f"--- {module}", flush=True)
        subprocess.run([sys.executable, "-m", module], check=True)


if __name__ == "__main__":
    main()
