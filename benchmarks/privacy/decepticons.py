"""Race the comparison of words with a loop over places, and read a large batch with a large vocabulary.

Run from the repository root: ``python -m benchmarks.privacy.decepticons``.
"""

import time

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.timing import race
from posterity.privacy import AuditTransformer, audit_leakage, corrupt_transformer
from posterity.privacy.leakage_reconstruction import _centred, _word_fit


def by_loop(seen: Tensor, places: Tensor, words: Tensor) -> Tensor:
    """Return the same correlations as one would write them: for each place, what is left of all words."""
    rows = []
    for h, p in zip(seen, places, strict=True):
        rest = torch.cat([h[None], words])
        rest = rest - (rest @ p)[:, None] * p
        rest = F.normalize(rest, dim=1)
        rows.append(rest[1:] @ rest[0])
    return torch.stack(rows)


def main() -> None:
    torch.manual_seed(0)
    for size, rounds in ((1_000, 15), (50_000, 3)):
        words = _centred(torch.randn(size, 89))
        seen, places = (F.normalize(_centred(torch.randn(32, 89)), dim=1) for _ in range(2))
        torch.testing.assert_close(
            _word_fit(seen, places, words), by_loop(seen, places, words), rtol=1e-4, atol=1e-5
        )
        race(f"correlations of 32 places with {size} words, against a loop over places",
             lambda: _word_fit(seen, places, words), lambda: by_loop(seen, places, words),  # noqa: B023
             target=4, rounds=rounds)  # fmt: skip

    model, tokens = AuditTransformer(50_000, 32), torch.randint(50_000, (16, 32))
    state, probe = corrupt_transformer(model)
    start = time.perf_counter()
    report = audit_leakage(state, tokens, probe)
    seconds = time.perf_counter() - start
    print(
        f"16 x 32 tokens of 50000: {seconds:.1f} s (target under 30 s), accuracy {report.token_accuracy:.2f}"
    )


if __name__ == "__main__":
    main()
