"""What a row says beside its texts: flags, thoughts, tools, JSON text, media, class labels, questions and
prefilled turns. Every expectation is written by hand."""

import json
from types import SimpleNamespace

import pytest
from helpers import (
    ONLINE,
    REWARDS,
    byte_tokenizer,
    messages,
    metrics,
    pair_rows,
    prompt_rows,
    refused,
    tiny_model,
    train_here,
    write_config,
    write_jsonl,
)

from data.dataset import build_dataset, load_datasets
from data.errors import RunError
from data.files import read_rows
from data.formats import parse
from data.messages import MARKED_OFF, NAMES, read_messages
from rewards.functions import check_rewards

TOKENIZER, PLAIN = byte_tokenizer(), byte_tokenizer(chat_template=False)
Q, A, BAD = messages("6*7?"), messages("", "42")[1:], messages("", "41")[1:]
CALL = {"name": "area", "arguments": {"wide": 2, "high": [3, None]}}
CALLED = [{"type": "function", "function": CALL}]
TOOL = {"name": "area", "description": "of a box", "parameters": {"type": "object", "properties": {}}}


def read(*turns):
    return read_messages(list(turns), "messages", "x.jsonl:4")


def reply(**keys):
    """The assistant's turn as it is read, of a message with these keys."""
    return read({"role": "assistant", "content": "42"} | keys)[0]


def build(tmp_path, rows, kind="responses", tokenizer=TOKENIZER, name="x.jsonl", **options):
    return build_dataset(write_jsonl(tmp_path / name, rows), kind, tokenizer, 400, **options)


def load(tmp_path, rows, kind="responses", tokenizer=TOKENIZER, **config):
    """load_datasets -> (examples, the report, notices)."""
    notices = []
    common = SimpleNamespace(
        **{
            "data": write_jsonl(tmp_path / "x.jsonl", rows),
            "eval_data": None,
            "eval_fraction": 0.0,
            "seed": 0,
            "max_length": 400,
            "truncate": "none",
            "hh": "messages",
            "system_prompt": None,
            "columns": None,
        }
        | config
    )
    settings = SimpleNamespace(reward=f"{REWARDS}:varied", reward_weights=None)
    examples, _, reports = load_datasets(common, kind, tokenizer, notices.append)
    if kind == "prompts":
        check_rewards(settings, examples)
    return examples, reports["train"], notices


def texts(examples, tokenizer=TOKENIZER):
    """Each example as the text of its prompt and of what is trained of its first response."""
    return [
        (
            tokenizer.decode(example.prompt),
            tokenizer.decode(example.responses[0].tokens[example.responses[0].trained]),
        )
        for example in examples
    ]


# ---- roles ----


@pytest.mark.parametrize(
    "name, role",
    [
        ("system", "system"),
        ("developer", "system"),
        ("user", "user"),
        ("human", "user"),
        ("assistant", "assistant"),
        ("gpt", "assistant"),
        ("tool", "tool"),
        ("function", "tool"),
        ("ipython", "tool"),
        ("observation", "tool"),
        ("function_response", "tool"),
    ],
)
def test_roles(name, role):
    expected = [{"role": role, "content": "said"}]
    assert read({"role": name, "content": "said"}) == read({"from": name, "value": "said"}) == expected


def test_unknown_roles_list_the_known_ones():
    for message in (
        {"role": "narrator", "content": "x"},
        {"from": "narrator", "value": "x"},
        {"role": 3, "content": "x"},
    ):
        said = refused(read, message)
        assert "messages[0] in x.jsonl:4" in said and all(name in said for name in NAMES)


# ---- flags ----


@pytest.mark.parametrize(
    "flags, trained",
    [
        ({"weight": 0}, False),
        ({"weight": 0.0}, False),
        ({"weight": 1}, True),
        ({"weight": 1.0}, True),
        ({"weight": None}, True),
        ({"train": False}, False),
        ({"train": True}, True),
        ({"train": 0}, False),
        ({"loss": False}, False),
        ({"loss": True}, True),
        ({"weight": 1, "loss": False}, False),
        ({"weight": False}, False),
    ],
)
def test_flags(flags, trained):
    expected = {"role": "assistant", "content": "42"} | ({} if trained else {"train": False})
    assert reply(**flags) == expected
    assert read({"from": "gpt", "value": "42"} | flags) == [expected]
    assert read({"role": "user", "content": "q"} | flags) == messages("q")  # never trained anyway
    assert read({"human": "q", "assistant": "42"} | flags) == messages("q") + [expected]


