"""Rewards of online algorithms: the verifiers gsm8k and r1_zero, and functions from the user's own file.

Every reward is `def reward(prompts, completions, **columns) -> list[float | None]`, or `async def`: prompts
are strings or message lists, completions strings, columns the rows' other columns as lists (None: missing),
and completion_ids the completions' token ids. One entry per completion; None skips it.

What a model writes is hostile input. It is never evaluated; every search below takes time linear in its length; and what is read as
a number is short before any arithmetic begins.
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
from fractions import Fraction
from pathlib import Path

from data.errors import RunError, UserError, printable
from data.guard import Interrupted, TimedOut, guarded

IMPORT_SECONDS = 600.0                             # limit for the import of its file, which may load a model
GIVEN = ("prompts", "completions", "completion_ids")               # what a reward gets beside the columns
OF_TRL = ("trainer_state", "log_extra", "log_metric", "environments")      # what only TRL passes to it
AS_MESSAGE = re.compile("string indices must be integers|'str' object has no attribute '(get|content|role)'")
NO_MESSAGE = ("a completion is a string here, of a conversation too: write completion where a function for "
              "TRL has completion[0]['content'] (a prompt is a string or a list of messages, as in the data)")
GOLD = ("answer", "ground_truth", "solution")      # columns with the gold answer; the first one that a row has
DIGITS = 40                                        # longer numbers are no answers
ANSWER = 100                                       # characters; the same
LAST = re.compile(r"(?:(?<![\w)])-\$?)?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+")
NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:,[0-9]{3})*(?:\.[0-9]*)?|\.[0-9]+)")
FRACTION = re.compile(r"([+-]?[0-9]+)/([0-9]+)")
UNITS = re.compile(r"(?<![a-z])(?:degree|mm|cm|km|kg|kmh|mph|meter|mile|second|minute|hour|day|week|month|year|foot|feet|inch|yard"
                   r"|percent|apple)(?:es|s)?(?![a-z])")


# ---- the two verifiers ----

def gsm8k(prompts, completions, **columns):
    """1.0 where the last number of the completion is the gold answer's, else 0.0."""
    return [float(any(_same_last_number(completion, gold) for gold in golds))
            for completion, golds in zip(completions, _all_golds(columns, len(completions)))]


def _same_last_number(completion, gold):
    numbers = [_last_number(text) for text in (completion, gold)]
    return None not in numbers and numbers[0] == numbers[1]


def _last_number(text):
    found = None
    for match in LAST.finditer(text):
        found = match
    text = found[0].replace(",", "").replace("$", "") if found else ""
    return Fraction(text) if 0 < len(text) <= DIGITS else None


def r1_zero(prompts, completions, **columns):
    """1.0 where format and answer are right, else 0.0: `... </think> <answer> 18 </answer>`. A right format alone earns nothing."""
    return [r1_zero_details(completion, golds)["reward"]
            for completion, golds in zip(completions, _all_golds(columns, len(completions)))]


def r1_zero_details(completion, gold):
    """{"format": bool, "answer": bool, "reward": float} of one completion; `gold`: text, a number, or a list of which any will do.

    format: `</think>`, white space, `<answer>`, and somewhere `</answer>`; the prompt has opened <think>. answer: what follows the
    last `<answer>`, or its last \\boxed{}, is the gold number: 1,000 = 1000.00, $18 = 18% = x = 18 = 18 minutes = 18, 0.5 = 1/2; but
    no other words, and 36/2 is not 18. An answer that is no number must be the gold text. False without the format.
    """
    text = re.sub(r"</think>\s+<answer>", "</think> <answer>", completion)
    if "</think> <answer>" not in text or "</answer>" not in text:
        return {"format": False, "answer": False, "reward": 0.0}
    answer = text.rpartition("<answer>")[2].replace("</answer>", "")
    if "\\boxed" in answer:
        answer = _last_boxed(answer)
    right = answer is not None and any(_same_answer(answer, text) for text in gold_texts(gold))
    return {"format": True, "answer": right, "reward": float(right)}


def _last_boxed(text):
    """What is inside the last \\boxed{...}, or None if its braces do not close."""
    inside = text.rpartition("\\boxed")[2]
    depth = 0
    for i, character in enumerate(inside[:ANSWER + 2]):
        depth += (character == "{") - (character == "}")
        if not depth:
            return inside[1:i] if i else None
    return None


