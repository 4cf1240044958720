"""A preview's report as Markdown for a comment, and as a page of HTML with the same words."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

from scripts.lib.changes import NONE
from scripts.lib.plan import KINDS, PRICED_FOR, PRICED_ON, Report, Step

MARKER = "<!-- pulumi-preview -->"
"""What a comment begins with, so that the next one is written in its place."""
LIMIT = 65_536
"""Characters that GitHub takes in a comment."""
CUT = "… cut here: {} more lines; the whole is in preview.json"
_MARKS = {"created": "+", "updated": "~", "replaced": "±", "deleted": "-"}


def code(text: str) -> str:
    """Text as a code span, whatever is in it; fit for a table's cell."""
    flat = re.sub(r"\s+", " ", text).strip() or " "
    fence = "`" * (1 + max((len(run) for run in re.findall(r"`+", flat)), default=0))
    pad = " " if "`" in flat else ""
    return f"{fence}{pad}{flat}{pad}{fence}".replace("|", "\\|")


def _fence(lines: Iterable[str]) -> str:
    """A fence that nothing in the lines can close."""
    return "`" * max(3, 1 + max((len(run) for line in lines for run in re.findall(r"`+", line)), default=0))


def _sentence(report: Report) -> str:
    counted = [(sum(step.kind == kind for step in report.steps), kind) for kind in KINDS]
    said = ", ".join(f"{number} {kind}" for number, kind in counted if number) or "nothing changes"
    return f"**{said}**, {report.unchanged} unchanged"


def _loud(step: Step) -> str:
    because = ", ".join(code(reason) for reason in step.because) or "what it stands on is made anew"
    why = "it is no longer in the program" if step.kind == "deleted" else f"because of {because}"
    away = "" if step.downtime == NONE else f"; the app is away for {step.downtime}"
    return f"- **{step.kind.upper()}** {code(step.name)} ({code(step.type)}): {why}{away}"