@pytest.mark.parametrize("key", ["weight", "train", "loss"])
@pytest.mark.parametrize("value", [0.5, 2, -1, "0", "false", "", [], [0.0], {}, float("nan")])
def test_flags_that_are_none(key, value):
    said = refused(reply, **{key: value})
    assert said.startswith(
        f"{key} of messages[0] is {value!r}, neither true or false nor 0 or 1, in x.jsonl:4"
    )


@pytest.mark.parametrize(
    "key, value", [("train_detail", [{"begin": 0, "end": 3, "train": False}]), ("loss_scale", 0.5)]
)
def test_what_trains_a_part_of_a_turn_is_refused(key, value):
    assert f"messages[0] has {key!r}" in refused(reply, **{key: value}) and reply(**{key: None}) == A[0]


OFF, NO = {"weight": 0}, {"train": False}
WRONG, ASK = [{"role": "assistant", "content": "43"}], messages("Sure?")


def test_flags_in_conversations():
    """They stay where the turns are a response, and go where they are a prompt."""
    conversation = Q + [WRONG[0] | OFF] + ASK + A
    text = parse({"messages": conversation}, "x:1", "responses")
    assert (text.prompt, text.responses) == (Q, [[WRONG[0] | NO] + ASK + A])
    text = parse({"messages": Q + WRONG + ASK + [A[0] | {"loss": False}]}, "x:1", "responses")
    assert text.responses == [WRONG + ASK + [A[0] | NO]]
    text = parse({"messages": conversation, "label": True}, "x:1", "labelled")
    assert (text.responses, text.extras) == ([[WRONG[0] | NO] + ASK + A], {"label": True})
    text = parse({"prompt": Q + [WRONG[0] | OFF] + ASK, "completion": A}, "x:1", "responses")
    assert (text.prompt, text.responses) == (Q + WRONG + ASK, [A])
    text = parse({"messages": conversation}, "x:1", "prompts")
    assert (text.prompt, text.extras["columns"]) == (Q + WRONG + ASK, {"messages": conversation})
    assert text.extras["prompt"] == text.prompt


@pytest.mark.parametrize(
    "kind, row",
    [
        ("responses", {"messages": Q + [A[0] | OFF]}),
        ("responses", {"messages": Q + [WRONG[0] | OFF] + ASK + [A[0] | {"train": False}]}),
        ("responses", {"prompt": Q, "completion": [A[0] | {"loss": 0}]}),
        ("labelled", {"messages": Q + [A[0] | OFF], "label": False}),
        ("pairs", {"prompt": Q, "chosen": A, "rejected": [BAD[0] | OFF]}),
        ("pairs", {"chosen": Q + [A[0] | OFF], "rejected": Q + BAD}),
        ("pairs", {"messages": Q + [A[0] | OFF], "rejected_response": "41"}),
    ],
)
def test_rows_with_nothing_to_train_are_dropped(kind, row):
    assert parse(row, "x:1", kind) == MARKED_OFF and "weight" in MARKED_OFF


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": Q + [WRONG[0] | OFF] + ASK + A, "rejected": Q + WRONG + ASK + BAD},
        {
            "chosen": Q + WRONG + ASK + [A[0] | {"weight": 1}],
            "rejected": Q + [WRONG[0] | {"train": False}] + ASK + BAD,
        },
        {"prompt": Q + WRONG + ASK, "chosen": Q + [WRONG[0] | OFF] + ASK + A, "rejected": BAD},
        {"prompt": Q + [WRONG[0] | OFF] + ASK, "chosen": A, "rejected": Q + WRONG + ASK + BAD},
    ],
)
def test_flags_do_not_make_two_prompts_of_one(row):
    text = parse(row, "x:1", "pairs")
    assert (text.prompt, text.responses) == (Q + WRONG + ASK, [A, BAD])


def test_flagged_turns_are_not_trained(tmp_path):
    rows = [{"messages": Q + [WRONG[0] | OFF] + ASK + A}, {"messages": Q + [A[0] | OFF]}, {"messages": Q + A}]
    examples, report, notices = load(tmp_path, rows)
    assert [trained for _, trained in texts(examples)] == ["42<|im_end|>", "42<|im_end|>"]
    assert report["dropped"] == {MARKED_OFF: 1} and any(
        MARKED_OFF in line and "1 of 3 rows" in line for line in notices
    )


def test_flags_against_train_on_all(tmp_path):
    rows = [{"messages": Q + A}, {"messages": Q + [WRONG[0] | OFF] + ASK + A}]
    assert "x.jsonl:2, but train_on is all" in refused(build, tmp_path, rows, train_on="all")
    assert build(tmp_path, rows[:1], train_on="all").report["used"] == 1


