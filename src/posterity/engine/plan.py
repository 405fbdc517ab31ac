"""What to run: the trials of a paper's claims, all of their input checked before any starts."""

import types
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Union, get_args, get_origin

from posterity.claims import Claim
from posterity.engine.discovery import Outline, claim_outlines, load_claims
from posterity.engine.fingerprint import fingerprint, reader
from posterity.engine.store import Job
from posterity.papers import Paper

__all__ = ["A_WEEK", "Plan", "plan_claims", "typed"]

A_WEEK = 7 * 24 * 3600.0  # seconds: the time limit of a setting whose cost nobody knows


@dataclass(frozen=True)
class Plan:
    """The trials of one claim at one setting."""

    paper: Paper
    outline: Outline
    params: dict[str, Any]
    jobs: list[Job]
    note: str = ""


def plan_claims(
    paper: Paper, *, claim: str | None = None, seeds: int | None = None, first_seed: int = 0, data: str | None = None,
    target: str | None = None, settings: dict[str, str] | None = None, device: str = "cpu",
) -> tuple[list[Plan], list[str]]:  # fmt: skip
    """Return the plans of a paper's claims, all of their input checked.

    Parameters
    ----------
    paper : Paper
    claim : str, optional
        One claim; by default each that takes what is set.
    seeds : int, optional
        How many; by default what each claim asks for.
    first_seed : int, default=0
    data, target : str, optional
        Values of the parameters of these names.
    settings : dict of str to str, optional
        Other parameters, as text.
    device : str, default="cpu"

    Returns
    -------
    tuple of list of Plan and list of str
        The plans, and the names of claims left out because they do not take what is set.

    Raises
    ------
    ValueError
        For an unknown claim or parameter, a value of another type or out of range, or data
        that does not fit or cannot be read.
    """
    claims = load_claims(paper)
    if claim is not None and claim not in claims:
        raise ValueError(f"claim of {paper.slug} must be one of {', '.join(claims)}, got {claim!r}")
    given = dict(settings or {})
    given |= {name: value for name, value in (("data", data), ("target", target)) if value is not None}
    chosen = {claim: claims[claim]} if claim else claims
    taking = {name: each for name, each in chosen.items() if set(given) <= set(each.parameters)}
    if not taking:
        name, each = next(iter(chosen.items()))
        missing = next(key for key in given if key not in each.parameters)
        raise ValueError(f"{paper.slug} {name} takes no {missing!r}, it takes: {', '.join(each.parameters)}")
    plans = []
    for name, each in taking.items():
        params = each.defaults
        for key, text in given.items():
            params[key] = typed(f"{name}: {key}", text, each.parameters[key].annotation)
        each.refuse(params)
        note, read = _check_data(each, params) if "data" in params else ("", "")
        code = fingerprint(paper.claims, name) + read
        limit = each.time_limit if params == each.defaults else A_WEEK
        jobs = [
            Job(
                paper.slug,
                name,
                f"{paper.claims}:{name}",
                params,
                seed,
                code,
                device,
                limit,
            )
            for seed in range(first_seed, first_seed + (seeds or each.seeds))
        ]
        outline = next(outline for outline in claim_outlines(paper) if outline.name == name)
        plans.append(Plan(paper, outline, params, jobs, note))
    return plans, [name for name in chosen if name not in taking]


def _check_data(claim: Claim, params: dict[str, Any]) -> tuple[str, str]:
    """Return what is said of the data, and the code of what reads it."""
    from posterity.lab.data import absolute, check, kind_of, resolve

    annotation = claim.parameters["data"].annotation
    options = {"target": params["target"]} if "target" in params else {}
    needs = partial(claim.refuse, params) if claim.check is not None else None
    note = check(annotation, params["data"], needs, **options)
    if callable(resolve(annotation, params["data"])):
        return note, ""
    params["data"] = absolute(annotation, params["data"])
    return note, "+" + reader(kind_of(annotation).name)


def typed(name: str, text: str, annotation: Any) -> Any:
    """Return text as the value that an annotation asks for.

    Parameters
    ----------
    name : str
        For the message.
    text : str
    annotation : Any
        ``int``, ``float``, ``bool``, ``str``, a ``Literal``, a tuple or list of these, an
        ``Annotated`` of one, or a union with None.

    Returns
    -------
    Any
    """
    origin, inner = get_origin(annotation), get_args(annotation)
    if hasattr(annotation, "__metadata__"):
        return typed(name, text, inner[0])
    if origin in (Union, types.UnionType):
        if type(None) in inner and text.lower() == "none":
            return None
        return typed(name, text, next(arg for arg in inner if arg is not type(None)))
    if origin is Literal:
        by_text = {str(value): value for value in inner}
        if text not in by_text:
            raise ValueError(f"{name} must be one of {', '.join(by_text)}, got {text!r}")
        return by_text[text]
    if origin in (tuple, list):
        parts = [part for part in text.strip("()[] ").split(",") if part.strip()]
        return [typed(name, part.strip(), inner[0]) for part in parts]
    if annotation is bool:
        if text.lower() not in ("true", "false", "yes", "no", "1", "0"):
            raise ValueError(f"{name} must be true or false, got {text!r}")
        return text.lower() in ("true", "yes", "1")
    if annotation in (int, float):
        try:
            return annotation(text.replace("_", ""))
        except ValueError:
            noun = "an integer" if annotation is int else "a number"
            raise ValueError(f"{name} must be {noun}, got {text!r}") from None
    return text
