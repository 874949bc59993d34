"""Every chat template that TRL ships, and one that puts the system turn into the last user turn, with six
kinds of conversations: trained, dropped for a reason that is true, or an error that names what the template
leaves out.

The table says what is right, judged by reading the templates. What is trained is checked against
`apply_chat_template` and the messages alone: contexts, texts, stop tokens, and whose text is trained."""
import importlib.util
import itertools
import re
from pathlib import Path

import pytest
from helpers import assistant, user
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data.errors import UserError
from data.formats import Text
from data.templates import end_with_last_turn
from data.tokenise import Tokeniser, stop_ids

TRL = importlib.util.find_spec("trl")
FOLDER = Path(TRL.origin).parent / "chat_templates" if TRL else None
WHY = "trl is not installed: pip install -r requirements-dev.txt"
pytestmark = pytest.mark.skipif(TRL is None, reason=WHY)

# A number: trained, in so many examples. There are several where the template writes a turn otherwise once
# another one follows.
#   unthinking  dropped: the generation prompt opens <think>, and the template has no way to close it at once
#   closed      dropped: the generation prompt says that there are no thoughts
#   refused     dropped: the template raises an exception
#   reasoning   error: the template knows no thoughts apart from the content (gemma4: beside calls only)
#   tools       error: the template does not tell the model what it may call
#   calls       error: the template shows the tools and their results, but not the calls
TABLE = """
                        one         system      two         thinking    reasoning   tool
cohere                  1           1           1           1           reasoning   tools
cohere2                 1           1           1           1           reasoning   tools
deepseek_r1_distill     unthinking  unthinking  unthinking  2           2           tools
deepseekv3              unthinking  unthinking  unthinking  2           2           tools
diffusion_gemma         1           1           1           1           2           1
gemma                   1           refused     1           1           reasoning   tools
gemma3                  1           1           1           1           reasoning   tools
gemma4                  1           1           1           1           reasoning   1
gemma4_v2               1           1           1           1           reasoning   1
gemma4_v3               1           1           1           1           reasoning   1
gemma4_v4               1           1           1           1           reasoning   1
gemma4_v5               1           1           1           1           2           1
glm4moe                 1           1           2           2           2           2
gptoss                  1           1           2           2           2           1
idefics3                1           1           1           1           reasoning   tools
lfm2                    1           1           1           1           reasoning   calls
lfm2_2_5                1           1           1           2           2           1
lfm2_2_5_v2             1           1           1           2           2           1
lfm2_2_5_vl             1           1           1           2           2           1
lfm2_v2                 1           1           1           1           reasoning   1
llama3                  1           1           1           1           reasoning   tools
llama3_1                1           1           1           1           reasoning   1
llama3_2                1           1           1           1           reasoning   1
llava_next              1           1           1           1           reasoning   tools
muse_glimmer            1           1           1           1           1           1
nemotron_3_5_lightning  1           1           2           2           2           2
nemotron_3_nano         1           1           2           2           2           2
nemotron_3_super        1           1           2           2           2           2
nemotron_3_ultra        1           1           2           2           2           2
phi3                    1           1           1           1           reasoning   tools
phi3_5                  1           1           1           1           reasoning   tools
qwen2_5                 1           1           1           1           reasoning   1
qwen2_5_vl              1           1           1           1           reasoning   tools
qwen3                   1           1           2           2           2           2
qwen3_5_nothink         1           1           2           closed      closed      1
qwen3_5_think           1           1           2           2           2           1
qwen3_6                 1           1           2           2           2           1
qwen3_8                 1           1           1           1           1           1
qwen3_instruct_2507     1           1           1           1           reasoning   1
qwen3_vl                1           1           1           1           reasoning   1
smolvlm                 1           1           1           1           reasoning   tools
system_in_last_turn     1           1           1           1           reasoning   tools
"""
SAID = {"unthinking": "the generation prompt opens <think>, but the reply has no thoughts",
        "closed": "the generation prompt closes the thoughts, but the reply has some",
        "refused": "the chat template refuses it: System role not supported"}
ERRORS = {"reasoning": "leaves out the reasoning_content of the assistant's turn ('ruddy') in rows.jsonl:7",
          "tools": "leaves out the tools in rows.jsonl:7",
          "calls": "leaves out the tool calls of the assistant turn (message 2) in rows.jsonl:7"}
HEAD, *ROWS = [line.split() for line in TABLE.strip().splitlines()]
EXPECTED = {name: dict(zip(HEAD, kinds, strict=True)) for name, *kinds in ROWS}

SYSTEM_IN_LAST_TURN = """{% set system, turns = '', messages %}{% if messages[0].role == 'system' %}
{%- set system, turns = messages[0].content, messages[1:] %}{% endif %}{{- bos_token }}{% for turn in turns %}
{%- if turn.role == 'user' %}{{- '[INST]' }}{% if loop.last and system %}{{- system + '\n\n' }}{% endif %}
{{- turn.content + '[/INST]' }}
{%- elif turn.role == 'assistant' %}{{- turn.content + eos_token }}{% endif %}{% endfor %}"""


