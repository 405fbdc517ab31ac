"""Search: papers ranked by BM25 over the fields of their records, in the words of a user.

A stem w that n of N papers have weighs log(1 + (N - n + 1/2) / (n + 1/2)). For a paper, tf(w) is
how often each field has it, times the field's weight, divided by 1 - B + B * length / mean
length of that field, summed over fields. The paper scores for it

    s(w) = log(1 + (N - n + 1/2) / (n + 1/2)) tf(w) (K + 1) / (tf(w) + K),               (1)

so that a rare word counts more than a common one, a tag more than a summary, and the tenth
repetition less than the first. These are reckoned once, in ``index``; to search is to add up.
"""

import re
import unicodedata
from functools import cache
from math import log
from typing import Any

from posterity.papers import Paper, papers

__all__ = ["find", "index", "rank"]

K, B = 1.2, 0.75  # how soon repetition saturates, how much a long field is discounted: the usual values
FIELDS = {
    "slug": 3.0, "tags": 3.0, "title": 2.0, "problem": 1.5, "summary": 1.5, "domain": 1.0, "kind": 1.0, "exports": 1.0,
}  # fmt: skip
READY = 1.1  # of two papers that fit within a tenth of each other, the one that can be used now comes first
LIKE = 0.6  # what a synonym, the beginning of a word or a mended typo counts beside the word itself
LEAST = 0.35  # a paper below this share of the best score has a common word by chance

_STOP = """a about after again all almost also am an and another any anyone anything are around as at be
    because been before being but by can cannot cant come could did do does doesnt doing don done dont each
    either else ever every far for from get gets give go goes going got had has have having he help her here
    him his how however i if in instead into is isn isnt it its itself just keep let like ll made make makes
    making may me method methods might mine much must my need needs nobody not of off on one only onto or
    other others our out over paper papers per please put re really same say says see shall she should so some
    somebody someone something still such take than that the their them then there these they thing things
    this those though to too try trying up upon us use used uses using ve very want wants was way ways we were
    what when where whether which while who whom whose why will with won wont would yet you your"""
STOP = frozenset(_STOP.split())

# Rows of words that users say for each other and that share no stem: each finds the others, which count LIKE.
SYNONYMS = tuple(row.split() for row in (
    "image picture photo photograph", "error mistake wrong incorrect", "few small little limited", "big large huge many",
    "slow expensive costly", "fast quick rapid", "smaller shrink compress", "enlarge upscale zoom", "without no",
    "delete remove erase forget", "label annotation annotate", "predict forecast", "unlike dissimilar different",
    "network net", "explain interpret understand", "person people human user", "attacker adversary adversarial malicious",
    "gap missing", "fake synthetic artificial", "private secret confidential", "sure certain confident",
    "repeat repetition loop endless", "table tabular spreadsheet csv", "similar alike resemble same",
    "rare unusual uncommon", "new unseen unknown novel", "animal pet dog cat", "car vehicle truck",
    "phone mobile device", "chatbot dialogue conversation", "medical medicine clinical hospital",
))  # fmt: skip

# What words end in, in steps: (ending, what stands for it, how many pairs of a vowel and a consonant must
# come before it). Of each step the longest ending that fits is used, once; the aim is that forms of a word
# meet, not that stems are words. Endings are Porter's, but "al" stays: general is not generated.
_PLURAL = (
    ("bias", "bias", 0), ("sses", "ss", 0), ("ies", "y", 0), ("ss", "ss", 0), ("us", "us", 0), ("is", "is", 0), ("s", "", 0),
)  # fmt: skip
_PARTICIPLE = (("eed", "eed", 0), ("ed", "", 1), ("ing", "", 1))
_DERIVED = (
    ("transformer", "transformer", 0), ("stability", "stabil", 0), ("stable", "stabil", 0), ("anomaly", "anomal", 0),
    ("ational", "", 1), ("ation", "", 1), ("ative", "", 1), ("ator", "", 1), ("ate", "", 1), ("at", "", 1),
    ("acy", "", 1), ("sional", "s", 1), ("tional", "t", 1), ("sion", "s", 1), ("tion", "t", 1),
    ("ivity", "", 1), ("ive", "", 1), ("ability", "", 1), ("ibility", "", 1), ("able", "", 1), ("ible", "", 1),
    ("ification", "if", 1), ("ifier", "if", 1), ("ify", "if", 1), ("ical", "ic", 1), ("ainty", "ain", 0), ("ity", "", 1),
    ("ness", "", 1), ("ment", "", 1), ("ful", "", 1), ("ous", "", 1), ("ly", "", 1),
    ("ance", "", 2), ("ence", "", 2), ("ancy", "", 2), ("ency", "", 2), ("ant", "", 2), ("ent", "", 2),
    ("our", "or", 1), ("er", "", 1), ("or", "", 1), ("est", "", 1),
)  # fmt: skip
_VERB = (("ise", "", 2), ("is", "", 2))
_VOWEL = (("e", "", 1), ("y", "", 1), ("i", "", 1))
_DOUBLE = tuple((c + c, c, 0) for c in "bcdfgklmnprstvz")
STEPS = tuple(
    tuple(sorted(step, key=lambda rule: -len(rule[0])))
    for step in (_PLURAL, _PARTICIPLE, _DERIVED, _DERIVED, _VERB, _VOWEL, _DOUBLE)
)
_ENDINGS = tuple(tuple(ending for ending, _, _ in step) for step in STEPS)
_PAIR = re.compile("[aeiouy][^aeiou]")


