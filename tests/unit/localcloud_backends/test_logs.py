"""`localcloud logs`: which part is meant, and a tail that loses and repeats nothing over rotations."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localcloud.home import Home, HomeError
from localcloud.logs import Tail, parts, select, show

NAMES = ["api", "cluster-a.apiserver", "cluster-a.etcd", "vm-n.console", "vm-n.krustlet"]


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("api", "api"),
        ("etcd", "cluster-a.etcd"),
        ("krustlet", "vm-n.krustlet"),
        ("vm-n.console", "vm-n.console"),
        ("apis", "cluster-a.apiserver"),
    ],
)
def test_a_part_is_meant_by_its_name_its_end_or_a_piece_of_it(wanted: str, found: str) -> None:
    assert select(NAMES, wanted) == found


def test_what_is_not_clear_or_not_there_is_named() -> None:
    with pytest.raises(HomeError, match=r"vm-n\.console, vm-n\.krustlet"):
        select(NAMES, "vm-n")
    with pytest.raises(HomeError, match="nothing called 'scheduler'"):
        select(NAMES, "scheduler")


def test_programs_and_consoles_are_parts(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    (home.logs / "api.log").write_text("one\ntwo\nthree\n")
    console = home.instance("n") / "log" / "serial-port-1.log"
    console.parent.mkdir()
    console.write_text("booted\n")
    assert list(parts(home)) == ["api", "vm-n.console"]
    out = io.StringIO()
    assert show(home, ["console"], lines=10, follow=False, out=out) == 0
    assert show(home, ["api", "console"], lines=2, follow=False, out=out) == 0
    assert out.getvalue() == "booted\napi: two\napi: three\nvm-n.console: booted\n"


@settings(deadline=None)  # a busy machine is no fault
@given(
    st.lists(
        st.one_of(
            st.integers(1, 5).map(lambda count: ("write", count)),
            st.just(("rotate", 0)),
            st.just(("halve", 0)),
            st.just(("part", 0)),
        ),
        max_size=30,
    )
)
def test_a_followed_file_is_read_once_whatever_becomes_of_it(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]]
) -> None:
    path = tmp_path_factory.mktemp("log") / "x.log"
    path.touch()
    tail, written = Tail(path, 0), 0
    seen: list[str] = []
    tail.read()
    for step, count in steps:
        match step:
            case "write":
                with path.open("a") as file:
                    for _ in range(count):
                        file.write(f"line {written}\n")
                        written += 1
            case "part":
                with path.open("a") as file:
                    file.write("line ")
                seen += tail.read()
                with path.open("a") as file:
                    file.write(f"{written}\n")
                written += 1
            case "rotate":
                path.rename(path.with_suffix(".1"))
                path.touch()
            case "halve":
                lines = path.read_text().splitlines(keepends=True)
                scratch = path.with_suffix(".new")
                scratch.write_text("".join(lines[len(lines) // 2 :]))
                scratch.replace(path)
        seen += tail.read()
    assert seen == [f"line {number}" for number in range(written)]
