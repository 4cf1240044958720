"""What the runner of others' preview 1 tests takes for a suite."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conformance.wasi import Case, Result, SuiteError, read_log, read_suite, table


def test_a_case_without_a_specification_has_the_default_one(tmp_path: Path) -> None:
    (tmp_path / "alone.wasm").touch()
    assert read_suite(tmp_path) == [Case("alone", tmp_path / "alone.wasm")]


@pytest.mark.parametrize("text", ["", "[]", "7", '{"env": []}', '{"exit_code": "x"}', '{"args": 7}'])
def test_a_specification_that_cannot_be_read_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "case.wasm").touch()
    (tmp_path / "case.json").write_text(text)
    with pytest.raises(SuiteError, match=r"case\.json"):
        read_suite(tmp_path)


def test_a_directory_without_modules_is_no_suite(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match=r"no \.wasm"):
        read_suite(tmp_path)


def test_what_a_specification_asks_for_beyond_the_format_is_kept(tmp_path: Path) -> None:
    (tmp_path / "case.wasm").touch()
    (tmp_path / "case.json").write_text('{"operations": [], "args": ["a"], "world": "x"}')
    [case] = read_suite(tmp_path)
    assert (case.args, case.unknown) == (("a",), ("operations", "world"))


def test_a_log_is_taken_apart_by_stream_and_part() -> None:
    text = "T stdout P one \nT stderr F bad\nT stdout F two\nT stdout F \nT stdout P end\n"
    assert read_log(text) == {"stdout": "one two\n\nend", "stderr": "bad\n"}


def test_the_table_counts_what_it_shows() -> None:
    case = Case("a/case", Path("case.wasm"))
    shown = table([Result(case, "ok"), Result(case, "failed", "exit code 1, expected 0")])
    assert shown.splitlines() == [
        "a/case  ok",
        "a/case  failed   exit code 1, expected 0",
        "1 ok, 1 failed, 0 skipped",
    ]
