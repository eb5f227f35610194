"""The search on recorded results: no model, no seconds."""

import pytest

from tfgptopt.job.candidates import default_candidates
from tfgptopt.job.search import Candidate, Limits, Trial, search
from tfgptopt.job.tuning import describe, verdict

MB = 10**6
# Size, speed, rise, seconds; of those that train, the rise at 60, 180 and 540 steps.
RECORDED = {
    "int8 rtn": (1.57, 500, 0.012, 9),
    "int4:32 mse": (0.97, 640, 0.14, 9),
    "int4 mse": (0.91, 655, 0.31, 9),
    "int8 smoothquant": (1.57, 505, 0.010, 30),
    "int8 gptq": (1.57, 502, 0.009, 40),
    "int4:32 gptq": (0.97, 640, 0.06, 41),
    "int4 gptq": (0.91, 655, 0.12, 38),
    "50 % pruned, int8": (1.57, 500, 0.2, 35),
    "trained int8": (1.57, 500, (0.01, 0.005, 0.0), 20),
    "trained int4:32": (0.97, 640, (0.06, 0.03, 0.02), 21),
    "trained int4": (0.91, 655, (0.09, 0.05, 0.035), 20),
    "trained 50 % pruned, int8": (1.57, 500, (0.1, 0.05, 0.03), 22),
    "75 % of neurons, int8, distilled": (1.3, 590, (0.2, 0.1, 0.06), 25),
    "75 % of neurons, int4:32, distilled": (0.82, 700, (0.25, 0.12, 0.07), 26),
    "75 % of neurons, int4, distilled": (0.78, 705, (0.27, 0.13, 0.08), 25),
    "50 % of neurons, int8, distilled": (1.0, 640, (0.4, 0.2, 0.11), 22),
    "50 % of neurons, int4:32, distilled": (0.66, 760, (0.45, 0.22, 0.12), 24),
    "50 % of neurons, int4, distilled": (0.62, 770, (0.47, 0.24, 0.13), 24),
    "70 % of layers, int8, distilled": (1.1, 720, (0.5, 0.3, 0.2), 20),
    "70 % of layers, int4:32, distilled": (0.7, 850, (0.5, 0.3, 0.21), 20),
    "70 % of layers, int4, distilled": (0.65, 860, (0.52, 0.31, 0.22), 20),
    "70 % of layers 50 % of neurons, int8, distilled": (0.8, 900, (0.9, 0.6, 0.4), 18),
    "70 % of layers 50 % of neurons, int4:32, distilled": (0.5, 990, (0.9, 0.6, 0.4), 18),
    "70 % of layers 50 % of neurons, int4, distilled": (0.47, 999, (0.9, 0.6, 0.4), 18),
}
STEPS = (60, 180, 540)


class Replay:
    """Gives recorded results, and counts what was asked."""

    def __init__(self, failing=()):
        self.asked, self.failing = [], failing

    def __call__(self, candidate, steps):
        self.asked.append((candidate.name, steps))
        size, speed, rise, seconds = RECORDED[candidate.name]
        if candidate.trains:
            rise, seconds = rise[STEPS.index(steps)], seconds * steps / 60
        if candidate.name in self.failing:
            return Trial(candidate.name, steps, 1.0, error="it crashed")
        size = int(size * MB)
        return Trial(candidate.name, steps, seconds, size, size // 2, speed, rise)


def run(limits, budget=1e9, failing=(), known=()):
    replay = Replay(failing)
    return search(default_candidates(), replay, limits, budget, STEPS, known), replay


def test_the_records_are_of_what_is_tried():
    assert {candidate.name for candidate in default_candidates()} == set(RECORDED)


def test_cheap_recipes_end_the_search():
    found, replay = run(Limits(max_size=2 * MB, max_rise=0.03))
    assert found.kept.name == "int8 rtn" and found.misses == {}
    assert len(replay.asked) == 3  # A tier, no more.
    assert verdict(found, Limits()).startswith("Keep 'int8 rtn': it meets all")


def test_what_only_a_combination_meets_is_found():
    limits = Limits(max_size=int(0.8 * MB), min_speed=680, max_rise=0.1)
    found, replay = run(limits)
    assert found.kept.name == "75 % of neurons, int4, distilled" and not found.misses
    # Files that are too large are not trained: another one of their shape showed it.
    assert not any(name.startswith("trained") for name, _ in replay.asked)
    assert found.skipped["trained int4"] == "its file is as large as that of int4 mse"
    # Halving: fewer go on to more steps, those that are best at few.
    counts = [sum(steps == rung for _, steps in replay.asked) for rung in STEPS]
    assert counts[0] > counts[1] >= counts[2] >= 1


def test_the_honest_answer_where_nothing_meets_the_limits():
    limits = Limits(max_size=int(0.5 * MB), max_rise=0.01)
    found, _ = run(limits)
    assert found.misses
    words = verdict(found, limits)
    assert words.startswith("Nothing that was tried meets the limits. The nearest is")
    assert all(name in words for name in found.misses)


def test_the_front_is_what_nothing_beats_in_all():
    found, _ = run(Limits(max_rise=-0.5))  # Nothing does: all are tried.
    names = {trial.name for trial in found.front}
    assert "int8 rtn" not in names  # trained int8 is as large, and better.
    assert "70 % of layers 50 % of neurons, int4, distilled" in names
    for one in found.front:
        for other in found.trials:
            better = (other.size <= one.size, other.speed >= one.speed, other.rise < one.rise)
            assert not all(better)


def test_the_budget_holds_and_says_what_was_left_out():
    found, replay = run(Limits(max_rise=-0.5), budget=300)
    assert sum(trial.seconds for trial in found.trials) <= 300 + 30
    assert len(replay.asked) < 15 and found.skipped
    assert all("budget" in reason for reason in found.skipped.values())


def test_crashes_are_passed_over():
    limits = Limits(max_size=2 * MB, max_rise=0.03)
    found, _ = run(limits, failing={"int8 rtn"})
    assert found.kept.name == "int8 gptq"
    (crashed,) = (trial for trial in found.trials if trial.error)
    assert "passed over, it crashed" in describe(crashed)
    found, _ = run(limits, failing=set(RECORDED))
    assert found.kept is None and "all candidates failed" in verdict(found, limits)


def test_a_search_that_was_stopped_goes_on():
    limits = Limits(max_size=int(0.8 * MB), min_speed=680, max_rise=0.1)
    whole, first = run(limits)
    again, second = run(limits, known=whole.trials[:9])
    assert again.kept == whole.kept and again.trials == whole.trials
    assert second.asked == first.asked[9:]


def test_bad_input():
    for bad in ({"max_size": 0}, {"min_speed": -1}, {"max_rise": -2}, {"max_download": -5}):
        with pytest.raises(ValueError, match="Received"):
            Limits(**bad)
    twice = [Candidate("a", 0, "int8"), Candidate("a", 1, "int8")]
    for candidates in ([], twice):
        with pytest.raises(ValueError, match="names that differ"):
            search(candidates, Replay(), Limits(), 1)
