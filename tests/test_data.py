"""From files to token examples, against expectations written by hand."""
import gzip
import itertools
import json
import sys
import types

import numpy as np
import pytest
from helpers import byte_tokenizer
from tokenizers.processors import TemplateProcessing

from data.dataset import Dataset, build_dataset, overlap, split_off
from data.errors import UserError
from data.files import read_rows
from data.formats import parse
from data.hub import hh_messages, hub_rows, split_hh
from data.pack import Example, Response
from data.store import Examples
from data.tokenise import Tokeniser, stop_ids


@pytest.fixture
def write(tmp_path):
    def write(name, content, zipped=False):
        content = content.encode() if isinstance(content, str) else content
        (tmp_path / name).write_bytes(gzip.compress(content) if zipped else content)
        return str(tmp_path / name)
    return write


def rows(path, **options):
    """[(line, row)] of a file."""
    return [(where.removeprefix(f"{path}:"), row) for where, row in read_rows(path, **options)]


def error(function, *arguments, **options):
    with pytest.raises(UserError) as caught:
        result = function(*arguments, **options)
        list(result)  # generators raise when they are read
    assert "\n" not in str(caught.value) and "; fix: " in str(caught.value)
    return str(caught.value)


# ---- files ----

@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("content", [
    '[{"a": 1},\n {"a":\n 2}, {"a": 3}\n]\n',
    '\n[\n{"a": 1}\n,\n{"a": 2},{"a": 3}]',
    '{"data": [{"a": 1}, {"a": 2}, {"a": 3}]}',
    '{"version": 1, "x": [1, {"data": 2}],\n"data": [\n{"a": 1},\n{"a": 2}, {"a": 3}\n], "z": 0}',
])
def test_rows_of_a_json_list_have_numbers(write, content, zipped):
    path = write("x.any" if zipped else "x.json", content, zipped)
    assert rows(path) == [(f"row {i}", {"a": i}) for i in (1, 2, 3)]


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("content, lines", [
    ('{"a": 1}\n\n{"a": 2}\r\n{"a": 3}', ["1", "3", "4"]),
    ('\ufeff{"a": 1}\n{"a": 2}\n{"a": 3}\n', ["1", "2", "3"]),
])
def test_json_lines_have_line_numbers(write, content, lines, zipped):
    path = write("x.any" if zipped else "x.json", content, zipped)
    assert rows(path) == [(line, {"a": i}) for i, line in enumerate(lines, 1)]


def test_unwrapping_is_noted_and_a_single_row_is_not_unwrapped(write, capsys):
    assert len(rows(write("a.json", '{"data": [{"a": 1}]}'))) == 1
    assert "the rows are the list under 'data'" in capsys.readouterr().err
    row = {"messages": [{"role": "user", "content": "x"}]}
    assert rows(write("b.jsonl", json.dumps(row))) == [("1", row)]
    assert rows(write("c.json", "\n" + json.dumps(row, indent=1))) == [("2", row)]
    two = {"question": "q", "answers": [{"text": "x"}]}
    assert rows(write("d.jsonl", json.dumps(two) + "\n" + json.dumps(two))) == [("1", two), ("2", two)]


@pytest.mark.parametrize("row", [
    {"prompt": "q", "response": "a", "tools": [{"type": "function", "function": {"name": "f"}}]},
    {"conversations": [{"human": "q", "assistant": "a"}]},
    {"prompt": "q", "response": "a", "documents": [{"title": "t", "text": "x"}]},
    {"question": "q", "answers": [{"text": "x", "pm_score": 1}]}])
def test_a_single_row_with_a_list_of_objects_is_a_row(write, row, capsys):
    assert rows(write("x.jsonl", json.dumps(row))) == [("1", row)]
    assert rows(write("x.json", json.dumps(row, indent=1))) == [("1", row)]
    wrapper = {"version": "1.0", "name": "mine", "data": [row]}
    assert [found for _, found in rows(write("x.json", json.dumps(wrapper)))] == [row]
    assert capsys.readouterr().err.count("the rows are the list under 'data'") == 1


def test_unicode_line_separators_do_not_end_a_line(write):
    assert rows(write("x.jsonl", '{"a": "x\u2028y\x85z"}\n{"a": 2}')) == [("1", {"a": "x\u2028y\x85z"}), ("2", {"a": 2})]