def _table(head: list[str], rows: Iterable[Iterable[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows)]


def _head(report: Report) -> list[str]:
    commits = [f"{word} {code(sha)}" for word, sha in (("base", report.base), ("head", report.head)) if sha]
    return [f"### Preview of the stack {code(report.stack)}", "", ", ".join(commits), ""]


def _summary(report: Report) -> list[str]:
    lines = [_sentence(report), ""]
    if report.failed:
        lines[:0] = ["> [!CAUTION]", "> The preview fails; what is below is what was seen until then.", ""]
    lines += [f"The app is away for: **{report.downtime}**", ""]
    loud = [step for step in report.steps if step.kind in ("replaced", "deleted")]
    if loud:
        lines += [_loud(step) for step in sorted(loud, key=lambda step: (step.kind, step.name))]
        lines.append("")
    for kind in ("created", "updated"):
        names = sorted(step.name for step in report.steps if step.kind == kind)
        if names:
            lines += [f"{kind.capitalize()}: {', '.join(map(code, names))}", ""]
    return lines


def _sections(report: Report) -> list[str]:
    lines: list[str] = []
    if report.messages:
        fence = _fence(report.messages)
        lines += ["#### Messages", "", fence, *"\n".join(report.messages).splitlines(), fence, ""]
    for change in report.built:
        lines += [f"#### Built: {code(change.name)}", ""]
        if change.because:
            lines += [f"Made of another {', '.join(f'**{part}**' for part in change.because)}.", ""]
        rows = [[row, code(old), code(new)] for row, old, new in change.rows]
        lines += [*_table(["", "before", "after"], rows), ""]
    if report.configuration:
        rows = [[code(key), code(old), code(new)] for key, old, new in report.configuration]
        lines += ["#### Configuration", "", *_table(["key", "before", "after"], rows), ""]
    if report.policies or report.violations:
        lines += ["#### Policies", ""]
        rows = [
            [
                f"**{violation['level']}**",
                *(code(violation[key]) for key in ("policy", "resource", "message")),
            ]
            for violation in report.violations
        ]
        lines += _table(["level", "policy", "resource", "violation"], rows) if rows else ["All are kept."]
        lines += ["", f"Asked: {', '.join(map(code, report.policies))}", ""] if report.policies else [""]
    if report.drift is not None:
        lines += ["#### Drift", ""]
        for step in report.drift:
            what = "is gone" if step.kind == "deleted" else "is not as the state has it"
            places = sorted({re.split(r"[:\[]", line[2:], maxsplit=1)[0] for line in step.diff})
            lines.append(f"- {code(step.name)} {what}{': ' if places else ''}{', '.join(map(code, places))}")
        lines += [""] if report.drift else ["None: everything is as the state has it.", ""]
    if report.cost is not None:
        before, after = report.cost
        lines += [
            "#### Cost (an estimate)",
            "",
            f"${before:,.2f} a month before, **${after:,.2f}** after: Google Cloud's list prices for"
            f" {PRICED_FOR} as of {PRICED_ON}, without traffic, storage, discounts and taxes.",
            "",
        ]
    return lines


def _diff(report: Report) -> list[str]:
    lines = []
    for step in report.steps:
        mark = _MARKS[step.kind]
        lines += [f"{'!' if mark == '±' else mark} {step.name} ({step.type}) {step.kind}"]
        lines += [f"{line[:1]}   {line[2:]}" for line in step.diff]
    return lines


def markdown(report: Report, limit: int = LIMIT) -> str:
    """The comment: a summary first, the whole diff folded, at most `limit` characters, cut with a word."""
    visible = [MARKER, *_head(report), *_summary(report), *_sections(report)]
    kept = _cut(visible, limit)
    if len(kept) < len(visible) or not report.steps:
        return "\n".join(kept) + "\n"
    diff = _diff(report)
    fence = _fence(diff)
    before = ["<details><summary>The whole diff</summary>", "", f"{fence}diff"]
    after = [fence, "", "</details>"]
    room = limit - sum(len(line) + 1 for line in [*visible, *before, *after])
    return "\n".join([*visible, *before, *_cut(diff, max(room, len(CUT) + 10)), *after])[:limit] + "\n"


def _cut(lines: list[str], room: int) -> list[str]:
    """As many lines as fit, the last of them a word about the others."""
    if sum(len(line) + 1 for line in lines) < room:
        return lines
    room -= len(CUT) + 10
    kept: list[str] = []
    for line in lines:
        room -= len(line) + 1
        if room < 0:
            break
        kept.append(line)
    # a block of code that was begun is ended, so that the word is read as one
    fences = [line.removesuffix("diff") for line in kept if re.fullmatch(r"`{3,}(diff)?", line)]
    closing = [fences[-1]] if len(fences) % 2 else []
    return [*kept, *closing, CUT.format(len(lines) - len(kept))]


_STYLE = """\
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1f2328}
code,pre{font:13px/1.45 ui-monospace,monospace;background:#f4f5f7;border-radius:4px}code{padding:.1em .3em}
pre{padding:.8rem;overflow:auto}table{border-collapse:collapse}
td,th{border:1px solid #d0d7de;padding:.3em .6em}
.add{color:#116329}.del,.loud{color:#a40e26}"""


def _span(text: str) -> str:
    """Our own Markdown's code spans and bold words, and nothing else of it, as HTML."""
    parts = re.split(r"(?<!`)(`+)(?!`)(.*?)(?<!`)\1(?!`)", text.replace("\\|", "|"))
    out = []
    for number in range(0, len(parts), 3):
        plain = html.escape(parts[number])
        out.append(re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", plain))
        if number + 2 < len(parts):
            out.append(f"<code>{html.escape(parts[number + 2].strip())}</code>")
    return "".join(out)


def page(report: Report) -> str:
    """The same as a page to look at, with nothing cut."""
    body: list[str] = []
    fence = ""
    for line in [*_head(report), *_summary(report), *_sections(report)]:
        if fence:
            body.append("</pre>" if line == fence else html.escape(line))
            fence = "" if line == fence else fence
        elif re.fullmatch(r"`{3,}", line):
            fence = line
            body.append("<pre>")
        elif line.startswith("#"):
            level = len(line) - len(line.lstrip("#")) - 2
            body.append(f"<h{level}>{_span(line.lstrip('# '))}</h{level}>")
        elif line.startswith("|"):
            if not set(line) <= set("| -"):
                cells = re.split(r"(?<!\\)\|", line.strip("|"))
                body.append(
                    "<table><tr>" + "".join(f"<td>{_span(c.strip())}</td>" for c in cells) + "</tr></table>"
                )
        elif line:
            kind = ' class="loud"' if line.startswith("- **") else ""
            body.append(f"<p{kind}>{_span(line.removeprefix('> ').replace('[!CAUTION]', ''))}</p>")
    shades = {"+": "add", "-": "del", "!": "loud"}
    diff = [f'<span class="{shades.get(line[:1], "")}">{html.escape(line)}</span>' for line in _diff(report)]
    folded = ["<details><summary>The whole diff</summary><pre>", *diff, "</pre></details>"] if diff else []
    text = "\n".join([*body, *folded]).replace("</table>\n<table>", "")
    title = html.escape(f"Preview of {report.stack}")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style>\n{text}\n</html>\n"
    )
