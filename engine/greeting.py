"""What chat.py knows of a run before the first line: questions of the kind it was trained on, how they were
put, and how it is decoded."""
import itertools
from collections import Counter
from collections.abc import Iterator

from data.errors import UserError, notice
from data.formats import parse, read_template
from data.local import local_data
from data.sources import rename, source_name
from engine.options import stop_strings
from engine.results import trained_template, training_config, usual_or_trained_stop
from rewards.functions import is_model, parts_of

ROWS = 50           # of the data, among which questions are looked for
LONGEST = 200       # characters of a question that is shown
SAMPLED = 0.7       # temperature


def usual_temperature(model: str) -> float:
    """0 for a run that a verifier has trained: there an answer is right or wrong. Else 0.7."""
    reward = training_config(model).get("reward", "null")
    parts = [] if reward == "null" else parts_of(reward)
    return 0.0 if any(not is_model(part) for part in parts) else SAMPLED


def form_of_questions(model: str, settings) -> tuple[str | None, list[str]]:
    """(the text in which a run got its questions, at {question}, None where a line is a turn of a
    conversation; the strings that end its completions). With a key of the chat template in `settings` every
    line is a turn. UserError where the text is in a file that is gone."""
    trained = training_config(model)
    name = trained_template(trained)
    if settings.chat_template or settings.system_prompt or settings.chat_template_kwargs:
        name = None
    strings = stop_strings(usual_or_trained_stop(name, trained))
    if name is None:
        return None, strings
    notice(f"{model}: every line is a question of its own, in prompt_template {name}")
    try:
        return read_template(name), strings
    except UserError as error:
        raise UserError(f"model: {name}, the prompt_template of {model}, cannot be read; "
                        "fix: put the file back, or pass --chat-template") from error


def questions(model: str, count: int = 2) -> list[str]:
    """Prompts of a run's held-out rows, else of its training rows; [] for what is no run, and where its data
    are not here any more."""
    config = training_config(model)
    data = config.get("eval_data", "null")
    if data == "null":
        data = config.get("data", [])
    sources = [{"path": data}] if isinstance(data, str) else data
    columns = config.get("columns", "null")
    found = {}
    try:
        for source in sources:
            own = source.get("columns", {} if columns == "null" else columns)
            for text in asked(source_name(source), own):
                found[text] = None
                if len(found) == count:
                    return list(found)
    except (UserError, OSError, ValueError):
        pass                              # such as a hub dataset, or a file that is gone
    return list(found)


def asked(name: str, columns: dict) -> Iterator[str]:
    """Yield the questions of the first rows that are one short line."""
    for where, row in itertools.islice(local_data(name).rows(Counter()), ROWS):
        text = parse(rename(row, columns, where), where, "prompts", chat=True)
        if isinstance(text, str):         # the reason why the row is dropped
            continue
        prompt = text.prompt
        question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        if question.strip() and "\n" not in question.strip() and len(question) <= LONGEST:
            yield question.strip()