def test_blank_turns_that_are_not_trained_are_context():
    assert parse(
        {"messages": Q + [{"role": "assistant", "content": "", "weight": 0}] + ASK + A}, "x:1", "responses"
    ).responses
    assert parse({"messages": Q + messages("", "")[1:] + ASK + A}, "x:1", "responses") == "empty response"


# ---- thoughts and tools ----


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts(key):
    assert reply(**{key: "six sevens"}) == A[0] | {"reasoning_content": "six sevens"}
    assert reply(**{key: ""}) == reply(**{key: None}) == A[0]
    assert "messages[0]." + key in refused(reply, **{key: ["a"]})
    assert reply(reasoning="b", thinking="b")["reasoning_content"] == "b"
    assert "different thoughts" in refused(reply, reasoning="a", thinking="b")
    assert "role user" in refused(read, {"role": "user", "content": "q", key: "a"})


@pytest.mark.parametrize(
    "keys, calls",
    [
        ({"tool_calls": [{"type": "function", "function": CALL}]}, CALLED),
        ({"tool_calls": [CALL]}, CALLED),
        (
            {
                "tool_calls": [
                    {
                        "id": "c1",
                        "type": "function",
                        "function": CALL | {"arguments": json.dumps(CALL["arguments"])},
                    }
                ]
            },
            [CALLED[0] | {"id": "c1"}],
        ),
        ({"tool_calls": json.dumps([CALL, CALL])}, CALLED * 2),
        ({"function_call": CALL, "tool_calls": None}, CALLED),
        (
            {"function_call": CALL | {"arguments": "{}"}},
            [{"type": "function", "function": {"name": "area", "arguments": {}}}],
        ),
        (
            {"tool_calls": [{"function": {"name": "now", "arguments": ""}}]},
            [{"type": "function", "function": {"name": "now", "arguments": {}}}],
        ),
        (
            {"tool_calls": [{"function": {"name": "now"}, "id": None}]},
            [{"type": "function", "function": {"name": "now", "arguments": {}}}],
        ),
    ],
)
def test_tool_calls(keys, calls):
    assert reply(**keys, content=None) == {"role": "assistant", "content": "", "tool_calls": calls}
    assert reply(**keys, content="Wait.") == {"role": "assistant", "content": "Wait.", "tool_calls": calls}
    assert (
        parse(
            {"messages": Q + [{"role": "assistant", "content": None} | keys]}, "x:1", "responses"
        ).responses[0][0]["tool_calls"]
        == calls
    )


@pytest.mark.parametrize(
    "call, says",
    [
        ({"name": "f", "arguments": "{x: 1}"}, "messages[0].tool_calls[0].arguments is text, but not JSON"),
        (
            {"name": "f", "arguments": "[1]"},
            "arguments of messages[0].tool_calls[0] are a list, not an object",
        ),
        ({"name": "f", "arguments": 3}, "are a number, not an object"),
        ({"name": "f", "arguments": '{"a": NaN}'}, "not JSON"),
        ({"arguments": {}}, "messages[0].tool_calls[0] is not a tool call"),
        ({"name": ""}, "is not a tool call"),
        ("f()", "not JSON"),
        (3, "is not a tool call"),
        ({"name": "f", "arguments": {"a": "\ud800"}}, "surrogate"),
    ],
)
def test_tool_calls_that_are_none(call, says):
    said = refused(reply, tool_calls=[call] if call != "f()" else call)
    assert says in said and "x.jsonl:4" in said
    assert "both tool_calls and function_call" in refused(reply, tool_calls=[CALL], function_call=CALL)
    assert "role tool" in refused(read, {"role": "tool", "content": "6", "tool_calls": [CALL]})
    assert "messages[0] is null" in refused(reply, content=None, tool_calls=[])


def test_sharegpt_calls_as_llama_factory_writes_them():
    turns = read(
        {"from": "human", "value": "How large?"},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": "6"},
        {"from": "gpt", "value": "Six."},
    )
    assert turns == [
        *messages("How large?"),
        {"role": "assistant", "content": "", "tool_calls": CALLED},
        {"role": "tool", "content": "6"},
        {"role": "assistant", "content": "Six."},
    ]
    (turn,) = read(
        {
            "from": "function_call",
            "value": "<think>\nhm\n</think>\n\n" + json.dumps([CALL, CALL]),
            "loss": False,
        }
    )
    assert turn == {
        "role": "assistant",
        "content": "<think>\nhm\n</think>",
        "tool_calls": CALLED * 2,
        "train": False,
    }
    for value in ("area(2, 3)", "[]", "7"):
        assert "x.jsonl:4" in refused(read, {"from": "function_call", "value": value})


