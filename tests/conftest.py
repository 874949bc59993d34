"""`python -m pytest tests/test_resume.py --algorithm NAME` tests one file of algorithms/, also your own;
`python -m pytest -m quick` runs the files that take seconds."""
import gc
import os

# pytest's two processes fill two cores: the programs that tests start get one thread each, as the models in
# them are too small for more. Two threads made the CPU time of benchmark/gpu.py 80 s instead of 15.
os.environ.setdefault("OMP_NUM_THREADS", "1")

QUICK = ("losses", "online_losses", "pack", "divergence", "entropy", "verifiers", "reading", "advice")
# they begin first, in this order, so that at the end no process works alone on a long file
LONG = ("distributed", "learns", "mutations", "families", "hub", "resume", "trl_parity", "store", "grid",
        "engine_exact", "contract", "gpu_benchmark", "table", "install")


def pytest_configure(config):
    config.addinivalue_line("markers", "quick: the tests of the files that take seconds")


def pytest_addoption(parser):
    what = "the name of a file in algorithms/: test that its runs resume exactly"
    parser.addoption("--algorithm", help=what)


def pytest_ignore_collect(collection_path, config):
    """With -m quick the other files are not even imported: that alone takes longer than the quick tests."""
    if config.option.markexpr == "quick" and collection_path.suffix == ".py":
        return collection_path.stem.removeprefix("test_") not in QUICK or None
    return None


def pytest_generate_tests(metafunc):
    if "chosen_algorithm" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--algorithm")
        metafunc.parametrize("chosen_algorithm", [chosen] if chosen else [])


def name_of(item):
    """The part of the file's name that is its own."""
    return item.path.stem.removeprefix("test_")


def place(item):
    """Of a test's file: the long ones in their order, then all others, the quick ones last."""
    name = name_of(item)
    if name in LONG:
        return LONG.index(name)
    return len(LONG) + (name in QUICK)


def pytest_collection_modifyitems(config, items):
    """With --algorithm only the tests that take one run. Those of the quick files get their mark."""
    items.sort(key=place)
    for item in items:
        if name_of(item) in QUICK:
            item.add_marker("quick")
    if config.getoption("--algorithm"):
        chosen = [item for item in items if "chosen_algorithm" in item.fixturenames]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen


def pytest_collection_finish(session):
    """What is there before the first test, the libraries above all, is no garbage: no collection reads it
    again. Every run with a reference makes one."""
    gc.freeze()
