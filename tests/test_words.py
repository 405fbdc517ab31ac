"""The library's words, as CONTRIBUTING lists them: every public signature is held against them."""

import inspect
import re
from collections import defaultdict
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import Literal, Union, get_args, get_origin

import pytest
import torch

from posterity.papers import papers

ROOT = Path(__file__).parent.parent
COMMON = 6  # domains in which a name of more than one letter must be a listed word
GREEK = {"alpha", "beta", "gamma", "delta", "sigma", "epsilon", "lambda"}
OWN = {  # what a name is in one place, where the field's own use of it is another
    "generative.ECGAN.__init__": {"generator"},  # the network of a GAN
    "generative.GeometryControl.__init__": {"generator"},  # the model that makes images
    "representation.ContrastiveRegularizer.__init__": {"criterion"},  # by which pairs count
    "tabular.mr_pseudo_outcome": {"tau"},  # the effect of a treatment
    "generative.FunkNN.__init__": {"network"},  # its kind, by name
    "transfer.ScheduledTeacher.__init__": {"module"},
    "uncertainty.fit_input_components": {"inputs"},
    "combinatorial.CCQD.__init__": {"seed", "tau"},  # ribs' word; how fast slow copies follow
    "compression.latency": {"warmup"},  # calls that are not timed
    "dynamics.grokking_delay": {"steps"},  # their numbers
    "clustering.EarlyStopMiniBatchKMeans.__init__": {"learning_rate"},  # of centres, by name
    "clustering.kmeans_batch_update": {"learning_rate"},
}


def table():
    """Yield the words of each row of the list, and those it takes the place of."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = text.partition("| word | what it is | not |")[2].partition("\n\n")[0].splitlines()[2:]
    for row in rows:
        word, _, instead = (cell.strip() for cell in row.strip("|").split("|"))
        yield re.findall(r"`([^`]+)`", word), re.findall(r"`([^`]+)`", instead)


def signatures():
    """Yield place and parameters of every public callable: ``domain.name``, ``domain.Class.method``."""
    for paper in papers().values():
        if not (paper.implemented and paper.module.startswith("posterity.")):
            continue
        for name in paper.exports:
            thing = getattr(import_module(f"posterity.{paper.domain}"), name)
            each = {"": thing}
            if inspect.isclass(thing) and (issubclass(thing, tuple) or is_dataclass(thing)):
                continue  # a result: its fields are values
            if inspect.isclass(thing):
                each = {
                    f".{key}": value
                    for key, value in inspect.getmembers(thing, callable)
                    if (key == "__init__" or not key.startswith("_"))
                    and getattr(value, "__module__", "").startswith("posterity")
                }
            for key, value in each.items():
                try:
                    found = inspect.signature(value).parameters
                except (TypeError, ValueError):
                    continue
                yield f"{paper.domain}.{name}{key}", found


ALL = dict(signatures())
LISTED = {word for words, _ in table() for word in words}
INSTEAD = {word: words[0] for words, others in table() for word in others}


def test_no_signature_has_another_word_for_what_is_listed():
    found = {
        f"{where}: {name}, say {INSTEAD[name]}"
        for where, parameters in ALL.items()
        for name in parameters
        if name in INSTEAD and name not in OWN.get(where, ()) and not where.startswith("graphs.")
    }
    assert not found
    spelled = {
        f"{where}: {name}"
        for where, parameters in ALL.items()
        for name in parameters
        if re.search(r"colour|neighbour|centre|alis[ei]|behaviour", name)
    }
    assert not spelled


def test_what_many_domains_say_is_listed():
    domains = defaultdict(set)
    for where, parameters in ALL.items():
        for name in parameters:
            domains[name].add(where.partition(".")[0])
    common = {name for name, where in domains.items() if len(where) >= COMMON and len(name) > 1}
    assert not common - LISTED - GREEK - {"self"}


def test_an_exception_is_still_one():
    for where, names in OWN.items():
        assert names <= set(ALL[where]), where


def kinds(annotation):
    """Return the types of an annotation, without None and names of choices."""
    parts = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return {each for each in parts if each is not NoneType and get_origin(each) is not Literal}


@pytest.mark.parametrize(
    ("word", "kind"),
    [
        ("generator", torch.Generator), ("lr", float), ("n_steps", int), ("n_classes", int), ("batch_size", int),
        ("temperature", float), ("weight_decay", float), ("epsilon", float), ("tol", float),
    ],
)  # fmt: skip
def test_a_word_has_one_type(word, kind):
    odd = {
        where: parameters[word].annotation
        for where, parameters in ALL.items()
        if word in parameters
        and word not in OWN.get(where, ())
        and kinds(parameters[word].annotation) != {kind}
    }
    assert not odd


@pytest.mark.parametrize("word", ["generator", "random_state"])
def test_draws_need_nobody_to_say_by_what(word):
    found = {where: parameters[word] for where, parameters in ALL.items() if word in parameters}
    assert not {
        where for where, of in found.items() if of.default is of.empty and word not in OWN.get(where, ())
    }
