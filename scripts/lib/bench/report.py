"""From the JSON of a run to what people read: tables, plots, and docs/benchmarks.md around them.

Everything is made of the JSON alone, so that no figure stands anywhere that was not measured in that run.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from scripts.lib import paths
from scripts.lib.bench import measure

DOCS = paths.REPOSITORY / "docs"
JSON = DOCS / "benchmarks.json"
README = paths.REPOSITORY / "README.md"
BEGIN, END = "<!-- figures of a run -->", "<!-- end of the figures -->"
TEXT = Path(__file__).with_name("benchmarks.md")

# Readable on white and on black, and told apart by those who see colours otherwise (Okabe and Ito).
COLOURS = {
    "node": "#0072B2",
    "docker": "#E69F00",
    "docker run": "#D55E00",
    "runtime": "#CC79A7",
    "process": "#009E73",
    "wasmtime": "#56B4E9",
}
THEMES = {"light": ("#ffffff", "#24292f"), "dark": ("#0d1117", "#e6edf3")}


def number(value: float) -> str:
    """Three digits are what such a figure has."""
    if value == 0:
        return "0"
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 100 else f"{rounded:g}"


def _spread(value: dict[str, Any]) -> str:
    return f"{number(value['median'])} ({number(value['low'])} to {number(value['high'])})"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def title(data: dict[str, Any], name: str) -> str:
    """A peer's name for people."""
    others = {"docker run": "the same by `docker run`", "node ready": "the same until Ready"}
    return others.get(name) or str(data["peers"].get(name, {"title": name})["title"])


def size(data: dict[str, Any]) -> str:
    """Bytes."""
    rows = []
    for name, one in data["size"].items():
        pushed = f"{one['pushed']:,}" if "pushed" in one else ""
        wait = number(one["computed_pull_ms"]) if "pushed" in one else ""
        rows.append([title(data, name), f"{one['app']:,}", pushed, wait])
    heads = ["", "the app alone, bytes", "pushed, bytes", f"{data['link_mbit']} Mbit/s, ms (computed)"]
    return _table(heads, rows)


def start(data: dict[str, Any]) -> str:
    """Milliseconds to the first right answer."""
    rows = [
        [title(data, name), number(one["p50"]), number(one["p99"]), str(one["count"])]
        for name, one in data["start"].items()
    ]
    return _table(["", "p50, ms", "p99, ms", "starts"], rows)


def density(data: dict[str, Any]) -> str:
    """Megabytes of all, by the number of instances."""
    counts = sorted({count for one in data["density"].values() for count in one["total_mb"]}, key=int)
    rows = []
    for name, one in data["density"].items():
        totals = [number(one["total_mb"][count]) if count in one["total_mb"] else "-" for count in counts]
        most = max(one["total_mb"], key=int)
        idle = number(one["idle_cpu_percent"][most])
        rows.append(
            [title(data, name), number(one["platform_mb"]), *totals, number(one["instance_kb"]), idle]
        )
    heads = ["MB of memory", "none", *counts, "kB each", "idle, % of a core"]
    text = _table(heads, rows)
    notes = [
        f"{title(data, name)} stops here: {one['stopped']}."
        for name, one in data["density"].items()
        if "stopped" in one
    ]
    if "control_plane_mb" in data["density"].get("node", {}):
        control = number(data["density"]["node"]["control_plane_mb"])
        notes.append(f"The control plane that the pods also have, and no peer: {control} MB.")
    return "\n".join([text, "", *notes]) if notes else text


def throughput(data: dict[str, Any]) -> str:
    """A table for each route."""
    parts = []
    for path, by_connections in data["throughput"].items():
        rows = [
            [
                title(data, name),
                connections,
                _spread(one["rate"]),
                number(one["p50_ms"]["median"]),
                number(one["p99_ms"]["median"]),
                number(one["cpu_seconds_per_million"]["median"]),
            ]
            for connections, loads in by_connections.items()
            for name, one in loads.items()
        ]
        heads = [f"`{path}`", "connections", "requests a second", "p50, ms", "p99, ms", "CPU-s a million"]
        parts.append(_table(heads, rows))
    return "\n\n".join(parts)


def sandbox(data: dict[str, Any]) -> str:
    """What an app can reach, with the command of each row."""
    names = list(data["peers"])
    rows = [
        [row["what"], *(row.get(name, "") for name in names), f"`{row['command']}`".replace("|", "\\|")]
        for row in data["sandbox"]
    ]
    return _table(["", *(title(data, name) for name in names), "seen by"], rows)


