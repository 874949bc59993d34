"""Rewards of online algorithms: verifiers, functions from the user's own file, and reward models.

Every reward is `def reward(prompts, completions, **columns) -> list[float | None]`, or `async def`: prompts
are strings or message lists, completions strings, columns the rows' other columns as lists (None: missing),
and completion_ids the completions' token ids. One entry per completion; None skips it.
"""
import asyncio
import difflib
import functools
import hashlib
import importlib.util
import inspect
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data.errors import RunError, UserError, printable
from data.hub import NAME
from model.modelscope import PREFIX
from rewards.guard import Interrupted, TimedOut, guarded
from rewards.verifiers import golds_of, gsm8k, math_answer, no_gold, r1_zero

# owner/name, neither a run nor a file
ON_HUB = re.compile(f"(?!runs/)({PREFIX})?{NAME}/{NAME}(?<!\\.py)")
IMPORT_SECONDS = 600.0                             # limit for the import of its file, which may load a model
GIVEN = ("prompts", "completions", "completion_ids")               # what a reward gets beside the columns
OF_TRL = ("trainer_state", "log_extra", "log_metric", "environments")      # what only TRL passes to it
AS_MESSAGE = re.compile("string indices must be integers|'str' object has no attribute '(get|content|role)'")
NO_MESSAGE = ("a completion is a string here, of a conversation too: write completion where a function for "
              "TRL has completion[0]['content'] (a prompt is a string or a list of messages, as in the data)")


# ---- before the start ----

def check_rewards(config, examples):
    """UserError where the rewards that an online configuration names could score none of the `examples` (of
    kind "prompts")."""
    rewards = load_reward(config.reward, config.reward_weights)
    check_arguments(rewards, examples)
    check_gold(rewards, examples)


def check_gold(rewards, examples):
    """Feed the gold answers of `examples` (of kind "prompts"), wrapped in each verifier's format, through it:
    UserError that lists the rows which do not score 1. A reward that is 0 for every answer would only look
    like a model that does not learn."""
    for reward in rewards:
        if reward.function not in WRAPPED:
            continue
        failed = []
        for example in examples:
            columns = example.extras["columns"]
            golds = golds_of(columns)
            if not golds:
                raise no_gold(columns, example.where)
            if not _verifies(reward.function, golds):
                failed.append(f"{example.where} ({_shown(', '.join(golds))})")
        if failed:
            shown = ", ".join(failed[:5]) + (", ..." if len(failed) > 5 else "")
            other = "" if reward.function is math_answer else ", or take reward=math, which reads formulas"
            raise UserError(f"{reward.name} cannot verify the gold answers of "
                            f"{len(failed)} of {len(examples)} rows, in {shown}; "
                            f"fix: correct or remove these rows{other}")


def _verifies(verifier, golds):
    """Whether each gold answer of a row, in the verifier's format, scores 1."""
    for gold in golds:
        completion = WRAPPED[verifier].format(gold)
        if verifier([None], [completion], answer=[gold]) != [1.0]:
            return False
    return True


# ---- which rewards ----

@dataclass(frozen=True)
class Reward:
    name: str
    weight: float
    function: Callable | None      # None: the model in `path` scores
    path: str | None = None        # a reward model's directory or hub name
    file: str = ""                 # where the function is the user's: its file


BUILT_IN = {"gsm8k": gsm8k, "r1_zero": r1_zero, "math": math_answer}
WRAPPED = {
    gsm8k: "#### {}",
    r1_zero: " So that is it. </think> <answer> {} </answer>",
    math_answer: "\\boxed{{{}}}",
}
PACKAGES = {"math": "math-verify"}                 # optional ones


def parts_of(spec):
    """The names in a list of rewards, such as "r1_zero, runs/rm"."""
    return [part.strip() for part in spec.split(",")]


def is_model(part):
    """Whether such a name is the directory of a reward model, or the hub name of one."""
    if part in BUILT_IN or not part:
        return False
    return Path(part).is_dir() or bool(ON_HUB.fullmatch(part)) and not Path(part).exists()


