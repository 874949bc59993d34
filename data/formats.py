"""One row of any accepted shape -> `Text`: a prompt and its responses, as strings or as messages.

Plain strings stay exactly as they are. A row that is well-formed but cannot be trained on is dropped: `parse` returns the reason,
a short constant that the dataset counts. A row that is malformed is the file's mistake: `parse` raises UserError naming where.

Which columns are read, where a row has more than it needs: the first of these that is there in full.
    pairs       PAIRS below, from top to bottom
    responses   WHOLE, REPLIES, then the chosen side of PAIRS, then text
    labelled    with a label WHOLE or REPLIES, else PAIRS, of which both sides are trained
    prompts     PROMPTS; whole conversations without the assistant's last turns
`instruction`, `query` and every row with a `system` column are conversations, for the chat template; other strings are not.
"""
import difflib
import math
from dataclasses import dataclass, field
from pathlib import Path

from data.errors import UserError
from data.hub import hh_messages, is_transcript, split_hh
from data.messages import read_history, read_messages, read_string

WHOLE = ("messages", "conversations", "conversation")            # one column with the whole conversation
REPLIES = (("prompt", "response"), ("prompt", "completion"), ("question", "answer"), ("instruction", "output"),
           ("query", "response"), ("prompt", "extra_info.answer"))          # the last: verl's
PAIRS = (("prompt", "chosen_response", "rejected_response"), ("prompt", "chosen", "rejected"),
         ("conversations", "chosen", "rejected"), ("instruction", "chosen", "rejected"), ("question", "chosen", "rejected"),
         ("query", "chosen", "rejected"), ("query", "response", "rejected_response"), ("question", "response_j", "response_k"),
         ("messages", "rejected_response"), ("messages", "rejected_messages"), ("", "chosen", "rejected"))  # "": no prompt column
PROMPTS = (*WHOLE, "prompt", "question", "instruction", "query", "chosen")
LABELS = ("label", "kto_tag")
LARGEST = 3.4e38      # a margin becomes a float32, which holds no larger number
TEMPLATES = Path(__file__).parent / "prompts"
SHAPES = {
    "responses": "messages; conversations; prompt + response or completion; question + answer; instruction + output; "
                 "query + response; text; or a pair's columns",
    "pairs": "prompt + chosen + rejected (or chosen_response + rejected_response); instruction, question or conversations + "
             "chosen + rejected; messages + rejected_response; chosen + rejected as message lists or HH transcripts",
    "labelled": "prompt + response or completion + label; messages + label; or a pair's columns",
    "prompts": "prompt; messages; conversations; question; instruction; query; chosen as a message list or HH transcript",
}


@dataclass
class Text:
    """One row before tokenising; prompt and responses are all strings or all message lists [{"role", "content"}, ...]."""
    prompt: str | list
    responses: list      # 1 for sft; chosen, rejected for a pair; none for prompts. Messages: the turns after the prompt, assistant
                         # first and last
    where: str           # "file:line"
    raw: bool = False    # plain running text: the prompt is "" and the only response is cut into pieces
    shape: str = ""      # the columns that were read
    extras: dict = field(default_factory=dict)      # label (bool), margin (float); of prompts: prompt, columns
    tools: list | None = None      # what the assistant may call, as the chat template takes it


def read_template(name):
    """The text of a prompt template: a name in data/prompts/, such as r1_zero, or a file. Raises UserError, also without {question}."""
    known = {path.stem: path for path in sorted(TEMPLATES.glob("*.prompt"))}
    path = known.get(name, Path(name))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        near = difflib.get_close_matches(name, known, n=1)
        raise UserError(f"prompt_template {name!r} is neither one of {', '.join(known)} nor a UTF-8 file ({type(error).__name__}); "
                        f"fix: give {near[0] if near else 'a name or the path of a file'}") from None
    if "{question}" not in text:
        raise UserError(f"no {{question}} in {path}, the prompt_template; fix: write {{question}} where the row's question belongs")
    return text


