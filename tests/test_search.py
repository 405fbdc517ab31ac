"""Search, as people ask: sixty problems in users' words, typos, forms of words, words that nobody wrote."""

import json
import subprocess
import sys
import time
from collections import Counter
from itertools import product
from math import log

import pytest

from posterity.papers import DOMAINS, papers
from posterity.papers.search import FIELDS, B, K, find, index, letters_apart, rank, split, stem

QUESTIONS = [  # a problem as a person says it who does not know the method's name; the slugs that answer it
    ("assign workers to jobs so that nobody gets more than two", "sparse-ot"),
    ("distance between two 3d scans with less noise", "quasi-sliced-wasserstein"),
    ("make the model's scores look alike for every group", "demd"),
    ("my gnn gets worse when I add more layers", "a-dgn acmp"),
    ("suggest friends to people who just joined", "t-bgrl"),
    ("eigenvectors flip their sign at random between runs", "signnet"),
    ("which node would disconnect the network if it fails", "gd-wl"),
    ("embed the nodes of a graph without any labels", "polygcl t-bgrl"),
    ("how sure is my trained network, I want error bars", "sampled-laplace"),
    ("detect inputs that look like nothing in the training data", "cider"),
    ("probabilities are too high compared to how often it is right", "esd"),
    ("predict several sensors at once with gaussian processes", "gmogp"),
    ("all members of my ensemble fail on the same pictures", "forde"),
    ("a customer asks me to delete his data from the model", "salun"),
    ("publish a regression without revealing anyone in the table", "tukey-em"),
    ("can the server read what my users typed", "decepticons"),
    ("some machines send broken gradients", "byz-vr-marina"),
    ("hospitals with different scanners train together", "fedfa"),
    ("loan model rejects women more often than men", "fairee"),
    ("cluster people so that every group is represented equally", "consensus-fair-clustering"),
    ("someone planted a trigger in my training set", "ntba"),
    ("stop companies from training on my photos", "self-ensemble-protection"),
    ("prove that no small change flips the prediction", "gains"),
    ("find wrong annotations in my dataset", "cg-score"),
    ("only forty labelled images and thousands without labels", "softmatch"),
    ("combine keyword heuristics instead of hand labelling", "weak-label-propagation"),
    ("group millions of rows quickly", "minibatch-kmeans"),
    ("merge duplicate customer records with few paid comparisons", "kwikbucks"),
    ("neural net overfits on a spreadsheet with few rows", "tangos"),
    ("does the treatment help when patients chose it themselves", "mriv"),
    ("predict electricity demand for next week", "timesnet"),
    ("sensors drop out and leave gaps", "tider timesnet"),
    ("sampling from my diffusion model takes too many steps", "rectified-flow"),
    ("make pictures of my dog from five photos", "textual-inversion"),
    ("upscale a photo to any size", "funknn multiscale-score"),
    ("make fake tables with whole numbers and categories", "constrained-bridges"),
    ("is a lower fid really better", "fid-classes"),
    ("shrink images without losing a bit", "fsar"),
    ("codec gives smeared pictures at a low bit rate", "idempotent-codec"),
    ("make my network smaller so that it fits on a phone", "lilnetx fit dfpc"),
    ("embeddings collapse to a few directions", "rank-differential sfrik ssl-duality"),
    ("find photos that resemble this one", "unicom"),
    ("the network learned which scanner took the image", "circe"),
    ("model forgets old tasks when trained on new ones", "scheduled-data-prior continual-pretraining"),
    ("regression is terrible outside the range it saw", "bilinear-transduction"),
    ("works in one city but not in another", "topology-aware-robust"),
    ("which step size when I double the batch", "batch-size-scaling"),
    ("train without storing activations for backprop", "local-forward-gradient dc-fl"),
    ("test accuracy jumps long after training accuracy is perfect", "omnigrok"),
    ("network misses fine details and sharp wiggles", "frequency-bias"),
    ("delivery trucks should all finish at about the same time", "neuro-cross"),
    ("chatbot repeats itself and never stops", "non-monotonic-lm"),
    ("write the best prompt automatically", "ape"),
    ("attention is too slow for long documents", "treeformer"),
    ("agent needs too many games to learn", "twm avtd"),
    ("controller works in simulation but not on the real robot", "lqg-sim-to-real"),
    ("learn from demonstrations that are not perfect", "ailp"),
    ("why did the detector draw this box", "odam"),
    ("lidar detector is too slow for the car", "dbq-ssd"),
    ("design a drug that fits a protein pocket", "e3bind"),
]
ANSWERS = [tuple(slugs.split()) for _, slugs in QUESTIONS]


