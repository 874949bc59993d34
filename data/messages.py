"""Messages of any accepted notation -> [{"role", "content": str}, ...]; every mistake is a UserError that names the file and line."""
from data.errors import UserError

ROLES = ("system", "user", "assistant", "tool")
FROM = {"human": "user", "gpt": "assistant"} | {role: role for role in ROLES}  # ShareGPT's names


def read_messages(value, column, where):
    """A message or a list of them, with role/content, from/value or human/assistant -> [{"role", "content": str}, ...], not empty."""
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list):
        raise UserError(f"{column!r} is neither text nor a list of messages in {where}; "
                        f"fix: use [{{\"role\": ..., \"content\": ...}}, ...]")
    if not value:
        raise UserError(f"{column!r} is an empty list of messages in {where}; fix: add messages or delete the row")
    messages = []
    for i, element in enumerate(value):
        turns = [element]
        if isinstance(element, dict) and {"human", "assistant"} & element.keys():  # one question and its answer
            turns = [{"from": FROM[speaker], "value": element[speaker]} for speaker in ("system", "human", "assistant")
                     if element.get(speaker) is not None]
        messages += [_message(turn, f"{column}[{i}]", where) for turn in turns]
    return messages


def read_history(value, where):
    """Earlier turns [[question, answer], ...] (or null) -> messages."""
    messages = []
    for i, pair in enumerate(value or []) if isinstance(value, (list, type(None))) else [(0, value)]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise UserError(f"history[{i}] is not a pair [question, answer] in {where}; fix: write the turns so, or use messages")
        messages += [{"role": role, "content": read_string(text, f"history[{i}]", where)}
                     for role, text in zip(("user", "assistant"), pair)]
    return messages


def _message(message, name, where):
    if not isinstance(message, dict):
        raise UserError(f"{name} is not a message in {where}; fix: use {{\"role\": ..., \"content\": ...}}")
    for key in ("tool_calls", "function_call", "reasoning_content", "thinking"):
        if message.get(key):
            raise UserError(f"{name} has {key!r}, which is not read, in {where}; fix: write it as text into the content")
    if message.get("role") is not None:
        role, roles, content = message["role"], ROLES, message.get("content")
        role = role if role in ROLES else None
    else:
        role, roles, content = message.get("from"), tuple(FROM), message.get("value")
        role = FROM[role] if role in roles else None
    if role is None:
        raise UserError(f"unknown role {message.get('role', message.get('from'))!r} of {name} in {where}; "
                        f"fix: use one of {', '.join(roles)}")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            raise UserError(f"{name} has content parts other than text in {where}; "
                            f"fix: use {{\"type\": \"text\", \"text\": ...}} parts only")
        content = "".join(read_string(part.get("text"), name, where) for part in content)
    return {"role": role, "content": read_string(content, name, where)}


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
