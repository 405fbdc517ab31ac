"""Which layers of a user's model a method works on, under the names of ``named_modules()``."""

from collections.abc import Mapping, Sequence

from torch import fx, nn

__all__ = ["WEIGHTED", "in_place_of", "weight_places", "weighted_layers"]

WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def weighted_layers(
    model: nn.Module, layers: Sequence[str] | None = None, *, kinds: tuple[type[nn.Module], ...] = WEIGHTED
) -> dict[str, nn.Module]:
    """Return the Linear and Conv layers of a model, or those that are named, by name in the model's order.

    A weight that several modules share, or a module in several places, is one layer under its first name,
    which any of its names finds. A layer without a weight of its own (lazy, meta, or computed from others
    by a parametrisation) is left out. Raises ValueError for a name that is unknown, says which there are,
    and for a model that has none.
    """
    found: dict[str, nn.Module] = {}
    first: dict[str, str] = {}  # any name of a layer -> its first name
    owner: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        weight = module._parameters.get("weight") if isinstance(module, kinds) else None
        if weight is None or weight.is_meta or isinstance(weight, nn.parameter.UninitializedParameter):
            continue
        first[name] = owner.setdefault(id(weight), name)
        found.setdefault(first[name], module)
    known = f"the layers are {', '.join(map(repr, found))}"
    if not found:
        names = ", ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"model must have a layer of {names}, got {type(model).__name__} without one")
    if layers is None:
        return found
    if isinstance(layers, str):
        raise ValueError(f"layers must be a sequence of names, got the string {layers!r}")
    for name in layers:
        if name not in first:
            modules = dict(model.named_modules(remove_duplicate=False))
            what = f"a {type(modules[name]).__name__}" if name in modules else "no module"
            raise ValueError(f"layers must name layers of the model, got {name!r}, {what}: {known}")
    wanted = {first[name] for name in layers}
    if not wanted:
        raise ValueError(f"layers must name at least one layer: {known}")
    return {name: module for name, module in found.items() if name in wanted}


def weight_places(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Return, for each layer that `weighted_layers` found, the parameter paths that hold its weight, its own first.

    A module in several places counts under its first name.
    """
    owner = {id(layer.weight): name for name, layer in layers.items()}
    places: dict[str, list[str]] = {name: [] for name in layers}
    for path, module in model.named_modules():
        for attribute, p in module._parameters.items():
            if p is not None and id(p) in owner:
                places[owner[id(p)]].append(f"{path}.{attribute}".lstrip("."))
    return {
        name: sorted(paths, key=lambda path: path != f"{name}.weight".lstrip("."))
        for name, paths in places.items()
    }


def in_place_of(layer: nn.Module, root: nn.Module, graph: fx.Graph, name: str) -> nn.Module:
    """Return a graph as a module of torch's own class, which a file can hold without this library.

    It answers as the layer does when it is asked for its stride or its size, also as a copy.
    """
    made = fx.GraphModule(root, graph, name).train(layer.training)
    facts = {fact: getattr(layer, fact) for fact in getattr(layer, "__constants__", ())}
    made.meta[fx.graph_module._USER_PRESERVED_ATTRIBUTES_KEY] = facts
    for fact, value in facts.items():
        setattr(made, fact, value)
    return made
