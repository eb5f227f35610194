"""The page, as a browser has it."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import matplotlib.image
import pytest

from tfgptopt.evaluation import Quality, Result, Size, Speed
from tfgptopt.evaluation.distributions import Distribution
from tfgptopt.evaluation.machine import Machine
from tfgptopt.evaluation.passages import ChangedPassage
from tfgptopt.evaluation.results import Run, Training, load_results, save_results
from tfgptopt.evaluation.speed import Latency
from tfgptopt.evaluation.tasks import Score
from tfgptopt.job.charts import Point, _front
from tfgptopt.job.reporting import headline, render_report, write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def result(name, megabytes, speed, loss, change=None, **more):
    size = Size(1_000_000, 1.0, int(megabytes * 1e6), int(megabytes * 9e5))
    kl = None if change is None else 0.01
    passages = (ChangedPassage(("<b>a", " &\n", "c"), (1.5, -0.4, 0.0)),) if change else ()
    domain = Quality(loss, 1.0, 0.5, 0.7)
    intervals = {} if change is None else {"change": (change - 0.01, change + 0.01)}
    quality = Quality(loss, 1.2, 0.4, 0.7, kl, 0.98, change, 900, intervals,
                      {"a": domain, "b": domain}, passages)  # fmt: skip
    told = {"import": f" {name}</pre><script>alert(1)</script>"}
    tasks = {"quiz": Score(4, {"accuracy": 0.75}, {"accuracy": (0.5, 1.0)})}
    return Result(name, size, quality, Speed(3.0, speed, **more), tasks, told)


@pytest.fixture(scope="module")
def run():
    machine = Machine("a processor", 2, 8 << 30, 2e10, 5e11)
    latency = {"64": Latency(1.0, 1.5, 2.0)}
    results = (
        result("float32", 400, 40.0, 2.0, 0.0),
        result(
            "int8",
            100,
            120.0,
            2.02,
            0.02,
            by_depth=latency,
            load_seconds=0.4,
            by_batch={"1": {"64": 90.0}, "4": {"64": 1234.0}},
        ),
        result("int4", 60, 110.0, 2.3, 0.35, peak_rss_bytes=10**8),
    )
    curves = {"dense": ((1.0, 3.0, 0.0), (2.0, 2.5, 0.0)), "small": ((1.0, 3.0, 0.1),)}
    weights = {"layer_*/x/kernel": Distribution(-1.0, 1.0, (0.2, 0.5, 0.2), (0.0, 0.4, 0.1), 0.5)}
    training = Training(curves, {"x/kernel": 0.5}, {"x/kernel": 32.0, "y/kernel": 20.0}, weights,
                        {"techniques": []}, 3.0)  # fmt: skip
    return Run(results, "float32", {"text": ["held_out"]}, machine, training)


def test_the_headline_says_what_changed(run):
    lines = headline(run)
    assert lines[0].startswith("int4 is 6.7 times smaller than float32 and 2.8 times faster")
    assert "perplexity +2.0% (95 %: +1.00% to +3.00%)" in lines[1]
    assert "bigram" in lines[2]
    assert "perplexity 7.39" in headline(Run(run.results[:1]))[0]


def test_the_front_is_what_nothing_beats():
    points = [Point("a", 4, 1.0), Point("b", 1, 3.0), Point("c", 2, 2.0), Point("d", 3, 5.0)]
    assert [p.name for p in _front(points, True)] == ["b", "d"]
    assert [p.name for p in _front(points, False)] == ["b", "c", "a"]


def test_the_page_is_whole_and_safe(run, tmp_path):
    page = render_report([run, run])
    assert "<script" not in page and "&lt;b&gt;a" in page
    assert "int8 (2)" in page and page.count("<svg") == 2 + 1 + 2
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    for shown in (
        "what the memory allows",
        "quiz, accuracy",
        "20.0 dB",
        "p99 ms",
        "By domain",
        "1,234",
    ):
        assert shown in page
    save_results(run, tmp_path / "results.json")
    assert load_results(tmp_path / "results.json") == run
    other = Run(run.results, "float32", {"text": ["another"]})
    assert "read different texts" in render_report([run, other])
    with pytest.raises(ValueError, match="no results"):
        render_report([])


def test_an_interrupted_report_leaves_no_half_file(run, tmp_path, monkeypatch):
    write_report([run], tmp_path / "report.html")
    before = (tmp_path / "report.html").read_text("utf-8")

    def half(path, text, encoding):
        path.write_bytes(text[:100].encode())
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", half)
        with pytest.raises(KeyboardInterrupt):
            write_report([run], tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text("utf-8") == before
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def browse(page, folder, *options):
    """Opens a page in headless Chromium without a network, and returns what it logs and gives."""
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
               "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}",
               "--host-resolver-rules=MAP * ~NOTFOUND", *options, page.as_uri()]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    return [line for line in ended.stderr.splitlines() if "CONSOLE" in line], ended.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium (Debian package `chromium`)")
def test_a_browser_shows_it_light_and_dark_and_on_a_phone(run, tmp_path):
    page = tmp_path / "report.html"
    write_report([run], page)
    means = {}
    for name, size, *options in (
        ("light", "1000,1400"),
        ("dark", "1000,1400", "--blink-settings=preferredColorScheme=0"),
        ("phone", "500,1400"),
    ):
        shot = tmp_path / f"{name}.png"
        logged, _ = browse(
            page, tmp_path, f"--window-size={size}", f"--screenshot={shot}", *options
        )
        assert logged == []  # Neither errors nor requests, which would fail.
        pixels = matplotlib.image.imread(shot)[..., :3]
        assert pixels.std() > 0.05  # Not blank.
        means[name] = pixels.mean()
    assert means["dark"] < 0.4 < 0.6 < min(means["light"], means["phone"])
    probe = "<script>document.title = document.documentElement.scrollWidth</script></body>"
    narrow = tmp_path / "narrow.html"
    inside = page.read_text("utf-8").replace("</body>", probe)
    inside = inside.replace("&", "&amp;").replace('"', "&quot;")
    frame = f'<iframe srcdoc="{inside}"'
    read = "document.title = document.querySelector('iframe').contentDocument.title"
    style = ' style="width: 360px; height: 700px; border: 0"></iframe>'
    narrow.write_text(f"<body>{frame}{style}<script>onload = () => {{{read}}}</script></body>")
    _, found = browse(narrow, tmp_path, "--virtual-time-budget=5000", "--dump-dom")
    width = int(re.search(r"<title>(\d+)</title>", found)[1])
    assert width <= 360  # A phone does not scroll sideways.


@pytest.mark.skipif(
    CHROMIUM is None or "AXE_CORE" not in os.environ,
    reason="set AXE_CORE to axe.min.js of the npm package axe-core, beside Chromium",
)
@pytest.mark.parametrize("scheme", ["0", "1"], ids=["dark", "light"])
def test_axe_finds_nothing(run, tmp_path, scheme):
    axe = Path(os.environ["AXE_CORE"]).read_text("utf-8")
    show = "document.title = JSON.stringify(found.violations.map(v => [v.id, v.impact]))"
    probe = f"<script>{axe}</script><script>axe.run().then(found => {{{show}}})</script></body>"
    page = tmp_path / "report.html"
    page.write_text(render_report([run]).replace("</body>", probe), "utf-8")
    options = ("--virtual-time-budget=20000", f"--blink-settings=preferredColorScheme={scheme}")
    _, found = browse(page, tmp_path, *options, "--dump-dom")
    assert json.loads(re.search(r"<title>(\[.*?\])</title>", found)[1]) == []
