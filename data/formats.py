"""One row of any accepted shape -> `Text`: a prompt and its responses, as strings or as messages.

Plain strings stay exactly as they are. A row that is well-formed but cannot be trained on is dropped: `parse`
returns the reason, a short constant that the dataset counts. A row that is malformed is the file's mistake:
`parse` raises UserError naming where.

Which columns are read, where a row has more than it needs: the first of these in `data.columns` that is there
in full.
    pairs       PAIRS, from top to bottom
    responses   WHOLE, REPLIES, then the chosen side of PAIRS, then text
    labelled    with a label WHOLE or REPLIES, else PAIRS, of which both sides are trained
    prompts     PROMPTS; whole conversations without the assistant's last turns
`instruction`, `query` and every row with a `system` or `tools` column are conversations, for the chat
template, and so are QUESTIONS where the tokenizer has one; other strings are not. A string that is nothing
but messages as JSON is read as these.

Only text is read. A row with something in a column of MEDIA is an error. Where such a column is gone and a
line of a prompt or of a user's turn begins or ends with the <image> that stood for it, the row is dropped and
counted; within a line, and beside a closing tag such as </image>, it is text.
"""
import itertools
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from data.columns import KNOWN, LABELS, MEDIA, PAIRS, PROMPTS, QUESTIONS, REPLIES, WHOLE
from data.errors import UserError
from data.extras import numbers_in, read_number, renamed
from data.files import read_named
from data.hub import hh_messages, is_transcript, split_hh
from data.messages import (
    MARKED_OFF,
    messages_in,
    read_history,
    read_messages,
    read_string,
    read_tools,
    says_nothing,
    unflagged,
)

MAY_BE_JSON = (*WHOLE, "prompt", "response", "completion", "chosen", "rejected", "chosen_response",
               "rejected_response", "rejected_messages")
PLACEHOLDER = re.compile(r"^[^\S\n]*<(image|video|audio)>|<image>[^\S\n]*$", re.MULTILINE)
MARKUP = re.compile(r"</(image|video|audio)>")      # HTML or XML, not a place for an image
ONLY_TEXT = "an image, video or sound stands in its text, and only text is read"
# the columns under which the same strings are a conversation
AS_CONVERSATION = {
    "prompt": "instruction",
    "response": "output",
    "completion": "output",
    "chosen": "chosen",
    "rejected": "rejected",
    "chosen_response": "chosen",
    "rejected_response": "rejected",
}
TEMPLATES = Path(__file__).parent / "prompts"
# the roles of a row's columns, and the words by which a name may tell them
ROLES = {
    "prompt": {"prompt", "question", "query", "instruction", "input", "ask", "user", "problem", "task"},
    "chosen": {"chosen", "good", "better", "best", "winner", "win", "preferred", "accepted", "positive"},
    "rejected": {"rejected", "bad", "worse", "worst", "loser", "lose", "dispreferred", "negative"},
    "response": {"response", "answer", "output", "completion", "reply", "assistant", "target", "solution"},
    "label": {"label", "liked", "desirable", "thumbs", "feedback", "good"},
}
# in the order in which they take their columns: good_answer is no response where it is the chosen one
ROLES_OF = {
    "responses": ("response", "prompt"),
    "pairs": ("chosen", "rejected", "prompt"),
    "labelled": ("label", "response", "prompt"),
    "prompts": ("prompt",),
}
SHAPES = {
    "responses": "messages; conversations; prompt + response or completion; question + answer; "
                 "problem + solution; instruction + output; query + response; text; or a pair's columns",
    "pairs": "prompt + chosen + rejected (or chosen_response + rejected_response); instruction, question or "
             "conversations + chosen + rejected; messages + rejected_response; chosen + rejected as message "
             "lists or HH transcripts",
    "labelled": "prompt + response or completion + label; messages + label; or a pair's columns",
    "prompts": "prompt; messages; conversations; question; problem; instruction; query; chosen as a message "
               "list or HH transcript",
}