def test_tool_turns_keep_their_names():
    turn = {"role": "tool", "content": "", "tool_call_id": "c1", "name": "area"}
    assert read(turn) == [turn] and read(turn | {"name": None}) == [
        {"role": "tool", "content": "", "tool_call_id": "c1"}
    ]
    assert "messages[0].tool_call_id" in refused(read, turn | {"tool_call_id": 7})
    assert parse({"prompt": Q + [turn]}, "x:1", "prompts").prompt == Q + [turn]  # a tool may answer nothing


FUNCTION = {"type": "function", "function": TOOL}


@pytest.mark.parametrize(
    "tools, expected",
    [
        *((nothing, None) for nothing in (None, "", " ", "[]", "null", [])),
        ([TOOL], [FUNCTION]),
        ([FUNCTION], [FUNCTION]),
        ([{"type": "function"} | TOOL], [FUNCTION]),
        (json.dumps([TOOL, FUNCTION]), [FUNCTION] * 2),
        ([json.dumps(TOOL)], [FUNCTION]),
    ],
)
def test_tools(tools, expected):
    text = parse({"messages": Q + A, "tools": tools}, "x:1", "responses")
    assert text.tools == expected and text.shape == ("tools + messages" if expected else "messages")
    text = parse({"prompt": Q, "tools": tools, "answer": "42"}, "x:1", "prompts")
    assert text.tools == expected and text.extras["columns"] == {"prompt": Q, "tools": tools, "answer": "42"}
    assert (
        parse({"prompt": Q, "chosen": A, "rejected": BAD, "tools": tools}, "x:1", "pairs").tools == expected
    )


@pytest.mark.parametrize(
    "tools, says",
    [
        ("[{'name': 'area'}]", "'tools' is text, but not JSON"),
        ("area", "not JSON"),
        ({"name": "area"}, "'tools' is an object, not a list"),
        ([{}], "tools[0] is not a tool"),
        ([TOOL, "x"], "tools[1] is text"),
        ([3], "tools[0] is not a tool"),
        ("7", "not a list"),
    ],
)
def test_tools_that_are_none(tools, says):
    assert says in refused(parse, {"messages": Q + A, "tools": tools}, "x:1", "responses")


def test_tools_make_a_conversation_of_strings():
    """As a `system` column does; where there is no place for them, they are refused."""
    text = parse({"prompt": "6*7?", "response": "42", "tools": [TOOL]}, "x:1", "responses")
    assert (text.prompt, text.responses, text.tools, text.shape) == (
        Q,
        [A],
        [FUNCTION],
        "tools + prompt + response",
    )
    assert parse({"prompt": "6*7?", "tools": [TOOL]}, "x:1", "prompts").prompt == Q
    assert "raw text" in refused(parse, {"text": "6*7", "tools": [TOOL]}, "x:1", "responses")
    assert "prompt_template" in refused(
        parse, {"prompt": Q, "tools": [TOOL]}, "x:1", "prompts", template="{question}"
    )


def test_fields_that_parquet_fills_with_null_are_no_arguments(tmp_path):
    """Two calls of different tools: every struct of the file has the fields of both. In JSON a null is
    meant."""
    import pyarrow
    import pyarrow.parquet

    calls = [{"name": "area", "arguments": {"wide": 2}}, {"name": "now", "arguments": {"zone": "UTC"}}]
    tools = [{"name": name, "parameters": {"properties": {key: {"type": "string"}}}} for name, key in
             (("area", "wide"), ("now", "zone"))]
    rows = []
    for call, tool in zip(calls, tools):
        turn = {"role": "assistant", "content": None, "tool_calls": [{"function": call}]}
        rows.append({"messages": [*Q, turn], "tools": [tool]})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    for (where, row), call, tool in zip(read_rows(tmp_path / "x.parquet"), calls, tools, strict=True):
        for place in (where, "owner/name:train:3", "owner/name/part:train:3"):
            text = parse(row, place, "responses")
            assert text.responses[0][0]["tool_calls"] == [{"type": "function", "function": call}]
            assert text.tools == [{"type": "function", "function": tool}]
    meant = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"a": None}}]}
    assert read(meant)[0]["tool_calls"][0]["function"]["arguments"] == {"a": None}


# ---- messages as JSON text ----


def dumped(row):
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items()}


