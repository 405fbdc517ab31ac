"""Check that no extra brings torchvision, CUDA packages or another torch."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

FORBIDDEN = re.compile(r"^(torchvision|nvidia-.*|cuda-.*|triton|cupy.*|functorch|xgboost)$")


def main() -> None:
    root = Path(__file__).parent.parent
    pinned = dict(
        line.split("==") for line in (root / "constraints.txt").read_text().splitlines() if "==" in line
    )
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    plan = root / ".venv" / "plan.json"
    for extra in extras:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed",
                   "--report", str(plan), "-c", str(root / "constraints.txt"), f"{root}[{extra}]"]  # fmt: skip
        subprocess.run(command, check=True)
        import json

        names = {item["metadata"]["name"].lower(): item["metadata"]["version"] for item in json.loads(plan.read_text())["install"]}
        if bad := sorted(name for name in names if FORBIDDEN.match(name)):
            sys.exit(f"extra {extra} brings {', '.join(bad)}")
        if names["torch"].split("+")[0] != pinned["torch"]:
            sys.exit(f"extra {extra} brings torch {names['torch']}")
        print(f"{extra}: {len(names)} packages, torch {names['torch']}")


if __name__ == "__main__":
    main()
