import io

import numpy as np
import pytest
from conftest import make_gpt, random_batch
from rich.console import Console

import tfgptopt
from tfgptopt.pruning import Wanda
from tfgptopt.quantization import Int4
from tfgptopt.terminal import progress
from tfgptopt.terminal.progress import showing, stage, track


def console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=80)


@pytest.fixture
def clock(monkeypatch):
    """The time, in a list."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def test_nobody_looks_unless_a_call_says_so(capsys):
    with stage("Work", 2) as shown:
        shown.advance()
    assert list(track([1, 2], "Work")) == [1, 2]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("verbose", "terminal", "words"),
    [
        (0, True, None),
        ("auto", False, None),
        ("auto", True, "Work"),
        (1, False, "Work"),
        (2, False, "Work: "),
        (2, True, "Work: "),
    ],
)
def test_verbose_as_keras_spells_it(verbose, terminal, words):
    looked = console(terminal)
    with showing(verbose, looked):
        assert list(track(range(3), "Work")) == [0, 1, 2]
    text = looked.file.getvalue()
    assert text == "" if words is None else words in text
    assert all(len(line) <= 80 for line in text.splitlines()) or terminal


def test_auto_is_what_a_call_around_it_said():
    looked = console(True)
    with showing(0), showing("auto", looked), stage("Work"):
        pass
    assert looked.file.getvalue() == ""
    with showing(2, looked), showing("auto"), stage("Work"):
        pass
    assert "Work: 0.0 s" in looked.file.getvalue()


def test_the_time_left_is_that_of_the_work_left(clock):
    with showing(2, console(False)), stage("Work", total=40.0) as shown:
        assert shown.left == "0:00 so far"
        clock[0] += 30.0
        shown.advance(10.0)
        assert shown.left == "1:30 left"
        clock[0] += 3600.0
        shown.advance(20.0)
        assert shown.left == "20:10 left"
    with stage("Work") as endless:
        clock[0] += 3700.0
        endless.advance()
        assert endless.left == "1:01:40 so far"


def test_lines_come_now_and_then_and_at_the_end(clock):
    looked = console(False)
    with showing(2, looked), stage("Work", total=4) as shown:
        for _ in range(4):
            clock[0] += 10.0
            shown.say(f"Work at {clock[0]:.0f}")
            shown.advance()
    assert looked.file.getvalue().splitlines() == [
        "Work at 120: 1:00 left",
        "Work at 140: 0:13 left",
        "Work: 40.0 s",
    ]


def test_calls_show_their_stages_and_are_silent_on_request(capsys):
    data = random_batch(rows=8)[0]
    tfgptopt.quantize(make_gpt(), Int4(), ("awq", "gptq"), data, verbose=2)
    said = capsys.readouterr().out
    for words in ("Looking where scales can be moved", "AWQ", "GPTQ", "Rounding"):
        assert f"{words}" in said
    tfgptopt.prune(make_gpt(), 0.5, score=Wanda(data), verbose=2)
    assert "Reading the calibration data" in capsys.readouterr().out
    tfgptopt.quantize(make_gpt(), Int4(), "gptq", data, verbose=0)
    assert capsys.readouterr().out == ""


def test_an_unknown_verbose_is_refused_before_anything_changes(tmp_path):
    model = make_gpt()
    before = model.get_weights()
    for call in (
        lambda: tfgptopt.quantize(model, Int4(), verbose=3),
        lambda: tfgptopt.prune(model, 0.5, verbose="yes"),
        lambda: tfgptopt.export(model, tmp_path / "gpt.tflite", verbose=-1),
    ):
        with pytest.raises(ValueError, match="`verbose` must be 'auto', 0"):
            call()
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert not list(tmp_path.iterdir())
