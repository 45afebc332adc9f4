"""bench/published.py: published figures name a clean commit of this history."""

import subprocess

import published
import pytest

TABLE = "| op | ratio |\n|---|---|\n| glu | **1.41x** |\n"


@pytest.fixture
def repository(tmp_path):
    """A repository of two commits, whose README has a table measured at the first."""

    def git(*words):
        identity = ["-c", "user.name=A", "-c", "user.email=a@b"]
        done = subprocess.run(
            ["git", *identity, *words], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    git("init", "-q")
    (tmp_path / "docs").mkdir()
    git("commit", "-q", "--allow-empty", "-m", "measured")
    write(tmp_path, git("rev-parse", "--short", "HEAD"))
    git("add", ".")
    git("commit", "-q", "-m", "published")
    return tmp_path, git


def write(root, commit):
    (root / "README.md").write_text(f"# A\n\n## Fast\nZen 4, commit {commit}.\n\n{TABLE}")


def test_figures_of_this_history(repository):
    root, _ = repository
    assert published.check(root) == ([], ["published: README.md: 1 to 1 commits old"])


@pytest.mark.parametrize("commit", ["0123abc", "0123abc-dirty"])
def test_a_commit_that_nobody_can_check_out(repository, commit):
    root, git = repository
    good = git("rev-parse", "--short", "HEAD")
    write(root, f"{good} and {commit}")
    kind = "a clean commit" if commit.endswith("-dirty") else "an ancestor of HEAD"
    assert published.check(root)[0] == [f"README.md:3: expected {kind}, got {commit}"]


@pytest.mark.parametrize("form", ["Commit {}, commit {}", "commit `{}`; commit {}"])
def test_a_dirty_commit_in_any_form(repository, form):
    root, git = repository
    good = git("rev-parse", "--short", "HEAD")
    (root / "README.md").write_text(form.format("0123abc-dirty", good) + f"\n\n{TABLE}")
    assert published.check(root)[0] == ["README.md:1: expected a clean commit, got 0123abc-dirty"]


def test_a_front_page_without_figures(repository):
    root, _ = repository
    (root / "README.md").write_text("# A\nThe table is withdrawn.\n")
    assert published.check(root)[0] == ["README.md: expected a table of ratios, got none"]


def test_a_commit_of_another_branch(repository):
    root, git = repository
    git("checkout", "-q", "-b", "other")
    git("commit", "-q", "--allow-empty", "-m", "elsewhere")
    other = git("rev-parse", "--short", "HEAD")
    git("checkout", "-q", "-")
    write(root, other)
    assert f"expected an ancestor of HEAD, got {other}" in published.check(root)[0][0]


def test_a_table_without_a_commit(repository):
    root, _ = repository
    (root / "docs" / "ops.md").write_text(f"# Ops\ncommit 0123abc\n\n## Fast\n{TABLE}")
    faults = published.check(root)[0]
    assert "docs/ops.md:4: expected a commit beside a table of ratios" in faults
    (root / "docs" / "ops.md").write_text(f"```\n## No heading\n{TABLE}```\n")
    assert published.check(root)[0] == []
    (root / "docs" / "ops.md").write_text(f"A lone ` before it\n\n{TABLE}\nand ` after it\n")
    assert len(published.check(root)[0]) == 1


def test_the_front_page_ages(repository, monkeypatch):
    root, git = repository
    monkeypatch.setattr(published, "OLDEST", 1)
    assert published.check(root)[0] == []
    git("commit", "-q", "--allow-empty", "-m", "later")
    assert published.check(root)[0] == ["README.md: expected at most 1 commits behind HEAD, got 2"]


def test_a_shallow_clone_skips_the_history(repository):
    root, git = repository
    git("clone", "-q", "--depth", "1", f"file://{root}", "shallow")
    faults, ages = published.check(root / "shallow")
    assert faults == [] and "not checked" in ages[0]
