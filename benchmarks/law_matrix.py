"""The laws as a table: rows of METHODS against laws of the design, with the number of tests that passed.

python benchmarks/law_matrix.py               # writes docs/laws.md; exit code 1 if any failed
python benchmarks/law_matrix.py REPORT.xml …  # the same of runs that have been made, with pytest's --junitxml
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

from finetooth import METHODS

ROOT = Path(__file__).resolve().parents[1]
ROWS = [*METHODS, "own"]
LAWS = {
    1: "rest is kept",
    2: "keep=1 is AdamW",
    3: "exact budget",
    4: "accumulation",
    5: "two ranks",
    6: "resume",
    7: "apply and revert",
    8: "seeds",
    9: "gradients",
    10: "trainer",
    12: "memory",
}


def run(report: Path) -> None:
    """The laws' tests, with their report."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "", "tests/laws", "tests/dist", f"--junitxml={report}"]
    subprocess.run([*command, "-p", "no:cacheprovider"], cwd=ROOT, check=False, stdout=sys.stderr)


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        reports = [Path(name) for name in sys.argv[1:]]
        if not reports:
            reports = [Path(folder) / "laws.xml"]
            run(reports[0])
        every = [case for report in reports for case in ElementTree.parse(report).iter("testcase")]
    cases = [case for case in every if case.attrib["classname"].startswith(("tests.laws", "tests.dist"))]
    code = int(any(case.find(bad) is not None for case in cases for bad in ("failure", "error")))
    passed, other = Counter[tuple[str, int]](), Counter[tuple[str, int]]()
    for case in cases:
        law = re.search(r"test_(\d+)_", case.attrib["classname"])
        name = case.attrib["name"].replace("gmt-strict", "gmtstrict").replace("gift-sw", "giftsw")
        words = set(re.findall(r"[a-z0-9]+", name.partition("[")[2]))
        for row in ROWS:
            if law and row.replace("-", "") in words:
                target = passed if not [c for c in case if c.tag in ("failure", "error", "skipped")] else other
                target[row, int(law.group(1))] += 1
    lines = [f"| row | {' | '.join(f'{n} {text}' for n, text in LAWS.items())} |", f"|---{'|---' * len(LAWS)}|"]
    for row in ROWS:
        cells = [f"{passed[row, n] or '–'}" for n in LAWS]
        lines.append(f"| `{row}` | {' | '.join(cells)} |")
    page = f"""# The law matrix

How many tests of each law pass for each row, float32 and bfloat16 together; made by `python benchmarks/law_matrix.py`.
`own` is a user's score function (`tests/laws/toy.py`). A dash: the law does not apply (`full` chooses nothing, so it
has no budget; law 9 is about rows with compact state). `gift-sw` and `spectrum` have fewer tests of law 3, because their scores are of columns, and of whole matrices.

{chr(10).join(lines)}
"""
    (ROOT / "docs" / "laws.md").write_text(page, encoding="utf-8")
    sys.stdout.write(page)
    return code


if __name__ == "__main__":
    sys.exit(main())