def slugs(text):
    return [paper.slug for paper in find(text)]


def test_questions_are_sixty_from_every_domain_implemented_and_not():
    asked = [papers()[slug] for right in ANSWERS for slug in right]
    assert len({text for text, _ in QUESTIONS}) == 60
    assert {paper.domain for paper in asked} == set(DOMAINS)
    assert {paper.implemented for paper in asked} == {True, False}


@pytest.mark.parametrize(("text", "right"), QUESTIONS, ids=[text.replace(" ", "-") for text, _ in QUESTIONS])
def test_a_right_paper_is_among_the_first_three(text, right):
    assert set(slugs(text)[:3]) & set(right.split())


def test_a_right_paper_is_first_for_four_of_five_questions():
    first = [slugs(text)[0] in right for (text, _), right in zip(QUESTIONS, ANSWERS, strict=True)]
    assert sum(first) >= 0.8 * len(first)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("graph with unlike neighbours", "heterophily"),
        ("one step image generation", "rectified-flow"),
        ("my network says 99 percent but is wrong", "esd"),
    ],
)
def test_a_strange_word_does_not_drop_a_paper(text, right):
    assert right in slugs(text)[:3]


def test_a_slug_finds_its_paper_first():
    assert [slug for slug in papers() if slugs(slug)[0] != slug] == []


@pytest.mark.parametrize(
    ("typo", "word"),
    [
        ("calibraton", "calibration"), ("callibration", "calibration"), ("grpah", "graph"), ("overfiting", "overfitting"),
        ("wasertsein", "wasserstein"), ("nieghbours", "neighbours"), ("GRAHP", "graph"), ("forcasting", "forecasting"),
    ],
)  # fmt: skip
def test_a_typo_finds_what_the_word_finds(typo, word):
    assert slugs(typo) == slugs(word) != []


@pytest.mark.parametrize(
    "forms",
    [
        "graph graphs", "forecast forecasts forecasting", "neighbour neighbors neighbouring", "optimise optimized optimizing",
        "calibrate calibrated calibration calibrating", "predict prediction predictions predictive", "noise noisy",
        "overfit overfits overfitting overfitted", "diverse diversity", "label labelled labeled labelling labels", "private privacy",
        "classify classifier classification", "class classes", "policy policies", "stable stability", "robust robustness",
        "confident confidence", "segment segmentation segments", "memorise memorised memorization memory", "bias biased biases", "sparse sparsity",
        "anomaly anomalies anomalous", "loss losses", "blur blurry", "compress compressed compression", "colour color colors",
    ],
)  # fmt: skip
def test_forms_of_a_word_are_one(forms):
    assert len({stem(word) for word in forms.split()}) == 1


@pytest.mark.parametrize(
    "words",
    [
        "general generation",
        "class classify",
        "optimal optimise",
        "transform transformer",
        "agent age",
        "nose noise",
    ],
)
def test_words_that_mean_different_things_are_two(words):
    one, two = words.split()
    assert stem(one) != stem(two)


def test_strange_words_numbers_and_stop_words_change_nothing():
    assert slugs("zzzzqqqq overconfident") == slugs("overconfident")
    assert slugs("my 99 is overconfident, why?") == slugs("overconfident")
    assert slugs("OverConfident!") == slugs("overconfident")


def test_a_word_twice_counts_once():
    assert rank("graph graphs", index()) == rank("graph", index())


def test_the_beginning_of_a_word_finds_it():
    assert "esd" in slugs("miscalib")[:3]


def test_joined_and_hyphenated_words_are_one():
    assert split("k-means") == ["means", "kmeans"]
    assert slugs("kmeans")[0] == slugs("k-means")[0] == "minibatch-kmeans"


def test_accents_and_apostrophes_do_not_matter():
    assert split("Fréchet's") == split("frechet") == ["frechet"]
    assert split("don’t 99 %") == ["percent"]