@dataclass
class Text:
    """One row before tokenising; prompt and responses are all strings or all lists of turns (see
    `data.messages`)."""
    prompt: str | list   # without flags; a prompt's last turn may be the beginning of the assistant's
    responses: list      # 1 for sft; chosen, rejected for a pair; none for prompts. Messages: the turns after
                         # the prompt, assistant first and last, at least one of the assistant's without
                         # "train": False
    where: str           # "file:line"
    raw: bool = False    # plain running text: the prompt is "" and the only response is cut into pieces
    shape: str = ""      # the columns that were read
    extras: dict = field(default_factory=dict)      # label (bool), margin (float); prompts: prompt, columns
    tools: list | None = None      # what the assistant may call, as `data.messages` reads it
    label: str = ""      # the column that says whether the response is desirable; extras has no label if it
                         # says something else
    numbers: dict = field(default_factory=dict)     # the other columns of numbers, see `data.extras`
    of_pair: bool = False          # the row is a pair, of which perhaps only the chosen side is a response


def read_template(name):
    """The text of a prompt template: a name in data/prompts/, such as r1_zero, or a file. Raises UserError,
    also without {question}."""
    known = {path.stem: path for path in sorted(TEMPLATES.glob("*.prompt"))}
    path, text = read_named("prompt_template", name, known)
    if "{question}" not in text:
        raise UserError(f"no {{question}} in {path}, the prompt_template; "
                        "fix: write {question} where the row's question belongs")
    return text


def parse(row, where, kind, hh="messages", template=None, chat=False, system=False):
    """Row (dict) -> Text, or the reason (str) to drop it.

    `kind`: "responses" (one response per row, of a pair the chosen one), "pairs" (chosen, rejected),
    "labelled" (one response and extras["label"]; or a pair) or "prompts" (no response; extras["prompt"] and
    extras["columns"], the row's columns by name, with ground_truth of verl's rows among them). `hh`:
    "messages" splits HH transcripts into turns, "text" keeps them as they are. `template`: for prompts a text
    in which the row's question takes the place of {question}. `chat`: strings in a column of QUESTIONS are a
    user's turn. `system`: there is a system prompt, so all strings but raw text are turns of a conversation.
    Raises UserError for malformed rows and unknown columns.
    """
    found = row
    if isinstance(row.get("extra_info"), dict):
        row = row | {"extra_info.answer": row["extra_info"].get("answer")}
    # Parquet and the hub fill absent columns with null
    columns = {name for name, value in row.items() if value is not None}
    shape = _shape(columns, kind)
    if shape is None:
        raise _unknown_columns(found, columns, where, kind)
    _check_media(row, where)
    row = dict(row)
    for name in MAY_BE_JSON:
        if name in columns:
            row[name] = messages_in(row[name], name, where)
    tools = read_tools(row.get("tools"), where)
    label = _label_column(row, columns, shape, kind)
    text = _prompt_only(row, shape[0], where, hh) if kind == "prompts" else _read(row, shape, where, hh)
    desirable = _desirable(row, label, where, kind)
    if isinstance(text, str):
        return text
    asks = ("instruction", "query", *QUESTIONS) if chat else ("instruction", "query")
    conversational = system or tools is not None or shape[0] in asks
    text = _conversational(text, row, shape[0], conversational)
    if tools and (text.raw or template):
        beside, way = ("prompt_template", "prompt_template") if template else ("raw text", "write messages")
        raise UserError(f"tools beside {beside}, which has no place for them, in {where}; "
                        f"fix: remove the column, or {way}")
    text.tools, text.label = tools, label
    if kind == "prompts":
        return _with_columns(text, found, shape[0], template)
    parts = ["system" if "system" in columns else "", "tools" if tools else "", *shape, label]
    text.shape = " + ".join(filter(None, parts))
    if desirable is not None:
        text.extras["label"] = desirable
    if kind == "pairs" and "margin" in columns:
        text.extras["margin"] = _margin(row["margin"], where)
    text.of_pair = _is_of_pair(shape, columns)
    text.numbers = numbers_in(found, KNOWN, _in_csv(where), text.of_pair)
    return text


def _unknown_columns(row, columns, where, kind):
    names = ", ".join(name if name in columns else f"{name} (null)" for name in row) or "none"
    pairs = [f"{ours}: {theirs}" for ours, theirs in _meant(columns, kind).items()]
    if pairs:
        fix = f'write "columns={{{", ".join(pairs)}}}" if that is meant, or rename them in the file to'
    else:
        fix = "rename them in the file, or with columns={our name: the file's}, to"
    return UserError(f"unknown columns in {where}: found {names}; fix: {fix} one of these shapes: "
                     f"{SHAPES[kind]}")


def _meant(columns, kind):
    """{our name: the file's} that makes the columns a shape of this kind, by the words in their names; {}
    where a role has no column, or two that fit as well."""
    mapping = {}
    free = {name: _words(name) for name in columns}
    for role in ROLES_OF[kind]:
        fitting = [name for name, words in free.items() if not words.isdisjoint(ROLES[role])]
        best = [role] if role in columns else fitting
        if len(best) != 1:
            return {}
        free.pop(best[0])
        mapping[role] = best[0]
    return {role: mapping[role] for role in ROLES if mapping.get(role, role) != role}


def _words(name):
    """The words of a column's name: goodAnswer, good_answer and "Good answer" have two."""
    parted = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return set(re.split(r"[^a-z]+", parted.lower()))


def _is_of_pair(shape, columns):
    """Whether the columns that are read, or these and a rejected one beside them, are a pair."""
    for pair in PAIRS:
        if pair[:len(shape)] == shape and columns.issuperset(filter(None, pair)):
            return True
    return False


def _label_column(row, columns, shape, kind):
    """The name of the column that says whether the row's only response is desirable, or ""."""
    if kind not in ("responses", "labelled") or not _single(shape):
        return ""
    label = next((name for name in LABELS if name in columns), "")
    is_null = kind == "responses" and row.get(label) == ""      # in CSV
    return "" if is_null else label


def without_template(text, columns):
    """Where a row's plain strings pass by the tokenizer's chat template: the sentence that says so and what
    changes it. Else None. `columns`: {our name: the file's name}, as the source gives them."""
    if not isinstance(text.prompt, str) or text.raw:
        return None
    names = text.shape.split(" + ")
    if text.label in names:
        names.remove(text.label)
    if "prompt" not in names:
        return None
    fix = "write the prompts as messages"
    if AS_CONVERSATION.keys() >= set(names):
        theirs = {AS_CONVERSATION[name]: columns.get(name, name) for name in names}
        for ours, name in columns.items():
            if ours not in names:
                theirs[ours] = name
        pairs = [f"{ours}: {name}" for ours, name in theirs.items() if ours != name]
        fix = f"write columns: {{{', '.join(pairs)}}}"
    return f"plain strings are read without the tokenizer's chat template; to use it {fix}"


def _check_media(row, where):
    """UserError where a column holds more than text."""
    for name in MEDIA:
        if not _is_empty(row.get(name)):
            raise UserError(f"something in the column {name!r}, but only text is read, in {where}; "
                            f"fix: leave such rows out, or rename it ({renamed(name)}) where the text stands "
                            "on its own")


def _is_empty(value):
    parts = list(value.values()) if isinstance(value, dict) else value
    return not parts or parts in ("[]", "null") or isinstance(parts, list) and all(map(_is_empty, parts))


def _single(shape):
    return shape[0] in WHOLE and len(shape) == 1 or shape in REPLIES