@pytest.mark.parametrize(
    "kind, row",
    [
        ("responses", {"messages": Q + A}),
        (
            "responses",
            {"conversations": [{"from": "human", "value": "6*7?"}, {"from": "gpt", "value": "42"}]},
        ),
        ("responses", {"prompt": Q, "completion": A}),
        ("responses", {"prompt": Q, "response": "42"}),
        ("pairs", {"prompt": Q, "chosen": A, "rejected": BAD}),
        ("pairs", {"prompt": "6*7?", "chosen": Q + A, "rejected": Q + BAD}),
        ("pairs", {"chosen": Q + A, "rejected": Q + BAD}),
        (
            "pairs",
            {
                "conversations": [{"from": "human", "value": "6*7?"}],
                "chosen": {"from": "gpt", "value": "42"},
                "rejected": {"from": "gpt", "value": "41"},
            },
        ),
        ("labelled", {"prompt": Q, "chosen": A, "rejected": BAD}),
        ("prompts", {"prompt": Q}),
        ("prompts", {"messages": Q + A}),
        ("prompts", {"prompt": "6*7?", "chosen": Q + A, "rejected": Q + BAD}),
    ],
)
def test_messages_as_json_text(kind, row):
    plain, text = (parse(form, "x:1", kind) for form in (row, dumped(row)))
    assert (text.prompt, text.responses, text.shape) == (plain.prompt, plain.responses, plain.shape)
    assert text.prompt == Q and text.responses == plain.responses
    if kind == "prompts":
        assert text.extras["columns"] == dumped(row)  # a reward gets the columns as they stand in the file


def test_messages_as_json_text_in_csv(tmp_path):
    import csv

    with open(tmp_path / "x.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows(
            [
                ["id", "messages", "tools"],
                [1, json.dumps(Q + [A[0] | {"weight": 1}]), ""],
                [2, json.dumps(Q + A), "[]"],
            ]
        )
    dataset = build_dataset(tmp_path / "x.csv", "responses", TOKENIZER, 400)
    assert (
        texts(dataset.examples)
        == [("<|im_start|>user\n6*7?<|im_end|>\n<|im_start|>assistant\n", "42<|im_end|>")] * 2
    )


@pytest.mark.parametrize(
    "kind, row, says",
    [
        ("responses", {"messages": str(Q + A)}, "'messages' is text, but not JSON"),
        ("responses", {"messages": json.dumps(Q + A)[:-1]}, "'messages' is text, but not JSON"),
        ("responses", {"messages": "7"}, "'messages' is neither text nor a list of messages"),
        ("responses", {"messages": "[]"}, "empty list"),
        ("responses", {"messages": '[{"role": "narrator", "content": "x"}]'}, "unknown role 'narrator'"),
        (
            "pairs",
            {"prompt": "q", "chosen": str(Q + A), "rejected": str(Q + BAD)},
            "'chosen' is text, but not JSON",
        ),
        ("prompts", {"prompt": str(Q)}, "'prompt' is text, but not JSON"),
        (
            "responses",
            {"prompt": str([{"content": "it's", "role": "user"}]), "response": "x"},
            "'prompt' is text, but not JSON",
        ),
    ],
)
def test_text_that_is_no_json(kind, row, says):
    said = refused(parse, row, "x.csv:5", kind)
    assert says in said and "x.csv:5" in said and ("not JSON" not in says or "json.dumps" in said)


@pytest.mark.parametrize(
    "prompt",
    [
        "[1, 2, 3]",
        '{"a": 1}',
        '[{"a": 1}]',
        "[{'value': 3}]  # sort this list",
        '[{"role": "narrator", "name": "x"}]',
        "[{'role': 1}]",
        '[{"role": "user", "content": "q"}] is a message',
        '[{"from": "Ulm", "value": 3}]',
        "{",
        "[]",
    ],
)
def test_other_json_stays_text(prompt):
    text = parse({"prompt": prompt, "response": prompt}, "x:1", "responses")
    assert (text.prompt, text.responses) == (prompt, [prompt])


# ---- images, videos, sound ----


@pytest.mark.parametrize("name", ["image", "images", "video", "videos", "audio", "audios"])
@pytest.mark.parametrize(
    "value", ["cat.jpg", ["cat.jpg"], [{"bytes": None, "path": "cat.jpg"}], {"path": "cat.jpg"}]
)
@pytest.mark.parametrize(
    "kind, row",
    [
        ("responses", {"messages": Q + A}),
        ("prompts", {"prompt": "q"}),
        ("pairs", {"prompt": "q", "chosen": "a", "rejected": "b"}),
    ],
)
def test_columns_that_are_no_text_are_refused(kind, row, name, value):
    said = refused(parse, row | {name: value}, "x.jsonl:2", kind)
    assert (
        f"the column {name!r}, but only text is read, in x.jsonl:2" in said
        and f"columns: {{unused_{name}: {name}}}" in said
    )


