"""Write docs/node-classification.md: every node classifier on four graphs, ranked."""

from pathlib import Path

from posterity.engine.compare import advice, compare
from posterity.engine.run import execute
from posterity.engine.store import Store

# Few, because all depths of all entries take a quarter of an hour a seed on the last two.
SEEDS = {"cora": 3, "texas": 3, "squirrel_filtered": 2, "minesweeper": 2}
PAGE = Path(__file__).parent.parent / "docs" / "node-classification.md"
HEAD = """# Which node classifier?

Every node classifier of `posterity.graphs` against networks of ordinary layers with
residual connections, layer normalisation and a separate map of a node's own features, and
against an MLP that sees no edge. Depth and other choices of each are made on the validation
nodes of the data's own splits. Accuracy, for the two classes of Minesweeper the area under
the ROC curve: mean, lowest and highest over seeds. The best of a column and all that tie
with it are bold: their paired difference has 0 in its 95 % interval, which is wide for so
few seeds.

"""
TAIL = """On a graph of your own: `posterity compare node-classification --data FILE.npz`.
`python -m tools.tables` writes this page.
"""


def cell(row):
    """Return mean and range in one cell, bold in the first rank."""
    if row["rank"] is None:
        return "error"
    text = f"{row['mean']:.3f} ({min(row['values']):.3f} to {max(row['values']):.3f})"
    return f"**{text}**" if row["rank"] == 1 else text


def main() -> None:
    store, found = Store(), {}
    for data, seeds in SEEDS.items():
        jobs, rank, _ = compare("node-classification", data=data, seeds=seeds)
        found[data] = rank([(job, outcome) for job, outcome, _ in execute(jobs, store)])
        print(data, advice(found[data]), flush=True)
    papers = {row["entry"]: row["paper"] for rows in found.values() for row in rows}
    cells = {(data, row["entry"]): cell(row) for data, rows in found.items() for row in rows}
    heads = (f"{data}, {seeds} seeds" for data, seeds in SEEDS.items())
    lines = [f"| | {' | '.join(heads)} |", "|---|" + "---|" * len(SEEDS)]
    for entry, paper in sorted(papers.items(), key=lambda item: (item[1] is not None, item[0])):
        name = f"[{entry}](papers/{paper}.md)" if paper else entry
        lines.append(f"| {name} | " + " | ".join(cells[data, entry] for data in SEEDS) + " |")
    said = [f"- {data}: {advice(rows)}" for data, rows in found.items()]
    PAGE.write_text(HEAD + "\n".join([*lines, "", *said, "", TAIL]), encoding="utf-8")


if __name__ == "__main__":
    main()
