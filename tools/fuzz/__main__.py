"""Fuzz the public names, or those given, in so many minutes; exit with 1 where there is a fault."""

import sys
import time

import torch

from tools.fuzz import Fuzzed, public_names


def main(minutes="10", *chosen) -> int:
    torch.set_num_threads(1)
    names = [entry for entry in public_names() if not chosen or {entry[0], entry[2]} & set(chosen)]
    end, total, idle, long = time.monotonic() + 60 * float(minutes), 0, [], []
    for k, (slug, domain, name) in enumerate(names):
        fuzzed = Fuzzed(domain, name)
        fuzzed.search(rounds=10_000, until=time.monotonic() + (end - time.monotonic()) / (len(names) - k))
        total += len(fuzzed.faults)
        idle += [] if fuzzed.right else [name]
        long += [name] if fuzzed.long else []
        for text in fuzzed.faults.values():
            print(f"{slug} {name}: {text}", flush=True)
    print(f"{len(names)} names, {total} faults")
    print(
        f"without a right call: {', '.join(idle) or 'none'}; some too long to judge: {', '.join(long) or 'none'}"
    )
    return int(total > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
