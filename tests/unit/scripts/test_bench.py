"""The benchmark's arithmetic, what it reads of a load, what it leaves behind, and what the docs say."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.lib.bench import change, guard, measure, peers, report
from tests.unit.conftest import REPOSITORY
from tests.waiting import until

FIGURES = st.lists(st.floats(min_value=1e-3, max_value=1e6), min_size=1, max_size=50)
WRK = """Running 1s test @ http://127.0.0.1:1/healthz
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     1.27ms    2.10ms  22.02ms   90.91%
  Latency Distribution
     50%  {p50}
     75%    1.01ms
     90%    3.40ms
     99%  {p99}
  12345 requests in 1.00s, 3.40MB read
{errors}Requests/sec:  12340.50
Transfer/sec:      3.39MB
"""


@given(FIGURES, st.floats(min_value=0, max_value=1))
def test_a_percentile_is_the_least_value_that_so_many_do_not_exceed(values: list[float], part: float) -> None:
    found = measure.percentile(values, part)

    def reached(value: float) -> bool:
        return sum(one <= value for one in values) >= part * len(values)

    assert found in values
    assert reached(found)
    assert not [value for value in values if value < found and reached(value)]


@given(FIGURES)
def test_a_summary_has_the_median_between_the_extremes(values: list[float]) -> None:
    made = measure.summary(values)
    assert made["low"] <= made["median"] <= made["high"]
    assert len(made["rounds"]) == len(values)
    assert made["low"] == pytest.approx(min(values), rel=1e-3)


@given(FIGURES, st.floats(min_value=0.01, max_value=100))
def test_a_ratio_is_taken_within_each_round(values: list[float], factor: float) -> None:
    theirs = measure.summary(values)
    ours = measure.summary([factor * value for value in values])
    made = measure.ratio(ours, theirs)
    # However much the rounds differ among each other: each has four digits.
    assert made["low"] == pytest.approx(factor, rel=3e-3)
    assert made["high"] == pytest.approx(factor, rel=3e-3)


def test_rounds_that_were_not_taken_together_have_no_ratio() -> None:
    with pytest.raises(ValueError, match="zip"):
        measure.ratio(measure.summary([1.0]), measure.summary([1.0, 2.0]))


@given(st.lists(st.integers(), min_size=1, max_size=6, unique=True))
def test_each_peer_goes_first_as_often_as_another(peers: list[int]) -> None:
    rounds = [measure.rotated(peers, number) for number in range(len(peers))]
    assert sorted(order[0] for order in rounds) == sorted(peers)
    assert all(sorted(order) == sorted(peers) for order in rounds)


@pytest.mark.parametrize(
    ("printed", "milliseconds"), [("417.00us", 0.417), ("5.73ms", 5.73), ("1.20s", 1200), ("1.50m", 90_000)]
)
def test_the_load_s_units_are_milliseconds(printed: str, milliseconds: float) -> None:
    read = measure.read_wrk("wrk", WRK.format(p50=printed, p99=printed, errors=""))
    assert (read.p50, read.p99) == pytest.approx((milliseconds, milliseconds))
    assert (read.requests, read.rate, read.timeouts) == (12345, 12340.5, 0)


def test_who_waited_too_long_is_counted() -> None:
    errors = "  Socket errors: connect 0, read 0, write 0, timeout 7\n"
    assert measure.read_wrk("wrk", WRK.format(p50="1ms", p99="2ms", errors=errors)).timeouts == 7


@pytest.mark.parametrize(
    "errors",
    [
        "  Non-2xx or 3xx responses: 1\n",
        "  Socket errors: connect 1, read 0, write 0, timeout 0\n",
        "  Socket errors: connect 0, read 1, write 0, timeout 0\n",
        "  Socket errors: connect 0, read 0, write 1, timeout 0\n",
    ],
)
def test_a_load_with_a_wrong_answer_is_no_figure(errors: str) -> None:
    with pytest.raises(measure.BenchError, match="did not measure"):
        measure.read_wrk("wrk", WRK.format(p50="1ms", p99="2ms", errors=errors))


@pytest.mark.skipif(sys.platform != "linux", reason="the benchmark reads /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_that_a_benchmark_started_outlives_it(number: signal.Signals, tmp_path: Path) -> None:
    # A process that left the benchmark's session and its parent, as a container's shim does.
    source = tmp_path / "source"
    source.write_text("as it was")
    code = """
