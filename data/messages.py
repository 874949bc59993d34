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
NAMES = {role: role for role in ROLES} | {
    "developer": "system", "human": "user", "gpt": "assistant", "function_call": "assistant",
    "function": "tool", "observation": "tool", "function_response": "tool", "ipython": "tool"}
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
        turns = [element]
        if isinstance(element, dict) and {"human", "assistant"} & element.keys():      # question and answer
            flags = {key: element[key] for key in FLAGS if key in element}
            spoken = [name for name in ("system", "human", "assistant") if element.get(name) is not None]
            turns = [{"from": name, "value": element[name]} | flags for name in spoken]
        messages += [_message(turn, f"{column}[{i}]", where) for turn in turns]
    return messages


def messages_in(value, column, where):
    """Text that is nothing but messages as JSON -> them, not yet read; any other value as it is. UserError
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
    roles = [_role(element) for element in elements]
    return found if None not in roles and any(role in NAMES for role in roles) else value


def read_history(value, where):
    """Earlier turns [[question, answer], ...] (or null) -> messages."""
    messages = []
    for i, pair in enumerate(value or []) if isinstance(value, (list, type(None))) else [(0, value)]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise UserError(f"history[{i}] is not a pair [question, answer] in {where}; "
                            "fix: write the turns so, or use messages")
        messages += [{"role": role, "content": read_string(text, f"history[{i}]", where)}
                     for role, text in zip(("user", "assistant"), pair)]
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
    return [_tool(tool, f"tools[{i}]", where) for i, tool in enumerate(value)]


def unflagged(messages):
    """The same turns without their flag: what a template sees, and what two conversations are compared by."""
    return [{key: value for key, value in message.items() if key != "train"} for message in messages]


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
    said, content = message.get("role"), message.get("content")
    if said is None:
        said, content = message.get("from"), message.get("value")
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
    for key in ("tool_call_id", "name"):
        if message.get(key) not in (None, ""):
            turn[key] = read_string(message[key], f"{name}.{key}", where)
    if not _trained(message, name, where) and role == "assistant":
        turn["train"] = False
    return turn


def _text(content, name, where):
    if not isinstance(content, list):
        return read_string(content, name, where)
    kinds = [part.get("type") if isinstance(part, dict) else _kind(part) for part in content]
    others = [kind for kind in kinds if kind != "text"]
    if others:
        raise UserError(f"{name} has content parts other than text ({others[0]}) in {where}; "
                        "fix: leave such rows out, or use {\"type\": \"text\", \"text\": ...} parts only")
    return "".join(read_string(part.get("text"), name, where) for part in content)


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
    for key in FLAGS:
        flag = message.get(key)
        if flag is not None and (not isinstance(flag, (bool, int, float)) or flag not in (0, 1)):
            raise UserError(f"{key} of {name} is {flag!r}, neither true or false nor 0 or 1, in {where}; "
                            "fix: write 0 for a turn that is context only, 1 for one that is trained")
    return not any(message.get(key) == 0 for key in FLAGS)


# ---- tools ----

def _calls(message, name, where):
    """What `tool_calls`, or the older `function_call`, holds."""
    calls = _from_text(message.get("tool_calls"), f"{name}.tool_calls", where) or []
    old = _from_text(message.get("function_call"), f"{name}.function_call", where)
    if isinstance(old, dict) and all(value is None for value in old.values()):
        old = None                     # Parquet and the hub fill it in beside rows that have a call
    if calls and old:
        raise UserError(f"{name} has both tool_calls and function_call in {where}; fix: keep tool_calls")
    if old:
        calls = [old]
    if not isinstance(calls, list):
        calls = [calls]
    return [_call(call, f"{name}.tool_calls[{i}]", where) for i, call in enumerate(calls)]


def _call(call, name, where):
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
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
    calls = calls if isinstance(calls, list) and calls else [calls]
    calls = [_call(call, f"{name}[{i}]", where) for i, call in enumerate(calls)]
    return (thoughts + closing).strip(), calls


def _tool(tool, name, where):
    tool = _from_text(_unfilled(tool, where), name, where)
    function = tool.get("function") if isinstance(tool, dict) else None
    if isinstance(tool, dict) and function is None:
        function = {key: value for key, value in tool.items() if key not in ("type", "function")}
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f"{name} is not a tool in {where}; "
                        'fix: use {"type": "function", "function": {"name": ..., "parameters": ...}}')
    read_string(json.dumps(function, ensure_ascii=False), name, where)
    return {"type": "function", "function": function}


def _unfilled(value, where):
    """Rows of Parquet files and of the hub have every field that any row has, as null: without these."""
    if not FILLED.search(where):
        return value
    if isinstance(value, dict):
        return {key: _unfilled(part, where) for key, part in value.items() if part is not None}
    return [_unfilled(part, where) for part in value] if isinstance(value, list) else value


# ---- JSON text ----

def _from_text(value, name, where):
    """What JSON text holds, None of blank text; any other value as it is."""
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
