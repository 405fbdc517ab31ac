"""Check that no extra brings torchvision, CUDA packages or another torch."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

FORBIDDEN = re.compile(r"^(torchvision|nvidia-.*|cuda-.*|triton|cupy.*|functorch|xgboost)$")


def inside(requirements: list[str]) -> list[str]:
    """Return the extras that an extra consists of."""
    names = re.findall(r"posterity\[([^]]*)\]", " ".join(requirements))
    return [f"posterity[{name}]" for group in names for name in group.split(",")]


def main() -> None:
    root = Path(__file__).parent.parent
    pinned = dict(
        line.split("==") for line in (root / "constraints.txt").read_text().splitlines() if "==" in line
    )
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    plan = root / ".venv" / "plan.json"
    # `all` holds the extra of every domain, which a test keeps true
    for extra in [
        name for name in extras if name == "all" or f"posterity[{name}]" not in inside(extras["all"])
    ]:
        own = root / f"constraints-{extra}.txt"
        pins = own if own.is_file() else root / "constraints.txt"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed",
                   "--report", str(plan), "-c", str(pins), f"{root}[{extra}]"]  # fmt: skip
        subprocess.run(command, check=True)
        names = {
            item["metadata"]["name"].lower(): item["metadata"]["version"]
            for item in json.loads(plan.read_text())["install"]
        }
        if bad := sorted(name for name in names if FORBIDDEN.match(name)):
            sys.exit(f"extra {extra} brings {', '.join(bad)}")
        if names["torch"].split("+")[0] != pinned["torch"]:
            sys.exit(f"extra {extra} brings torch {names['torch']}")
        print(f"{extra}: {len(names)} packages, torch {names['torch']}")


if __name__ == "__main__":
    main()
