"""`python -m pytest tests/test_resume.py --algorithm NAME` tests one file of algorithms/, also your own."""


def pytest_addoption(parser):
    what = "the name of a file in algorithms/: test that its runs resume exactly"
    parser.addoption("--algorithm", help=what)


def pytest_generate_tests(metafunc):
    if "chosen_algorithm" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--algorithm")
        metafunc.parametrize("chosen_algorithm", [chosen] if chosen else [])


def pytest_collection_modifyitems(config, items):
    """With --algorithm only the tests that take one run."""
    if config.getoption("--algorithm"):
        chosen = [item for item in items if "chosen_algorithm" in item.fixturenames]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen
