"""Run cases of the corpus in forks of this process: ``python worker.py FOLDER`` with ids on stdin.

They come as a JSON object that gives each its seconds. One line of JSON for each goes to stdout: its id, and what the
program left behind. A process of its own, because forking needs a parent without threads, and pytest may have some.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from hostile import sandbox
from hostile.stage import KINDS, Case, cases, stage, write_stage

TOGETHER = 20
"""Cases that share a fork, as long as nothing is wrong with any of them; else each gets its own."""


def task(case: Case, root: Path) -> sandbox.Task:
    """What puts ``case`` among sound models, and the command that reads it."""
    kind = KINDS[case.kind]
    stage(kind)  # made before the fork, once

    def prepare() -> None:
        shutil.rmtree(root / "work", ignore_errors=True)
        write_stage(root / "work", kind)
        place = root / "work" / kind.place
        place.unlink(missing_ok=True)
        case.write(place)

    return prepare, kind.command


def main() -> None:
    """Run the cases that are asked for."""
    root = Path(sys.argv[1])
    os.environ.update(sandbox.environment(root))
    wanted: dict[str, float] = json.load(sys.stdin)
    by_id = {case.id: case for case in cases()}
    sandbox.preload(torch=any(name.startswith("pickle/") for name in wanted), mixtures=False)
    plain = [name for name, seconds in wanted.items() if seconds == sandbox.SECONDS]
    groups = [plain[i : i + TOGETHER] for i in range(0, len(plain), TOGETHER)]
    groups += [[name] for name in wanted if name not in set(plain)]
    for group in groups:
        tasks = [task(by_id[name], root) for name in group]
        found = sandbox.run_together(tasks, root, wanted[group[0]])
        if len(group) > 1 and (len(found) < len(group) or any(map(sandbox.broken, found))):
            found = [sandbox.run_together([one], root)[0] for one in tasks]
        for name, outcome in zip(group, found, strict=True):
            print(json.dumps([name, outcome.record()]), flush=True)


if __name__ == "__main__":
    main()
