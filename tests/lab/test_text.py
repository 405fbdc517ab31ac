"""Text: which words a file has, what is refused, and the text that ships."""

import os
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_iris

from posterity.lab.data import Text, check, load_text, words_of

PUBLIC = Path(os.environ.get("POSTERITY_DATA") or "../shared/data") / "text" / "tinyshakespeare.txt"


@pytest.fixture
def written(tmp_path):
    def write(content, query="", name="story.txt"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return f"{path}{query}"

    return write


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The cat, the CAT.", ["the", "cat", "the", "cat"]),
        ("don't 'quote' it’s 3.5 x_1", ["don't", "quote", "it’s", "3", "5", "x_1"]),
        ("Straße — Ελλάδα\n\n* * *\t东京 été", ["straße", "ελλάδα", "东京", "été"]),
        ("... !?", []),
    ],
)
def test_words_are_runs_of_letters_and_digits_in_lower_case(text, words):
    assert words_of(text) == words


@pytest.mark.parametrize("name", ["story.txt", "story.md", "STORY.TXT"])
def test_tokens_are_numbers_of_words_in_the_order_in_which_they_stand(written, name):
    data = load_text(written("\ufeffThe cat sat. The dog sat!", name=name))
    assert data.vocabulary == ("cat", "dog", "sat", "the")
    assert data.tokens.tolist() == [3, 0, 2, 3, 1, 2] and data.tokens.dtype == np.int64
    assert data.note == f"{name}: 6 words, 4 different"


STORY = "once upon a time there was a cat and a dog who lived in a house by the sea for many years"


@pytest.mark.parametrize(
    ("content", "query", "message"),
    [
        ("", "", "has no word"),
        ("?! ...", "", "has no word"),
        (b"once \xff upon", "", "no UTF-8 text, byte 5 is none of it"),
        (b"once \0 upon", "", "no text, character 5 is NUL"),
        ("one two", "", "at least 20 words, 5 of them different, are needed; has 2, 2 different"),
        ("one two three four " * 20, "", "has 80, 4 different"),
        (STORY, "?header=no", "'header' is no option of reading it, those are none"),
    ],
)
def test_what_cannot_be_read_back_is_refused_by_name(written, content, query, message):
    with pytest.raises(ValueError, match=rf"story\.txt.*{message}"):
        check(Text, written(content, query))


def test_a_short_story_will_do(written):
    assert check(Text, written(STORY)) == "story.txt: 22 words, 19 different"


def test_other_files_are_refused(written):
    with pytest.raises(
        ValueError, match=r"data must be text: a name \(.*sklearn-descr.*\) or \*.txt, \*.md, got"
    ):
        load_text(written(STORY, name="story.csv"))


def test_what_ships_is_the_english_of_the_descriptions():
    data = load_text("sklearn-descr")
    words = [data.vocabulary[token] for token in data.tokens]
    opening = words_of(load_iris().DESCR)
    assert words[: len(opening)] == opening
    assert len(words) > 1_500 and {"the", "breast", "diabetes", "wine"} <= set(data.vocabulary)


@pytest.mark.skipif(not PUBLIC.is_file(), reason="the public files are not here")
def test_the_public_text_is_read():
    data = load_text(str(PUBLIC))
    assert [data.vocabulary[token] for token in data.tokens[:4]] == ["first", "citizen", "before", "we"]
    assert len(data.tokens) > 200_000