# ---- conversations, in which no word of one message occurs in another ----

TOOLS = [{"type": "function", "function": {"name": "forecast", "description": "Sky.", "parameters": {
    "type": "object", "properties": {"town": {"type": "string"}}}}}]
CALL = {"type": "function", "function": {"name": "forecast", "arguments": {"town": "Ulm"}}}


SYSTEM = {"role": "system", "content": "Be brief."}
RESULT = {"role": "tool", "name": "forecast", "content": "wet 7"}
CONVERSATIONS = {
    "one": [user("Which fruit?"), assistant("Plum.")],
    "system": [SYSTEM, user("Which fruit?"), assistant("Plum.")],
    "two": [user("Which fruit?"), assistant("Plum."), user("Next one!"), assistant("Fig.")],
    "thinking": [user("Which fruit?"), assistant("<think>\nruddy\n</think>\n\nPlum."), user("Next one!"),
                 assistant("<think>\nlime\n</think>\n\nFig.")],
    "reasoning": [user("Which fruit?"), assistant("Plum.", reasoning_content="ruddy"), user("Next one!"),
                  assistant("Fig.", reasoning_content="lime")],
    "tool": [user("Which sky?"), assistant("", tool_calls=[CALL]), RESULT, assistant("Umbrella.")],
}


# ---- the templates ----

TOKENS = re.compile(r"<\|[^|<>\s]+\|?>|<[^|<>\s]+\|>|<｜[^｜]+｜>|<(?:start|end)_of_[a-z]+>|"
                    r"\[gMASK\]|<sop>|\[/?INST\]")
STOPS = "<|im_end|>", "<｜end▁of▁sentence｜>", "<|return|>"     # a family's eos, if it has one of these
IN_PARTS = ("idefics3", "llava_next", "smolvlm")                     # they want contents as lists
THINKING = ("gptoss", "lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl")      # they call thoughts `thinking`
APART = ("qwen3_8",)                              # it finds thoughts apart from contents only


def tokenizer_for(name):
    """Byte-level, with the template's special tokens."""
    template = SYSTEM_IN_LAST_TURN
    if name != "system_in_last_turn":
        template = (FOLDER / f"{name}.jinja").read_text()
    special = {"<s>", "</s>", *TOKENS.findall(template)}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(sorted(special))
    eos = next((token for token in STOPS if token in special), "</s>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=eos,
                                        clean_up_tokenization_spaces=False)
    tokenizer.chat_template = template
    return tokenizer


def prompt_of(tokenizer, name, history, tools):
    """The ids with which generation starts, by transformers alone."""
    turns = []
    for turn in history:
        turn = dict(turn)
        if name in THINKING and "reasoning_content" in turn:
            turn["thinking"] = turn.pop("reasoning_content")
        if name in APART and turn["content"].startswith("<think>"):
            thoughts, _, turn["content"] = turn["content"].partition("\n</think>\n\n")
            turn["reasoning_content"] = thoughts.removeprefix("<think>\n")
        if name in IN_PARTS:
            turn["content"] = [{"type": "text", "text": turn["content"]}]
        turns.append(turn)
    return tokenizer.apply_chat_template(turns, tools=tools, add_generation_prompt=True, return_dict=False)


def row_of(conversation, tools=None):
    """Its prompt ends before the assistant's first turn."""
    first = next(i for i, turn in enumerate(conversation) if turn["role"] == "assistant")
    return Text(conversation[:first], [conversation[first:]], "rows.jsonl:7", tools=tools)


def trained_turns(examples):
    """[(all ids before a trained run, the run)] of the examples' responses."""
    found = []
    for example in examples:
        response, = example.responses
        tokens = example.prompt.tolist() + response.tokens.tolist()
        start = len(example.prompt)
        for is_trained, run in itertools.groupby(response.trained.tolist()):
            end = start + len(list(run))
            if is_trained:
                found.append((tokens[:start], tokens[start:end]))
            start = end
    return found


def words(turn):
    """(what a turn says, its thoughts), each a list of texts."""
    thoughts, end, said = turn["content"].rpartition("</think>")
    said = [said.strip()] if said.strip() else []
    for call in turn.get("tool_calls", []):
        said += [call["function"]["name"], *call["function"]["arguments"].values()]
    thoughts = [thoughts.removeprefix("<think>").strip()] if end else []
    return said, [*thoughts, *filter(None, [turn.get("reasoning_content")])]


