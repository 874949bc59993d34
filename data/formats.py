"""One row of any accepted shape -> `Text`: a prompt and its responses, as strings or as messages.

Plain strings stay exactly as they are. A row that is well-formed but cannot be trained on is dropped: `parse` returns the reason,
a short constant that the dataset counts. A row that is malformed is the file's mistake: `parse` raises UserError naming where.
"""
from dataclasses import dataclass

from data.errors import UserError
from data.hub import hh_messages, is_transcript, split_hh

ROLES = ("system", "user", "assistant", "tool")
FROM = {"human": "user", "gpt": "assistant"} | {role: role for role in ROLES}  # ShareGPT's names
SHAPES = {
    "responses": "messages; conversations; prompt + response or completion; question + answer; text; or a pair's columns",
    "pairs": "prompt + chosen + rejected (or chosen_response + rejected_response); conversations + chosen + rejected; "
             "chosen + rejected as message lists or HH transcripts",
}


@dataclass
class Text:
    """One row before tokenising; prompt and responses are all strings or all message lists [{"role", "content"}, ...]."""
    prompt: str | list
    responses: list      # 1 for sft; chosen, rejected for a pair. Messages: the turns after the prompt, assistant first and last
    where: str           # "file:line"
    raw: bool = False    # plain running text: the prompt is "" and the only response is cut into pieces


def parse(row, where, kind, hh="messages"):
    """Row (dict) -> Text, or the reason (str) to drop it.

    `kind`: "responses" (one response per row; of a pair, the chosen one) or "pairs" (chosen, rejected). `hh`: "messages" splits
    HH transcripts into turns, "text" keeps them as they are. Raises UserError for malformed rows and unknown columns.
    """
    columns = {name for name, value in row.items() if value is not None}  # Parquet and the hub fill absent columns with null
    if kind == "responses":
        if "messages" in columns:
            return _conversation(row, "messages", where)
        if "conversations" in columns and "chosen" not in columns:
            return _conversation(row, "conversations", where)
        if "prompt" in columns and columns & {"response", "completion"}:
            return _prompted(row, "prompt", ["response" if "response" in columns else "completion"], where)
        if {"question", "answer"} <= columns:
            return _prompted(row, "question", ["answer"], where)
        if "text" in columns:
            text = _string(row["text"], "text", where)
            return Text("", [text], where, raw=True) if text.strip() else "empty text"
    sides = _pair_columns(columns, kind)
    if not sides:
        found = ", ".join(name if name in columns else f"{name} (null)" for name in row) or "none"
        raise UserError(f"unknown columns in {where}: found {found}; fix: use one of these shapes: {SHAPES[kind]}")
    if "prompt" in columns:
        return _prompted(row, "prompt", sides, where)
    if "conversations" in columns:
        return _prompted(row, "conversations", sides, where)
    if all(is_transcript(row[name]) for name in sides):
        return _transcripts(row, sides, where, hh)
    if all(isinstance(row[name], list) for name in sides):
        return _replies([_messages(row[name], name, where) for name in sides], where)
    raise UserError(f"no prompt in {where}: {' and '.join(sides)} are neither message lists nor HH transcripts; "
                    "fix: add a prompt column")


def _pair_columns(columns, kind):
    names = ["chosen_response", "rejected_response"] if "chosen_response" in columns else ["chosen", "rejected"]
    names = names[:1] if kind == "responses" else names
    return names if set(names) <= columns else []


def _conversation(row, name, where):
    """A whole conversation: everything from the first assistant's turn on is the response."""
    messages = _messages(row[name], name, where)
    first = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), None)
    if first is None or messages[-1]["role"] != "assistant":
        return "last turn is not the assistant's"
    if first == 0:
        return "first turn is the assistant's"
    return _checked(Text(messages[:first], [messages[first:]], where))


