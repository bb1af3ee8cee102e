"""`pytest benchmarks --smoke` runs every benchmark at its smallest, without asserting speed."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--smoke", action="store_true", help="run every benchmark at its smallest")


@pytest.fixture
def smoke(request: pytest.FixtureRequest) -> None:
    """Skips without `--smoke`: timings while other tests run would say nothing."""
    if not request.config.getoption("--smoke"):
        pytest.skip("benchmarks are run by hand, or at their smallest with --smoke")