def check_trained(tokenizer, name, conversation, tools, examples):
    """What is trained, against the messages and the tokenizer."""
    turns, stops = trained_turns(examples), stop_ids(tokenizer)
    assistants = [i for i, turn in enumerate(conversation) if turn["role"] == "assistant"]
    assert len(turns) == len(assistants)
    for i, (context, trained) in zip(assistants, turns):
        assert context == prompt_of(tokenizer, name, conversation[:i], tools)
        assert trained[-1] in stops and not set(trained[:-1]) & set(stops)
        text, before = tokenizer.decode(trained), tokenizer.decode(context)
        said, thoughts = words(conversation[i])
        for part in said + thoughts:
            times = text.count(part)
            assert times == 1 or times and part == "forecast"          # a call may say its name twice
        for other in conversation[:i] + conversation[i + 1:]:
            for part in sum(words(other), []):
                assert part in said or part not in text, "another turn's text is trained"
            if other in conversation[:i]:
                assert all(part in before for part in words(other)[0])


@pytest.mark.parametrize("name", EXPECTED)
def test_templates(name):
    tokenizer = tokenizer_for(name)
    for kind, conversation in CONVERSATIONS.items():
        tools = TOOLS if kind == "tool" else None
        tokeniser, expected = Tokeniser(tokenizer), EXPECTED[name][kind]
        try:
            found = tokeniser.encode([row_of(conversation, tools)], 10_000)[0]
        except UserError as error:
            assert expected in ERRORS and ERRORS[expected] in str(error), (kind, str(error))
            continue
        if isinstance(found, str):
            assert found == SAID.get(expected), kind
            continue
        assert str(len(found)) == expected, kind
        assert tokeniser.split == (len(found) > 1)
        check_trained(tokenizer, name, conversation, tools, found)


def test_the_table_names_every_template():
    shipped = {path.stem for path in FOLDER.glob("*.jinja") if not path.stem.endswith("_training")}
    assert shipped == EXPECTED.keys() - {"system_in_last_turn"}


# ---- kinds that the table has not ----

def shown(tokenizer, conversation, tools=None):
    """[prompt«trained»... of each example], or the reason to drop the row."""
    found = Tokeniser(tokenizer).encode([row_of(conversation, tools)], 10_000)[0]
    if isinstance(found, str):
        return found
    texts = []
    for example in found:
        text = ""
        for context, trained in trained_turns([example]):
            whole = tokenizer.decode(context)
            text += whole[len(text.replace("«", "").replace("»", "")):] + f"«{tokenizer.decode(trained)}»"
        texts.append(text)
    return texts


def test_a_system_turn_in_the_last_user_turn():
    tokenizer = tokenizer_for("system_in_last_turn")
    assert shown(tokenizer, [SYSTEM, *CONVERSATIONS["two"]]) == [
        "<s>[INST]Be brief.\n\nWhich fruit?[/INST]«Plum.</s>»",
        "<s>[INST]Which fruit?[/INST]Plum.</s>[INST]Be brief.\n\nNext one![/INST]«Fig.</s>»"]


@pytest.mark.parametrize("name", ["deepseek_r1_distill", "deepseekv3"])
def test_thoughts_behind_a_prompt_that_opens_them(name):
    """As the model writes them: these templates strip thoughts, so that none of their renderings has any."""
    tokenizer = tokenizer_for(name)
    start, end = "<s>Be brief.<｜User｜>Which fruit?<｜Assistant｜><think>\n", "<｜end▁of▁sentence｜>"
    for turn, written in [
            (assistant("<think>\nruddy\n</think>\n\nPlum."), "ruddy\n</think>\n\nPlum."),
            (assistant("ruddy\n</think>\nPlum."), "ruddy\n</think>\nPlum."),
            (assistant("<think>\n\n</think>\n\nPlum."), "\n</think>\n\nPlum."),        # empty, and it says so
            (assistant("<think>ruddy</think>Plum."), "ruddy</think>Plum."),
            (assistant("<think>\nruddy\n</think>"), "ruddy\n</think>"),
            (assistant("Plum.", reasoning_content="ruddy"), "ruddy\n</think>\n\nPlum.")]:
        assert shown(tokenizer, [SYSTEM, user("Which fruit?"), turn]) == [f"{start}«{written}{end}»"]


@pytest.mark.parametrize("name", [
    "deepseek_r1_distill", "deepseekv3", "nemotron_3_5_lightning", "nemotron_3_nano", "nemotron_3_super",
    "nemotron_3_ultra", "qwen3_5_think", "qwen3_6", "qwen3_8"])
