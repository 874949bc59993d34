"""A save in a thread of its own, while the training goes on.

There is one at a time. All ranks start it together, and it ends on all of them with the same result: it has a
group of processes for itself, and asks nothing of the main threads, so that it ends even where these fail.
"""
import threading

thread: threading.Thread | None = None
fault: BaseException | None = None


def start(function, *arguments) -> None:
    """Call `function(*arguments)` in the background, once what was started before has ended."""
    global thread
    wait()
    thread = threading.Thread(target=run, args=(function, *arguments))
    thread.start()


def run(function, *arguments) -> None:
    global fault
    try:
        function(*arguments)
    except BaseException as error:  # noqa: BLE001  `wait` raises it
        fault = error


def join() -> None:
    """Wait until nothing runs in the background."""
    if thread:
        thread.join()


def wait() -> None:
    """`join`, and raise what was raised there."""
    global thread, fault
    join()
    raised, thread, fault = fault, None, None
    if raised:
        raise raised
