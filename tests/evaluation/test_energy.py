"""Energy: by counters that a test turns, or not at all."""

import sys
import types

import pytest

from tfgptopt.evaluation import energy
from tfgptopt.evaluation.speed import Speed

SPEEDS = {"a": Speed(1.0, 10.0)}


class Artifact:
    """Each generation takes 5 J, which the counter of a folder shows."""

    def __init__(self, counter):
        self.counter, self.calls = counter, 0

    def generation(self, prompt, new_tokens):
        def call():
            self.calls += 1
            self.counter.write_text(str(int(self.counter.read_text()) + 5_000_000))

        return call


@pytest.fixture
def counter(tmp_path, monkeypatch):
    """A folder with a counter, and what reads it in the place of codecarbon."""
    found = tmp_path / "intel-rapl:0" / "energy_uj"
    found.parent.mkdir()
    found.write_text("123")

    class IntelRAPL:
        def __init__(self, folder):
            assert folder == str(tmp_path / "intel-rapl" / "subsystem")

        def start(self):
            self.first = int(found.read_text())

        def get_cpu_details(self, duration):
            joules = (int(found.read_text()) - self.first) / 1e6
            return {"Processor Energy Delta_0(kWh)": joules / 3.6e6, "Processor Power(W)": 99.0}

    monkeypatch.setattr(energy, "_POWERCAP", tmp_path)
    monkeypatch.setattr(energy, "_SECONDS", 0.05)
    for name, members in {"cpu": {"IntelRAPL": IntelRAPL}, "units": {"Time": float}}.items():
        module = types.ModuleType(f"codecarbon.core.{name}")
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, f"codecarbon.core.{name}", module)
    return found


def test_joules_of_a_token_are_those_of_the_counter(counter):
    artifact = Artifact(counter)
    found = energy.with_energy(SPEEDS, {"a": artifact}, {"a": [1]}, 20)["a"]
    assert artifact.calls > 2 and found.joules_per_token == pytest.approx(5 / 20)
    assert found.tokens_per_second == 10.0


def test_nothing_is_invented_where_nothing_is_counted(counter, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert "chmod" in energy.why_not_measured()
    counter.unlink()
    artifact = Artifact(counter)
    with pytest.warns(UserWarning, match=r"not measured: .*no counters of energy \(RAPL\)"):
        found = energy.with_energy(SPEEDS, {"a": artifact}, {"a": [1]})
    assert found == SPEEDS and found["a"].joules_per_token is None and artifact.calls == 0


def test_the_extra_is_named(counter, monkeypatch):
    monkeypatch.setitem(sys.modules, "codecarbon.core.cpu", None)
    with pytest.raises(ImportError, match=r"tfgptopt\[energy\]"):
        energy.with_energy(SPEEDS, {"a": Artifact(counter)}, {"a": [1]})