def _shape(columns, kind):
    """The columns to read, prompt first, or None."""
    if kind == "prompts":
        for name in PROMPTS:
            if name in columns:
                return (name,)
        return None
    if kind == "responses" or kind == "labelled" and not columns.isdisjoint(LABELS):
        for name in WHOLE:
            is_prompt = name == "conversations" and "chosen" in columns      # the pair's
            if name in columns and not is_prompt:
                return (name,)
        for shape in REPLIES:
            if columns.issuperset(shape):
                return shape
    for shape in PAIRS:
        shape = shape[:2] if kind == "responses" else shape
        if columns.issuperset(filter(None, shape)):
            return shape
    return ("text",) if kind == "responses" and "text" in columns else None


def _desirable(row, name, where, kind):
    """What the column `name` says of the response: true or false, 0 or 1, in CSV, where all is text, also as
    words. None without a column and where it says something else; an error of labelled rows."""
    label = row[name] if name else None
    if isinstance(label, str) and _in_csv(where):
        label = {"true": 1, "1": 1, "false": 0, "0": 0}.get(label.strip().lower(), label)
    if isinstance(label, (int, float)) and label in (0, 1):
        return bool(label)
    if name and kind == "labelled":
        raise UserError(f"the {name} is {_shown(row[name])}, neither true or false nor 0 or 1, in {where}; "
                        "fix: write true for a desirable response and false for an undesirable one")
    return None


def _in_csv(where):
    name = where.rpartition(":")[0].lower().removesuffix(".gz")
    return name.endswith((".csv", ".tsv"))


def _margin(value, where):
    number = math.nan if isinstance(value, bool) else read_number(value, is_text_allowed=True)
    if math.isnan(number):
        raise UserError(f"the margin is {_shown(value)}, not a finite number, in {where}; "
                        "fix: write a number such as 0.5, or rename the column if it is something else")
    return number


def _shown(value):
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _read(row, shape, where, hh):
    prompt, *replies = shape
    if prompt == "text":
        text = read_string(row["text"], "text", where)
        return Text("", [text], where, raw=True) if text.strip() else "empty text"
    if not replies:
        return _conversation(row, prompt, where)
    if prompt == "messages":
        name = replies[0]
        chosen = read_messages(row["messages"], "messages", where)
        rejected = read_messages(_reply(row[name]), name, where)
        if name != "rejected_messages":
            rejected = chosen[:-1] + rejected
        return _replies([chosen, rejected], where)
    if prompt:
        return _prompted(row, prompt, replies, where, pair=shape not in REPLIES)
    values = [row[name] for name in replies]
    if all(map(is_transcript, values)):
        return _transcripts(row, replies, where, hh)
    if set(map(type, values)) == {list}:
        conversations = [read_messages(row[name], name, where) for name in replies]
        return _replies(conversations, where)
    raise UserError(f"no prompt in {where}: {' and '.join(replies)} are neither message lists nor HH "
                    "transcripts; fix: add a prompt column")


def _reply(value):
    return [{"role": "assistant", "content": value}] if isinstance(value, str) else value


def _conversational(text, row, prompt_name, conversational):
    """The text with the row's `system` and `history` columns in front of its prompt; a system text, or
    `conversational`, makes plain strings a conversation."""
    system = row.get("system")
    if text.raw or system is None and not conversational:
        return text
    if isinstance(text.prompt, str):
        text.prompt = [{"role": "user", "content": text.prompt}]
        text.responses = list(map(_reply, text.responses))
    if prompt_name in ("instruction", "query"):
        text.prompt = read_history(row.get("history"), text.where) + text.prompt
    if system is not None and read_string(system, "system", text.where):
        turn = {"role": "system", "content": system}
        if text.prompt[0]["role"] != "system":
            text.prompt = [turn] + text.prompt
        elif text.prompt[0] != turn:
            raise UserError(f"a system column and another system turn in {text.where}; fix: keep one of them")
    return text


def _conversation(row, name, where):
    """A whole conversation: everything from the first assistant's turn on is the response."""
    messages = read_messages(row[name], name, where)
    roles = [message["role"] for message in messages]
    if roles[-1] != "assistant":
        return "last turn is not the assistant's"
    first = roles.index("assistant")
    if first == 0:
        return "first turn is the assistant's"
    return _checked(Text(messages[:first], [messages[first:]], where))