def test_csv(write):
    text = '\ufeffprompt,response\nq1,"a\nb, ""c"""\n\nq2, x \n' + "q3," + "y" * 200_000
    expected = [("2", {"prompt": "q1", "response": 'a\nb, "c"'}), ("5", {"prompt": "q2", "response": " x "}),
                ("6", {"prompt": "q3", "response": "y" * 200_000})]
    assert rows(write("x.csv", text)) == rows(write("x.csv.gz", text, zipped=True)) == expected
    assert "1 fields, the header has 2) in" in (message := error(rows, write("y.csv", "a,b\n1,2\n3\n"))) and "y.csv:3" in message
    assert "duplicate column" in error(rows, write("z.csv", "a,a\n1,2\n"))


def test_parquet(tmp_path, write):
    import pyarrow
    import pyarrow.parquet
    path = str(tmp_path / "x.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a", "b"], "response": ["c", None]}), path)
    assert rows(path) == [("row 1", {"prompt": "a", "response": "c"}), ("row 2", {"prompt": "b", "response": None})]
    assert "cannot read the Parquet file" in error(rows, write("y.parquet", "not parquet"))


@pytest.mark.parametrize("content, parts", [
    ("", ["empty, no rows"]),
    ("[]", ["empty, no rows"]),
    ("\n \n", ["empty, no rows"]),
    ('{"a": 1}\n{"a": \n{"a": 3}', ["malformed", "x.jsonl:2"]),
    ('{"a": 1}\n{"a": "thr', ["malformed", "seems cut off", "x.jsonl:2"]),
    ('[{"a": 1},\n{"a": "thr', ["malformed", "seems cut off", "x.jsonl:2:7"]),
    ('[{"a": 1}\n{"a": 2}]', ["malformed", "x.jsonl:2:1"]),
    ('[{"a": 1}]\n[{"a": 2}]', ["malformed", "Extra data", "x.jsonl:2:1"]),
    ('{"data": [\n{"a": 1},\n{"a": tru}]}', ["malformed", "x.jsonl:3:7"]),
    ('{"a": 1}\n"text"', ["not an object but a string", "x.jsonl:2"]),
    ("[1]", ["not an object but a number", "x.jsonl:row 1"]),
    ("[{}, [2]]", ["not an object but a list", "x.jsonl:row 2"]),
    ('[{"a": 1}, {"a": 2, "a": 3}]', ["duplicate key 'a'", "x.jsonl"]),
    ('[{"a": [NaN]}]', ["NaN is not JSON", "x.jsonl"]),
    ('{"a": 1, "a": 2}', ["duplicate key 'a'", "x.jsonl:1"]),
    ('{"a": {"b": NaN}}', ["NaN is not JSON", "x.jsonl:1"]),
    ('{"a": 1}\n{"a": -Infinity}\n', ["-Infinity", "x.jsonl:2"]),
    ('{"a": ' + "[" * 100_000, ["malformed", "x.jsonl"]),
    (b'{"a": 1}\n{"a": "\xe9"}', ["not UTF-8", "0xe9", "x.jsonl:2", "iconv"]),
    ('{"a": 1}'.encode("utf-16"), ["not UTF-8", "0xff", "x.jsonl:1", "iconv"]),
])
def test_bad_files(write, content, parts):
    message = error(rows, write("x.jsonl", content))
    assert all(part in message for part in parts), message
    assert ("seems cut off" in message) == ("seems cut off" in parts) or "[[[" in str(content), message


