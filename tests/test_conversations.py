"""Which turns of a conversation are trained, and in which contexts: flags of messages, turns that a prompt
has begun, templates that rewrite their history or take contents as parts. What is trained stands in «»."""
import itertools
import json
import random

import pytest
from helpers import CHATML, assistant, byte_tokenizer, user
from tokenizers import AddedToken

from data.errors import UserError
from data.formats import Text
from data.tokenise import Tokeniser

START, ASK, END = "<|im_start|>", "<|im_start|>assistant\n", "<|im_end|>"
EMPTY = "<think>\n\n</think>\n\n"
# Qwen3 and its successors write earlier turns without their thoughts; the last one gets a frame for them.
REWRITES = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' and loop.last and '</think>' not in m.content %}
{{- '<think>\n\n</think>\n\n' }}{% endif %}
{%- if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1].lstrip() }}
{%- else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
OPENS = REWRITES.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'")
# The distilled R1 models' write thoughts nowhere, and the generation prompt opens them.
STRIPS = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' %}{{ m.content.split('</think>')[-1].lstrip() }}
{%- else %}{{ m.content }}{% endif %}
{{- '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"""
DROPS = STRIPS.replace("assistant\n<think>\n", "assistant\n")
TRIMS = CHATML.replace("message['content']", "message['content'] | trim")
PARTS = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for part in m.content %}
{%- if part.type == 'text' %}{{ part.text }}{% else %}{{ '<image>' }}{% endif %}{% endfor %}
{{- '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
CALLS = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}
{%- for call in m.tool_calls or [] %}
{{- call.function.name }}{{ call.function.arguments }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def encode(template, prompt, *responses):
    """A row's examples, or the reason to drop it."""
    row = Text(prompt, list(responses), "rows.jsonl:7")
    return Tokeniser(byte_tokenizer(template)).encode([row], 10_000)[0]


def shown(template, prompt, *responses):
    """[text of every response behind its prompt], or the reason to drop the row."""
    found, tokenizer = encode(template, prompt, *responses), byte_tokenizer(template)
    if isinstance(found, str):
        return found
    texts = []
    for example in found:
        for response in example.responses:
            text, start = tokenizer.decode(example.prompt), 0
            for trained, run in itertools.groupby(response.trained.tolist()):
                end = start + len(list(run))
                piece = tokenizer.decode(response.tokens[start:end])
                text += f"«{piece}»" if trained else piece
                start = end
            texts.append(text)
    return texts


def starts_with(template, prompt):
    return byte_tokenizer(template).decode(Tokeniser(byte_tokenizer(template)).prompt_ids(prompt))


def turn(role, content):
    return f"{START}{role}\n{content}{END}\n"


# ---- turns that are not to be trained ----

FIRST, SECOND, THIRD = assistant("One."), assistant("Two."), assistant("Three.")
ASKED = turn("user", "a?") + ASK


def untrained(message):
    return message | {"train": False}


def test_an_untrained_turn_is_context():
    a, b, c = user("a?"), user("b?"), user("c?")
    more = f"\n{turn('user', 'b?')}{ASK}"
    assert shown(CHATML, [a], [untrained(FIRST), b, SECOND]) == [f"{ASKED}One.{END}{more}«Two.{END}»"]
    assert shown(CHATML, [a], [FIRST, b, untrained(SECOND)]) == [f"{ASKED}«One.{END}»"]
    assert shown(CHATML, [a], [FIRST, b, untrained(SECOND), c, THIRD]) == [
        f"{ASKED}«One.{END}»{more}Two.{END}\n{turn('user', 'c?')}{ASK}«Three.{END}»"]
    assert shown(CHATML, [a], [FIRST | {"train": True}]) == [f"{ASKED}«One.{END}»"]


def test_an_untrained_turn_of_a_conversation_that_is_split():
    a, b, c = user("a?"), user("b?"), user("c?")
    history = turn("user", "a?") + turn("assistant", "One.") + turn("user", "b?")
    one, two = f"{ASKED}«{EMPTY}One.{END}»", f"{history}{ASK}«{EMPTY}Two.{END}»"
    three = f"{history}{turn('assistant', 'Two.')}{turn('user', 'c?')}{ASK}«{EMPTY}Three.{END}»"
    assert shown(REWRITES, [a], [FIRST, b, SECOND]) == [one, two]
    assert shown(REWRITES, [a], [untrained(FIRST), b, SECOND]) == [two]
    assert shown(REWRITES, [a], [FIRST, b, untrained(SECOND)]) == [one]
    assert shown(REWRITES, [a], [FIRST, b, untrained(SECOND), c, THIRD]) == [one, three]


@pytest.mark.parametrize("template", [CHATML, REWRITES])
def test_a_row_without_a_trained_turn_is_dropped(template):
    turns = [untrained(FIRST), user("b?"), untrained(SECOND)]
    for responses in [turns], [turns[:1], [SECOND]], [[FIRST], turns[2:]]:
        assert encode(template, [user("a?")], *responses) == "no turn of it is to be trained"


def test_thoughts_of_an_untrained_turn_may_be_left_out():
    """They are the history's then; those of a trained turn are not."""
    thinking = assistant("<think>\nred\n</think>\n\nPlum.")
    assert shown(DROPS, [user("a?")], [untrained(thinking), user("b?"), SECOND]) == [
        f"{ASKED}Plum.{END}\n{turn('user', 'b?')}{ASK}«Two.{END}»"]
    said = r"leaves out the thoughts of the assistant's turn \('red'\) in rows.jsonl:7"
    for question in "a?", "Which is red?":           # that word is in the prompt, not in the reply
        with pytest.raises(UserError, match=said):
            encode(DROPS, [user(question)], [thinking])


def test_turns_of_the_assistant_in_a_row():
    """Each is a turn of its own, as the template writes it."""
    assert shown(CHATML, [user("a?")], [FIRST, SECOND]) == [f"{ASKED}«One.{END}»\n{ASK}«Two.{END}»"]
    assert shown(CHATML, [user("a?")], [untrained(FIRST), SECOND, user("b?"), THIRD]) == [
        f"{ASKED}One.{END}\n{ASK}«Two.{END}»\n{turn('user', 'b?')}{ASK}«Three.{END}»"]


# ---- a turn that the prompt has begun ----

@pytest.mark.parametrize("template, begun, context", [
    (CHATML, "The answer is", "The answer is"),
    (CHATML, "The answer is ", "The answer is "),
    (CHATML, "a\n\n", "a\n\n"),
    (TRIMS, "The answer is ", "The answer is"),      # the template's own way
    (CHATML, "<think>\n", "<think>\n"),
    (CHATML, "<think>\nSo", "<think>\nSo"),
    (CHATML, f"{END} a", f"{END} a"),
    (REWRITES, "<think>\nSo", "<think>\nSo"),
    (REWRITES, "It is", f"{EMPTY}It is"),
    (REWRITES, "<think>\nred\n</think>\n\nIt is ", "<think>\nred\n</think>\n\nIt is "),
    (OPENS, "<think>\nSo", "<think>\nSo"),
    (OPENS, "<think>", "<think>\n"),
    (OPENS, "<think>\n", "<think>\n"),
    (OPENS, "It is", f"{EMPTY}It is"),      # thinking is over, since something is said
    (OPENS, "<think>\nred\n</think>\n\nIt is", "<think>\nred\n</think>\n\nIt is"),
    (STRIPS, "<think>\nSo", "<think>\nSo"),
    (STRIPS, "red\n</think>\n\n", "<think>\nred\n</think>\n\n"),
    (STRIPS, "<think>\nred\n</think>\n\nIt", "<think>\nred\n</think>\n\nIt"),
    (STRIPS, "red\n</think>\n\nIt is ", "<think>\nred\n</think>\n\nIt is "),
])
def test_a_begun_turn_is_continued(template, begun, context):
    prompt = [user("a?"), assistant(begun)]
    assert starts_with(template, prompt) == ASKED + context
    example, = encode(template, prompt)              # a prompt without responses, as for online training
    assert byte_tokenizer(template).decode(example.prompt) == ASKED + context
    assert not example.responses


def test_where_a_begun_turn_cannot_be_continued():
    with pytest.raises(UserError, match="opens <think>, but the reply has no thoughts"):
        starts_with(STRIPS, [user("a?"), assistant("It is")])
    closes = OPENS.replace("assistant\n<think>\n", "assistant\n<think>\n\n</think>\n\n")
    with pytest.raises(UserError, match="closes the thoughts, but the turn opens some"):
        starts_with(closes, [user("a?"), assistant("<think>\nSo")])
    shouts = CHATML.replace("message['content']", "message['content'] | replace('it', 'IT')")
    with pytest.raises(UserError, match="changes the text of the assistant's turn that ends the prompt"):
        starts_with(shouts, [user("a?"), assistant("and it")])


@pytest.mark.parametrize("template, begun, replies, texts", [
    (CHATML, "It is", (" 4.", " 5."), ("It is« 4.", "It is« 5.")),
    (CHATML, "It is ", ("4.", "5."), ("It is «4.", "It is «5.")),
    (TRIMS, "It is ", ("4.", "5."), ("It is« 4.", "It is« 5.")),
    (CHATML, "<think>\n", ("a</think>b", "c</think>d"), ("<think>\n«a</think>b", "<think>\n«c</think>d")),
    (OPENS, "<think>\n", ("a</think>b", "c</think>d"), ("<think>\n«a</think>b", "<think>\n«c</think>d")),
    (STRIPS, "<think>\nS", ("a</think>b", "c</think>d"), ("<think>\nS«a</think>b", "<think>\nS«c</think>d")),
    (OPENS, "It is", (" 4.", " 5."), (f"{EMPTY}It is« 4.", f"{EMPTY}It is« 5.")),
])
def test_replies_to_a_begun_turn(template, begun, replies, texts):
    prompt = [user("a?"), assistant(begun)]
    responses = [[assistant(reply)] for reply in replies]
    expected = [f"{ASKED}{text}{END}»" for text in texts]
    assert shown(template, prompt, *responses) == expected
    for response, text in zip(responses, expected):
        assert shown(template, prompt, response) == [text]
        assert starts_with(template, prompt) == text[:text.index("«")]


def test_only_the_first_turn_is_begun_by_the_prompt():
    prompt, turns = [user("a?"), assistant("It is")], [assistant(" 4."), user("b?"), SECOND]
    expected = f"{ASKED}It is« 4.{END}»\n{turn('user', 'b?')}{ASK}«Two.{END}»"
    assert shown(CHATML, prompt, turns) == [expected]


# ---- templates ----

def test_contents_as_parts():
    a, b = user("a?"), user("b?")
    assert shown(PARTS, [a], [FIRST, b, SECOND]) == shown(CHATML, [a], [FIRST, b, SECOND])
    assert shown(PARTS, [a], [FIRST], [SECOND]) == shown(CHATML, [a], [FIRST], [SECOND])
    assert starts_with(PARTS, [a, FIRST, b]) == starts_with(CHATML, [a, FIRST, b])


def test_thoughts_behind_an_opened_tag():
    a, b = user("a?"), user("b?")
    turns = [assistant("<think>\nred\n</think>\n\nPlum."), b, assistant("<think>\nlime\n</think>\n\nFig.")]
    second = f"{turn('user', 'a?')}{turn('assistant', 'Plum.')}{turn('user', 'b?')}{ASK}"
    for template in OPENS, STRIPS:
        assert shown(template, [a], turns) == [f"{ASKED}<think>\n«red\n</think>\n\nPlum.{END}»",
                                               f"{second}<think>\n«lime\n</think>\n\nFig.{END}»"]
    assert shown(REWRITES, [a], turns) == [f"{ASKED}«<think>\nred\n</think>\n\nPlum.{END}»",
                                           f"{second}«<think>\nlime\n</think>\n\nFig.{END}»"]
    for answer in "d", "end", "<|im_end|>", "think":           # the frame holds them too
        assert shown(STRIPS, [a], [assistant(f"<think>\nred\n</think>\n\n{answer}")]) == [
            f"{ASKED}<think>\n«red\n</think>\n\n{answer}{END}»"]
        assert starts_with(REWRITES, [a, assistant(answer)]) == f"{ASKED}<think>\n\n</think>\n\n{answer}"
    assert shown(STRIPS, [a], [FIRST]) == "the generation prompt opens <think>, but the reply has no thoughts"


def test_arguments_of_a_call_are_json():
    """This template writes them as they are given to it; a mapping would come out as Python writes it."""
    arguments = {"town": "Ulm", "días": [1, True, None]}
    call = {"type": "function", "function": {"name": "forecast", "arguments": arguments}}
    text, = shown(CALLS, [user("a?")], [assistant("", tool_calls=[call])])
    assert text == f"{ASKED}«forecast{json.dumps(arguments, ensure_ascii=False)}{END}»"


# ---- tokens ----

def test_contexts_have_the_ids_of_the_whole_text():
    """They are tokenised in sections, each from a special token on that looks at nothing before it."""
    tokenizer = byte_tokenizer()
    special = [AddedToken("<left>", lstrip=True, special=True),
               AddedToken("<right>", rstrip=True, special=True),
               AddedToken("<word>", single_word=True, special=True)]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    pieces = [START, END, "<left>", "<right>", "<word>", "<|endoftext|>", "a", " ", "\n", "é", "b c"]
    draw, rows, texts = random.Random(0), [], []
    for _ in range(100):
        said = "a" + "".join(draw.choices(pieces, k=12)) + "."
        turns = [user(said), assistant(said), user(said), assistant("b")]
        rows += [Text(said, ["!"], "rows.jsonl:7"), Text(turns[:1], [turns[1:]], "rows.jsonl:7")]
        texts += [said + "!" + END, tokenizer.apply_chat_template(turns, tokenize=False).removesuffix("\n")]
    for text, found in zip(texts, Tokeniser(tokenizer).encode(rows, 10_000), strict=True):
        example, = found
        tokens = example.prompt.tolist() + example.responses[0].tokens.tolist()
        assert tokens == tokenizer(text, add_special_tokens=False).input_ids