@cache
def stem(word: str) -> str:
    """Return what the forms of a word share, as optimising and optimized."""
    word = word.replace("iz", "is")
    for step, endings in zip(STEPS, _ENDINGS, strict=True):
        if not word.endswith(endings):
            continue
        for ending, other, pairs in step:
            left = word[: -len(ending)]
            if word.endswith(ending) and len(_PAIR.findall(left)) >= pairs:
                word = left + other
                break
    return word


def split(text: str) -> list[str]:
    """Return the words of a text that weigh something; a word with a hyphen as its parts and joined."""
    plain = unicodedata.normalize("NFKD", text.lower())
    plain = "".join(c for c in plain if not unicodedata.combining(c))
    plain = re.sub("['’]s?", "", plain).replace("%", " percent ")
    found = []
    for word in re.findall("[a-z0-9]+(?:-[a-z0-9]+)*", plain):
        parts = word.split("-")
        found += [*parts, "".join(parts)] if len(parts) > 1 else parts
    return [word for word in found if len(word) > 1 and not word.isdigit() and word not in STOP]


def letters_apart(word: str, other: str) -> int:
    """Return how many letters are left out, put in, changed or swapped with the next between two words."""
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, letter in enumerate(word, start=1):
        last, row = row, [i]
        for j, letter2 in enumerate(other, start=1):
            row.append(min(last[j] + 1, row[-1] + 1, last[j - 1] + (letter != letter2)))
            if i > 1 and j > 1 and letter == other[j - 2] and word[i - 2] == letter2:
                row[j] = min(row[j], before[j - 2] + 1)
        before = last
    return row[-1]


