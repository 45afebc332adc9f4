"""tests/conftest.py: a skipped test fails where its program is required."""

from types import SimpleNamespace

import pytest


def test_a_missing_required_program_is_a_failure(request, monkeypatch):
    plugins = request.config.pluginmanager.get_plugins()
    (conftest,) = (plugin for plugin in plugins if hasattr(plugin, "REQUIRED"))
    monkeypatch.setattr(conftest, "REQUIRED", ("nginx", "postgresql"))

    def outcome(reason):
        report = SimpleNamespace(skipped=True, outcome="skipped", longrepr=("test.py", 1, reason))
        hook = conftest.pytest_runtest_makereport(None, None)
        next(hook)
        with pytest.raises(StopIteration) as done:
            hook.send(report)
        assert done.value.value is report
        return report.outcome

    assert outcome("Skipped: expected nginx (Debian: nginx), not found") == "failed"
    assert outcome("Skipped: expected a browser (Debian: chromium), found none") == "skipped"
    assert outcome("Skipped: expected a GPU") == "skipped"
