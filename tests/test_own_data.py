"""The promise of `--data`: a file as a user has it, with a gap and an odd header, goes through every paper's claims."""

import json
import math
from dataclasses import asdict
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from posterity.engine import local, worker
from posterity.engine.discovery import load_claims
from posterity.engine.store import Outcome
from posterity.papers import papers
from tools.own_data import kinds, page

ROOT = Path(__file__).parent.parent
rng = np.random.default_rng(0)
N = 2400
PAPERS = [paper for paper in papers().values() if paper.claims_file and paper.module.startswith("posterity.")]


TAKES = [(paper.slug, kind, claims[0]) for paper in PAPERS for kind, claims in kinds(paper).items()]


def european(frame, path):
    """Write a table as spreadsheets of half of Europe do: semicolons, decimal commas, a BOM, gaps said in words."""
    frame.to_csv(path, sep=";", decimal=",", index=False, na_rep="k.A.", encoding="utf-8-sig")
    return path


def table(folder):
    x = rng.normal(size=(N, 2))
    town = rng.choice(["Zürich", "Genève", "Köln", "Malmö"], N)
    y = x @ [1.5, -1.0] + (town == "Genève") + 0.1 * rng.normal(size=N)
    frame = pd.DataFrame({"Größe (m²)": x[:, 0].round(3), "1. Miete [€]": x[:, 1].round(3), " Ort ": town,
                          "Preis/€": (100 * y).round(1), "verkauft?": np.where(y > 0, "ja", "nein")})  # fmt: skip
    frame.iloc[3, 0] = math.nan
    return european(frame, folder / "Wohnungen 2024.csv")


def points(folder):
    frame = pd.DataFrame(rng.normal(size=(N, 2)).round(3), columns=["Länge (°)", "Breite (°)"])
    frame.iloc[9, 1] = math.nan
    return european(frame, folder / "Orte.csv")