@cache
def index() -> dict[str, Any]:
    """Return the search index: data that JSON holds, from which any language ranks as ``rank`` does.

    Returns
    -------
    dict
        ``papers``, slugs in order, where a paper's number is its place; ``ready``, 1 for those
        that are implemented; ``scores``, stem to pairs [number, s], with s of equation 1 times
        1000, rounded; ``words``, each word of the records to its stem; ``synonyms``, stem to
        stems; ``stop``, words that weigh nothing; ``steps``, the endings; ``like``, ``least`` and
        ``boost``, numbers.

    Notes
    -----
    To rank a text:

    1. Words. Make it small letters, take accents off (NFKD without combining marks), take out
       ``'s`` and apostrophes, write "percent" for %. Words match ``[a-z0-9]+(-[a-z0-9]+)*``; one
       with hyphens gives its parts and, after them, the parts joined. Drop words of one letter,
       those of digits only, those in ``stop``.
    2. Stems. Write "is" for each "iz"; then in each of ``steps`` take the first
       [ending, other, pairs] such that the word ends so and what is left of the ending has at
       least ``pairs`` matches of ``[aeiouy][^aeiou]``, and put ``other`` in the ending's place.
       Of words with one stem only the first counts.
    3. Each word stands for stems with a share: its own, if ``scores`` has it, with 1; its
       ``synonyms`` with ``like``. If that is none: of three letters and more, the stems of all
       ``words`` that begin with it, with ``like``. If still none: of four letters and more, the
       stems of those nearest among ``words`` that are at most 1 letter apart (2 for eight
       letters and more), with ``like``; a swapped pair counts as one.
    4. Score. A paper gets for each word the largest of share * s over those stems, and 0
       without; the words' values are added in their order; where ``ready`` is 1 the sum is
       multiplied by ``boost``. Papers of a score above 0 and of at least ``least`` times the
       best are the answer, by falling score, then by number.
    """
    found = papers()
    slugs = sorted(found)
    words: dict[str, str] = {}
    counts: dict[str, dict[int, float]] = {}
    for name, weight in FIELDS.items():
        values = (getattr(found[slug], name) for slug in slugs)
        texts = [split(value if isinstance(value, str) else " ".join(value)) for value in values]
        mean = sum(map(len, texts)) / max(1, sum(map(bool, texts)))  # of papers that have the field
        for number, text in enumerate(texts):
            for word in text:
                have = counts.setdefault(words.setdefault(word, stem(word)), {})
                have[number] = have.get(number, 0.0) + weight / (1 - B + B * len(text) / mean)
    scores = {}
    for root, have in sorted(counts.items()):
        rare = log(1 + (len(slugs) - len(have) + 0.5) / (len(have) + 0.5))
        scores[root] = [[n, round(1000 * rare * tf * (K + 1) / (tf + K))] for n, tf in sorted(have.items())]
    synonyms: dict[str, list[str]] = {}
    for row in SYNONYMS:
        roots = [stem(word) for word in row]
        for root in roots:
            others = [other for other in roots if other != root and other in scores]
            synonyms[root] = synonyms.get(root, []) + others
    return {
        "papers": slugs, "ready": [int(found[slug].implemented) for slug in slugs], "scores": scores,
        "words": dict(sorted(words.items())), "synonyms": synonyms, "stop": sorted(STOP),
        "steps": [[list(rule) for rule in step] for step in STEPS], "like": LIKE, "least": LEAST, "boost": READY,
    }  # fmt: skip


def _roots(word: str, data: dict[str, Any]) -> dict[str, float]:
    """Return the stems that a word stands for, and what each counts."""
    root = stem(word)
    like: float = data["like"]
    found = dict.fromkeys(data["synonyms"].get(root, ()), like)
    if root in data["scores"]:
        found[root] = 1.0
    near = [] if found or len(word) < 3 else [known for known in data["words"] if known.startswith(word)]
    if not found and not near and len(word) > 3:
        most, letters = 1 if len(word) < 8 else 2, set(word)
        apart = {
            known: letters_apart(word, known)
            for known in data["words"]
            # a letter apart changes at most two of the set: most words are ruled out by that
            if abs(len(known) - len(word)) <= most and len(letters.symmetric_difference(known)) <= 2 * most
        }
        least = min(apart.values(), default=most + 1)
        near = [known for known, far in apart.items() if far == least <= most]
    return found or {data["words"][known]: like for known in near}


def rank(text: str, data: dict[str, Any]) -> list[tuple[str, float]]:
    """Return slug and score of the papers that fit a text, best first, by an index as ``index`` gives it."""
    total = [0.0] * len(data["papers"])
    firsts: dict[str, str] = {}
    for word in split(text):
        firsts.setdefault(stem(word), word)
    for word in firsts.values():
        best: dict[int, float] = {}
        for root, share in _roots(word, data).items():
            for number, score in data["scores"][root]:
                best[number] = max(best.get(number, 0.0), share * score)
        for number, score in best.items():
            total[number] += score
    total = [
        score * (data["boost"] if ready else 1.0) for score, ready in zip(total, data["ready"], strict=True)
    ]
    least = data["least"] * max(total, default=0.0)
    name = text.strip().lower()  # who gives a paper's name wants that paper, whoever else has the word
    order = sorted(range(len(total)), key=lambda n: (data["papers"][n] != name, -total[n], n))
    return [
        (data["papers"][n], total[n]) for n in order
        if total[n] > 0 and (total[n] >= least or data["papers"][n] == name)
    ]  # fmt: skip


def find(text: str) -> list[Paper]:
    """Return the papers that fit what a user says, best first.

    Parameters
    ----------
    text : str
        A problem, a method, a name: words found nowhere are passed over, typos forgiven.

    Returns
    -------
    list of Paper
        Empty if no word is found.

    Raises
    ------
    ValueError
        If the text is empty.
    """
    if not text.strip():
        raise ValueError(f"words must say what you look for, got {text!r}")
    return [papers()[slug] for slug, _ in rank(text, index())]