def _same_answer(answer, gold):
    answer, gold = _plain(answer), _plain(gold)
    left, right = _value(answer), _value(gold)
    if left is None or right is None:
        return answer == gold != ""
    if "/" in answer and "/" in gold:
        return answer == gold
    if "/" in answer or "/" in gold:                 # an integer must be written as one
        return left == right and left.denominator > 1
    return left == right


def _plain(text):
    """An answer without what may stand around its number; "" if it is too long to be one."""
    text = text.strip()
    if len(text) > ANSWER:
        return ""
    if match := re.fullmatch(r"\\(?:text|fbox)\{([^{}]*)\}", text):
        text = match[1]
    text = re.sub(r"\\text\{[^{}]*\}|\\?[$%]", "", text)
    text = re.sub(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}", r"\1/\2", text)
    text = "".join(UNITS.sub("", text).lower().split())
    name, _, value = text.partition("=")
    if value and "=" not in value and len(name) <= 2:
        text = value
    if text[:1] in ("(", "[") and text[-1] in (")", "]"):
        text = text[1:-1]
    return text.removesuffix(".")


def _value(text):
    """The Fraction that a plain answer is, or None."""
    if NUMBER.fullmatch(text):
        return Fraction(text.replace(",", ""))
    match = FRACTION.fullmatch(text)
    return Fraction(int(match[1]), int(match[2])) if match and int(match[2]) else None


# ---- gold answers ----

def gold_texts(gold):
    """A gold answer, or a list of them, as texts: what follows #### where it is there, else all of it."""
    texts = map(str, gold if isinstance(gold, list) else [] if gold is None else [gold])
    return [(re.search(r"####\s*(.*)", text) or ["", text])[1].strip() for text in texts]


def golds_of(row):
    """The gold answers (list of str) of a row, {column: value}; [] if it has none."""
    return gold_texts(next((row[name] for name in GOLD if row.get(name) is not None), None))


def _all_golds(columns, count):
    golds = [golds_of({name: columns[name][i] for name in GOLD if name in columns}) for i in range(count)]
    if not all(golds):
        raise _no_gold(columns, f"row {golds.index([])} of a batch")
    return golds


def _no_gold(columns, where):
    found = printable(", ".join(columns), keep="") or "none"
    return UserError(f"no gold answer in {where}, columns found: {found}; "
                     f"fix: give every row a column {', '.join(GOLD[:-1])} or {GOLD[-1]}, or use another reward")


def check_gold(rewards, examples):
    """Feed the gold answers of `examples` (of kind "prompts"), wrapped in each verifier's format, through it: UserError that lists
    the rows which do not score 1. A reward that no answer can earn would only look like a model that does not learn."""
    for reward in rewards:
        wrap = WRAPPED.get(reward.function)
        failed = []
        for example in examples if wrap else []:
            columns = example.extras["columns"]
            golds = golds_of(columns)
            if not golds:
                raise _no_gold(columns, example.where)
            if not all(reward.function([None], [wrap.format(gold)], answer=[gold]) == [1.0] for gold in golds):
                failed.append(f"{example.where} ({_shown(', '.join(golds))})")
        if failed:
            raise UserError(f"{reward.name} cannot verify the gold answers of {len(failed)} of {len(examples)} rows, in "
                            f"{', '.join(failed[:5])}{', ...' if len(failed) > 5 else ''}; fix: correct or remove these rows")


# ---- which rewards ----

@dataclass(frozen=True)
class Reward:
    name: str
    weight: float
    function: Callable | None      # None: the model in `path` scores
    path: str | None = None        # a reward model's directory
    file: str = ""                 # of a function of the user's


BUILT_IN = {"gsm8k": gsm8k, "r1_zero": r1_zero}
WRAPPED = {gsm8k: "#### {}", r1_zero: " So that is it. </think> <answer> {} </answer>"}


def parts_of(spec):
    """The names in a list of rewards, such as "r1_zero, runs/rm"."""
    return [part.strip() for part in spec.split(",")]


def is_model(part):
    """Whether such a name is the directory of a reward model."""
    return part not in BUILT_IN and bool(part) and Path(part).is_dir()


