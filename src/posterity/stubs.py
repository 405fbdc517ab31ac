"""Stubs for editors: what each domain and the conformance checks serve, from records and files.

``python -m posterity.stubs`` writes them; a test holds them equal to the records.
"""

from pathlib import Path

from posterity._names import files
from posterity.papers import DOMAINS, ROOT, papers, public_modules

__all__ = ["stubs"]


def stubs() -> dict[Path, str]:
    """Return the text of each stub, by path; domains without methods have none."""
    checks = files(ROOT / "testing")
    rows = [f"from posterity.testing.{path.stem} import {name} as {name}" for name, path in checks.items()]
    texts = {ROOT / "testing" / "__init__.pyi": "\n".join(sorted(rows)) + "\n"}
    for domain in DOMAINS:
        here = [
            p
            for p in papers().values()
            if p.domain == domain and p.module.startswith("posterity.") and p.implemented
        ]
        shared = [name.rpartition(".")[2] for name in public_modules(domain)]
        if not here and not shared:
            continue
        rows = sorted(f"from {p.home(name)} import {name} as {name}" for p in here for name in p.exports)
        rows += [f"from posterity.{domain} import {name} as {name}" for name in shared]
        texts[ROOT / domain / "__init__.pyi"] = "\n".join(rows) + "\n"
    return texts


if __name__ == "__main__":
    for path, text in stubs().items():
        path.write_text(text, encoding="utf-8")
