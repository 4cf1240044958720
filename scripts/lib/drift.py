"""./scripts/drift: what runs and is not as the state has it; nothing is changed. For a cron job.

Exits with 0 where there is none, with 2 where there is some, and with 1 where it cannot be told.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from scripts.lib import plan
from scripts.lib.preview import events, known_secrets

FOUND = 2


def main() -> int:
    """Look, and say it in a line a resource, or as JSON."""
    parser = argparse.ArgumentParser(prog="./scripts/drift", description=__doc__)
    parser.add_argument("--stack", default="local", help="unless given, local")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    options = parser.parse_args()
    secrets = known_secrets(options.stack)
    seen, status, said = events(["refresh", "--preview-only", "--stack", options.stack])
    if status != 0:
        messages = [*plan.messages(seen), said]
        print(plan.Redactor(secrets).text("\n".join(filter(None, messages))), file=sys.stderr)
        return 1
    found = plan.drift(seen, secrets)
    if options.json:
        print(json.dumps([dataclasses.asdict(step) for step in found], indent=2, ensure_ascii=False))
    else:
        for step in found:
            print(f"{step.name} ({step.type}): {'gone' if step.kind == 'deleted' else 'changed'}")
            print("".join(f"    {line}\n" for line in step.diff), end="")
        if not found:
            print("no drift: everything is as the state has it")
    return FOUND if found else 0


if __name__ == "__main__":
    sys.exit(main())
