"""Bounds for forty federations: fast, slow for bounded and for sub-exponential losses."""

from posterity.federated import Bounded, SubExponential, fast_rate_bound, two_level_bound

AGAINST = "their closed forms, and bisection for the inverse of kl, in 40 digits"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    for risk, m, n, delta, size, *theirs in stored["rows"].tolist():
        federation = (risk, int(m), int(n))
        found = [
            fast_rate_bound(*federation, delta=delta, log_class_size=size),
            two_level_bound(*federation, delta=delta, tail=Bounded(), log_class_size=size),
            two_level_bound(*federation, delta=delta, tail=SubExponential(0.7), log_class_size=size),
        ]
        for name, each, (own, other) in zip(
            ("fast", "bounded", "sub-exponential"),
            found,
            zip(theirs[::2], theirs[1::2], strict=True),
            strict=True,
        ):
            yield f"{name}, participating, {federation}", each.participating, own, 1e-12 * (1 + own)
            yield f"{name}, unparticipating, {federation}", each.unparticipating, other, 1e-12 * (1 + other)