def test_thoughts_as_a_model_writes_them_behind_an_opened_tag(name):
    """Without it, in a chat, and in files of what models have written. The history is that of training."""
    tokenizer, tokeniser = tokenizer_for(name), Tokeniser(tokenizer_for(name))
    asked, more = user("Which fruit?"), user("Next one!")
    assert tokenizer.decode(tokeniser.prompt_ids([asked])).endswith("<think>\n")
    full = assistant("<think>\nruddy\n</think>\n\nPlum.")
    written = assistant("ruddy\n</think>\n\nPlum.")
    assert shown(tokenizer, [asked, full]) == shown(tokenizer, [asked, written])
    assert tokeniser.prompt_ids([asked, full, more]) == tokeniser.prompt_ids([asked, written, more])


def test_thoughts_before_a_call():
    tokenizer = tokenizer_for("deepseekv3")
    turn = assistant("", reasoning_content="ruddy", tool_calls=[CALL])
    text, = shown(tokenizer, [user("Which sky?"), turn])
    context, trained = text.split("«")
    assert context.endswith("<｜Assistant｜><think>\n")
    assert trained.startswith("ruddy\n</think>\n\n<｜tool▁calls▁begin｜>")
    assert 'forecast\n```json\n{"town": "Ulm"}\n```' in trained
    assert trained.endswith("<｜tool▁calls▁end｜><｜end▁of▁sentence｜>»")


@pytest.mark.parametrize("name", ["qwen3_5_think", "qwen3_6", "qwen3_8", "qwen3"])
def test_thoughts_without_an_end(name):
    """These templates write thoughts of their own, empty ones, before them."""
    assert shown(tokenizer_for(name), [user("Which fruit?"), assistant("<think>\nruddy and cut")]) == \
        "the chat template writes empty thoughts before the reply's, which do not end"


@pytest.mark.parametrize("name", ["llama3_1", "llama3_2"])
def test_what_is_said_beside_a_call(name):
    """They write the call alone. In the history that is their way, and no way to train the turn."""
    turns = [user("Which sky?"), assistant("One moment.", tool_calls=[CALL]), RESULT, assistant("Umbrella.")]
    with pytest.raises(UserError, match=r"leaves out the assistant turn \(message 2\) in rows.jsonl:7"):
        shown(tokenizer_for(name), turns, TOOLS)
    turns[1]["train"] = False
    text, = shown(tokenizer_for(name), turns, TOOLS)
    assert text.count("«") == 1 and "forecast" in text and "«Umbrella.<|eot_id|>»" in text


def test_all_tokens_of_a_conversation_whose_history_is_rewritten():
    """train_on: all takes the conversation as one text, which must not lose thoughts."""
    tokenizer = tokenizer_for("qwen3")

    def encode(turns):
        return Tokeniser(tokenizer).encode([row_of(turns)], 10_000, train_on="all")[0]

    example, = encode(CONVERSATIONS["two"])
    whole = tokenizer.apply_chat_template(CONVERSATIONS["two"], tokenize=False).removesuffix("\n")
    assert tokenizer.decode(example.prompt) + tokenizer.decode(example.responses[0].tokens) == whole
    assert example.responses[0].trained.all()
    with pytest.raises(UserError, match="leaves out the thoughts of the assistant's turn .'ruddy'. in rows"):
        encode(CONVERSATIONS["thinking"])


def test_stop_tokens():
    """eos, the end of a turn and of a call. Nothing else ends a turn, such as the frame of a call."""
    stops = {"gptoss": ["<|return|>", "<|call|>"], "gemma4": ["</s>", "<turn|>", "<|tool_response>"],
             "glm4moe": ["</s>"], "qwen3": ["<|im_end|>"], "lfm2_v2": ["<|im_end|>"],
             "llama3_1": ["</s>", "<|eot_id|>"], "phi3": ["</s>", "<|end|>"]}
    for name, tokens in stops.items():
        tokenizer = tokenizer_for(name)
        assert stop_ids(tokenizer) == sorted(tokenizer.convert_tokens_to_ids(tokens)), name


@pytest.mark.parametrize("name", EXPECTED)
def test_a_conversation_that_ends_with_its_last_turn(name):
    """A sequence classifier reads the score at the last token: the template of rm's ends where the response
    does in training, and changes nothing else."""
    tokenizer, turns = tokenizer_for(name), CONVERSATIONS["one"]
    if EXPECTED[name]["one"] == "unthinking":
        turns = [user("Which fruit?"), assistant("Plum.", reasoning_content="ruddy")]
    example, = Tokeniser(tokenizer).encode([row_of(turns)], 10_000)[0]
    if name in IN_PARTS:
        turns = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in turns]

    def rendered(turns, **options):
        return tokenizer.apply_chat_template(turns, tokenize=False, **options)

    before, begun = rendered(turns), rendered(turns[:1], add_generation_prompt=True)
    end_with_last_turn(tokenizer)
    assert rendered(turns[:1], add_generation_prompt=True) == begun
    whole = rendered(turns)
    last = example.responses[0].tokens[-1]
    assert tokenizer(whole).input_ids[-1] == last
    assert before.startswith(whole) or before + tokenizer.decode(last) == whole