def test_what_the_refusal_of_images_advises(tmp_path):
    rows = [{"messages": Q + A, "images": ["a.jpg"]}]
    assert build(tmp_path, rows, columns={"unused": "images"}).report["used"] == 1


@pytest.mark.parametrize(
    "value", [None, "", [], "[]", "null", [None], {}, {"bytes": None, "path": None}, [{"path": None}]]
)
def test_empty_columns_of_images_are_nothing(value):
    assert parse({"messages": Q + A, "images": value}, "x:1", "responses").prompt == Q


@pytest.mark.parametrize(
    "text, dropped",
    [
        ("<image>\nWhat is this?", True),
        ("What is this?\n<image>", True),
        ("<image>What is this?", True),
        ("Look: <image>\nWhat is it?", True),
        ("<video> and after it?", True),
        (" <audio>", True),
        ("What does <image> mean in SVG?", False),
        ("Fix my HTML:\n<video>\n  <source src='a.mp4'>\n</video>", False),
        ("<image>\n<url>x</url>\n</image>\nIs this RSS right?", False),
        ("Which tag plays sound, <video> or <audio>", False),
        ('<image href="a.png"/>', False),
        ("`<image>`", False),
        ("<images>", False),
        ("image", False),
    ],
)
def test_placeholders(text, dropped):
    for kind, row in [
        ("responses", {"messages": messages(text, "a")}),
        ("responses", {"prompt": text, "response": "a"}),
        ("prompts", {"prompt": text}),
        ("responses", {"messages": messages("q", "a", text, "b")}),
        ("pairs", {"prompt": text, "chosen": "a", "rejected": "b"}),
    ]:
        found = parse(row, "x:1", kind)
        assert isinstance(found, str) == dropped and (not dropped or "only text is read" in found)
    assert not isinstance(
        parse({"messages": messages("q", text)}, "x:1", "responses"), str
    )  # the model's own words


# ---- class labels ----


def label_rows(*labels):
    return [
        {"prompt": messages(f"q{i}"), "completion": messages("", f"a{i}")[1:]}
        | ({"label": label} if label != "none" else {})
        for i, label in enumerate(labels)
    ]


def trained(examples):
    return [text.removesuffix("<|im_end|>") for _, text in texts(examples)]


@pytest.mark.parametrize(
    "labels", [(0, 1, 2), (1, 0, "x"), (False, True, 0.5), ("0", "1", "0"), (1, 0, [1]), (2, 2, 2)]
)
def test_class_labels_drop_nothing(tmp_path, labels):
    examples, report, notices = load(tmp_path, label_rows(*labels))
    assert trained(examples) == ["a0", "a1", "a2"] and report["dropped"] == {} and "desirable" not in report
    assert all(example.extras == {} for example in examples)
    said = [line for line in notices if "'label' is ignored" in line]
    first = next(i for i, label in enumerate(labels) if label not in (0, 1)) + 1
    assert len(said) == 1 and f"x.jsonl:{first})" in said[0] and "other values than true and false" in said[0]


@pytest.mark.parametrize(
    "labels, kept", [((1, 0, 1), [0, 2]), ((False, True, "none"), [1, 2]), ((0.0, None, True), [1, 2])]
)
def test_kto_labels_drop_the_undesirable(tmp_path, labels, kept):
    examples, report, notices = load(tmp_path, label_rows(*labels))
    reason = "label is false or 0 (undesirable)"
    assert trained(examples) == [f"a{i}" for i in kept] and report["dropped"] == {reason: 1}
    assert all(example.extras == {} for example in examples) and any(
        f"1 of 3 rows dropped (33.3%): {reason}" in line for line in notices
    )
    assert not any("ignored" in line for line in notices)


def test_a_class_label_far_down_the_file(tmp_path):
    """Rows are tokenised 1,000 at a time; the 2,100th says that the column means something else."""
    examples, report, _ = load(tmp_path, label_rows(*[0, 1] * 1050, 4))
    assert len(examples) == 2101 and report["dropped"] == {}
    assert trained(examples[:3]) == ["a0", "a1", "a2"]  # in the order of the file


def test_class_labels_in_csv(tmp_path):
    for labels, kept in (("0,1,2", "abc"), ("0,1,", "bc"), ("true,FALSE,1", "ac")):
        lines = [f"q,{answer},{label}" for answer, label in zip("abc", labels.split(","))]
        (tmp_path / "x.csv").write_text("\n".join(["instruction,output,label", *lines]) + "\n")
        assert trained(build_dataset(tmp_path / "x.csv", "responses", TOKENIZER, 400).examples) == list(kept)