def parse(row, where, kind, hh="messages", template=None):
    """Row (dict) -> Text, or the reason (str) to drop it.

    `kind`: "responses" (one response per row; of a pair, the chosen one), "pairs" (chosen, rejected) or "labelled" (one response
    and extras["label"]; or a pair) or "prompts" (no response; extras["prompt"] and extras["columns"], the row's columns by name,
    with ground_truth of verl's rows among them). `hh`: "messages" splits HH transcripts into turns, "text" keeps them as they are.
    `template`: of prompts, a text in which the row's question takes the place of {question}.
    Raises UserError for malformed rows and unknown columns.
    """
    found = row
    if isinstance(row.get("extra_info"), dict):
        row = row | {"extra_info.answer": row["extra_info"].get("answer")}
    columns = {name for name, value in row.items() if value is not None}  # Parquet and the hub fill absent columns with null
    shape = _shape(columns, kind)
    if shape is None:
        names = ", ".join(name if name in columns else f"{name} (null)" for name in found) or "none"
        raise UserError(f"unknown columns in {where}: found {names}; fix: use one of these shapes: {SHAPES[kind]}")
    if row.get("tools") not in (None, "", "[]", []):
        raise UserError(f"a 'tools' column, which is not read, in {where}; fix: write the tools as text into a system turn")
    if kind == "prompts":
        text = _prompt_only(row, shape[0], where, hh)
        return text if isinstance(text, str) else _with_columns(_conversational(text, row, shape[0]), found, shape[0], template)
    label = next((name for name in LABELS if name in columns and kind != "pairs" and _single(shape)), None)
    try:
        desirable = _label(row[label], label, where) if label else None
    except UserError:
        if kind == "labelled":
            raise
        label = None                       # some other label, which sft has no use for
    text = _read(row, shape, where, hh)
    if isinstance(text, Text):
        text = _conversational(text, row, shape[0])
        text.shape = " + ".join(filter(None, ["system" if "system" in columns else "", *shape, label]))
        if label and kind == "responses" and not desirable:
            return "undesirable"
        if label and kind == "labelled":
            text.extras["label"] = desirable
        if kind == "pairs" and "margin" in columns:
            text.extras["margin"] = _margin(row["margin"], where)
    return text


def _single(shape):
    return shape[0] in WHOLE and len(shape) == 1 or shape in REPLIES


def _shape(columns, kind):
    """The columns to read, prompt first, or None."""
    if kind == "prompts":
        return next(((name,) for name in PROMPTS if name in columns), None)
    if kind == "responses" or kind == "labelled" and columns & set(LABELS):
        pair = "chosen" in columns                     # then `conversations` is the pair's prompt
        for shape in (*((name,) for name in WHOLE if not (pair and name == "conversations")), *REPLIES):
            if set(shape) <= columns:
                return shape
    for shape in PAIRS:
        shape = shape[:2] if kind == "responses" else shape
        if set(shape) - {""} <= columns:
            return shape
    return ("text",) if kind == "responses" and "text" in columns else None


def _label(value, name, where):
    """bool, 0 or 1; in CSV, where all is text, the same as words."""
    label = value
    if isinstance(value, str) and where.rpartition(":")[0].lower().endswith((".csv", ".csv.gz")):
        label = {"true": 1, "1": 1, "false": 0, "0": 0}.get(value.strip().lower())
    if not isinstance(label, (int, float)) or label not in (0, 1):
        raise UserError(f"the {name} is {_shown(value)}, neither true or false nor 0 or 1, in {where}; "
                        "fix: write true for a desirable response, false for an undesirable one, or rename the column")
    return bool(label)


def _margin(value, where):
    try:
        number = math.nan if isinstance(value, bool) else float(value)      # float(): in CSV all is text
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= LARGEST:
        raise UserError(f"the margin is {_shown(value)}, not a finite number, in {where}; fix: write a number such as 0.5")
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
        chosen, rejected = read_messages(row["messages"], "messages", where), row[replies[0]]
        rejected = read_messages(_reply(rejected), replies[0], where)
        return _replies([chosen, rejected if replies[0] == "rejected_messages" else chosen[:-1] + rejected], where)
    if prompt:
        return _prompted(row, prompt, replies, where, pair=shape not in REPLIES)
    if all(is_transcript(row[name]) for name in replies):
        return _transcripts(row, replies, where, hh)
    if all(isinstance(row[name], list) for name in replies):
        conversations = [read_messages(row[name], name, where) for name in replies]
        return _replies(conversations, where)
    raise UserError(f"no prompt in {where}: {' and '.join(replies)} are neither message lists nor HH transcripts; "
                    "fix: add a prompt column")


