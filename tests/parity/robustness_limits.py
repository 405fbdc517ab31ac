"""The limit for 160 spaces, classes, norms and sizes."""

from posterity.robustness import robust_fraction_bound

AGAINST = "exact binomial sums and the closed forms of the three bounds, in 60 digits"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    for n, channels, bits, c, p, size, theirs in stored["rows"].tolist():
        ours = robust_fraction_bound(
            size, int(n), channels=int(channels), bit_depth=int(bits), p=p, class_fraction=c
        )
        yield (
            f"n={n:g}, channels={channels:g}, bits={bits:g}, c={c}, p={p:g}, size={size}",
            ours,
            theirs,
            1e-10 * theirs + 1e-300,
        )