@functools.cache
def load_reward(spec, weights=None, where="reward"):
    """The rewards named in `spec`, separated by commas: gsm8k, r1_zero, math, path.py:function, or a reward
    model's directory or hub name.

    `weights`: as many numbers, separated by commas; None = all 1. `where`: the key, for errors. Raises
    UserError; a Python file is run to load it, once in a process.
    """
    parts = parts_of(spec)
    try:
        numbers = [float(number) for number in weights.split(",")] if weights else [1.0] * len(parts)
    except ValueError:
        numbers = [math.nan]
    if len(numbers) != len(parts) or not all(map(math.isfinite, numbers)):
        raise UserError(f"reward_weights is {weights!r} for {len(parts)} rewards; "
                        "fix: give one number for each, separated by commas, such as 1,0.5")
    rewards = [_reward(part, weight, where) for part, weight in zip(parts, numbers)]
    names = [reward.name for reward in rewards]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two rewards named {name!r} in {where}; fix: rename one of them or name it once")
    return rewards


def _reward(part, weight, where):
    if part in BUILT_IN:
        package = PACKAGES.get(part)
        if package and not importlib.util.find_spec(package.replace("-", "_")):
            raise UserError(f"{part} in {where} needs the package {package}; fix: pip install {package}")
        return Reward(part, weight, BUILT_IN[part])
    path, colon, name = part.rpartition(":")
    if colon and path.endswith(".py"):
        return Reward(name, weight, _function(Path(path), name, where), file=path)
    if is_model(part):
        return Reward(Path(part).resolve().name, weight, None, part)
    near = difflib.get_close_matches(part, BUILT_IN, n=1)
    form = f"{part}:function" if part.endswith(".py") else "path.py:function or the path of an rm run"
    known = ", ".join(BUILT_IN)
    raise UserError(f"{part!r} in {where} is neither {known}, a Python function nor a directory; "
                    f"fix: write {near[0] if near else form}")


def _function(path, name, where):
    if not path.is_file():
        raise UserError(f"{path} in {where} does not exist; fix: correct the path of the reward's file")
    module = _module(path.resolve(), f"{path} in {where}")
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        near = difflib.get_close_matches(name, known, n=1) or known
        fix = f"write {near[0]}" if near else "define it there"
        raise UserError(f"no function {name!r} in {path}, named in {where}; fix: {fix}")
    if not _takes_columns(function):
        raise UserError(f"{name} in {path} does not take the data's columns; "
                        f"fix: def {name}(prompts, completions, **columns)")
    return function


@functools.cache
def _module(path, called):
    """The module of a file, which is run once and can import the modules beside it. `called` is its name in
    errors."""
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))      # last, so that no module of ours is hidden
    spec = importlib.util.spec_from_file_location(_module_name(path), path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module            # dataclasses look their module up
    try:
        with guarded(IMPORT_SECONDS, f"the import of {called}"):
            spec.loader.exec_module(module)
    except Interrupted:
        raise
    except BaseException as error:  # noqa: BLE001  the user's code
        late = isinstance(error, TimedOut)
        failure = f"its import took longer than {IMPORT_SECONDS:g} s" if late else _failure(error)
        raise UserError(f"{called} cannot be loaded ({failure}); fix: correct that file") from error
    return module


def _module_name(path):
    """The name by which a process that was not forked can import the file; another name where that one is
    taken."""
    name = path.stem
    if name.isidentifier() and name not in sys.modules:
        found = importlib.util.find_spec(name)
        if found and found.origin == str(path):
            return name
    # no dots: pickle would look for a package. A forked process finds the module by this name, too
    return f"reward_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"


def _takes_columns(function):
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):            # functions in C may have no signature
        return False
    kinds = [parameter.kind for parameter in parameters]
    return inspect.Parameter.VAR_KEYWORD in kinds and inspect.Parameter.POSITIONAL_ONLY not in kinds


