"""What a run needs of its data is asked before any trial, of every claim and task that takes data."""

import math
import re

import numpy as np
import pandas as pd
import pytest

from posterity.claims import Trial
from posterity.engine.compare import compare
from posterity.engine.discovery import load_claims
from posterity.engine.plan import plan_claims
from posterity.lab.data import kind_of
from posterity.lab.tasks import get_task, task_names
from posterity.papers import get, papers

rng = np.random.default_rng(0)
CLAIMS = {
    f"{paper.slug} {name}": kind_of(claim.parameters["data"].annotation).name
    for paper in papers().values()
    if paper.claims_file
    for name, claim in load_claims(paper).items()
    if "data" in claim.parameters
}
TASKS = {name: kind_of(get_task(name).kind).name for name in task_names()}


def table(n=40, **columns):
    features = {"a": rng.normal(size=n), "age": rng.integers(20, 60, n), "town": rng.choice(list("uvw"), n)}
    return pd.DataFrame({**features, "target": rng.normal(size=n), **columns})


def series(n, **columns):
    return pd.DataFrame({"v": rng.normal(size=n), "w": rng.normal(size=n), **columns}, index=range(n))


def functions(n, m, **columns):
    x = rng.normal(size=n * m)
    return pd.DataFrame({"function": np.repeat(np.arange(n), m), "x": x, "y": np.sin(x), **columns})


def instrumented(n=200, **columns):
    whole = {
        "age": rng.integers(20, 60, n),
        "town": rng.choice(list("uvw"), n),
        "outcome": rng.normal(size=n),
    }
    z = np.arange(n) % 2
    return pd.DataFrame(
        {**whole, "instrument": z, "treatment": np.where(np.arange(n) % 10 < 4, 1 - z, z), **columns}
    )


def images(n=60, **arrays):
    return {"x": rng.integers(0, 255, (n, 8, 8)).astype(np.uint8), "y": np.arange(n) % 3, **arrays}


def features(n=60, **arrays):
    return {"x": rng.normal(size=(n, 5)), "y": np.arange(n) % 3, **arrays}


def graph(n=60, **arrays):
    whole = {"node_features": rng.normal(size=(n, 4)), "node_labels": np.arange(n) % 2}
    return {**whole, "edges": rng.integers(0, n, (3 * n, 2)), **arrays}


def places(n, **columns):
    return pd.DataFrame({"x": rng.normal(size=n), "y": rng.normal(size=n), **columns})


def matchings(n=20, **arrays):
    whole = {
        "features": rng.random((n, 16)),
        "permutations": np.stack([np.arange(n) % 2, 1 - np.arange(n) % 2], 1),
    }
    return {**whole, **arrays}


def masks(*ends):
    at, low = np.arange(60)[None], 0
    for part, high in zip(("train", "val", "test"), ends, strict=True):
        yield f"{part}_masks", (at >= low) & (at < high)
        low = high