def _prompted(row, prompt_name, names, where):
    """A prompt column and one or two response columns, each a string, a message or a message list."""
    prompt, replies = row[prompt_name], [row[name] for name in names]
    if isinstance(prompt, str) and all(isinstance(reply, str) for reply in replies):
        prompt = _string(prompt, prompt_name, where)
        return _checked(Text(prompt, [_string(reply, name, where) for reply, name in zip(replies, names)], where))
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    prompt = _messages(prompt, prompt_name, where)
    conversations = []
    for reply, name in zip(replies, names):
        reply = _messages([{"role": "assistant", "content": reply}] if isinstance(reply, str) else reply, name, where)
        conversations.append(_without_prompt(prompt, reply))
    if len(names) == 2:
        return _replies([start + turns for start, turns in conversations], where)
    start, turns = conversations[0]
    while turns and turns[0]["role"] != "assistant":
        start, turns = start + turns[:1], turns[1:]
    if not turns or turns[-1]["role"] != "assistant":
        return "last turn is not the assistant's"
    return _checked(Text(start, [turns], where))


def _without_prompt(prompt, reply):
    """(prompt, turns after it): a reply may be the full conversation, which repeats the prompt, perhaps after a system turn."""
    for start in (0, 1) if reply[0]["role"] == "system" else (0,):
        end = start + len(prompt)
        if reply[start:end] == prompt:
            return reply[:end], reply[end:]
    return prompt, reply


def _replies(conversations, where):
    """Conversations that must be the same up to their last turn, the assistant's."""
    if any(messages[-1]["role"] != "assistant" for messages in conversations):
        return "last turn is not the assistant's"
    prompt = conversations[0][:-1]
    if any(messages[:-1] != prompt for messages in conversations):
        return "chosen and rejected do not share their prompt"
    if not prompt:
        return "first turn is the assistant's"
    return _checked(Text(prompt, [messages[-1:] for messages in conversations], where))


def _transcripts(row, names, where, hh):
    split = split_hh(*(_string(row[name], name, where) for name in names))
    if isinstance(split, str):
        return split
    prompt, replies = split
    messages = hh_messages(prompt)
    if not messages[-1]["content"]:
        return "empty prompt"  # not an error as in a user's own file: the published data has such rows
    if hh == "text":
        return _checked(Text(prompt, replies, where))
    return _checked(Text(messages, [[{"role": "assistant", "content": reply.strip()}] for reply in replies], where))


def _checked(text):
    """The text if it can be trained on, else the reason to drop it. Raises UserError for a blank prompt."""
    plain = isinstance(text.prompt, str)
    if not (text.prompt if plain else text.prompt[-1]["content"]).strip():
        raise UserError(f"the prompt is empty in {text.where}; fix: write a prompt or delete the row")
    for response in text.responses:
        turns = [response] if plain else [message["content"] for message in response if message["role"] == "assistant"]
        if not all(turn.strip() for turn in turns):
            return "empty response"
    if len(text.responses) == 2 and text.responses[0] == text.responses[1]:
        return "chosen equals rejected"
    return text


def _messages(value, column, where):
    """A message or a list of them, with role/content or from/value -> [{"role", "content": str}, ...], not empty."""
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list):
        raise UserError(f"{column!r} is neither text nor a list of messages in {where}; "
                        f"fix: use [{{\"role\": ..., \"content\": ...}}, ...]")
    if not value:
        raise UserError(f"{column!r} is an empty list of messages in {where}; fix: add messages or delete the row")
    return [_message(message, f"{column}[{i}]", where) for i, message in enumerate(value)]


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
        content = "".join(_string(part.get("text"), name, where) for part in content)
    return {"role": role, "content": _string(content, name, where)}


def _string(value, name, where):
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise UserError(f"the content of {name} is {kind}, not text, in {where}; fix: write it as a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{name} has half of a Unicode surrogate pair (\\udXXX) in {where}; "
                        "fix: correct or delete that character") from None
    return value