@pytest.mark.parametrize("text", ["zzzzqqqq", "the", "99", "?"])
def test_words_that_nobody_wrote_find_nothing(text, command):
    assert find(text) == []
    code, out, err = command("search", text)
    assert (code, out) == (0, "")
    assert f"nothing found for {text}" in err
    assert command("search", text, "--json")[:2] == (0, "[]\n")


@pytest.mark.parametrize("text", ["", " \t"])
def test_empty_words_are_refused(text, command):
    with pytest.raises(ValueError, match="words must say what you look for"):
        find(text)
    code, out, err = command("search", text)
    assert (code, out) == (2, "")
    assert "words must say what you look for" in err


def test_the_command_prints_rows_of_the_index_best_first(command):
    _, out, _ = command("search", "sensors", "drop out", "--json")
    rows = json.loads(out)
    assert [row["slug"] for row in rows] == slugs("sensors drop out")
    assert all(
        list(row) == ["slug", "domain", "title", "summary", "tags", "venue", "implemented"] for row in rows
    )


def test_the_index_as_json_ranks_the_same_again_and_again():
    data = json.loads(json.dumps(index()))
    assert data == index()
    for text, _ in QUESTIONS:
        assert rank(text, data) == rank(text, index())
    assert index.__wrapped__() == index()


def test_scores_are_bm25_over_weighted_fields():
    """Equation 1, reckoned anew for each word of a few."""
    texts = {
        name: [[stem(word) for word in split(value if isinstance(value, str) else " ".join(value))] for value in values]
        for name in FIELDS
        for values in [[getattr(papers()[slug], name) for slug in sorted(papers())]]
    }  # fmt: skip
    for word in ("calibration", "graph", "wasserstein", "image"):
        tf = Counter()
        for name, weight in FIELDS.items():
            filled = [len(text) for text in texts[name] if text]
            for number, text in enumerate(texts[name]):
                length = len(text) * len(filled) / sum(filled)
                tf[number] += weight * text.count(stem(word)) / (1 - B + B * length)
        have = {number: value for number, value in tf.items() if value}
        rare = log(1 + (len(papers()) - len(have) + 0.5) / (len(have) + 0.5))
        truth = {
            n: pytest.approx(1000 * rare * f * (K + 1) / (f + K), abs=0.5 + 1e-6) for n, f in have.items()
        }
        assert dict(map(tuple, index()["scores"][stem(word)])) == truth


def test_the_paper_that_can_be_used_comes_first_where_scores_are_near():
    data = {**index(), "papers": ["a", "b", "c"], "ready": [0, 1, 0], "words": {"graph": "graph"}}
    near = {**data, "scores": {"graph": [[0, 1000], [1, 950], [2, 300]]}}
    assert [slug for slug, _ in rank("graph", near)] == ["b", "a"]
    far = {**data, "scores": {"graph": [[0, 1000], [1, 800], [2, 1000]]}}
    assert [slug for slug, _ in rank("graph", far)] == ["a", "c", "b"]


def test_letters_apart_is_the_least_number_of_edits():
    """Against the recursion that defines it, on every pair of short words of three letters."""

    def truth(a, b):
        if not a or not b:
            return len(a) + len(b)
        ways = [truth(a[1:], b) + 1, truth(a, b[1:]) + 1, truth(a[1:], b[1:]) + (a[0] != b[0])]
        if len(a) > 1 and len(b) > 1 and a[0] == b[1] and a[1] == b[0]:
            ways.append(truth(a[2:], b[2:]) + 1)
        return min(ways)

    words = ["".join(letters) for n in range(4) for letters in product("abc", repeat=n)]
    assert all(letters_apart(a, b) == truth(a, b) for a in words for b in words)


def test_search_loads_nothing_slow():
    code = (
        "import sys; from posterity.cli import main; sys.argv = ['posterity', 'search', 'calibraton'];\n"
        "try: main()\nexcept SystemExit: pass\n"
        "slow = {'torch', 'numpy', 'scipy', 'sklearn', 'pandas', 'rich', 'jinja2', 'sqlite3'} & set(sys.modules)\n"
        "assert not slow, slow"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.startswith("* esd")


def test_an_index_and_a_question_take_less_than_the_three_tenths_of_a_second_that_a_user_waits():
    def seconds():
        stem.cache_clear()
        begun = time.process_time()
        rank("my netwrok is overconfidant on unfamiliar inptus", index.__wrapped__())
        return time.process_time() - begun

    assert min(seconds() for _ in range(3)) < 0.3