SORTED = np.arange(60) // 30
BROKEN = {
    "table": {
        "a single row": (table(1), "at least 10 rows|needs two classes"),
        "one class": (table(target="yes"), "needs two classes|needs a target of numbers"),
        "one row of a class": (table(target=["yes"] * 39 + ["no"]), "at least 2 classes|needs a target of numbers"),
        "a constant target": (table(target=2.5), "the target is always|needs two classes"),
        "an infinite target": (table(target=[*range(39), math.inf]), "infinite in row 40"),
        "no target": (table(target=math.nan), "has no value in any row"),
        "no feature": (table(target=list("yn") * 20, a=math.nan, age=math.nan, town=math.nan), "no column beside the target|a target of numbers"),
    },
    "images": {
        "a single image": (images(1), "at least 10 images"),
        "one class": (images(y=np.zeros(60, int)), "at least 2 classes of 5 images"),
        "a class an image": (images(y=np.arange(60)), "at least 2 classes of 5 images"),
        "one picture": (images(x=np.full((60, 8, 8), 9, np.uint8)), "all images are the same"),
        "no array": ({}, "needs arrays x and y"),
    },
    "pictures": {
        "a single picture": ({"x": np.zeros((1, 8, 8), np.uint8)}, "at least 10 pictures"),
        "no whole numbers": ({"x": np.zeros((60, 8, 8))}, "must be uint8"),
        "no pixels": ({"x": np.zeros((60, 0, 8), np.uint8)}, "must be uint8 of shape"),
    },
    "samples": {
        "a single image": ({"x": np.zeros((1, 8, 8), np.uint8)}, "at least 10 samples"),
        "one image": ({"x": np.zeros((60, 8, 8), np.uint8)}, "all samples are the same"),
        "text": (pd.DataFrame({"x": range(40), "y": list("ab") * 20}), "column 'y' is not"),
    },
    "labelled": {
        "a single row": (features(1), "at least 10 inputs"),
        "one class": (features(y=np.zeros(60, int)), "at least 2 classes of 5 inputs"),
        "equal rows": (features(x=np.ones((60, 5))), "all inputs are the same"),
        "no columns": (features(x=np.ones((60, 0))), "x holds nothing"),
        "beyond float32": (features(x=np.full((60, 5), 1e300)), "finite numbers"),
    },
    "clients": {
        "one client": (features(client=np.zeros(60, int)), "at least 2 clients"),
        "a client of three rows": (features(client=np.arange(60) < 3), "at least 4 rows of each client"),
        "one class": (features(y=np.zeros(60, int), client=np.arange(60) % 3), "at least 2 classes"),
        "equal rows": (features(x=np.ones((60, 5)), client=np.arange(60) % 3), "all inputs are the same"),
        "nobody's rows": (features(), "needs an array client"),
    },
    "points": {
        "three points": (pd.DataFrame(rng.normal(size=(3, 2)), columns=["x", "y"]), "at least 10 points"),
        "one point": (pd.DataFrame(np.ones((40, 2)), columns=["x", "y"]), "all points are the same"),
        "text": (pd.DataFrame({"x": range(40), "y": list("ab") * 20}), "column 'y' is not"),
    },
    "series": {
        "five rows": (series(5), "at least 10 rows"),
        "nothing happens": (series(400, v=1.0, w=2.0), "no column of it varies"),
        "an empty column": (series(400, v=math.nan), "'v' has no observed value"),
    },
    "functions": {
        "four functions": (functions(4, 9), "at least 5 functions"),
        "points alone": (functions(9, 1), "at least 5 functions"),
        "one output": (functions(9, 9, y=1.0), "all outputs are the same"),
        "one input": (functions(9, 9, x=1.0), "all inputs are the same"),
    },
    "instrumented": {
        "a single row": (instrumented(1), "at least 40 rows"),
        "three treatments": (instrumented(treatment=np.arange(200) % 3), "must have two values, got 3"),
        "an instrument of numbers": (instrumented(instrument=np.linspace(0, 1, 200)), "must have two values, got 200"),
        "an instrument that never changes": (instrumented(instrument=1), "it never changes"),
        "an instrument that moves nobody": (instrumented(treatment=np.arange(200) // 2 % 2), "almost irrelevant"),
        "a column that is missing": (instrumented().drop(columns="instrument"), "no column 'instrument', say data.instrument= and one of"),
        "no covariate": (instrumented(age=1, town="u"), "no column beside treatment, instrument and outcome varies"),
    },
    "graph": {
        "no edges": (graph(edges=np.zeros((0, 2), int)), "no edge joins two nodes"),
        "loops": (graph(edges=np.stack([np.arange(60)] * 2, 1)), "no edge joins two nodes"),
        "few labels": (graph(node_labels=np.r_[0, 1, 0, 1, np.full(56, -1)]), "at least 10 nodes with a label"),
        "one class": (graph(node_labels=np.zeros(60, int)), "must have two classes"),
        "a class a node": (graph(node_labels=np.arange(60)), "at least 2 classes of 5 nodes"),
        "a class to learn": (graph(node_labels=SORTED, **dict(masks(20, 45, 60))), "train_masks, split 0"),
        "a class to test": (graph(node_labels=SORTED, **dict(masks(32, 40, 60))), "val_masks, split 0"),
        "all test": (graph(**dict(masks(0, 0, 60))), "train_masks is empty"),
        "beyond float32": (graph(node_features=np.full((60, 4), 1e300)), "NaN or infinity"),
    },
    "text": {
        "a single word": ("word", "at least 20 words"),
        "four different words": ("to be or not " * 9, "at least 20 words, 5 of them different"),
        "no word": ("?! ...", "has no word"),
    },
    "routing": {
        "a depot alone": (places(1), "at least 2 customers are needed, has 0"),
        "text": (places(9, x=list("abcdefghi")), "column 'x' must be numbers"),
        "no coordinates": (places(9).drop(columns="y"), "columns x and y, or longitude and latitude, are needed"),
        "a negative demand": (places(9, demand=-1.0), "the demand of place 1 is -1"),
        "no depot": (places(9, depot="no"), "marks no depot"),
    },
    "matchings": {
        "a single pair": (matchings(1), "at least 10 pairs of graphs"),
        "one permutation": (matchings(permutations=np.tile([1, 0], (20, 1))), "all permutations are the same"),
        "no permutation": (matchings(permutations=np.ones((20, 2), int)), r"row 0 of permutations is \[1, 1\]"),
        "features of others": (matchings(features=np.ones((20, 9))), r"features must be numbers \(20, 16\)"),
        "no array": ({}, "array 'features' is missing"),
    },
    "qubo": {
        "a single bit": ({"matrix": np.ones((1, 1))}, "at least 2 bits"),
        "nothing to choose": ({"matrix": np.zeros((4, 4))}, "at least 2 bits and one coupling"),
        "not square": ({"matrix": np.ones((4, 5))}, r"matrix must be \(n, n\)"),
        "no number": ({"matrix": np.full((4, 4), math.nan)}, "NaN or infinity at"),
        "edges of fractions": ({"edges": np.ones((4, 2))}, "edges must be integers"),
    },
    "examples": {
        "a single row": (features(1), "at least 10 inputs"),
        "equal rows": (features(x=np.ones((60, 5))), "all inputs are the same"),
        "a short text": ("to be or not is " * 4, "at least 640 characters are needed"),
        "a single word": ("word", "at least 20 words"),
    },
}  # fmt: skip
LEAST = {
    "table": table(12, target=list("yn") * 6, town=list("uuvv") * 3),
    "images": images(12, y=np.arange(12) % 2),
    "pictures": {"x": rng.integers(0, 256, (12, 5, 7)).astype(np.uint8)},
    "samples": {"x": rng.integers(0, 256, (60, 5, 7)).astype(np.uint8)},
    "labelled": features(12, y=np.arange(12) % 2),
    "clients": images(12, y=np.arange(12) % 2, client=np.arange(12) % 3),
    "points": pd.DataFrame(rng.normal(size=(12, 2)), columns=["x", "y"]),
    "series": series(12),
    "functions": functions(5, 2),
    "instrumented": instrumented(80, treatment=np.where(np.arange(80) % 10 < 5, 1, np.arange(80) % 2)),
    "graph": graph(24),
    "text": "to be or not is " * 4,
    "routing": places(3),
    "matchings": matchings(12),
    "qubo": {"matrix": np.array([[0.0, 1.0], [1.0, -1.0]])},
    "examples": features(20, y=np.arange(20) % 2),
}


@pytest.fixture
def written(tmp_path):
    def write(content):
        ends = {pd.DataFrame: "csv", str: "txt"}.get(type(content), "npz")
        path = tmp_path / f"data.{ends}"
        if isinstance(content, pd.DataFrame):
            content.to_csv(path, index=False)
        elif isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        else:
            np.savez(path, **content)
        return path

    return write


def aim(kind):
    return {"target": "target"} if kind == "table" else {}


@pytest.mark.parametrize(
    ("kind", "fault"), [pytest.param(k, f, id=f"{k}-{f}") for k, faults in BROKEN.items() for f in faults]
)
def test_data_of_which_nothing_can_be_learned_end_in_one_line_and_exit_code_2(command, written, kind, fault):
    content, said = BROKEN[kind][fault]
    path = written(content)
    doors = [["run", *each.split()] for each in CLAIMS if CLAIMS[each] == kind]
    doors += [["compare", each] for each in TASKS if TASKS[each] == kind]
    words = doors[0][:2] + (["--claim", doors[0][2]] if doors[0][0] == "run" else [])
    code, out, err = command(*words, "--data", path, *(["--target", "target"] if aim(kind) else []))
    assert (code, out, len(err.strip().splitlines())) == (2, "", 1), err
    assert re.search(f"{path.name}.*({said})", err), err


@pytest.mark.parametrize("claim", CLAIMS)
def test_every_claim_refuses_them_before_any_trial(written, claim):
    (slug, name), kind = claim.split(), CLAIMS[claim]
    content, said = next(iter(BROKEN[kind].values()))
    with pytest.raises(ValueError, match=rf"data\..*({said})"):
        plan_claims(get(slug), claim=name, data=str(written(content)), **aim(kind))


@pytest.mark.parametrize("task", TASKS)
def test_every_task_refuses_them_before_any_trial(written, task):
    content, said = next(iter(BROKEN[TASKS[task]].values()))
    with pytest.raises(ValueError, match=rf"data\..*({said})"):
        compare(task, data=str(written(content)), **aim(TASKS[task]))


@pytest.mark.parametrize("claim", CLAIMS)
def test_the_least_data_that_are_not_refused_give_a_result(written, claim, as_a_user):
    """So that a claim says in its check what it needs beyond its kind."""
    slug, name = claim.split()
    found = load_claims(get(slug))[name]
    path = str(written(LEAST[CLAIMS[claim]]))
    settings = {
        k: ",".join(map(str, v)) if isinstance(v, tuple) else str(v) for k, v in found.smallest.items()
    }
    try:
        ((plan,), _) = plan_claims(get(slug), claim=name, data=path, settings=settings, **aim(CLAIMS[claim]))
    except ValueError as error:
        if "data." not in str(error):
            raise
        return
    value = found(Trial(0), **plan.params)
    values = value.values() if isinstance(value, dict) else [value]
    assert all(math.isfinite(each) for each in values)