def pictures(folder):
    for k in range(14):
        at = folder / "Fotos" / f"{k % 2}"
        at.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (40, 36 + k, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(at / f"DSC {k}.{'JPG' if k % 2 else 'png'}")
    (folder / "Fotos" / ".DS_Store").write_bytes(b"no picture")
    return folder / "Fotos"


def images(folder, names=tuple(f"Klasse {k}" for k in range(12)), n=40):
    for k, name in enumerate(names):
        at = folder / name
        at.mkdir(parents=True)
        for i in range(n):
            pixels = 15 * k + rng.integers(0, 90, (16, 16, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(at / f"{i}.{'PNG' if i % 2 else 'png'}")
        (at / "Thumbs.db").write_bytes(b"no picture")
    return folder


def series(folder):
    days = pd.date_range("2024-01-13", periods=400).strftime("%d.%m.%Y")
    wave = np.sin(np.arange(400) / 3)
    frame = pd.DataFrame({"Datum": days, "T (°C)": (wave + 0.1 * rng.normal(size=400)).round(3),
                          "Last [kW]": (2 * wave + rng.normal(size=400)).round(3)})  # fmt: skip
    frame.iloc[7, 1] = math.nan
    return european(frame, folder / "Zähler.csv")


def functions(folder):
    x = rng.uniform(-2, 2, 20 * 30).round(3)
    frame = pd.DataFrame({"function": np.repeat([f"Probe {k}" for k in range(20)], 30), "x": x,
                          "y": np.sin(3 * x).round(3)})  # fmt: skip
    return european(frame.drop(index=[4]), folder / "Kurven.csv")


def instrumented(folder):
    n = 400
    z = np.arange(n) % 2
    frame = pd.DataFrame({"Alter (J.)": rng.integers(20, 60, n), "Größe": rng.normal(size=n).round(3),
                          "instrument": z, "treatment": np.where(np.arange(n) % 10 < 2, 1 - z, z),
                          "outcome": rng.normal(size=n).round(3)})  # fmt: skip
    frame.iloc[5, 1] = math.nan
    return european(frame, folder / "Studie.csv")


def graph(folder, unknown=(5,)):
    labels = np.arange(240) % 2
    labels[list(unknown)] = -1
    arrays = {"node_features": rng.normal(size=(240, 4)) + labels[:, None], "node_labels": labels}
    np.savez(folder / "Netz.npz", **arrays, edges=rng.integers(0, 240, (960, 2)))
    return folder / "Netz.npz"


def text(folder):
    words = rng.choice(
        ["der", "Fluss", "fließt", "—", "und", "wieder,", "ja", "wieder", "zum", "Meer", "wo", "er", "war"],
        2000,
    )
    path = folder / "Notizen.txt"
    path.write_text("\ufeff" + "\r\n".join(" ".join(row) for row in words.reshape(-1, 10)), encoding="utf-8")
    return path


def clients(folder):
    frame = pd.read_csv(table(folder), sep=";", decimal=",", na_values="k.A.", encoding="utf-8-sig")
    frame["Filiale Nr."] = np.arange(N) % 6
    return european(frame, folder / "Filialen.csv")


def routing(folder):
    frame = pd.DataFrame({"Kunde": [f"Müller & Söhne {k}" for k in range(14)], "Lon (°)": 8 + rng.random(14).round(4),
                          " LAT": 47 + rng.random(14).round(4), "Demand [kg]": rng.integers(1, 9, 14)})  # fmt: skip
    frame.iloc[6, 2] = math.nan
    return european(frame, folder / "Kunden.csv")


def matchings(folder):
    orders = np.argsort(rng.random((40, 3)), 1)
    np.savez(folder / "Paare.npz", features=rng.random((40, 81)), permutations=orders)
    return folder / "Paare.npz"


def qubo(folder):
    np.savez(folder / "Kopplungen.npz", matrix=rng.integers(-3, 4, (9, 9)))
    return folder / "Kopplungen.npz"


def fields(folder):
    at = np.linspace(-1, 1, 30).round(3)
    waves = [
        pd.DataFrame({"function": f"Lauf {k}", "x": at, "y": np.sin(3 * at + k).round(3)}) for k in range(20)
    ]
    return european(pd.concat(waves), folder / "Läufe.csv")


def scenes(folder):
    for k in range(24):
        mask = np.zeros((16, 16), np.uint8)
        mask[:, 3 + k // 2 :] = 1
        for part, pixels in (
            ("images", rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)),
            ("labels", mask),
        ):
            (folder / part).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(folder / part / f"Szene {k}.png")
    return folder


def known(folder):
    return graph(folder, ())


def words(folder):
    return images(
        folder, [f"{a}_{o}" for a in ("red", "blue", "tiny") for o in ("disc", "ring", "cross", "star")], 20
    )


def branches(folder):
    for k in range(6):
        images(folder / f"Filiale {k}", ("ja", "nein"), 30)
    return folder


def few(folder):
    return images(folder, ("ja", "nein", "weiß nicht"), 20)


FILES = {
    "table": table, "points": points, "pictures": pictures, "samples": images, "images": images,
    "labelled": table, "examples": table, "series": series, "functions": functions,
    "instrumented": instrumented, "graph": graph, "text": text, "clients": clients,
    "routing": routing, "qubo": qubo, "matchings": matchings,
}  # fmt: skip
OF_PAPER = {"diffusion-fields functions": fields, "ecgan pictures": scenes, "csp images": words, "sfrik images": few, "scheduled-data-prior images": few, "fedfa clients": branches,
            "semantic-robustness graph": known}  # fmt: skip


OPTIONS = {
    "bilinear-transduction": {"split_column": "Größe (m²)"}, "canife": {"data.clients": 120},
    "cldfd": {"n_unlabelled": 100}, "demd": {"group": "Ort"}, "dfw": {"site": "Ort", "standardize": True}, "esd": {"n_train": 200},
    "fairee": {"group": "Ort", "n_train": 90}, "fedfa": {"n_train": 20}, "forde": {"n_train": 300}, "federated-bounds": {"data.client": "Filiale Nr."},
    "idempotent-codec": {"n_train": 100}, "rarity-score labelled": {"target": "Ort"}, "scheduled-data-prior": {"n_stream": 40},
    "topology-aware-robust": {"group": "Ort", "n_sources": 3, "topology": "learned"}, "tukey-em": {"n_models": 20},
}  # fmt: skip
OF_NUMBERS = (
    "bilinear-transduction", "dfw", "layer-variational", "sam-sharpness", "tukey-em", "variance-limited",
)  # fmt: skip


@pytest.fixture(autouse=True)
def the_same_draws():
    """Draw alike in each test, whatever ran before it."""
    rng.bit_generator.state = np.random.PCG64(0).state


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return what makes the file of a paper and a kind, once."""
    return cache(lambda maker: maker(tmp_path_factory.mktemp("own")))


@pytest.fixture
def in_this_process(monkeypatch):
    """Run trials here, without a worker process for each."""

    def run(jobs, workers=None):
        for job in jobs:
            yield job, Outcome(**worker.perform(asdict(job)))

    monkeypatch.setattr(local, "run_local", run)


@pytest.mark.parametrize(("slug", "kind", "claim"), TAKES)
def test_a_users_file_goes_through(command, in_this_process, made, slug, kind, claim):
    path, found = made(OF_PAPER.get(f"{slug} {kind}", FILES[kind])), load_claims(papers()[slug])[claim]
    settings = {**found.smallest, **OPTIONS.get(slug, {}), **OPTIONS.get(f"{slug} {kind}", {})}
    target = []
    if path.suffix == ".csv":
        settings["data.missing"] = "k.A."
        if "target" in found.parameters:
            column = "Preis/€" if slug in OF_NUMBERS else "verkauft?"
            target = ["--target", settings.pop("target", column)]
    sets = [
        f"--set={name}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
        for name, value in settings.items()
    ]
    words = ["run", slug, "--claim", claim, "--data", path, *target, "--seeds", 1, *sets, "--json", "--quiet"]
    code, out, err = command(*words)
    if kind == "points":  # a gap in a point cannot be filled: it is said where it is
        assert (code, out) == (2, "") and "row 10 has a missing" in err
        whole = path.with_name("Orte ganz.csv")
        whole.write_text("".join(line for line in path.read_text().splitlines(True) if "k.A." not in line))
        code, out, err = command(*(whole if word is path else word for word in words))
    assert code == 0, err
    (row,) = json.loads(out)
    means = [arm["mean"] for arm in row["arms"].values()] if "arms" in row else [row["value"]["mean"]]
    assert all(math.isfinite(mean) for mean in means)
    assert str(row["data"]).startswith(str(path.parent))


def photo(folder):
    pixels = rng.integers(0, 256, (24, 20, 4)).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "Foto mit Rand.PNG")
    return folder / "Foto mit Rand.PNG"


def mesh(folder):
    corners = [(1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1)]
    lines = ["# Blender", "o Würfel", *(f"v {x} {y} {z}" for x, y, z in corners), "f 1/1/1 2/2/1 3/3/1",
             "f 1 3 4", "f 1 4 2", "f 2 4 3"]  # fmt: skip
    (folder / "Körper.obj").write_text("\r\n".join(lines), encoding="utf-8")
    return folder / "Körper.obj"


def corpora(folder):
    for name, words in (
        ("Küche", "Topf Herd Salz kocht und die"),
        ("Garten", "Beet Baum Gras wächst und die"),
    ):
        lines = " ".join(rng.choice(words.split(), 4000))
        (folder / f"{name}.txt").write_text("\ufeff" + lines, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("slug", "claim", "name", "maker"),
    [
        ("quasi-sliced-wasserstein", "direction_error", "source", photo),
        ("sparse-ot", "capped_columns", "source", photo),
        ("signnet", "spectral_filter", "image", photo),
        ("geometry-control", "filter_finds", "shape", mesh),
        ("continual-pretraining", "keeps_domains", "corpora", corpora),
    ],
)
def test_what_goes_in_by_another_name_does(command, in_this_process, made, slug, claim, name, maker):
    settings = {**load_claims(papers()[slug])[claim].smallest, name: made(maker)}
    words = [f"--set={key}={value}" for key, value in settings.items()]
    code, out, err = command("run", slug, "--claim", claim, "--seeds", 1, *words, "--json", "--quiet")
    assert code == 0, err
    (row,) = json.loads(out)
    assert row["params"][name] == str(settings[name]) and row["verdict"] != "error"
    assert name in papers()[slug].own_data


def test_a_paper_takes_data_or_says_what_else_it_takes_or_why_not():
    assert not [paper.slug for paper in PAPERS if bool(kinds(paper)) == bool(paper.own_data)]
    assert (ROOT / "docs" / "own-data.md").read_text(encoding="utf-8") == page(), "run `make stubs`"


def test_a_word_for_a_gap_is_asked_for_and_not_taken_for_a_category(command, made):
    code, out, err = command("run", "tangos", "--data", made(table), "--target", "verkauft?")
    assert (code, out) == (
        2,
        "",
    ) and "'Größe (m²)' has numbers and 'k.A.': missing=k.A. reads that as missing" in err