import signal, subprocess, sys
from pathlib import Path
from scripts.lib.bench import guard
# A shell has its background jobs ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
with guard.place() as directory:
    source = Path(sys.argv[1])
    guard.keep(directory, source)
    source.write_text("changed")
    command = ["sh", "-c", "sleep 600 >/dev/null & echo $!"]
    child = subprocess.check_output(
        command, env=guard.environment(directory), start_new_session=True, text=True
    )
    print(directory, child, flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code, str(source)],
        cwd=REPOSITORY,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as bench:
        assert bench.stdout is not None
        directory, child = bench.stdout.readline().split()
        assert int(child) in guard.marked(Path(directory))
        bench.send_signal(number)
        until(lambda: not Path(directory).exists(), "the directory to go", timeout=40)
        assert guard.marked(Path(directory)) == []
        assert source.read_text() == "as it was"


def test_a_mount_is_found_in_a_path_with_a_space() -> None:
    line = r"36 35 98:0 / /a\040path\134/disk rw,noatime master:1 - ext3 /dev/root rw"
    assert guard.mount_points(line) == ["/a path\\/disk"]


@pytest.mark.skipif(sys.platform != "linux", reason="the benchmark reads /proc")
def test_a_program_is_found_in_a_path_with_a_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "a path" / ".localcloud"
    home.mkdir(parents=True)
    monkeypatch.setenv("LOCALCLOUD_HOME", str(home))
    agent = shutil.copy2("/bin/sh", home / "krustlet")
    # Another one, which only knows the place.
    other = ["sh", "-c", "read line", str(home / "krustlet")]
    with (
        subprocess.Popen([agent, "-c", "read line", "sh", str(home)], stdin=subprocess.PIPE) as ours,
        subprocess.Popen(other, stdin=subprocess.PIPE),
    ):
        assert measure.family(lambda _, words: peers.of_stack(words, "krustlet")) == {ours.pid}


def test_the_changed_line_is_put_back_whatever_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, ups = tmp_path / "routes.rs", []
    before = change.ROUTES.read_text()
    copy.write_text(before)
    monkeypatch.setattr(change, "ROUTES", copy)
    monkeypatch.setattr(change, "_up", lambda: ups.append(copy.read_text()))

    def fail() -> None:
        with change.changeable(tmp_path / "run") as write:
            for word in ("1", "2"):
                answer = write(word).decode()
                assert json.loads(answer) == {"status": "ok", "change": word}
                assert copy.read_text().count(answer) == 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert copy.read_text() == before
    assert ups == [before], "the stack is put back too, with the sources as they were"


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value


def _numbers(text: str) -> set[str]:
    return set(re.findall(r"\d[\d,.]*\d|\d", text))


@pytest.fixture
def published() -> dict[str, Any]:
    """The run that the docs quote."""
    found: dict[str, Any] = json.loads(report.JSON.read_text())
    return found


def test_the_page_is_what_the_run_gives(published: dict[str, Any]) -> None:
    assert (report.DOCS / "benchmarks.md").read_text() == report.document(published), "./scripts/bench report"


def test_every_figure_of_the_page_stands_in_the_run(published: dict[str, Any]) -> None:
    known = set[str]()
    for leaf in _leaves(published):
        if isinstance(leaf, (int, float)) and not isinstance(leaf, bool):
            known |= {report.number(leaf), f"{leaf:,}"}
        else:
            known |= _numbers(str(leaf))
    page = (report.DOCS / "benchmarks.md").read_text()
    ours, heading, others = page.partition("## Published figures")
    assert heading
    ours += others.partition("\n## ")[2]
    assert _numbers(ours) - known == set()


def test_the_readme_quotes_the_run_or_none(published: dict[str, Any]) -> None:
    quoted = report.README.read_text().partition(report.BEGIN)[2].partition(report.END)[0].strip()
    if report.is_for_the_readme(published):
        assert quoted == report.readme(published)
    else:
        assert quoted
        assert "docs/plots" not in quoted


def test_the_page_s_pictures_are_there(published: dict[str, Any]) -> None:
    named = set(re.findall(r"plots/[\w-]+\.\w+", (report.DOCS / "benchmarks.md").read_text()))
    assert {Path(name).stem for name in named} == {
        f"{name}-{theme}" for name in ("throughput", "start", "density") for theme in report.THEMES
    }
    for name in named:
        for ending in (".svg", ".png"):
            assert (report.DOCS / name).with_suffix(ending).stat().st_size > 5_000
    assert set(published["peers"]) | {"docker run"} <= set(report.COLOURS) | set(published["absent"])