def _prompted(row, prompt_name, names, where, pair):
    """A prompt column and one or two response columns, each a string, a message or a message list. From
    a pair's side only the last turn is the response, as in a pair."""
    prompt = _with_input(row, prompt_name, where)
    replies = [row[name] for name in names]
    if {type(prompt), *map(type, replies)} == {str}:
        prompt = read_string(prompt, prompt_name, where)
        responses = [read_string(reply, name, where) for reply, name in zip(replies, names)]
        return _checked(Text(prompt, responses, where))
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    messages = read_messages(turns, prompt_name, where)
    conversations = []
    for reply, name in zip(replies, names):
        reply = read_messages(_reply(reply), name, where)
        if isinstance(prompt, str) and reply[0]["role"] != "assistant":
            conversations.append(([], reply))      # the full conversation; the prompt repeats one turn of it
        else:
            conversations.append(_without_prompt(messages, reply))
    if pair:
        return _replies([start + turns for start, turns in conversations], where)
    start, turns = conversations[0]
    while turns and turns[0]["role"] != "assistant":
        start, turns = start + turns[:1], turns[1:]
    if not turns or turns[-1]["role"] != "assistant":
        return "last turn is not the assistant's"
    return _checked(Text(start, [turns], where))


def _with_input(row, name, where):
    """The prompt's column; an instruction with its input below it."""
    if name != "instruction" or not row.get("input"):
        return row[name]
    return read_string(row[name], name, where) + "\n" + read_string(row["input"], "input", where)


def _without_prompt(prompt, reply):
    """(prompt, turns after it): a reply may be the full conversation, which repeats the prompt, perhaps after
    a system turn."""
    asked = unflagged(prompt)
    said = unflagged(reply)
    starts = (0, 1) if reply[0]["role"] == "system" else (0,)
    for start in starts:
        end = start + len(prompt)
        if said[start:end] == asked:
            return reply[:end], reply[end:]
    return prompt, reply


def _replies(conversations, where):
    """Conversations that must be the same up to their last turn, the assistant's."""
    prompt = unflagged(conversations[0][:-1])
    responses = [messages[-1:] for messages in conversations]
    for turn, in responses:
        if turn["role"] != "assistant":
            return "last turn is not the assistant's"
    for messages in conversations:
        if unflagged(messages[:-1]) != prompt:
            return "chosen and rejected do not share their prompt"
    if not prompt:
        return "first turn is the assistant's"
    return _checked(Text(prompt, responses, where))


def _transcripts(row, names, where, hh):
    transcripts = [read_string(row[name], name, where) for name in names]
    split = split_hh(*transcripts)
    if isinstance(split, str):
        return split
    prompt, replies = split
    messages = hh_messages(prompt)
    if not messages[-1]["content"]:
        return "empty prompt"  # not an error as in a user's own file: the published data has such rows
    if hh == "text":
        return _checked(Text(prompt, replies, where))
    responses = [_reply(reply.strip()) for reply in replies]
    return _checked(Text(messages, responses, where))


def _prompt_only(row, name, where, hh):
    """The prompt in column `name` as a Text without responses, or the reason to drop the row."""
    value = _with_input(row, name, where)
    if name == "chosen":
        if is_transcript(value):
            text = _transcripts(row, [name], where, hh)
            return text if isinstance(text, str) else Text(text.prompt, [], where)
        if not isinstance(value, list):
            raise UserError(f"no prompt in {where}: chosen is neither a message list nor an HH transcript; "
                            "fix: add a prompt column")
    if not isinstance(value, str) or name in WHOLE:
        turns = read_messages(value, name, where)
        is_begun = name not in (*WHOLE, "chosen")      # the assistant's last turn, which sampling continues
        return _asked(turns, where, is_begun)
    for reply in ("chosen", "completion", "response"):
        if isinstance(row.get(reply), (list, dict)):   # a conversation all the same, as for the other kinds
            turns = read_messages(row[reply], reply, where)
            if turns[0]["role"] == "assistant":
                turns = read_messages([{"role": "user", "content": value}], name, where)
            return _asked(turns, where, is_begun=False)
    return _checked(Text(read_string(value, name, where), [], where))


