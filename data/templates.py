"""The keys chat_template, system_prompt and chat_template_kwargs.

All three become part of the tokenizer's own template. So every program here renders by them, final/ is saved
with them, and a server that reads final/ renders what was trained without being told.
"""
import difflib
import json
import re
from pathlib import Path

from data.chat import Chat, Unusable
from data.errors import UserError
from data.files import read_named

FOLDER = Path(__file__).parent / "templates"
SYSTEM = """{{%- if messages and messages[0]['role'] not in ['system', 'developer'] %}}
{{%- set system_prompt = {text} %}}
{{%- set parts = [{{'type': 'text', 'text': system_prompt}}] %}}
{{%- set content = system_prompt if messages[0]['content'] is string else parts %}}
{{%- set messages = [{{'role': 'system', 'content': content}}] + messages %}}
{{%- endif %}}"""
DEFAULT = "{{%- if {name} is not defined %}}{{%- set {name} = {value} %}}{{%- endif %}}"
JSON = "{%- set null = none %}"      # with it jinja reads all of JSON
NOTHING = "{{ '' }}"      # jinja removes a line's end behind a tag of the other kind
CAPTURE = "{%- set whole_conversation %}" + NOTHING
CAPTURED = """{{%- endset %}}
{{%- if add_generation_prompt %}}{{{{ whole_conversation }}}}
{{%- else %}}{{{{ whole_conversation.removesuffix({tail}) + {eos} }}}}
{{%- endif %}}"""
LAST_LINE_END = re.compile(r"(\r\n|\r|\n)\Z")


def set_template(tokenizer, settings, notice):
    """Change the tokenizer's chat template as `settings` say, an object with the three keys. UserError where
    the template cannot do it."""
    if settings.chat_template:
        tokenizer.chat_template = read_template(settings.chat_template, tokenizer)
        if Chat(tokenizer).end_of_turn is None:
            notice(f"chat_template {settings.chat_template}: the tokenizer has no token with which it ends "
                   f"a turn; {tokenizer.eos_token} ends a response")
    arguments = settings.chat_template_kwargs or {}
    asked = [key for key in ("system_prompt", "chat_template_kwargs") if getattr(settings, key)]
    if asked and not tokenizer.chat_template:
        raise UserError(f"{asked[0]} is given, but the tokenizer has no chat template; "
                        "fix: add chat_template: chatml")
    if settings.system_prompt:
        check_system(tokenizer, settings.system_prompt)
    before = []
    for name, value in arguments.items():
        check_known(name, tokenizer.chat_template)
        before.append(DEFAULT.format(name=name, value=as_json(value)))
    if settings.system_prompt:
        before.append(SYSTEM.format(text=as_json(settings.system_prompt)))
    if before:
        prepend(JSON + "".join(before) + NOTHING, tokenizer)


def read_template(name, tokenizer):
    """The text of a built-in template or of a file."""
    known = {path.stem: path for path in sorted(FOLDER.glob("*.jinja"))}
    _, text = read_named("chat_template", name, known)
    if name not in known:
        return text
    text = text.replace("\n", "")              # the lines of ours are for the reader
    starts_with_bos = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    return "{{ bos_token }}" + text if starts_with_bos else text


def check_known(name, template):
    """UserError where a template does not read a variable: it would be ignored."""
    texts = template.values() if isinstance(template, dict) else [template]
    words = set(re.findall(r"[A-Za-z_]\w*", " ".join(texts)))
    if name not in words:
        near = difflib.get_close_matches(name, words, n=1)
        fix = f"write {near[0]}" if near else "remove it"
        raise UserError(f"chat_template_kwargs: the chat template does not read {name!r}; fix: {fix}")


def check_system(tokenizer, system_prompt):
    """UserError where the template has no place for a system turn."""
    turns = [{"role": "system", "content": system_prompt}, {"role": "user", "content": "x"}]
    try:
        rendered = Chat(tokenizer).render(turns, None, True, "a system turn and a question")
        fault = None if system_prompt.strip() in rendered else "leaves out"
    except Unusable:
        fault = "refuses"
    if fault:
        raise UserError(f"system_prompt: the chat template {fault} a system turn; "
                        "fix: remove system_prompt, or give another chat_template")


def end_with_last_turn(tokenizer):
    """Change the chat template, if there is one, so that a conversation ends where the last response does in
    training: without what a template writes behind the end of a turn, and with eos where it has no such
    end."""
    if not tokenizer.chat_template:
        return
    chat = Chat(tokenizer)
    tail, eos = chat.tail, "eos_token"
    if chat.end_of_turn:
        _, _, tail = tail.partition(chat.end_of_turn)
        eos = "''"
    if not chat.end_of_turn or tail:
        surround(CAPTURE, NOTHING + CAPTURED.format(tail=as_json(tail), eos=eos), tokenizer)


def prepend(text, tokenizer):
    surround(text, "", tokenizer)


def surround(before, behind, tokenizer):
    """Put texts before and behind the template, all of them where the tokenizer has several."""
    def changed(body):
        if behind:
            body = LAST_LINE_END.sub("", body)      # as jinja does at the end of a template
        return before + body + behind

    template = tokenizer.chat_template
    if isinstance(template, dict):
        tokenizer.chat_template = {name: changed(body) for name, body in template.items()}
    else:
        tokenizer.chat_template = changed(template)


def as_json(value):
    return json.dumps(value, ensure_ascii=False)
