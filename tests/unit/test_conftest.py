"""What tests/conftest.py does to a test that is skipped."""

from types import SimpleNamespace

import pytest


def test_a_program_that_has_to_be_there(request, monkeypatch):
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
