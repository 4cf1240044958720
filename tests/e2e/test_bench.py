"""The benchmark as a user starts it: every peer that is there is measured, and the figures are complete."""

import json
import shutil
from pathlib import Path

from scripts.lib.bench import report
from scripts.lib.bench.measure import ANSWERS
from tests.e2e.conftest import Stack


def test_a_quick_run_answers_every_question_for_every_peer(stack: Stack, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    said = stack.run(
        "./scripts/bench", "quick", "--rounds=1", "--seconds=1", "--starts=2", f"--json={file}"
    ).stdout
    data = json.loads(file.read_text())
    peers, absent = set(data["peers"]), data["absent"]
    assert data["failed"] == {}
    # No threshold: other tests run beside it.
    assert {"node", "process"} <= peers
    assert peers | set(absent) - {"wrk"} == {"node", "docker", "runtime", "process", "wasmtime"}
    assert all("install" in how for how in absent.values())
    assert ("wrk" in absent) == (shutil.which("wrk") is None)
    assert set(data.get("throughput", ANSWERS)) == set(ANSWERS)
    for loads in data.get("throughput", {}).values():
        for by_peer in loads.values():
            assert set(by_peer) == peers
            assert all(one["rate"]["low"] > 0 and len(one["rate"]["rounds"]) == 1 for one in by_peer.values())
    assert peers <= set(data["start"])
    assert all(len(one["rounds"]) == 2 for one in data["start"].values())
    assert set(data["density"]) == peers
    assert all(set(one["total_mb"]) == {"1", "10"} for one in data["density"].values())
    assert data["size"]["node"]["app"] == stack.outputs()["wasm_bytes"]
    assert all(peers <= set(row) for row in data["sandbox"])
    assert data["ratios"]
    assert report.tables(data) in said
    assert str(stack.directory) not in file.read_text()
    assert stack.kubectl_json("get", "pods", "--namespace", "bench")["items"] == []
