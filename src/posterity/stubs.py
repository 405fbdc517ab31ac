"""Stubs for editors: what each domain serves, written from the records.

``python -m posterity.stubs`` writes them; a test holds them equal to the records.
"""

from pathlib import Path

from posterity.papers import DOMAINS, ROOT, papers

__all__ = ["stubs"]


def stubs() -> dict[Path, str]:
    """Return the text of each domain's stub, by path; domains without methods have none."""
    texts = {}
    for domain in DOMAINS:
        here = [
            p
            for p in papers().values()
            if p.domain == domain and p.module.startswith("posterity.") and p.implemented
        ]
        if not here:
            continue
        rows = sorted(f"from {p.module} import {name} as {name}" for p in here for name in p.exports)
        texts[ROOT / domain / "__init__.pyi"] = "\n".join(rows) + "\n"
    return texts


if __name__ == "__main__":
    for path, text in stubs().items():
        path.write_text(text, encoding="utf-8")
