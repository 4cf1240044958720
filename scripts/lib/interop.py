"""Who reads whose: each tool on what the program pushed, and the node on what each tool pushed or signed.

tests/e2e/test_interop.py runs the commands as they stand here, on a stack. `AWESOME_WASM_INTEROP=publish` has
it keep what it saw in docs/interop.json, and `python -m scripts.lib.interop` makes the table in
docs/supply-chain.md of both. What no such run has seen is said not to have been run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from scripts.lib import paths

DOCUMENT = paths.REPOSITORY / "docs" / "supply-chain.md"
SEEN = paths.REPOSITORY / "docs" / "interop.json"
BEGIN, END = "<!-- who reads whose -->\n", "<!-- end of the table -->\n"

_VERIFY = "--key cosign.pub --insecure-ignore-tlog --trusted-root root.json $IMAGE"
_SIGN = "--yes --key own.key --use-signing-config=false --tlog-upload=false $COPY"
_PULLED = "--output pulled.wasm"


@dataclass(frozen=True)
class Cell:
    """Commands of a tool, one after the other; without any there is nothing to run, for the reason in `note`.

    `IMAGE` is the stack's image by digest, `LAYER` its module, `COPY` an image of the same kind that nobody
    signed, `NEW` a name that nothing has, `HOST` the registry. `own.key` is the stack's key, `app.wasm` the
    module.
    """

    tool: str
    is_ours: bool
    commands: tuple[str, ...]
    note: str = ""

    @property
    def name(self) -> str:
        """What the cell is called in docs/interop.json."""
        return f"{self.tool}, {'our artifact' if self.is_ours else 'our node'}"


def _cosign(program: str) -> tuple[Cell, Cell]:
    verified = (
        f"{program} verify {_VERIFY}",
        f"{program} verify-attestation --type slsaprovenance1 {_VERIFY}",
        f"{program} verify-attestation --type cyclonedx {_VERIFY}",
    )
    return Cell(program, True, verified), Cell(program, False, (f"{program} sign {_SIGN}",))


CELLS = (
    *_cosign("cosign"),
    *_cosign("cosign3"),
    Cell(
        "oras",
        True,
        ("oras discover --plain-http $IMAGE", f"oras blob fetch --plain-http {_PULLED} $LAYER"),
    ),
    Cell(
        "oras",
        False,
        (
            "oras push --plain-http --config config.json:application/vnd.wasm.config.v0+json "
            "$NEW:latest app.wasm:application/wasm",
        ),
    ),
    Cell("crane", True, ("crane manifest $IMAGE", "crane blob $LAYER > pulled.wasm")),
    Cell("crane", False, ("crane copy $IMAGE $NEW:latest",)),
    Cell("wkg", True, (f"wkg oci pull --insecure $HOST {_PULLED} $IMAGE",)),
    Cell("wkg", False, ("wkg oci push --insecure $HOST $NEW:latest app.wasm",)),
    Cell("wasmtime", True, ("wasmtime serve --addr 127.0.0.1:$PORT app.wasm",)),
    Cell("wasmtime", False, (), "pushes nothing"),
)
NAMES = {"cosign": "cosign 2", "cosign3": "cosign 3", "wasmtime": "wasmtime serve"}
"""What a tool is called for people, where that is not its program's name."""


def rendered(seen: dict[str, Any]) -> str:
    """The table, of what a run has seen."""
    lines = ["| | command | seen |", "| --- | --- | --- |"]
    for cell in CELLS:
        tool = NAMES.get(cell.tool, cell.tool)
        what = f"{tool} on our artifact" if cell.is_ours else f"our node on {tool}'s"
        commands = "<br>".join(f"`{command}`" for command in cell.commands)
        lines.append(f"| {what} | {commands or cell.note} | {_outcome(cell, seen)} |")
    return "\n".join(lines) + "\n"


def _outcome(cell: Cell, seen: dict[str, Any]) -> str:
    if not cell.commands:
        return "nothing to run"
    found = seen.get(cell.name, {})
    if "version" in found:
        return f"works, {found['version']}"
    return f"**not run**: {found.get('why', 'no run has come to it')}"


def with_table(page: str, seen: dict[str, Any]) -> str:
    """A page with the table in its place."""
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{rendered(seen)}\n{END}{tail}"


def read_seen() -> dict[str, Any]:
    """What the last run has seen, by the cells' names."""
    seen: dict[str, Any] = json.loads(SEEN.read_text(encoding="utf-8"))
    return seen


if __name__ == "__main__":
    DOCUMENT.write_text(with_table(DOCUMENT.read_text(encoding="utf-8"), read_seen()), encoding="utf-8")
