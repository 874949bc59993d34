"""Messages of any accepted notation -> turns in one. A mistake is a UserError that names file and line.

A turn is {"role", "content": str} and, where its message has them,
    reasoning_content   str: the thoughts before the answer
    tool_calls          [{"type": "function", "function": {"name": str, "arguments": dict}}, ...]; some
                        with "id"
    tool_call_id, name  str
    train               False: an assistant's turn that is context only
Notations: OpenAI's (role, content), ShareGPT's as LLaMA-Factory reads it (from, value; function_call,
observation), and [{"human", "assistant"}, ...]. `weight` is mistral-finetune's and OpenAI's flag, `train`
axolotl's, `loss` ms-swift's.
"""
import json
import re

from data.errors import UserError
from data.files import kind_of, read_json

ROLES = ("system", "user", "assistant", "tool")
NAMES = {
    **dict(zip(ROLES, ROLES)),
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "ipython": "tool",
}
THOUGHTS = ("reasoning_content", "reasoning", "thinking")      # names of what precedes a reply
FLAGS = ("weight", "train", "loss")
CONTENTS = {"content", "value", "tool_calls", "function_call"}
FILLED = re.compile(r":row \d+$|:[^:]+:\d+$")      # `where` of a row in a Parquet file, or of the hub
UNREAD = ("train_detail", "loss_scale")      # they train a part of a turn, or weigh it
MARKED_OFF = "no assistant turn to train: all are marked weight 0, train false or loss false"
# messages as Python prints them: their beginning, and somewhere a role
PRINTED = re.compile(r"\s*\[\s*\{\s*'(role|content|from|value)'\s*:")
PRINTED_ROLE = re.compile(rf"'(role|from)'\s*:\s*'({'|'.join(NAMES)})'")


def read_messages(value, column, where):
    """A message, a list of them, or either as JSON text -> turns (see above), not empty."""
    value = _from_text(value, repr(column), where)
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list):
        raise UserError(f"{column!r} is neither text nor a list of messages in {where}; "
                        f"fix: use [{{\"role\": ..., \"content\": ...}}, ...]")
    if not value:
        raise UserError(f"{column!r} is an empty list of messages in {where}; "
                        "fix: add messages or delete the row")
    messages = []
    for i, element in enumerate(value):
        name = f"{column}[{i}]"
        if isinstance(element, dict) and ("human" in element or "assistant" in element):
            for turn in _question_and_answer(element):
                messages.append(_message(turn, name, where))
        else:
            messages.append(_message(element, name, where))
    return messages


def _question_and_answer(element):
    """The messages of {"human": ..., "assistant": ...}, each with the flags."""
    flags = {key: element[key] for key in FLAGS if key in element}
    turns = []
    for name in "system", "human", "assistant":
        if element.get(name) is not None:
            turns.append({"from": name, "value": element[name]} | flags)
    return turns


