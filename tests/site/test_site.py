"""The site: a gallery that finds by problem, a page a paper, a page a task, all from files."""

import json
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from benchmarks.timing import race
from posterity.engine.compare import compare
from posterity.engine.verdicts import agreement
from posterity.papers import Paper, papers
from posterity.papers.search import find
from posterity.site import gallery, sources
from posterity.site.gallery import write_site
from posterity.site.pages import environment, write_paper
from tools import bench, comparisons

ROOT = Path(__file__).parent.parent.parent
READY = [paper for paper in papers().values() if paper.implemented]
ROWS = [(paper.slug, row) for paper in READY for row in paper.evidence()["claims"]]
FORMS = {row["form"]: (slug, row) for slug, row in reversed(ROWS)}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return write_site(tmp_path_factory.mktemp("site"))


class Seen(HTMLParser):
    """What a page refers to, its identifiers, its headings, and its text outside code."""

    def __init__(self, text):
        super().__init__()
        self.to, self.ids, self.tags, self.prose, self.seen, self._code = [], [], [], [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.to += [given[name] for name in ("href", "src") if name in given]
        self.ids += [given["id"]] if "id" in given else []
        self.tags.append(tag)
        self.seen += [(given.get("src", ""), given.get("alt", ""))] if tag == "img" else []
        self._code += tag in ("pre", "code", "script", "style")

    def handle_endtag(self, tag):
        self._code -= tag in ("pre", "code", "script", "style")

    def handle_data(self, data):
        if not self._code:
            self.prose.append(data)


def test_every_page_is_whole_and_leads_only_to_files_that_are_there(site):
    pages = sorted(site.parent.rglob("*.html"))
    assert len(pages) == 1 + len(papers()) + 1 + len(sources.questions())
    for path in pages:
        page = Seen(path.read_text(encoding="utf-8"))
        assert page.tags.count("h1") == 1, path
        assert len(page.ids) == len(set(page.ids)), path
        assert "`" not in "".join(page.prose), f"{path}: a raw backtick"
        assert page.tags.count("link") == 1 and "iframe" not in page.tags, path
        for picture, says in page.seen:
            assert picture.startswith("data:image/png;base64,") and says, path
        for address in page.to:
            there = urlsplit(address)
            if there.scheme in ("data", "http", "https"):
                continue
            target = path if not there.path else path.parent / unquote(there.path)
            assert target.is_file(), f"{path}: {address}"
            assert not there.fragment or there.fragment in page.ids, f"{path}: {address}"


def test_front_page_has_a_card_a_paper_and_stays_small(site):
    page = site.read_text(encoding="utf-8")
    assert page.count("<li data-slug") == len(papers())
    assert page.count("<svg") == sum(bool(paper.evidence()["claims"]) for paper in READY)
    later = page.index('class="later"')
    assert all(page.index(f'data-slug="{paper.slug}"') < later for paper in READY)
    assert len(page.encode()) < 10_000 + 1_500 * len(papers())
    assert (site.parent / "search.js").stat().st_size < 1_500 * len(papers())


@pytest.mark.parametrize("form", sorted(FORMS))
def test_page_of_a_paper_goes_from_lines_and_picture_to_citation(site, form):
    slug, row = FORMS[form]
    page = (site.parent / "papers" / f"{slug}.html").read_text(encoding="utf-8")
    paper = papers()[slug]
    parts = ["The lines that use it", "<svg", "95 % interval</th>", "Departures", "Parity", "<h2>API",
             "On your own data", "<h2>Cite"]  # fmt: skip
    if not paper.departures:
        parts.remove("Departures")
    places = [page.find(part) for part in parts if part in page]
    assert places == sorted(places) and len(places) >= len(parts) - 1  # not every claim takes data
    words = " ".join("".join(Seen(page).prose).split())
    for part in (row["says"], row["metric"], agreement(paper.evidence()["parity"])):
        assert part.replace("`", "") in words
    assert row["code"] in page and f"torch {paper.evidence()['libraries']['torch']}" in words
    assert all(f"{name}" in page for name in paper.exports)


def test_own_data_is_asked_for_as_the_kind_of_the_claim_takes_it(site):
    def commands(slug):
        return (site.parent / "papers" / f"{slug}.html").read_text(encoding="utf-8")

    assert "posterity run tangos --claim generalises --data YOUR.csv --target COLUMN" in commands("tangos")
    assert "posterity compare tabular-regression --data YOUR.csv --target COLUMN" in commands("tangos")
    assert "posterity run heterophily --claim standard_beats_special --data YOUR.npz" in commands(
        "heterophily"
    )
    assert "posterity compare calibration --data YOUR-FOLDER" in commands("esd")


def test_assistants_find_every_paper_in_one_text(site):
    lines = (site.parent / "llms.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# Posterity" and lines[2].startswith("> ")
    for paper in papers().values():
        there = f"papers/{paper.slug}.html"
        assert sum(line.startswith(f"- [{paper.slug}]({there}): ") for line in lines) == 1
        assert (site.parent / there).is_file()


def test_speed_is_kept_with_the_evidence_and_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("POSTERITY_RACES", str(tmp_path / "races"))
    race("this, against <that>", lambda: None, lambda: None, target=2 / 3, rounds=1)
    races = [json.loads(line) for line in (tmp_path / "races").read_text().splitlines()]
    assert races[0]["name"] == "this, against <that>" and races[0]["target"] == 0.667
    stored = tmp_path / "esd.json"
    stored.write_text((ROOT / "evidence" / "esd.json").read_text())
    bench.keep(stored, races)
    monkeypatch.setattr(Paper, "evidence", lambda self: json.loads(stored.read_text()))
    write_paper(environment([]), papers()["esd"], [], [], tmp_path)
    page = (tmp_path / "papers" / "esd.html").read_text()
    assert "Speed beside the peer" in page and "this, against &lt;that&gt;" in page


@pytest.mark.parametrize("task", [each.name for each in sources.questions()])
def test_comparison_of_a_task_is_current_and_its_page_shows_it(site, task):
    path = comparisons.FOLDER / f"{task}.json"
    page = (site.parent / "tasks" / f"{task}.html").read_text(encoding="utf-8")
    assert sources.question(task).command in page
    if not path.is_file():
        assert "Not measured yet" in page
        return
    stored = json.loads(path.read_text(encoding="utf-8"))
    words = "".join(Seen(page).prose)
    assert stored["advice"] in words
    assert all(row["entry"] in words and stored["code"][row["entry"]] in page for row in stored["rows"])
    if comparisons.same_versions(stored):
        jobs, _, _ = compare(task)
        assert comparisons.current(path, jobs), f"run `make comparisons TASKS={task}`"


def test_points_of_a_curve_are_drawn_for_every_entry_and_not_listed(site):
    page = (site.parent / "tasks" / "self-supervised.html").read_text(encoding="utf-8")
    stored = json.loads((comparisons.FOLDER / "self-supervised.json").read_text(encoding="utf-8"))
    drawn = page.split("linear probe by labels a class")[1:]
    assert all(any(f"{row['entry']} from" in unescape(chart) for chart in drawn) for row in stored["rows"])
    assert "labels a class: 1<" not in page and ">nearest neighbours</th>" in page


def test_manual_is_linked_where_there_is_one(tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "papers", lambda: {"esd": papers()["esd"]})
    (tmp_path / "manual").mkdir()
    (tmp_path / "manual" / "index.html").write_text("")
    assert 'href="manual/index.html"' in write_site(tmp_path).read_text()
    page = (tmp_path / "papers" / "esd.html").read_text()
    assert 'href="../manual/api/uncertainty.html#posterity.uncertainty.ESDLoss"' in page


def test_the_command_writes_it_and_says_where_to_click(command, tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "write_site", lambda out: out / "index.html")
    code, out, err = command("site", "-o", tmp_path)
    assert (code, out.strip()) == (0, str(tmp_path / "index.html"))
    assert (tmp_path / "index.html").as_uri() in err
    (tmp_path / "file").touch()
    assert command("site", "-o", tmp_path / "file")[0] == 2


def test_a_reader_types_a_problem_with_a_typo_and_opens_the_right_card_by_keyboard(site, reader):
    page = reader(site)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    for _ in range(10):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "words":
            break
    page.keyboard.type("overconfidnt clasifier")
    cards = page.locator("#cards li:visible")
    assert cards.first.get_attribute("data-slug") == "esd"
    assert page.locator("#count").inner_text() == f"{cards.count()} of {len(papers())} papers"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.textContent") == "esd"
    page.keyboard.press("Enter")
    page.wait_for_url("**/papers/esd.html")
    page.go_back()
    assert page.get_by_label("problem").input_value() == "overconfidnt clasifier"
    assert cards.first.get_attribute("data-slug") == "esd"


def test_search_in_the_browser_ranks_as_the_command_line_does(site, reader):
    texts = [paper.problem for paper in READY] + [
        "graph with unlike neighbours",
        "one step image generaton",
        "xqzt",
        "diffuser",
    ]
    found = reader(site).evaluate("texts => texts.map(text => rank(text).map(([slug]) => slug))", texts)
    assert found == [[paper.slug for paper in find(text)] for text in texts]


def test_filters_narrow_the_cards_and_a_link_brings_them_back(site, reader):
    page = reader(site)
    cards = page.locator("#cards li:visible")
    page.get_by_label("Domain").select_option("graphs")
    assert cards.count() == sum(paper.domain == "graphs" for paper in papers().values())
    page.get_by_label("can be used now").check()
    assert cards.count() == sum(paper.domain == "graphs" for paper in READY)
    page.get_by_label("no labels").check()
    free = [p.slug for p in READY if p.domain == "graphs" and p.labels.startswith("not needed")]
    assert sorted(card.get_attribute("data-slug") for card in cards.all()) == sorted(free)
    there = page.url
    assert "#domain=graphs&needs=now&needs=no-labels" in there
    page.goto("about:blank")
    page.goto(there)
    assert cards.count() == len(free) and page.get_by_label("no labels").is_checked()
    page.evaluate("location.hash = 'kind=loss&verdict=holds'")
    page.wait_for_function("document.querySelector('[name=kind]').value === 'loss'")
    assert page.locator("#count").inner_text() == f"{cards.count()} of {len(papers())} papers"
    assert 0 < cards.count() == sum(
        "loss" in paper.kind.split(", ") and any(slug == paper.slug and row["verdict"] == "holds" for slug, row in ROWS)
        for paper in READY
    )  # fmt: skip
    page.evaluate("location.hash = 'q=xqzt'")
    page.wait_for_function("document.getElementById('count').textContent.startsWith('No paper')")
    assert cards.count() == 0


CONTRAST = """() => {
  const parts = (c) => c.match(/[\\d.]+/g).map(Number);
  const light = (c) => parts(c).slice(0, 3).map((v) => v / 255)
    .map((v) => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, k) => sum + v * [.2126, .7152, .0722][k], 0);
  const ground = (e) => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    if (parts(c)[3] !== 0) return c; } };
  const low = [];
  for (const e of document.querySelectorAll("h1, h2, p, a, b, code, pre, td, th, label, span, dd, summary, select, text"))
    if (e.textContent.trim()) {
      const style = getComputedStyle(e), ink = e.tagName === "text" ? style.fill : style.color;
      const [a, b] = [light(ink), light(ground(e))].sort((a, b) => b - a);
      if ((a + .05) / (b + .05) < 4.5) low.push(e.tagName + " " + e.className + " " + ink + " on " + ground(e));
    }
  return [...new Set(low)];
}"""


def test_no_paper_scrolls_sideways_on_a_phone(site, reader):
    page = reader(site, width=360)
    for path in sorted((site.parent / "papers").glob("*.html")):
        page.goto(path.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, path.name


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_scrolls_sideways_and_letters_stand_out(site, reader, scheme):
    slugs = sorted({slug for slug, _ in FORMS.values()})
    inner = [f"papers/{slug}.html" for slug in slugs] + ["tasks/calibration.html", "tasks/index.html"]
    page = reader(site, scheme=scheme, width=360)
    for path in ["index.html", *inner]:
        page.goto((site.parent / path).as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, path
        assert page.evaluate(CONTRAST) == [], path
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 22, 26)"
        assert dark == (scheme == "dark")