def _asked(turns, where, is_begun):
    """The turns as a prompt, without the assistant's last ones unless sampling is to continue them."""
    if all(turn["role"] == "assistant" for turn in turns):
        return "first turn is the assistant's"
    while turns[-1]["role"] == "assistant" and not is_begun:
        turns.pop()
    return _checked(Text(turns, [], where))


def _with_columns(text, row, name, template):
    """The prompt, in the template's place for it if there is one, and the row's columns for the reward."""
    parts = ["system" if row.get("system") is not None else "", "tools" if text.tools else "", name]
    text.shape = " + ".join(filter(None, parts))
    if template:
        question = text.prompt
        if not isinstance(question, str):
            question = _only_question(text)
            if len(text.prompt) > 1:
                text.shape += ", without its system turn"
        text.prompt = template.replace("{question}", question)
        text.shape += ", put into prompt_template"
    for column, value in row.items():      # a reward reads it, and parts of it are written to a file
        _check_strings(value, column, text.where)
    columns = dict(row)
    verl = row.get("reward_model")
    if isinstance(verl, dict) and "ground_truth" in verl:
        columns = {"ground_truth": verl["ground_truth"]} | row
    text.extras = {"prompt": text.prompt, "columns": columns}
    return text


def _only_question(text):
    """The only user's turn of a conversation, for the prompt template."""
    turns = [turn for turn in text.prompt if turn["role"] != "system"]
    if len(turns) != 1 or turns[0]["role"] != "user":
        begun = text.prompt[-1]["role"] == "assistant"
        more = "an assistant's" if begun else "more than one user"
        raise UserError(f"{more} turn in {text.where}, but prompt_template has room for one "
                        "question; fix: remove prompt_template, or leave such rows out")
    return turns[0]["content"]


def _check_strings(value, name, where):
    """UserError where a string within the value of a column cannot be written as UTF-8."""
    if isinstance(value, str):
        read_string(value, name, where)
    elif isinstance(value, dict):
        for key, part in value.items():
            _check_strings(key, f"a key of {name}", where)
            _check_strings(part, name, where)
    elif isinstance(value, list):
        for part in value:
            _check_strings(part, name, where)


def _checked(text):
    """The text if it can be trained on, else the reason to drop it. Raises UserError for a blank prompt."""
    if isinstance(text.prompt, str):
        return _checked_strings(text)
    text.prompt = unflagged(text.prompt)
    if text.prompt[-1]["role"] != "tool" and says_nothing(text.prompt[-1]):
        raise _no_prompt(text)
    for response in text.responses:
        trained = []
        for turn in response:
            if turn["role"] == "assistant" and turn.get("train") is not False:
                trained.append(turn)
        if not trained:
            return MARKED_OFF
        if any(map(says_nothing, trained)):
            return "empty response"
    for turn in itertools.chain(text.prompt, *text.responses):
        if turn["role"] != "assistant" and _misses_media(turn["content"]):
            return ONLY_TEXT
    if len(text.responses) == 2 and unflagged(text.responses[0]) == unflagged(text.responses[1]):
        return "chosen equals rejected"
    return text


def _checked_strings(text):
    if not text.prompt.strip():
        raise _no_prompt(text)
    if "" in map(str.strip, text.responses):
        return "empty response"
    if _misses_media(text.prompt):
        return ONLY_TEXT
    if len(text.responses) == 2 and text.responses[0] == text.responses[1]:
        return "chosen equals rejected"
    return text


def _misses_media(content):
    return bool(PLACEHOLDER.search(content)) and not MARKUP.search(content)


def _no_prompt(text):
    return UserError(f"the prompt is empty in {text.where}; fix: write a prompt or delete the row")