def change(data: dict[str, Any]) -> str:
    """Seconds from a changed line to the changed answer."""
    ways = {"node": "`pulumi up`: compile, sign, push, roll out", "docker": "compile, import, remove, run"}
    rows = [[ways[name], _spread(one)] for name, one in data["change"].items()]
    return _table(["", "s, median (spread)"], rows)


def ratios(data: dict[str, Any]) -> str:
    """Ours by theirs."""
    rows = [[one["what"], _spread(one), one["target"]] for one in data["ratios"]]
    return _table(["our node by the peer", "median (spread)", "target"], rows)


PARTS = {
    "size": size,
    "start": start,
    "density": density,
    "throughput": throughput,
    "sandbox": sandbox,
    "change": change,
    "ratios": ratios,
}


def tables(data: dict[str, Any]) -> str:
    """All that was measured."""
    return "\n\n".join(part(data) for name, part in PARTS.items() if data.get(name))


def _taken(data: dict[str, Any]) -> str:
    """On what, when, and with what beside it."""
    machine, effort = data["machine"], data["effort"]
    lines = [
        f"Taken on {data['date']} by `./scripts/bench {data['mode']}` in {number(data['seconds'])} s:"
        f" {machine['processor']}, {machine['cores']} cores, {machine['memory_gb']} GB,"
        f" {machine['system']}, kernel {machine['kernel']}."
        f" {effort['rounds']} rounds of {effort['seconds']} s, {effort['starts']} starts."
    ]
    if not machine["quiet"]:
        lines.append(
            f"**The machine had other work at that time (a load of {number(machine['load_before'])}):"
            " these figures show that the benchmark works, and are to be taken again on a quiet one.**"
        )
    return "\n\n".join(lines)


def _lines(data: dict[str, Any]) -> str:
    """The command line of each peer, and of the load."""
    rows = [[one["title"], f"`{one['command']}`"] for one in data["peers"].values()]
    rows.append(["the load", f"`{data['load']}`"])
    rows += [[name, f"not measured; to install: `{how}`"] for name, how in data["absent"].items()]
    rows += [[name, version] for name, version in data["versions"].items()]
    return _table(["", "command line, or version"], rows)


def document(data: dict[str, Any]) -> str:
    """docs/benchmarks.md: the text beside this file, with the figures in their places."""
    text = TEXT.read_text(encoding="utf-8")
    parts = {name: part(data) if data.get(name) else "Not measured." for name, part in PARTS.items()}
    for name, part in {**parts, "taken": _taken(data), "lines": _lines(data)}.items():
        text = text.replace(f"{{{name}}}", part)
    return text


def readme(data: dict[str, Any]) -> str:
    """What the README says of a full run on a quiet machine."""
    machine, primorial = data["machine"], data["throughput"]["/primorial/30"]
    node, peer = primorial["50"]["node"], primorial["50"].get("wasmtime")
    alone = primorial["1"]["node"]
    ready, idle = data["start"]["node ready"], data["density"]["node"]
    most = max(idle["total_mb"], key=int)
    rows = [["the app's module", f"{data['size']['node']['app']:,} bytes"]]
    if peer:
        wasmtime = f"`wasmtime serve` {data['versions']['wasmtime']}"
        rate, tail = (_spread(measure.ratio(node[key], peer[key])) for key in ("rate", "p99_ms"))
        rows.append([f"requests at 50 connections, by {wasmtime}", f"{rate}; p99 {tail}"])
    one = f"p50 {number(alone['p50_ms']['median'])} ms, p99 {number(alone['p99_ms']['median'])} ms"
    rows += [
        ["one request at a time", one],
        [
            "from a pod's creation to Ready, seen through a watch, its module cached",
            f"p50 {number(ready['p50'])} ms, p99 {number(ready['p99'])} ms",
        ],
        [
            f"{int(most):,} pods on one node",
            f"all answer in {number(idle['up_seconds'][most])} s, {number(idle['instance_kb'])} kB of"
            f" memory each, {number(idle['idle_cpu_percent'][most])} % of a core while idle",
        ],
        *([one["what"], _spread(one)] for one in data["ratios"] if "ocker" in one["what"]),
    ]
    heads = [f"on {machine['cores']} cores ({machine['processor']}), half of them the load's", ""]
    pictures = "\n".join(
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="docs/plots/{name}-dark.svg">'
        f'<img alt="{name}" src="docs/plots/{name}-light.svg"></picture>'
        for name in ("start", "density")
    )
    return f"{_table(heads, rows)}\n\n{pictures}"