def check_arguments(rewards, examples):
    """UserError that names all arguments of the user's functions that no call here has: those without a
    default that are neither in GIVEN nor a column of the `examples` (of kind "prompts"), and those of
    TRL's."""
    columns = {}
    for example in examples:
        columns |= example.extras["columns"]
    unknown = []
    for reward in rewards:
        if not reward.file:
            continue
        of_trl = inspect.signature(reward.function).parameters.keys() & {*OF_TRL}
        asked = (_required(reward.function) | of_trl) - {*GIVEN, *columns}
        if asked:
            unknown.append(f"{reward.name} takes {', '.join(sorted(asked))}")
    if unknown:
        found = printable(", ".join([*GIVEN, *columns]), keep="")
        raise UserError(f"reward {' and '.join(unknown)}, but gets {found}; fix: remove the others from its "
                        "arguments (TRL's trainer_state and log functions do not exist here), or add such "
                        "columns to the data")


def _required(function):
    """The names of the arguments without which it cannot be called."""
    names, optional = set(), (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.default is parameter.empty and parameter.kind not in optional:
            names.add(name)
    return names


# ---- calling them ----

def score(reward, prompts, completions, columns, timeout=60.0):
    """One finite float, or None, per completion: see `score_all`."""
    values, = score_all([reward], prompts, completions, columns, timeout)
    return values


def score_all(rewards, prompts, completions, columns, timeout=60.0):
    """For each reward a list of one finite float, or None, per completion. `columns`: {name: list};
    `timeout`: seconds for each call, limited on the main thread of Unix only. What `async def` functions
    return is awaited together, in the time of one call. Raises RunError, which names the reward, a prompt and
    its completion, if a function fails or returns something else."""
    columns = dict(columns)
    columns.pop("prompts", None)
    columns.pop("completions", None)
    outcomes = {}          # number of the reward: a list, an awaitable, or the exception that it raised
    for i, reward in enumerate(rewards):
        def call(reward=reward):
            return _as_list(_call(reward, prompts, completions, columns))
        outcomes[i] = _outcome(reward.name, timeout, call)
    waiting, has_failed = {}, False
    for i, outcome in outcomes.items():
        has_failed = has_failed or isinstance(outcome, BaseException)
        if inspect.isawaitable(outcome):
            waiting[i] = outcome
    if has_failed:
        for coroutine in filter(inspect.iscoroutine, waiting.values()):
            coroutine.close()      # nothing waits for it any more
    elif waiting:
        names = ", ".join([rewards[i].name for i in waiting])
        found = {}
        failure = _outcome(names, timeout, lambda: _await(waiting, found))
        unfinished = waiting.keys() - found.keys()
        if failure:      # where none is unfinished, one has swallowed it
            found |= dict.fromkeys(unfinished or waiting, failure)
        outcomes |= found
    for reward, outcome in zip(rewards, outcomes.values()):
        if isinstance(outcome, BaseException):
            raise _failed(reward, outcome, prompts, completions, columns, timeout)
    scores = []
    for reward, outcome in zip(rewards, outcomes.values()):
        scores.append(_numbers(reward, outcome, prompts, completions))
    return scores


def _outcome(names, timeout, call):
    """What `call()`, the user's code, returns or raises."""
    try:
        with guarded(timeout, f"reward {names}"):
            return call()
    except (UserError, Interrupted):
        raise
    except BaseException as error:  # noqa: BLE001  the user's code
        return error


def _call(reward, prompts, completions, columns):
    """What the function returns. A column that it must have, and that no row of this batch has, is None."""
    lacking = _required(reward.function) - columns.keys() - {"prompts", "completions"}
    columns = columns | dict.fromkeys(lacking, [None] * len(completions))
    return reward.function(prompts=list(prompts), completions=list(completions), **columns)


def _as_list(values):
    if inspect.isawaitable(values):
        return values
    if isinstance(values, (str, dict)) or not hasattr(values, "__iter__"):
        raise TypeError(f"the function returned {type(values).__name__}, not a list")
    return list(values)


_loop = None      # one for all calls: a client that a module holds belongs to the event loop of its first use


def _await(awaitables, found):
    """Await all of {number: awaitable} together; `found[number]` becomes what that returns as a list, or
    raises."""
    global _loop

    async def one(i, awaitable):
        try:
            found[i] = _as_list(await awaitable)
        except (Exception, SystemExit) as error:  # noqa: BLE001  the user's code
            found[i] = error

    async def all_of_them():
        await asyncio.gather(*(one(*pair) for pair in awaitables.items()))

    if _loop is None or _loop.is_closed():
        _loop = asyncio.new_event_loop()
    try:
        _loop.run_until_complete(all_of_them())
    except BaseException:      # its time is over, or the run's
        in_time = found.copy()
        left = asyncio.all_tasks(_loop)
        for task in left:
            task.cancel()
        if left:
            _loop.run_until_complete(asyncio.wait(left, timeout=1))
        found.clear()
        found.update(in_time)
        raise


def _failed(reward, error, prompts, completions, columns, timeout):
    """The RunError for what a function raised."""
    if isinstance(error, TimedOut):
        failure = f"took longer than {timeout:g} s for {len(completions)} completions"
        return _fault(reward, failure, prompts[0], completions[0], "make it faster, or raise reward_timeout")
    sample = _culprit(reward, prompts, completions, columns, timeout)
    failure = _failure(error)
    fix = NO_MESSAGE if AS_MESSAGE.search(failure) else "correct the function"
    return _fault(reward, f"raised {failure}", prompts[sample], completions[sample], fix)


def _numbers(reward, values, prompts, completions):
    """What a function returned, as floats or None; RunError where it is something else."""
    fix = "return one finite number, or None, per completion"
    if len(values) != len(completions):
        failure = f"returned {len(values)} values for {len(completions)} completions"
        raise _fault(reward, failure, prompts[0], completions[0], fix)
    numbers = list(map(_number, values))
    for number, prompt, completion in zip(numbers, prompts, completions):
        if isinstance(number, str):
            raise _fault(reward, f"returned {number}", prompt, completion, fix)
    return numbers


def _fault(reward, failure, prompt, completion, fix):
    prompt = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    shown = f"prompt {_shown(prompt)}, completion {_shown(completion)}"
    return RunError(f"reward {reward.name} {failure}, {shown}; fix: {fix}")


def _number(value):
    """The value as a finite float, None, or (str) what is wrong with it."""
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, (str, bytes)) else float(value)
    except Exception:  # noqa: BLE001  the value may be of a class of the user's
        number = math.nan
    return number if math.isfinite(number) else _shown(value)


def _culprit(reward, prompts, completions, columns, timeout):
    """Number of the first sample that fails on its own; 0 if none does."""
    try:
        with guarded(timeout, f"reward {reward.name}"):
            for i in range(len(completions)):
                one = {name: values[i:i + 1] for name, values in columns.items()}
                try:
                    values = _as_list(_call(reward, prompts[i:i + 1], completions[i:i + 1], one))
                    if inspect.isawaitable(values):
                        _as_list(_loop.run_until_complete(values))
                except (TimedOut, Interrupted):
                    raise
                except BaseException:  # noqa: BLE001
                    return i
    except TimedOut:
        pass
    return 0


def _failure(error):
    text = " ".join(_text(str, error)[:400].split())
    name = type(error).__name__
    return printable(f"{name}: {text[:200]}" if text else name, keep="")


def _shown(value):
    """On one line, shortened, without control characters."""
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...")
    return printable(" ".join(_text(repr, value)[:400].split())[:60], keep="")


def _text(function, value):
    """`function`, str or repr, of a value of the user's, whose own methods may fail."""
    try:
        return function(value)
    except Exception:  # noqa: BLE001
        return f"(a {type(value).__name__})"
