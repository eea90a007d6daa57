"""How many examples hypothesis tries: the same ones in every `make test`, others in `make properties`."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings

#: Of the tests in this folder, which try equally many examples.
TESTS = 5

#: Not Phase.explain, which traces every line of what fails: minutes for a model.
_PHASES = (Phase.explicit, Phase.generate, Phase.shrink)
settings.register_profile(
    "test",
    max_examples=500 // TESTS,
    derandomize=True,
    deadline=None,
    phases=_PHASES,
    database=None,
    print_blob=True,
)
settings.register_profile(
    "properties",
    settings.get_profile("test"),
    max_examples=10_000 // TESTS,
    derandomize=False,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("test")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For docs/reliability.md: how many cases a test is."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.user_properties.append(("cases", settings.default.max_examples))