def _reply(value):
    return [{"role": "assistant", "content": value}] if isinstance(value, str) else value


def _conversational(text, row, prompt_name):
    """The text with the row's `system` and `history` columns in front of its prompt; these, and the shapes that other projects
    always send through the chat template, make plain strings a conversation."""
    system, chat = row.get("system"), prompt_name in ("instruction", "query")
    if text.raw or system is None and not chat:
        return text
    if isinstance(text.prompt, str):
        text.prompt, text.responses = [{"role": "user", "content": text.prompt}], [_reply(reply) for reply in text.responses]
    if chat:
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
    first = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), None)
    if first is None or messages[-1]["role"] != "assistant":
        return "last turn is not the assistant's"
    if first == 0:
        return "first turn is the assistant's"
    return _checked(Text(messages[:first], [messages[first:]], where))


def _prompted(row, prompt_name, names, where, pair):
    """A prompt column and one or two response columns, each a string, a message or a message list. Of a pair's side only the
    last turn is the response, as in a pair."""
    prompt, replies = _with_input(row, prompt_name, where), [row[name] for name in names]
    if isinstance(prompt, str) and all(isinstance(reply, str) for reply in replies):
        prompt = read_string(prompt, prompt_name, where)
        return _checked(Text(prompt, [read_string(reply, name, where) for reply, name in zip(replies, names)], where))
    messages = read_messages([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt, prompt_name, where)
    conversations = []
    for reply, name in zip(replies, names):
        reply = read_messages(_reply(reply), name, where)
        if isinstance(prompt, str) and reply[0]["role"] != "assistant":      # the full conversation; the prompt repeats one turn of it
            conversations.append(([], reply))
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
    split = split_hh(*(read_string(row[name], name, where) for name in names))
    if isinstance(split, str):
        return split
    prompt, replies = split
    messages = hh_messages(prompt)
    if not messages[-1]["content"]:
        return "empty prompt"  # not an error as in a user's own file: the published data has such rows
    if hh == "text":
        return _checked(Text(prompt, replies, where))
    return _checked(Text(messages, [[{"role": "assistant", "content": reply.strip()}] for reply in replies], where))


def _prompt_only(row, name, where, hh):
    """The prompt in column `name` as a Text without responses, or the reason to drop the row."""
    value = _with_input(row, name, where)
    if name == "chosen":
        if is_transcript(value):
            text = _transcripts(row, [name], where, hh)
            return text if isinstance(text, str) else Text(text.prompt, [], where)
        if not isinstance(value, list):
            raise UserError(f"no prompt in {where}: chosen is neither a message list nor an HH transcript; fix: add a prompt column")
    reply = next((column for column in ("chosen", "completion", "response") if isinstance(row.get(column), (list, dict))), None)
    if isinstance(value, str) and reply and name not in WHOLE:     # a conversation all the same, as for the other kinds
        turns = read_messages(row[reply], reply, where)
        value = turns if turns[0]["role"] != "assistant" else [{"role": "user", "content": value}]
    if isinstance(value, str) and name not in WHOLE:
        return _checked(Text(read_string(value, name, where), [], where))
    turns = read_messages(value, name, where)
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    return _checked(Text(turns, [], where)) if turns else "first turn is the assistant's"


def _with_columns(text, row, name, template):
    """The prompt, in the template's place for it if there is one, and the row's columns for the reward."""
    text.shape = " + ".join(filter(None, ["system" if row.get("system") is not None else "", name]))
    if template:
        question = text.prompt
        if not isinstance(question, str):
            turns = [turn for turn in text.prompt if turn["role"] != "system"]
            if [turn["role"] for turn in turns] != ["user"]:
                raise UserError(f"more than one user turn in {text.where}, but prompt_template has room for one question; "
                                "fix: remove prompt_template or such rows")
            text.shape += ", without its system turn" if len(turns) < len(text.prompt) else ""
            question = turns[0]["content"]
        text.prompt = template.replace("{question}", question)
        text.shape += ", put into prompt_template"
    for column, value in row.items():      # a reward reads it, and parts of it are written to a file
        _check_strings(value, column, text.where)
    verl = row.get("reward_model")
    truth = {"ground_truth": verl["ground_truth"]} if isinstance(verl, dict) and "ground_truth" in verl else {}
    text.extras = {"prompt": text.prompt, "columns": truth | row}
    return text


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
