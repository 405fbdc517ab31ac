"""Race sampled Laplace with the whole matrix, then print memory and time as networks grow.

The peer is the naive version: the full J' H J, a Cholesky factor in each step, and the same
EM. (laplace-torch, which does that for any module, needs torchvision and is not run.) The
curves run each fit in a process of its own, on 256 digits with 16 draws and three steps, and
give up after two minutes or before a matrix that does not fit. Memory in all is what must stay
under 1 GB at 100,000 parameters; some 450 MiB of it are Python and torch.

Run from the repository root: ``python -m benchmarks.uncertainty.sampled_laplace``.
"""

import subprocess
import sys
import time
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from benchmarks.timing import race
from posterity.claims.uncertainty.sampled_laplace import exact_laplace
from posterity.uncertainty import SampledLaplace

SECONDS, GIB = 120, 24


def digits(n, n_outputs=10):
    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))[:n]
    x, y = torch.from_numpy(bunch.data / 16).float()[order], torch.from_numpy(bunch.target)[order]
    return x, (y * 37 + order) % n_outputs if n_outputs != 10 else y


def trained(x, y, *sizes, steps=100):
    torch.manual_seed(0)
    layers = [part for a, b in zip(sizes, sizes[1:], strict=False) for part in (nn.Linear(a, b), nn.Tanh())]
    net = nn.Sequential(*layers[:-1])
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-2 if sizes[1] < 100 else 1e-3, weight_decay=1e-4)
    for _ in range(steps):
        optimiser.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimiser.step()
    return net


def sampled(net, x, y, steps):
    generator = torch.Generator().manual_seed(0)
    return SampledLaplace(net, "classification", n_em_steps=steps, batch_size=500, generator=generator).fit(
        x, y
    )


def resident(what):
    """Return MiB of this process; unlike ru_maxrss, a peak here is not inherited from the parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(what)).split()[1]) / 1024


def measure(how, width, n_outputs):
    """Print seconds and MiB of one fit; runs in a process of its own."""
    torch.set_num_threads(1)
    x, y = digits(256, n_outputs)
    fit = {"sampled": sampled, "exact": exact_laplace}[how]
    fit(trained(x[:8], y[:8], 64, 2, n_outputs, steps=1), x[:8], y[:8], 1)  # loads what torch loads late
    net = trained(x, y, 64, width, width, n_outputs)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    start, before = time.perf_counter(), resident("VmRSS")
    fit(net, x, y, 3)
    print(time.perf_counter() - start, resident("VmHWM") - before, resident("VmHWM"))


def in_a_process(how, width, n_outputs):
    """Return what `measure` prints, or why there is nothing."""
    p = width**2 + (66 + n_outputs) * width + n_outputs
    if how == "exact" and 4 * (4 * p**2 + 3 * 256 * n_outputs * p) > GIB * 2**30:
        return f"a matrix and its factor do not fit {GIB} GiB"
    code = (
        f"from benchmarks.uncertainty.sampled_laplace import measure; measure({how!r}, {width}, {n_outputs})"
    )
    try:
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True,
                              timeout=SECONDS, check=False)  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"not done in {SECONDS} s"
    if done.returncode:
        return f"stopped with code {done.returncode}: {done.stderr.strip().splitlines()[-1:]}"
    seconds, above, peak = (float(part) for part in done.stdout.split())
    return f"{seconds:8.2f} s {above:8.0f} MiB above the start, {peak:6.0f} MiB in all"


def main() -> None:
    torch.set_num_threads(1)
    x, y = digits(500)
    net = trained(x, y, 64, 32, 10, steps=300)
    race("fit and tuning, 2,410 parameters, 500 points, against the whole matrix (naive)",
         lambda: sampled(net, x, y, 6), lambda: exact_laplace(net, x, y, 6), target=3, rounds=3)  # fmt: skip
    for title, cases in {
        "parameters": [(w, 10) for w in (24, 75, 139, 281, 500, 963)],
        "outputs": [(64, o) for o in (3, 10, 30, 100, 300)],
    }.items():
        print(f"\nseconds of fit and peak memory against the number of {title}")
        for width, n_outputs in cases:
            p = width**2 + (66 + n_outputs) * width + n_outputs
            for how in ("sampled", "exact"):
                print(f"{p:>9,} parameters {n_outputs:>4} outputs {how:>8}: {in_a_process(how, width, n_outputs)}",
                      flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