def test_kto_names_the_row_of_a_class_label(tmp_path):
    assert "the label is 2, neither true or false nor 0 or 1, in" in refused(
        build, tmp_path, label_rows(0, 1, 2), "labelled"
    )
    assert "only undesirable" not in refused(build, tmp_path, label_rows(0, 0, 0), "responses")


def test_undesirable_rows_are_not_counted_twice(tmp_path):
    """Too long comes first; a special token in a dropped row is not told of."""
    rows = label_rows(1, 0, 0)
    rows[1]["completion"][0]["content"] = "x" * 500
    rows[2]["prompt"][0]["content"] = "<|im_end|>"
    report = build(tmp_path, rows).report
    assert (
        report["dropped"] == {"longer than max_length": 1, "label is false or 0 (undesirable)": 1}
        and report["control_tokens"] == 0
    )


# ---- questions and prefilled turns ----


def test_questions_are_turns_where_there_is_a_chat_template(tmp_path):
    row = {"question": "6*7?", "answer": "42"}
    asked = "<|im_start|>user\n6*7?<|im_end|>\n<|im_start|>assistant\n"
    assert texts(build(tmp_path, [row]).examples) == [(asked, "42<|im_end|>")]
    assert texts(build(tmp_path, [row], tokenizer=PLAIN).examples) == [("6*7?", "42<|im_end|>")]
    (prompt,) = build(tmp_path, [row], "prompts").examples
    assert (TOKENIZER.decode(prompt.prompt), prompt.extras["prompt"], prompt.extras["columns"]) == (
        asked,
        Q,
        row,
    )
    (prompt,) = build(tmp_path, [row], "prompts", PLAIN).examples
    assert (PLAIN.decode(prompt.prompt), prompt.extras["prompt"]) == ("6*7?", "6*7?")
    (prompt,) = build(tmp_path, [row], "prompts", template="Q: {question}").examples
    assert TOKENIZER.decode(prompt.prompt) == "Q: 6*7?"
    for pair in (
        {"question": "6*7?", "chosen": "42", "rejected": "41"},
        {"question": "6*7?", "response_j": "42", "response_k": "41"},
    ):
        (example,) = build(tmp_path, [pair], "pairs").examples
        assert texts([example]) == [(asked, "42<|im_end|>")]
        assert len(build(tmp_path, [pair], "labelled").examples) == 2
    assert (
        parse(row, "x:1", "responses").prompt == "6*7?"
        and parse(row, "x:1", "responses", chat=True).prompt == Q
    )


PREFIX = [{"role": "assistant", "content": "<think>"}]


def test_a_prefilled_turn_stays_in_a_prompt():
    assert parse({"prompt": Q + PREFIX, "answer": "42"}, "x:1", "prompts").prompt == Q + PREFIX
    assert parse({"prompt": json.dumps(Q + PREFIX)}, "x:1", "prompts").prompt == Q + PREFIX
    for row in (
        {"messages": Q + A},
        {"conversations": Q + A},
        {"chosen": Q + A, "rejected": Q + BAD},
        {"prompt": "6*7?", "chosen": Q + A, "rejected": Q + BAD},
    ):
        assert parse(row, "x:1", "prompts").prompt == Q  # what the model is to say
    assert parse({"prompt": PREFIX}, "x:1", "prompts") == "first turn is the assistant's"
    assert "the prompt is empty" in refused(parse, {"prompt": Q + messages("", "")[1:]}, "x:1", "prompts")
    said = refused(parse, {"prompt": Q + PREFIX}, "x:1", "prompts", template="{question}")
    assert "an assistant's turn in x:1, but prompt_template has room for one question" in said


# ---- plain strings under a chat tokenizer ----

STRINGS = [
    ("responses", {"prompt": "p", "response": "r"}, {}),
    ("responses", {"prompt": "p", "completion": "r"}, {}),
    ("responses", {"prompt": "p", "chosen": "r", "rejected": "s"}, {}),
    ("responses", {"prompt": "p", "completion": "r", "label": True}, {}),
    ("responses", {"ask": "p", "say": "r"}, {"prompt": "ask", "response": "say"}),
    ("labelled", {"prompt": "p", "completion": "r", "label": True}, {}),
    ("labelled", {"prompt": "p", "response": "r", "kto_tag": True}, {}),
    ("pairs", {"prompt": "p", "chosen": "r", "rejected": "s"}, {}),
    ("pairs", {"prompt": "p", "chosen_response": "r", "rejected_response": "s", "margin": 1}, {}),
    ("pairs", {"ask": "p", "good": "r", "bad": "s"}, {"prompt": "ask", "chosen": "good", "rejected": "bad"}),
    ("prompts", {"prompt": "p", "answer": "r"}, {}),
    ("prompts", {"problem": "p"}, {"prompt": "problem"}),
    ("labelled", {"ask": "p", "say": "r", "ok": True}, {"prompt": "ask", "response": "say", "label": "ok"}),
    ("prompts", {"prompt": "p", "images": ["a.jpg"]}, {"unused": "images"}),
]