@functools.cache
def load_reward(spec, weights=None, where="reward"):
    """The rewards named in `spec`, separated by commas: gsm8k, r1_zero, path.py:function, or a reward model's directory.

    `weights`: as many numbers, separated by commas; None = all 1. `where`: the key, for errors. Raises UserError; a Python file
    is run to load it, once in a process.
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
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two rewards named {twice!r} in {where}; fix: rename one of them or name it once")
    return rewards


def _reward(part, weight, where):
    if part in BUILT_IN:
        return Reward(part, weight, BUILT_IN[part])
    path, colon, name = part.rpartition(":")
    if colon and path.endswith(".py"):
        return Reward(name, weight, _function(Path(path), name, where), file=path)
    if is_model(part):
        return Reward(Path(part).resolve().name, weight, None, part)
    near = difflib.get_close_matches(part, BUILT_IN, n=1)
    raise UserError(f"{part!r} in {where} is neither {', '.join(BUILT_IN)}, a Python function nor a directory; fix: write "
                    f"{near[0] if near else f'{part}:function' if part.endswith('.py') else 'path.py:function or the path of an rm run'}")


def _function(path, name, where):
    if not path.is_file():
        raise UserError(f"{path} in {where} does not exist; fix: correct the path of the reward's file")
    module = _module(path.resolve(), f"{path} in {where}")
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        near = difflib.get_close_matches(name, known, n=1) or known
        raise UserError(f"no function {name!r} in {path}, named in {where}; fix: {f'write {near[0]}' if near else 'define it there'}")
    if not _takes_columns(function):
        raise UserError(f"{name} in {path} does not take the data's columns; fix: def {name}(prompts, completions, **columns)")
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
    columns = dict.fromkeys(name for example in examples for name in example.extras["columns"])
    unknown = []
    for reward in filter(lambda reward: reward.file, rewards):
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
    """Of each reward one finite float, or None, per completion. `columns`: {name: list}; `timeout`: seconds
    for each call, limited on the main thread of Unix only. What `async def` functions return is awaited
    together, in the time of one call. Raises RunError, which names the reward, a prompt and its completion,
    if a function fails or returns something else."""
    columns = {name: values for name, values in columns.items() if name not in ("prompts", "completions")}
    outcomes = {}          # number of the reward: a list, an awaitable, or the exception that it raised
    for i, reward in enumerate(rewards):
        def call(reward=reward):
            return _as_list(_call(reward, prompts, completions, columns))
        outcomes[i] = _outcome(reward.name, timeout, call)
    waiting = {i: outcome for i, outcome in outcomes.items() if inspect.isawaitable(outcome)}
    if any(isinstance(outcome, BaseException) for outcome in outcomes.values()):
        for coroutine in filter(inspect.iscoroutine, waiting.values()):
            coroutine.close()      # nothing waits for it any more
    elif waiting:
        names, found = ", ".join(rewards[i].name for i in waiting), {}
        failure = _outcome(names, timeout, lambda: _await(waiting, found))
        unfinished = waiting.keys() - found.keys()
        if failure:      # where none is unfinished, one has swallowed it
            found |= dict.fromkeys(unfinished or waiting, failure)
        outcomes |= found
    for i, outcome in outcomes.items():
        if isinstance(outcome, BaseException):
            raise _failed(rewards[i], outcome, prompts, completions, columns, timeout)
    return [_numbers(rewards[i], outcome, prompts, completions) for i, outcome in outcomes.items()]


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
        in_time, left = found.copy(), asyncio.all_tasks(_loop)
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
    sample, failure = _culprit(reward, prompts, completions, columns, timeout), _failure(error)
    fix = NO_MESSAGE if AS_MESSAGE.search(failure) else "correct the function"
    return _fault(reward, f"raised {failure}", prompts[sample], completions[sample], fix)


def _numbers(reward, values, prompts, completions):
    """What a function returned, as floats or None; RunError where it is something else."""
    fix = "return one finite number, or None, per completion"
    if len(values) != len(completions):
        failure = f"returned {len(values)} values for {len(completions)} completions"
        raise _fault(reward, failure, prompts[0], completions[0], fix)
    numbers = [_number(value) for value in values]
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