def test_cut_off_gzip(write):
    whole = gzip.compress(b"".join(b'{"a": %d}\n' % i for i in range(5000)))
    assert "gzip file seems cut off" in error(rows, write("x.jsonl.gz", whole[:len(whole) // 2]))


def test_missing_files_directories_and_suffixes(tmp_path, write, monkeypatch):
    write("train.jsonl", '{"a": 1}')
    assert "nearest" in (message := error(rows, str(tmp_path / "trian.jsonl"))) and "train.jsonl" in message
    assert "does not exist" in error(rows, str(tmp_path / "no" / "x.jsonl"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    message = error(rows, "train.jsonl", base=str(tmp_path))
    assert f"{tmp_path}/train.jsonl exists" in message and "directory in which the command runs" in message
    assert "not a data file" in error(rows, write("x.xlsx", b"PK\x03\x04..."))
    assert rows(write("x.txt", '{"a": 1}')) == [("1", {"a": 1})]


# ---- hub and HH ----

def fake_hub(monkeypatch, load_dataset):
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr("data.hub.why_unreachable", lambda repo, kind: None)


def test_hub_names(monkeypatch):
    calls = []

    def load_dataset(*arguments, **options):
        calls.append((arguments, options))
        if "harmless-base" in arguments:
            raise ValueError("BuilderConfig 'harmless-base' not found")
        return [{"chosen": "a"}, {"chosen": "b"}]
    fake_hub(monkeypatch, load_dataset)
    assert [where for where, _ in hub_rows("Anthropic/hh-rlhf")] == ["Anthropic/hh-rlhf:train:1", "Anthropic/hh-rlhf:train:2"]
    assert next(hub_rows("openai/gsm8k/main:test"))[0] == "openai/gsm8k/main:test:1"
    assert next(hub_rows("Anthropic/hh-rlhf/harmless-base:test"))[0] == "Anthropic/hh-rlhf/harmless-base:test:1"
    assert calls == [(("Anthropic/hh-rlhf",), {"split": "train"}), (("openai/gsm8k", "main"), {"split": "test"}),
                     (("Anthropic/hh-rlhf", "harmless-base"), {"split": "test"}),
                     (("Anthropic/hh-rlhf",), {"data_dir": "harmless-base", "split": "test"})]


def test_hub_errors(monkeypatch):
    def load_dataset(*arguments, **options):
        raise ConnectionError("cannot reach the hub\nsecond line")
    fake_hub(monkeypatch, load_dataset)
    message = error(build_dataset, "owner/name", "pairs", byte_tokenizer(), 100)
    assert "neither an existing file" in message and "ConnectionError: cannot reach the hub)" in message
    assert "neither" in error(hub_rows, "no such thing")
    assert "no file" in error(build_dataset, "owner/name.jsonl", "pairs", byte_tokenizer(), 100)
    fake_hub(monkeypatch, lambda *arguments, **options: [])
    assert "empty, no rows in owner/name:train" in error(hub_rows, "owner/name")


HH = "\n\nHuman: hi \n\nAssistant: yes?\n\nHuman: a\n\nb\n\nAssistant:"


def test_split_hh():
    assert split_hh(HH + " good ", HH + " bad") == (HH, [" good ", " bad"])
    assert split_hh(HH + " good") == (HH, [" good"])
    assert split_hh(HH + " good", HH[:-10] + "?\n\nAssistant: bad") == "chosen and rejected do not share their prompt"
    assert split_hh(HH + " good", HH + " bad\n\nHuman: x\n\nAssistant: y") == "chosen and rejected do not share their prompt"
    assert split_hh(HH + " good\n\nHuman: thanks", HH + " bad") == "last turn is not the assistant's"
    assert hh_messages(HH) == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"},
                               {"role": "user", "content": "a\n\nb"}]


# ---- formats ----

def turns(*contents):
    """Messages of alternating roles, the user first."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def sharegpt(*contents):
    return [{"from": ("human", "gpt")[i % 2], "value": content} for i, content in enumerate(contents)]


SYSTEM = [{"role": "system", "content": "be brief"}]
GOOD, BAD = turns("", "good")[1:], turns("", "bad")[1:]


@pytest.mark.parametrize("row, prompt, response", [
    ({"messages": turns("q", "a")}, turns("q"), turns("q", "a")[1:]),
    ({"messages": SYSTEM + turns("q", "a", "r", "b")}, SYSTEM + turns("q"), turns("q", "a", "r", "b")[1:]),
    ({"messages": sharegpt("q", "a")}, turns("q"), turns("q", "a")[1:]),
    ({"conversations": [{"from": "system", "value": "be brief"}] + sharegpt("q", "a")}, SYSTEM + turns("q"), turns("q", "a")[1:]),
    ({"messages": turns("q", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])}, turns("q"), turns("q", "ab")[1:]),
    ({"prompt": " q ", "response": " a\n"}, " q ", " a\n"),
    ({"prompt": "q", "completion": "a", "response": None}, "q", "a"),
    ({"prompt": turns("q"), "completion": turns("q", "a")[1:]}, turns("q"), turns("q", "a")[1:]),
    ({"prompt": turns("q"), "response": "a"}, turns("q"), turns("q", "a")[1:]),
    ({"prompt": turns("q", "a", "r"), "completion": GOOD + turns("s", "b")}, turns("q", "a", "r"), GOOD + turns("s", "b")),
    ({"question": "q", "answer": "a #### 1"}, "q", "a #### 1"),
    ({"text": " raw "}, "", " raw "),
    ({"prompt": "q", "chosen": "good", "rejected": "bad"}, "q", "good"),
    ({"prompt": "q", "chosen": turns("q", "good"), "messages": None}, turns("q"), GOOD),
    ({"prompt": "q", "chosen": SYSTEM + turns("q", "good")}, SYSTEM + turns("q"), GOOD),
    ({"conversations": sharegpt("q"), "chosen": {"from": "gpt", "value": "good"}}, turns("q"), GOOD),
    ({"chosen": HH + " good "}, turns("hi", "yes?", "a\n\nb"), GOOD),
])
def test_responses(row, prompt, response):
    text = parse(row, "x:1", "responses")
    assert (text.prompt, text.responses, text.where, text.raw) == (prompt, [response], "x:1", "text" in row)


@pytest.mark.parametrize("row, prompt, strings", [
    ({"prompt": " q", "chosen": " good", "rejected": "bad "}, " q", True),
    ({"prompt": " q", "chosen_response": " good", "rejected_response": "bad "}, " q", True),
    ({"prompt": turns("q"), "chosen": "good", "rejected": "bad"}, turns("q"), False),
    ({"prompt": turns("q"), "chosen": GOOD, "rejected": BAD}, turns("q"), False),
    ({"prompt": turns("q"), "chosen": turns("q", "good"), "rejected": turns("q", "bad")}, turns("q"), False),
    ({"prompt": "q", "chosen": turns("q", "good"), "rejected": turns("q", "bad"), "score": 1}, turns("q"), False),
    ({"chosen": SYSTEM + turns("q", "a", "r", "good"), "rejected": SYSTEM + turns("q", "a", "r", "bad")},
     SYSTEM + turns("q", "a", "r"), False),
    ({"conversations": sharegpt("q"), "chosen": {"from": "gpt", "value": "good"}, "rejected": {"from": "gpt", "value": "bad"}},
     turns("q"), False),
    ({"chosen": HH + " good", "rejected": HH + " bad"}, turns("hi", "yes?", "a\n\nb"), False),
])
def test_pairs(row, prompt, strings):
    text = parse(row, "x:1", "pairs")
    assert (text.prompt, text.responses) == (prompt, [" good", "bad "] if strings else [GOOD, BAD])


def test_hh_as_text():
    text = parse({"chosen": HH + " good", "rejected": HH + " bad"}, "x:1", "pairs", hh="text")
    assert (text.prompt, text.responses) == (HH, [" good", " bad"])


@pytest.mark.parametrize("kind, row, reason", [
    ("responses", {"prompt": "q", "response": " \n"}, "empty response"),
    ("responses", {"messages": turns("q", "", "r", "b")}, "empty response"),
    ("responses", {"text": " "}, "empty text"),
    ("responses", {"messages": turns("q", "a", "r")}, "last turn is not the assistant's"),
    ("responses", {"messages": turns("q")}, "last turn is not the assistant's"),
    ("responses", {"prompt": turns("q"), "response": turns("q")}, "last turn is not the assistant's"),
    ("responses", {"messages": GOOD}, "first turn is the assistant's"),
    ("responses", {"chosen": "\n\nHuman: \n\nAssistant: a"}, "empty prompt"),
    ("pairs", {"prompt": "q", "chosen": "a", "rejected": ""}, "empty response"),
    ("pairs", {"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen equals rejected"),
    ("pairs", {"chosen": turns("q", "a"), "rejected": turns("q", "a")}, "chosen equals rejected"),
    ("pairs", {"chosen": turns("q", "a"), "rejected": turns("p", "a")}, "chosen and rejected do not share their prompt"),
    ("pairs", {"chosen": turns("q", "a"), "rejected": turns("q", "b", "r", "c")},
     "chosen and rejected do not share their prompt"),
    ("pairs", {"chosen": turns("q"), "rejected": turns("p")}, "last turn is not the assistant's"),
    ("pairs", {"chosen": GOOD, "rejected": BAD}, "first turn is the assistant's"),
])
def test_dropped_rows(kind, row, reason):
    assert parse(row, "x:1", kind) == reason


@pytest.mark.parametrize("kind, row, parts", [
    ("responses", {"ask": "q", "output": "a", "x": None}, ["unknown columns", "found ask, output, x (null)", "messages;"]),
    ("responses", {"prompt": "q", "response": None}, ["unknown columns", "response (null)"]),
    ("responses", {}, ["unknown columns", "found none"]),
    ("pairs", {"prompt": "q", "response": "a"}, ["unknown columns", "prompt + chosen + rejected"]),
    ("pairs", {"prompt": "q", "chosen": "a"}, ["unknown columns"]),
    ("pairs", {"chosen": "a", "rejected": "b"}, ["no prompt"]),
    ("responses", {"prompt": " \t", "response": "a"}, ["prompt is empty"]),
    ("responses", {"messages": turns(" ", "a")}, ["prompt is empty"]),
    ("responses", {"messages": []}, ["empty list"]),
    ("responses", {"messages": "hi"}, ["'messages' is text, but not JSON"]),
    ("responses", {"messages": 3}, ["neither text nor a list"]),
    ("responses", {"messages": ["hi"]}, ["messages[0] is not a message"]),
    ("responses", {"messages": turns("q", None)}, ["messages[1] is null"]),
    ("responses", {"messages": turns("q", 3)}, ["messages[1] is int"]),
    ("responses", {"messages": turns("q", [{"type": "image"}])}, ["other than text"]),
    ("responses", {"messages": [{"role": "bot", "content": "x"}]}, ["unknown role 'bot'"]),
    ("responses", {"messages": [{"role": ["user"], "content": "x"}]}, ["unknown role"]),
    ("responses", {"messages": [{"from": {}, "value": "x"}]}, ["unknown role"]),
    ("responses", {"messages": [{"content": "x"}]}, ["unknown role None"]),
    ("responses", {"messages": turns("q") + [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, ["tool_calls"]),
    ("responses", {"prompt": "q", "response": 4}, ["neither text nor"]),
    ("responses", {"text": 4}, ["text is int"]),
    ("responses", {"prompt": "q", "response": "\ud800"}, ["surrogate"]),
])
def test_malformed_rows(kind, row, parts):
    message = error(parse, row, "x.jsonl:7", kind)
    assert all(part in message for part in parts + ["x.jsonl:7"]), message


# ---- tokens ----

def encode(row, tokenizer, kind="responses", max_length=1000, hh="messages", **options):
    return Tokeniser(tokenizer).encode([parse(row, "x:1", kind, hh)], max_length, **options)[0]


def shown(row, tokenizer, **options):
    """(prompt, [response, with the trained tokens in «»]) of a row's only example, decoded."""
    (example,) = encode(row, tokenizer, **options)
    assert example.where == "x:1" and example.prompt.dtype == np.int32
    responses = []
    for response in example.responses:
        assert response.tokens.dtype == np.int32 and response.trained.dtype == bool and response.trained.any()
        edges = np.flatnonzero(np.diff(response.trained, prepend=False, append=False))
        starts = [0, *edges.tolist(), len(response.tokens)]
        pieces = [tokenizer.decode(response.tokens[a:b]) for a, b in itertools.pairwise(starts)]
        responses.append("".join(piece if i % 2 == 0 else f"«{piece}»" for i, piece in enumerate(pieces)))
    return tokenizer.decode(example.prompt), responses


def add_specials(tokenizer, template, *tokens):
    """Make the tokenizer put its own special tokens around every text, as Llama's and T5's do."""
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in tokens])
    return tokenizer


USER, REPLY, END = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>"


def test_plain_text_ends_with_eos_once():
    for tokenizer in byte_tokenizer(), byte_tokenizer(chat_template=False):  # plain strings stay plain with a chat model
        assert shown({"prompt": " q ", "response": " a\n"}, tokenizer) == (" q ", [f"« a\n{END}»"])
        assert shown({"prompt": "q", "response": f"a{END}"}, tokenizer) == ("q", [f"«a{END}»"])
        assert shown({"prompt": "q", "chosen": "good", "rejected": "b"}, tokenizer, kind="pairs") == (
            "q", [f"«good{END}»", f"«b{END}»"])


def test_plain_text_without_eos_is_an_error():
    tokenizer = byte_tokenizer(chat_template=False)
    tokenizer.eos_token = None
    assert "no eos token" in error(encode, {"prompt": "q", "response": "a"}, tokenizer)
    assert stop_ids(tokenizer) == []


def test_the_tokenizers_own_special_tokens():
    bos = "<|endoftext|>"
    tokenizer = add_specials(byte_tokenizer(), f"{bos} $A {END}", bos, END)
    assert shown({"prompt": "q", "response": "a"}, tokenizer) == (f"{bos}q", [f"«a{END}»"])        # no eos after the prompt
    assert shown({"prompt": f"{bos}q", "response": "a"}, tokenizer) == (f"{bos}q", [f"«a{END}»"])  # never two
    assert shown({"text": "ab"}, tokenizer) == (bos, [f"«ab{END}»"])
    assert shown({"text": f"{bos}ab"}, tokenizer) == (bos, [f"«ab{END}»"])
    assert shown({"messages": turns("q", "a")}, tokenizer) == (f"{USER}q{END}\n{REPLY}", [f"«a{END}»"])  # only the template's


def test_conversation():
    tokenizer = byte_tokenizer()
    assert shown({"messages": SYSTEM + turns("q", "a")}, tokenizer) == (
        f"<|im_start|>system\nbe brief{END}\n{USER}q{END}\n{REPLY}", [f"«a{END}»"])
    assert shown({"messages": turns("q", "a", "r", "b")}, tokenizer) == (
        f"{USER}q{END}\n{REPLY}", [f"«a{END}»\n{USER}r{END}\n{REPLY}«b{END}»"])
    assert shown({"messages": turns("q", f"x{END}y")}, tokenizer)[1] == [f"«x{END}y{END}»"]
    assert shown({"chosen": turns("q", "good"), "rejected": turns("q", "b")}, tokenizer, kind="pairs") == (
        f"{USER}q{END}\n{REPLY}", [f"«good{END}»", f"«b{END}»"])
    assert stop_ids(tokenizer) == [tokenizer.eos_token_id] == [258]


def test_train_on_all():
    tokenizer = byte_tokenizer()
    row = {"messages": turns("q", "a", "r", "b")}
    assert shown(row, tokenizer, train_on="all") == (
        "<|im_start|>", [f"«user\nq{END}\n{REPLY}a{END}\n{USER}r{END}\n{REPLY}b{END}»"])
    assert shown({"prompt": "qu", "response": "a"}, tokenizer, train_on="all") == ("q", [f"«ua{END}»"])


def test_prompt_ids_are_those_of_training():
    tokenizer = add_specials(byte_tokenizer(), "<|endoftext|> $A", "<|endoftext|>")
    for row, prompt in ({"prompt": "q", "response": "a"}, "q"), ({"messages": turns("q", "a")}, turns("q")):
        assert Tokeniser(tokenizer).prompt_ids(prompt) == encode(row, tokenizer)[0].prompt.tolist()
    assert Tokeniser(tokenizer).prompt_ids("q") == tokenizer("q").input_ids


LLAMA = ("{{ '<|endoftext|>' }}{% for m in messages %}{{ '[' + m['role'] + ']\n\n' + (m['content'] | trim) + '<|im_end|>' }}"
         "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]\n\n' }}{% endif %}")


def test_a_template_with_bos_in_its_text():
    tokenizer = add_specials(byte_tokenizer(LLAMA), "<|endoftext|> $A", "<|endoftext|>")
    assert shown({"messages": turns("q", " a ", "r", "b")}, tokenizer) == (
        f"<|endoftext|>[user]\n\nq{END}[assistant]\n\n", [f"«a{END}»[user]\n\nr{END}[assistant]\n\n«b{END}»"])


def test_a_template_without_end_of_turn():
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}" \
               "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    tokenizer = byte_tokenizer(template)
    assert shown({"messages": turns("q", "a")}, tokenizer) == ("user: q\nassistant: ", [f"«a{END}»"])
    first, second = encode({"messages": turns("q", "a", "r", "b")}, tokenizer)      # each learns to stop
    assert [tokenizer.decode(first.prompt), tokenizer.decode(second.prompt)] == [
        "user: q\nassistant: ", "user: q\nassistant: a\nuser: r\nassistant: "]
    replies = [tokenizer.decode(example.responses[0].tokens) for example in (first, second)]
    assert replies == [f"a{END}", f"b{END}"]


def test_a_template_whose_end_of_turn_is_not_eos():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    assert shown({"messages": turns("q", "a")}, tokenizer)[1] == [f"«a{END}»"]
    assert shown({"prompt": "q", "response": "a"}, tokenizer)[1] == ["«a<|endoftext|>»"]
    assert stop_ids(tokenizer) == [256, 258]


def test_text_after_the_last_end_of_turn_is_not_part_of_the_response():
    tokenizer = byte_tokenizer("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
                               "{% endfor %}{{ '<|im_start|>assistant\n' if add_generation_prompt else '<|endoftext|>' }}")
    assert shown({"messages": turns("q", "a", "r", "b")}, tokenizer)[1] == [f"«a{END}»\n{USER}r{END}\n{REPLY}«b{END}»"]


def test_templates_that_cannot_be_used():
    row = {"messages": turns("q", "a", "r", "b")}
    shout = byte_tokenizer("{% for m in messages %}{{ m['role'] + (m['content'] | upper "
                           "if m['role'] == 'assistant' and not loop.last else m['content']) + '<|im_end|>' }}"
                           "{% endfor %}{% if add_generation_prompt %}assistant{% endif %}")
    first, second = encode(row, shout)       # earlier turns look otherwise: every turn has its own context
    assert shout.decode(first.prompt) == "userq<|im_end|>assistant"
    assert shout.decode(first.responses[0].tokens) == f"a{END}"
    assert shout.decode(second.prompt) == "userq<|im_end|>assistantA<|im_end|>userr<|im_end|>assistant"
    assert shout.decode(second.responses[0].tokens) == f"b{END}"
    thinking = byte_tokenizer("{% for m in messages %}{{ m['role'] + m['content'] + '<|im_end|>' }}{% endfor %}"
                              "{% if add_generation_prompt %}assistant<think>{% endif %}")
    assert encode(row, thinking) == "the generation prompt opens <think>, but the reply has no thoughts"
    odd = byte_tokenizer("{% for m in messages %}{{ m['role'] + m['content'] + '<|im_end|>' }}{% endfor %}"
                         "{% if add_generation_prompt %}bot{% endif %}")
    reason = "the chat template's generation prompt is not how it renders the assistant's turn"
    assert encode(row, odd) == reason
    assert "no chat template" in (message := error(encode, row, byte_tokenizer(chat_template=False))) and "x:1" in message
    no_system = byte_tokenizer("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system\nhere') }}{% endif %}"
                               "{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}")
    assert encode({"messages": SYSTEM + turns("q", "a")}, no_system) == "the chat template refuses it: no system"
    assert "no system" in error(Tokeniser(no_system).prompt_ids, SYSTEM + turns("q"))


def test_raw_text_is_cut_into_pieces():
    tokenizer = byte_tokenizer()

    def cut(text, max_length):
        examples = encode({"text": text}, tokenizer, max_length=max_length)
        return [(tokenizer.decode(example.prompt), tokenizer.decode(response.tokens), response.trained.all())
                for example in examples for response in example.responses]
    assert cut("abc", 100) == [("a", f"bc{END}", True)]
    assert cut("abcdefg", 4) == [("a", "bcd", True), ("e", f"fg{END}", True)]
    assert cut("abcdefgh", 4) == [("a", "bcd", True), ("e", "fg", True), ("h", END, True)]  # eos alone would train nothing
    assert "".join(prompt + rest for prompt, rest, _ in cut("abcdefghij" * 5, 7)) == "abcdefghij" * 5 + END


def test_over_long_examples():
    tokenizer = byte_tokenizer()
    row = {"prompt": "0123456789", "chosen": "abc", "rejected": "abcde"}
    assert shown(row, tokenizer, kind="pairs", max_length=16)[0] == "0123456789"      # 10 + 5 + eos
    assert encode(row, tokenizer, kind="pairs", max_length=15) == "longer than max_length"
    assert shown(row, tokenizer, kind="pairs", max_length=15, truncate="prompt") == (
        "123456789", [f"«abc{END}»", f"«abcde{END}»"])
    assert shown(row, tokenizer, kind="pairs", max_length=7, truncate="prompt")[0] == "9"
    assert encode(row, tokenizer, kind="pairs", max_length=6, truncate="prompt") == "longer than max_length"
    assert shown({"messages": turns("q", "a")}, tokenizer, max_length=12, truncate="prompt") == ("assistant\n", [f"«a{END}»"])


def test_hh_with_and_without_a_template(write):
    path = write("hh.jsonl", json.dumps({"chosen": HH + " good", "rejected": HH + " bad"}))
    for tokenizer, hh, prompt, response in [
            (byte_tokenizer(), "messages", f"{USER}hi{END}\n{REPLY}yes?{END}\n{USER}a\n\nb{END}\n{REPLY}", f"good{END}"),
            (byte_tokenizer(), "text", HH, f" good{END}"),
            (byte_tokenizer(chat_template=False), "messages", HH, f" good{END}")]:
        (example,) = build_dataset(path, "pairs", tokenizer, 1000, hh=hh).examples
        assert (tokenizer.decode(example.prompt), tokenizer.decode(example.responses[0].tokens)) == (prompt, response)
        assert example.where == f"{path}:1" and len(example.responses) == 2


def test_batching_changes_nothing():
    tokenizer = byte_tokenizer()
    texts = [parse(row, f"x:{i}", "responses") for i, row in enumerate([
        {"prompt": "q", "response": "a"}, {"messages": turns("q", "a", "r", "b")}, {"text": "abcdef"},
        {"messages": turns("q", "c" * 90)}])]
    together = Tokeniser(tokenizer).encode(texts, 80)
    alone = [Tokeniser(tokenizer).encode([text], 80)[0] for text in texts]
    assert [repr(result) for result in together] == [repr(result) for result in alone] and together[3] == "longer than max_length"
    assert Tokeniser(tokenizer).encode([], 80) == []


# ---- datasets ----

def jsonl(write, name, content):
    return write(name, "".join(json.dumps(row) + "\n" for row in content))


def test_report(write):
    content = [{"prompt": "q" * i, "response": "a"} for i in range(1, 301)]
    content[10]["response"] = " "
    content[20]["response"] = content[30]["response"] = "a" * 1000
    content[40]["response"] = f"a{END}b"
    path = jsonl(write, "x.jsonl", content)
    dataset = build_dataset(path, "responses", byte_tokenizer(), 400)
    report = dataset.report
    assert [len(example.prompt) for example in dataset.examples][:12] == [*range(1, 11), 12, 13]  # the file's order
    assert len(report.pop("sha256")) == 64 and report == {
        "source": path, "read": 300, "used": 297, "dropped": {"empty response": 1, "longer than max_length": 2},
        "first_dropped": {"empty response": f"{path}:11", "longer than max_length": f"{path}:21"},
        "shape": "299 rows read as prompt + response", "duplicates": 0,
        "cut_rows": 0, "split_rows": 0, "continued": 0, "first_continued": None,
        "stop_inside": 1, "first_stop_inside": f"{path}:41",
        "control_tokens": 0, "first_control_tokens": None,
        "prompt_length": {"50": 152, "90": 270, "99": 297, "max": 300},
        "response_length": {"50": 2, "90": 2, "99": 2, "max": 4},
        "total": {"50": 154, "90": 272, "99": 299, "max": 302}}
    raw = build_dataset(jsonl(write, "raw.jsonl", [{"text": "a" * 100}, {"text": "b"}]), "responses", byte_tokenizer(), 40)
    assert (raw.report["cut_rows"], raw.report["read"], raw.report["used"], raw.report["stop_inside"]) == (1, 2, 4, 0)


def test_many_rows_cross_the_chunks(write):
    content = [{"prompt": str(i), "response": "a"} for i in range(2345)]
    dataset = build_dataset(jsonl(write, "x.jsonl", content), "responses", byte_tokenizer(), 50)
    assert [byte_tokenizer().decode(dataset.examples[i].prompt) for i in (0, 999, 1000, 2344)] == ["0", "999", "1000", "2344"]


def test_unusable_data(write):
    row, empty = {"prompt": "q", "response": "aaaa"}, {"prompt": "q", "response": ""}
    path = jsonl(write, "x.jsonl", [row] * 3 + [empty])
    message = error(build_dataset, path, "responses", byte_tokenizer(), 3)
    assert "none of the 4 rows" in message
    assert f"3 longer than max_length (first: {path}:1), 1 empty response (first: {path}:4)" in message
    message = error(build_dataset, path, "responses", byte_tokenizer(), 30)
    assert "1 of 4 rows" in message and "empty response" in message and f"{path}:4" in message
    assert build_dataset(jsonl(write, "y.jsonl", [row] * 99 + [empty]), "responses", byte_tokenizer(), 30).report["used"] == 99


def example(prompt, *responses):
    return Example(np.array(prompt, np.int32), [Response(np.array(r, np.int32), np.ones(len(r), bool)) for r in responses], "x:1")


def test_overlap():
    train = Dataset(Examples.of([example([1, 2], [3], [4]), example([5], [6], [7])]), {})
    evaluation = Dataset(Examples.of([example([1, 2], [3], [4]), example([1], [2, 3], [4]),
                                      example([1, 2], [4], [3]), example([5], [6], [7])]), {})
    assert overlap(train, evaluation) == (2, 3)        # the third has the first one's prompt, other responses


def test_split_off_keeps_the_turns_of_a_conversation_together():
    turns = []
    for row in range(10):
        for turn in range(3):
            prompt = np.arange(row, row + 2 + turn, dtype=np.int32)
            turns.append(Example(prompt, [Response.all_trained([9])], f"x:{row}"))
    train, evaluation = split_off(Dataset(Examples.of(turns), {"read": 10, "used": 30}), 0.2, seed=0)
    rows = [{example.where for example in part.examples} for part in (train, evaluation)]
    assert not rows[0] & rows[1] and len(evaluation.examples) == 6 and len(train.examples) == 24


def test_split_off():
    dataset = Dataset(Examples.of([example([i], [i + 1]) for i in range(20)]), {"read": 21, "used": 20})
    train, evaluation = split_off(dataset, 0.2, seed=1)
    firsts = [[int(e.prompt[0]) for e in part.examples] for part in (train, evaluation)]
    assert [len(part) for part in firsts] == [16, 4] and sorted(firsts[0] + firsts[1]) == list(range(20))
    assert all(part == sorted(part) for part in firsts)
    assert (train.report["used"], evaluation.report["used"], evaluation.report["read"]) == (16, 4, 21)
    again = split_off(dataset, 0.2, seed=1)[1]
    other = split_off(dataset, 0.2, seed=2)[1]
    assert [e.prompt[0] for e in again.examples] == firsts[1] != [e.prompt[0] for e in other.examples]
    assert len(split_off(dataset, 0.001, seed=1)[1].examples) == 1
    assert "eval_fraction" in error(split_off, Dataset(dataset.examples.take([0]), {}), 0.5, 0)
