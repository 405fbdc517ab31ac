"""Growth against a yardstick: the exponent of the work less that of the yardstick, however busy the machine."""

import random

import pytest

from posterity.claims import Trial
from posterity.lab import timing

SIZES = [100, 1_000, 10_000]


@pytest.fixture
def machine(monkeypatch):
    """Return what makes work of a cost; the clock is ours, and slows as it likes."""
    clock = {"now": 0.0, "slow": lambda: 1.0}
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock["now"])

    def work(cost):
        def run():
            clock["now"] += cost * clock["slow"]()

        return run

    return clock, work


@pytest.mark.parametrize("slow", ["never", "for a while", "now and then"])
@pytest.mark.parametrize(("ours", "known"), [(1.0, 1.0), (1.5, 1.0), (0.0, 0.0), (1.0, 0.0)])
def test_what_slows_the_machine_slows_both(machine, ours, known, slow):
    clock, work = machine
    turns, dice = iter(range(10_000)), random.Random(0)
    if slow == "for a while":  # a third of the time, by ten
        clock["slow"] = lambda: 10.0 if next(turns) // 18 % 3 == 0 else 1.0
    elif slow == "now and then":  # one operation in ten is interrupted
        clock["slow"] = lambda: 5.0 if dice.random() < 0.1 else 1.0
    trial = Trial(0)
    works, yardsticks = ([work(2.0 * size**power) for size in SIZES] for power in (ours, known))
    exponent = timing.relative_growth(trial, SIZES, works, yardsticks, rounds=9, name="work")
    assert exponent == pytest.approx(ours - known, abs=0.05)
    assert set(trial.curves) == {"seconds: work", "seconds: yardstick", "work, over the yardstick"}
    assert [size for size, _ in trial.curves["seconds: work"]] == SIZES