@pytest.mark.parametrize("kind, row, columns", STRINGS)
def test_plain_strings_are_told_of_with_the_columns_that_change_it(tmp_path, kind, row, columns):
    """What the notice advises is done: then the same strings are turns, and nothing is told."""
    path = write_jsonl(tmp_path / "x.jsonl", [row, row])
    notices = build_dataset(path, kind, TOKENIZER, 400, columns=columns).notices
    start = f"warning: {path}: plain strings are read without the tokenizer's chat template; to use it write "
    start += "columns: "
    assert len(notices) == 1 and notices[0].startswith(start)
    advised = dict(pair.split(": ") for pair in notices[0].removeprefix(start).strip("{}").split(", "))
    dataset = build_dataset(path, kind, TOKENIZER, 400, columns=advised)
    assert (
        TOKENIZER.decode(dataset.examples[0].prompt)
        == "<|im_start|>user\np<|im_end|>\n<|im_start|>assistant\n"
    )
    assert dataset.notices == []
    assert build_dataset(path, kind, PLAIN, 400, columns=columns).notices == []


@pytest.mark.parametrize(
    "kind, row, options",
    [
        ("responses", {"messages": Q + A}, {}),
        ("responses", {"text": "once"}, {}),
        ("responses", {"question": "q", "answer": "a"}, {}),
        ("prompts", {"prompt": "p"}, {"template": "{question}"}),
        ("responses", {"instruction": "p", "output": "a"}, {}),
        (
            "pairs",
            {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
            {"hh": "text"},
        ),
    ],
)
def test_what_goes_through_the_template_or_is_meant_raw_is_not_told_of(tmp_path, kind, row, options):
    assert build(tmp_path, [row], kind, **options).notices == []


def test_the_notice_comes_once_per_source(tmp_path):
    rows = [{"prompt": f"p{i}", "response": "r"} for i in range(3)]
    sources = [
        {"path": write_jsonl(tmp_path / "a.jsonl", rows)},
        {"path": write_jsonl(tmp_path / "b.jsonl", rows)},
    ]
    _, _, notices = load(tmp_path, rows, data=sources)
    assert sum("plain strings" in line for line in notices) == 2
    verl = {"prompt": "p", "extra_info": {"answer": "r"}}
    assert "write the prompts as messages" in build(tmp_path, [verl]).notices[0]


# ---- a first update without a gradient ----


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def train(model, tmp_path):
    def train(algorithm, rows, **values):
        options = (
            dict(
                algorithm=algorithm,
                model=model,
                data=write_jsonl(tmp_path / "x.jsonl", rows),
                output=tmp_path / "run",
                batch_size=4,
                max_steps=2,
                lr=1e-3,
                max_length=256,
                save_every=1,
            )
            | values
        )
        train_here(write_config(tmp_path / "run.yml", **options))
        return metrics(tmp_path / "run")

    return train


@pytest.mark.parametrize("algorithm, loss", [("dpo", "dpo_loss"), ("simpo", "simpo_loss")])
def test_an_offline_run_without_a_gradient_stops(train, tmp_path, monkeypatch, algorithm, loss):
    import importlib

    module = importlib.import_module(f"algorithms.{algorithm}")
    original = getattr(module, loss)

    def nothing(chosen, rejected, *others, **options):
        return original(0 * chosen, 0 * rejected, *others, **options)

    monkeypatch.setattr(module, loss, nothing)
    with pytest.raises(
        RunError,
        match="gradient of the first update is exactly 0.*pairs whose two responses are the same.*; fix: ",
    ):
        train(algorithm, pair_rows(4))
    assert metrics(tmp_path / "run") == [] and not list((tmp_path / "run" / "checkpoints").glob("*"))


def test_an_online_run_without_a_signal_goes_on(train, tmp_path):
    (tmp_path / "same.py").write_text(
        "def same(prompts, completions, **columns):\n    return [0.5] * len(completions)\n"
    )
    keys = ONLINE["grpo"] | {
        "num_iterations": 1,
        "num_mini_batches": 1,
        "reward": f"{tmp_path / 'same.py'}:same",
    }
    made = train("grpo", prompt_rows(4), **keys)
    assert [row["grad_norm"] for row in made] == [0, 0]