def messages_in(value, column, where):
    """Text that is nothing but messages as JSON -> them, not yet read; any other value unchanged. UserError
    where it is messages as Python prints them: such text is not meant to be trained as it stands."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    if PRINTED.match(value) and value.rstrip().endswith("]") and PRINTED_ROLE.search(value):
        raise _not_json(repr(column), where)
    try:
        found = read_json(value)
    except (ValueError, RecursionError):
        return value
    elements = found if isinstance(found, list) else [found]
    roles = set(map(_role, elements))
    return value if None in roles or roles.isdisjoint(NAMES) else found


def read_history(value, where):
    """Earlier turns [[question, answer], ...] (or null) -> messages."""
    if value is None:
        return []
    pairs = value if isinstance(value, list) else [value]
    messages = []
    for i, pair in enumerate(pairs):
        name = f"history[{i}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise UserError(f"{name} is not a pair [question, answer] in {where}; "
                            "fix: write the turns so, or use messages")
        for role, text in zip(("user", "assistant"), pair):
            messages.append({"role": role, "content": read_string(text, name, where)})
    return messages


def read_tools(value, where):
    """The `tools` column, a list, perhaps as JSON text -> [{"type": "function", "function": {...}}] or
    None."""
    value = _from_text(value, "'tools'", where)
    if value in (None, []):
        return None
    if not isinstance(value, list):
        raise UserError(f"'tools' is {_kind(value)}, not a list, in {where}; "
                        'fix: use [{"type": "function", "function": {"name": ..., "parameters": ...}}, ...]')
    tools = []
    for i, tool in enumerate(value):
        tools.append(_tool(tool, f"tools[{i}]", where))
    return tools


def unflagged(messages):
    """The same turns without their flag: what a template sees, and what two conversations are compared by."""
    turns = []
    for message in messages:
        turn = dict(message)
        turn.pop("train", None)
        turns.append(turn)
    return turns


def says_nothing(message):
    """Whether a turn is blank and calls no tool."""
    return not message["content"].strip() and not message.get("tool_calls")


def read_string(value, name, where):
    """`value` if it is text that UTF-8 can hold."""
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise UserError(f"the content of {name} is {kind}, not text, in {where}; fix: write it as a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{name} has half of a Unicode surrogate pair (\\udXXX) in {where}; "
                        "fix: correct or delete that character") from None
    return value


# ---- one message ----

def _message(message, name, where):
    if not isinstance(message, dict):
        raise UserError(f"{name} is not a message in {where}; fix: use {{\"role\": ..., \"content\": ...}}")
    said = message.get("role")
    content = message.get("content")
    if said is None:
        said = message.get("from")
        content = message.get("value")
    role = NAMES.get(said) if isinstance(said, str) else None
    if role is None:
        raise UserError(f"unknown role {said!r} of {name} in {where}; fix: use one of {', '.join(NAMES)}")
    if len(message) == 2 and said != "function_call":      # nothing but role and content, as most are
        return {"role": role, "content": _text(content, name, where)}
    for key in UNREAD:
        if message.get(key) not in (None, []):
            raise UserError(f"{name} has {key!r}, which is not read, in {where}; "
                            "fix: remove it; \"train\": false keeps a whole turn from being trained")
    calls = _calls(message, name, where)
    if said == "function_call":
        content, calls = _written_call(content, name, where)
    content = "" if content is None and calls else _text(content, name, where)
    turn = {"role": role, "content": content}
    if thoughts := _thoughts(message, name, where):
        turn["reasoning_content"] = thoughts
    if calls:
        turn["tool_calls"] = calls
    if role != "assistant" and len(turn) > 2:
        raise UserError(f"{name} has thoughts or tool calls, but it is a turn of role {role}, in {where}; "
                        "fix: only an assistant's turn has them")
    for key in "tool_call_id", "name":
        if message.get(key) not in (None, ""):
            turn[key] = read_string(message[key], f"{name}.{key}", where)
    if not _trained(message, name, where) and role == "assistant":
        turn["train"] = False
    return turn


def _text(content, name, where):
    if not isinstance(content, list):
        return read_string(content, name, where)
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else _kind(part)
        if kind != "text":
            raise UserError(f"{name} has content parts other than text ({kind}) in {where}; "
                            "fix: leave such rows out, or use {\"type\": \"text\", \"text\": ...} parts only")
    texts = [read_string(part.get("text"), name, where) for part in content]
    return "".join(texts)


def _thoughts(message, name, where):
    found = {}
    for key in THOUGHTS:
        if message.get(key) not in (None, ""):
            found[key] = read_string(message[key], f"{name}.{key}", where)
    if len(set(found.values())) > 1:
        raise UserError(f"{name} has different thoughts in {' and '.join(found)} in {where}; "
                        "fix: keep one of them")
    return next(iter(found.values()), None)


def _trained(message, name, where):
    """False where one of the flags says so."""
    flags = []
    for key in FLAGS:
        flag = message.get(key)
        if flag is None:
            continue
        if not isinstance(flag, (bool, int, float)) or flag not in (0, 1):
            raise UserError(f"{key} of {name} is {flag!r}, neither true or false nor 0 or 1, in {where}; "
                            "fix: write 0 for a turn that is context only, 1 for one that is trained")
        flags.append(flag)
    return 0 not in flags


# ---- tools ----

def _calls(message, name, where):
    """What `tool_calls`, or the older `function_call`, holds."""
    calls = _from_text(message.get("tool_calls"), f"{name}.tool_calls", where) or []
    old = _from_text(message.get("function_call"), f"{name}.function_call", where)
    if isinstance(old, dict) and set(map(type, old.values())) <= {type(None)}:
        old = None                     # Parquet and the hub fill it in beside rows that have a call
    if calls and old:
        raise UserError(f"{name} has both tool_calls and function_call in {where}; fix: keep tool_calls")
    if old:
        calls = [old]
    return _list_of_calls(calls, f"{name}.tool_calls", where)


def _list_of_calls(calls, name, where):
    """A call or a list of calls -> a list of calls, as they are kept in a turn."""
    if not isinstance(calls, list):
        calls = [calls]
    found = []
    for i, call in enumerate(calls):
        found.append(_call(call, f"{name}[{i}]", where))
    return found


def _call(call, name, where):
    function = call.get("function", call) if isinstance(call, dict) else None
    if not _has_name(function) or not function["name"]:
        raise UserError(f"{name} is not a tool call in {where}; "
                        'fix: use {"type": "function", "function": {"name": ..., "arguments": {...}}}')
    arguments = _unfilled(function.get("arguments"), where)
    arguments = _from_text(arguments, f"{name}.arguments", where)
    if not isinstance(arguments, (dict, type(None))):
        raise UserError(f"the arguments of {name} are {_kind(arguments)}, not an object, in {where}; "
                        'fix: write {"arguments": {"name": value, ...}}')
    _check_names(function["name"], arguments, name, where)
    found = {"type": "function", "function": {"name": function["name"], "arguments": arguments or {}}}
    if call.get("id") not in (None, ""):
        found["id"] = read_string(call["id"], f"{name}.id", where)
    return found


def _check_names(function, arguments, name, where):
    read_string(function, f"the name in {name}", where)
    read_string(json.dumps(arguments, ensure_ascii=False), f"arguments of {name}", where)


def _written_call(content, name, where):
    """ShareGPT's `function_call` turn, JSON of one call or of several, perhaps after thoughts
    -> (content, calls)."""
    text = read_string(content, name, where)
    thoughts, closing, written = text.rpartition("</think>")
    calls = _from_text(written, name, where)
    calls = _list_of_calls(calls or [calls], name, where)
    return (thoughts + closing).strip(), calls


def _tool(tool, name, where):
    tool = _from_text(_unfilled(tool, where), name, where)
    function = tool.get("function") if isinstance(tool, dict) else None
    if isinstance(tool, dict) and function is None:
        function = dict(tool)
        function.pop("type", None)
        function.pop("function", None)
    if not _has_name(function):
        raise UserError(f"{name} is not a tool in {where}; "
                        'fix: use {"type": "function", "function": {"name": ..., "parameters": ...}}')
    read_string(json.dumps(function, ensure_ascii=False), name, where)
    return {"type": "function", "function": function}


def _has_name(function):
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _unfilled(value, where):
    """Rows of Parquet files and of the hub have every field that any row has, as null: without these."""
    if not FILLED.search(where):
        return value
    if isinstance(value, list):
        return [_unfilled(part, where) for part in value]
    if not isinstance(value, dict):
        return value
    filled = {}
    for key, part in value.items():
        if part is not None:
            filled[key] = _unfilled(part, where)
    return filled


# ---- JSON text ----

def _from_text(value, name, where):
    """The value of JSON text, None for blank text; any other value unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return read_json(value) if value.strip() else None
    except (ValueError, RecursionError):
        raise _not_json(name, where) from None


def _not_json(name, where):
    return UserError(f"{name} is text, but not JSON, in {where}; "
                     "fix: write it as JSON, as Python's json.dumps does")


def _kind(value):
    return "an object" if isinstance(value, dict) else kind_of(value)


def _role(element):
    """The role that a message names; None where it is no message."""
    if not isinstance(element, dict) or not CONTENTS & element.keys():
        return None
    said = element.get("role") or element.get("from")
    return said if isinstance(said, str) else None
