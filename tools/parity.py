"""Compare papers with stored outputs of other code: tests/parity/<slug>.npz and the file beside it."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np

from posterity.papers import get, papers
from posterity.testing import check_parity

FOLDER = Path(__file__).parent.parent / "tests" / "parity"


def compare(slug):
    """Return against what a paper's outputs were compared, how many values, the largest difference."""
    path = FOLDER / f"{slug.replace('-', '_')}.py"
    for each in (path, FOLDER / f"{slug}.npz"):
        if not each.is_file():
            raise ValueError(
                f"{slug} lacks tests/parity/{each.name}: CONTRIBUTING says how a paper gets its parity"
            )
    spec = spec_from_file_location(f"parity_{path.stem}", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    with np.load(FOLDER / f"{slug}.npz") as stored:
        found = check_parity(module.pairs(dict(stored)))
    return {"against": module.AGAINST, "values": found.values, "largest": found.largest}


def main() -> None:
    for paper in [get(slug) for slug in sys.argv[1:]] or [p for p in papers().values() if p.implemented]:
        facts = compare(paper.slug)
        print(
            f"{paper.slug}: {facts['values']:,} values of {facts['against']}, at most {facts['largest']:.2g} apart"
        )


if __name__ == "__main__":
    main()