def is_for_the_readme(data: dict[str, Any]) -> bool:
    """Whether a run is one to quote: full, and beside no other work."""
    complete = not data.get("failed") and all(data.get(part) for part in PARTS)
    return data["mode"] == "full" and bool(data["machine"]["quiet"]) and complete


def plots(data: dict[str, Any], directory: Path) -> list[Path]:
    """Draws throughput, start and density, light and dark, as PNG and SVG; gives the files."""
    import matplotlib as mpl  # noqa: PLC0415 - half a second that no other command needs

    mpl.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    draw = {"throughput": _draw_throughput, "start": _draw_start, "density": _draw_density}
    made = []
    directory.mkdir(exist_ok=True)
    for theme, (paper, ink) in THEMES.items():
        style = {
            "figure.facecolor": paper,
            "axes.facecolor": paper,
            "savefig.facecolor": paper,
            **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), ink),
            "axes.edgecolor": ink,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "font.size": 11,
            "legend.frameon": False,
            "svg.hashsalt": "bench",  # the same run gives the same file
        }
        with mpl.rc_context(style):
            for name, drawing in draw.items():
                if not data.get(name):
                    continue
                figure, axes = pyplot.subplots(figsize=(8, 4.2), layout="constrained")
                drawing(data, axes)
                for ending in ("png", "svg"):
                    file = directory / f"{name}-{theme}.{ending}"
                    stamp = {"Date": None} if ending == "svg" else {"Software": None}
                    figure.savefig(file, dpi=160, metadata=stamp)
                    made.append(file)
                pyplot.close(figure)
    return made


def _draw_throughput(data: dict[str, Any], axes: Any) -> None:
    routes = list(data["throughput"])
    names = list(data["peers"])
    connections = "50"
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        rates = [data["throughput"][route][connections][name]["rate"] for route in routes]
        middle = [rate["median"] for rate in rates]
        below = [rate["median"] - rate["low"] for rate in rates]
        above = [rate["high"] - rate["median"] for rate in rates]
        at = [index + (place - (len(names) - 1) / 2) * width for index in range(len(routes))]
        axes.bar(at, middle, width * 0.92, label=title(data, name), color=COLOURS[name])
        axes.errorbar(at, middle, [below, above], fmt="none", ecolor=axes.xaxis.label.get_color(), lw=1)
    axes.set_xticks(range(len(routes)), [route if len(route) < 20 else f"{route[:12]}…" for route in routes])
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylabel("requests a second")
    axes.set_title(f"{connections} connections, servers and load on cores apart", loc="left")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3)


def _draw_start(data: dict[str, Any], axes: Any) -> None:
    names = [name for name in data["start"] if name != "node ready"]
    names.sort(key=lambda name: float(data["start"][name]["p50"]), reverse=True)
    for place, name in enumerate(names):
        one = data["start"][name]
        axes.plot([one["p50"], one["p99"]], [place, place], color=COLOURS[name], lw=3)
        axes.plot(one["p50"], place, "o", color=COLOURS[name], ms=11)
        axes.annotate(f"  {number(one['p50'])} ms", (one["p99"], place), va="center")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.margins(x=0.12)
    axes.set_yticks(range(len(names)), [title(data, name).replace("`", "") for name in names])
    axes.set_xlabel("ms to the first right answer: p50, with a line to p99")
    axes.set_title("From asking for an instance to its first right answer", loc="left")


def _draw_density(data: dict[str, Any], axes: Any) -> None:
    for name, one in data["density"].items():
        counts = [int(count) for count in one["total_mb"]]
        axes.plot(counts, list(one["total_mb"].values()), "o-", label=title(data, name), color=COLOURS[name])
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.set_xlabel("idle instances")
    axes.set_ylabel("MB, platform included")
    axes.set_title("Memory of idle instances", loc="left")
    axes.legend()


def publish() -> None:
    """Writes docs/benchmarks.md and the plots from docs/benchmarks.json."""
    data = json.loads(JSON.read_text(encoding="utf-8"))
    (DOCS / "benchmarks.md").write_text(document(data), encoding="utf-8")
    if is_for_the_readme(data):
        before, marker, rest = README.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        README.write_text(f"{before}{marker}\n{readme(data)}\n{END}{after}", encoding="utf-8")
    for file in plots(data, DOCS / "plots"):
        print(file.relative_to(paths.REPOSITORY))
