"""Check that published figures name a commit, a clean one of this history (`make lint`).

    python bench/published.py

A published table is a Markdown table with a ratio ("1.41x") in README.md or docs/*.md (the log,
docs/log, is history). Its section, or what is above its first heading, names a commit: "commit
0880537". A "-dirty" commit or one that is not an ancestor of HEAD is an error, and so is a table of
README.md that is more than `OLDEST` commits behind HEAD, or a README.md without one. The age of
each page's oldest commit is printed. In a shallow clone only the form is checked.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST = 400  # commits: the front page is of this state of the code, not of one long before
DIRTY = re.compile(r"\b[0-9a-f]{7,40}-dirty\b")
RATIO = re.compile(r"\|[^|]*\b\d+(\.\d+)?x\b[^|]*\|")
COMMITS = re.compile(r"\bcommits? ((?:[0-9a-f]{7,40}(?:-dirty)?(?:, | and | to )?)+)")


def git(root: Path, *words: str) -> str | None:
    """Return git's output, or None if the command fails."""
    done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def sections(text: str) -> list[tuple[int, str]]:
    """Return (first line, text) of each part of a page that a heading begins, without code."""
    parts, code, start = [], False, 1
    lines: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        code ^= line.startswith("```")
        if line.startswith("#") and not code:
            parts.append((start, "\n".join(lines)))
            start, lines = number, []
        lines.append("" if code else line)
    return [*parts, (start, "\n".join(lines))]


def check(root: Path) -> tuple[list[str], list[str]]:
    """Return the faults of the pages and what to print about their ages."""
    shallow = git(root, "rev-parse", "--is-shallow-repository") != "false"
    ages = ["published: no complete history here: ages and ancestors are not checked"]
    faults: list[str] = []
    if not shallow:
        ages.clear()
    for page in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        name, behind, has_table = str(page.relative_to(root)), {}, False
        for line, text in sections(page.read_text("utf-8")):
            named = [c for found in COMMITS.findall(text) for c in re.split(", | and | to ", found)]
            has_ratios = RATIO.search(re.sub("`[^`\n]*`", "", text))
            if has_ratios and not any(named):
                faults.append(f"{name}:{line}: expected a commit beside a table of ratios")
            has_table |= has_ratios is not None
            for commit in DIRTY.findall(text):
                faults.append(f"{name}:{line}: expected a clean commit, got {commit}")
            for commit in filter(None, named):
                if shallow or commit.endswith("-dirty"):
                    continue
                elif git(root, "merge-base", "--is-ancestor", commit, "HEAD") is None:
                    faults.append(f"{name}:{line}: expected an ancestor of HEAD, got {commit}")
                else:
                    behind[commit] = int(git(root, "rev-list", "--count", f"{commit}..HEAD") or 0)
        if name == "README.md" and not has_table:
            faults.append(f"{name}: expected a table of ratios, got none")
        if behind:
            age = max(behind.values())
            ages.append(f"published: {name}: {min(behind.values())} to {age} commits old")
            if name == "README.md" and age > OLDEST:
                faults.append(f"{name}: expected at most {OLDEST} commits behind HEAD, got {age}")
    return faults, ages


def main() -> None:
    faults, ages = check(ROOT)
    print("\n".join([*ages, *faults]))
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
