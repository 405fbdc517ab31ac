"""Check the docstrings of public names with numpydoc."""

import dataclasses
import importlib
import inspect
import sys

from numpydoc.validate import validate

from posterity.papers import ROOT, papers

# SS03 summary ends in a stop, PR01/PR02 parameters are documented and exist, RT03 returns described ...
CHECKS = {"GL08", "SS03", "SS05", "PR01", "PR02", "PR03", "PR07", "RT01", "RT03"}
ENGINE = ("plan", "run", "verdicts", "compare")
SHARED = (
    "posterity.testing", "posterity.claims", *(f"posterity.engine.{name}" for name in ENGINE),
    *(f"posterity.lab.{'.'.join(path.relative_to(ROOT / 'lab').with_suffix('').parts)}"
      for path in sorted((ROOT / "lab").rglob("[!_]*.py"))),
)  # fmt: skip


def public():
    """Yield the dotted name of every public function and class, and the public methods of classes."""
    for name in [
        *SHARED,
        *(module for paper in papers().values() if paper.implemented for module in paper.modules),
    ]:
        module = importlib.import_module(name)
        for attribute in module.__all__:
            thing = getattr(module, attribute)
            if not (inspect.isclass(thing) or inspect.isfunction(thing)):
                continue
            yield f"{name}.{attribute}"
            if inspect.isclass(thing) and not issubclass(thing, tuple):
                for method, value in vars(thing).items():
                    if inspect.isfunction(value) and not method.startswith("_") and value.__doc__:
                        yield f"{name}.{attribute}.{method}"


def resolve(name):
    """Return the object of a dotted name."""
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError:
        return getattr(resolve(module), attribute)


def main() -> None:
    found = []
    for name in public():
        is_method = name.split(".")[-2][:1].isupper()
        shared = name.startswith(SHARED)
        errors = [e for e in validate(name)["errors"] if e[0] in CHECKS]
        if is_method:  # short methods that repeat torch's or scikit-learn's own need one line
            errors = [e for e in errors if e[0] in ("GL08", "SS03", "SS05", "PR02")]
        if shared:  # what the type says need not be said again
            errors = [e for e in errors if e[0] not in ("PR07", "RT03")]
        thing = resolve(name)
        fields = dataclasses.is_dataclass(thing) or hasattr(thing, "_fields")
        if fields or getattr(thing, "_is_protocol", False):  # documented as attributes, or not called
            errors = [e for e in errors if e[0] not in ("PR01", "PR02", "PR07")]
        found += [f"{name}: {code} {text}" for code, text in errors]
    print("\n".join(found) or "docstrings: nothing to report")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
