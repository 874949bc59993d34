"""Which tokens are trained, and at which generation stops, under the chat templates in use: pinned by decoding what is trained.

Every tokenizer is byte-level with the special tokens of its family; in what is shown, trained tokens stand in «»."""
import numpy as np
import pytest
from helpers import CHATML, messages
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from data.errors import UserError
from data.formats import parse
from data.tokenise import Tokeniser, stop_ids

LLAMA3 = ("{% for m in messages %}{{ (bos_token if loop.first else '') + '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
          " + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
MISTRAL = ("{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
           "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
           "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}")
GEMMA = ("{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
         "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n'"
         " + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}")

FAMILIES = {    # template, special tokens, bos, eos, pad, whether the tokenizer itself puts the bos before every text
    "chatml": (CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None, "<|im_end|>", "<|endoftext|>", False),
    "llama3": (LLAMA3, ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"],
               "<|begin_of_text|>", "<|end_of_text|>", "<|end_of_text|>", True),        # pad is eos, and eos does not end a turn
    "mistral": (MISTRAL, ["<s>", "</s>", "[INST]", "[/INST]"], "<s>", "</s>", "</s>", True),               # pad is eos, which does
    "gemma": (GEMMA, ["<pad>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], "<bos>", "<eos>", "<pad>", True),
    "base": (None, ["<s>", "</s>"], "<s>", "</s>", "</s>", True),
}


def family(name, **changed):
    template, special, bos, eos, pad, lead = FAMILIES[name]
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(special)
    if lead:
        backend.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False,
                                        **{"bos_token": bos, "eos_token": eos, "pad_token": pad} | changed)
    tokenizer.chat_template = template
    return tokenizer


def trained(tokenizer, row, kind="responses"):
    """[prompt + response, with the trained tokens in «»] of a row's only example."""
    (example,) = Tokeniser(tokenizer).encode([parse(row, "x:1", kind)], 1000)[0]
    shown = []
    for response in example.responses:
        text, edges = tokenizer.decode(example.prompt), np.flatnonzero(np.diff(response.trained, prepend=False, append=False)).tolist()
        for start, end in zip([0, *edges], [*edges, len(response.tokens)]):
            piece = tokenizer.decode(response.tokens[start:end])
            text += f"«{piece}»" if start < end and response.trained[start] else piece
        shown.append(text)
        assert response.trained[-1]                                          # the stop token is trained
        assert response.tokens[-1] in stop_ids(tokenizer)
    return shown


ANSWER = "四 😀 = 4"
TURNS = messages("2+2？", ANSWER, "more", "no")
LLAMA_Q = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n2+2？<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"


@pytest.mark.parametrize("name, two_turns, stops", [
    ("chatml", f"<|im_start|>user\n2+2？<|im_end|>\n<|im_start|>assistant\n«{ANSWER}<|im_end|>»\n<|im_start|>user\nmore<|im_end|>\n"
               "<|im_start|>assistant\n«no<|im_end|>»", {"<|im_end|>"}),
    ("llama3", LLAMA_Q + f"«{ANSWER}<|eot_id|>»<|start_header_id|>user<|end_header_id|>\n\nmore<|eot_id|>"
               "<|start_header_id|>assistant<|end_header_id|>\n\n«no<|eot_id|>»", {"<|eot_id|>", "<|end_of_text|>"}),
    ("mistral", f"<s>[INST] 2+2？ [/INST]« {ANSWER}</s>»[INST] more [/INST]« no</s>»", {"</s>"}),
    ("gemma", f"<bos><start_of_turn>user\n2+2？<end_of_turn>\n<start_of_turn>model\n«{ANSWER}<end_of_turn>»\n"
              "<start_of_turn>user\nmore<end_of_turn>\n<start_of_turn>model\n«no<end_of_turn>»", {"<end_of_turn>", "<eos>"}),
])
def test_conversations(name, two_turns, stops):
    tokenizer = family(name)
    assert trained(tokenizer, {"messages": TURNS}) == [two_turns]
    first = two_turns[:two_turns.index("»") + 1]
    assert trained(tokenizer, {"messages": TURNS[:2]}) == [first]
    head, _, last = two_turns.rpartition("«")
    head = head.replace("«", "").replace("»", "")                            # in a pair only the last turn is trained
    pair = {"prompt": TURNS[:3], "chosen": TURNS[3:], "rejected": messages("", "x")[1:]}
    assert trained(tokenizer, pair, "pairs") == [f"{head}«{last}", f"{head}«{last.replace('no', 'x')}"]
    assert {tokenizer.convert_ids_to_tokens(i) for i in stop_ids(tokenizer)} == stops
    generated = tokenizer.decode(Tokeniser(tokenizer).prompt_ids(TURNS[:1]))          # generation starts where training does
    assert generated == first[:first.index("«")] and generated.count(tokenizer.bos_token or "\0") == (tokenizer.bos_token is not None)


@pytest.mark.parametrize("name, reason", [("mistral", "Only user and assistant roles"), ("gemma", "System role not supported")])
def test_templates_without_system_turns(name, reason):
    turns = [{"role": "system", "content": "s"}, *TURNS]
    for row in {"messages": turns}, {"messages": TURNS, "system": "s"}:
        result = Tokeniser(family(name)).encode([parse(row, "x:1", "responses")], 1000)[0]
        assert result.startswith("the chat template refuses it: ") and reason in result


def test_system_turns():
    assert trained(family("chatml"), {"messages": TURNS[:2], "system": "短"})[0].startswith(
        "<|im_start|>system\n短<|im_end|>\n<|im_start|>user")
    assert trained(family("llama3"), {"messages": TURNS[:2], "system": "s"})[0].startswith(
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\ns<|eot_id|><|start_header_id|>user")


@pytest.mark.parametrize("name", FAMILIES)
def test_plain_strings_never_see_the_template(name):
    tokenizer = family(name)
    bos, eos = tokenizer.bos_token if FAMILIES[name][-1] else "", tokenizer.eos_token
    assert trained(tokenizer, {"prompt": " 问题 ", "response": ANSWER}) == [f"{bos} 问题 «{ANSWER}{eos}»"]
    assert trained(tokenizer, {"prompt": f"{bos}q", "response": f"a{eos}"}) == [f"{bos}q«a{eos}»"]          # neither of them twice
    assert trained(tokenizer, {"prompt": "q", "chosen": "a", "rejected": "😀"}, "pairs") == [f"{bos}q«a{eos}»", f"{bos}q«😀{eos}»"]


def test_a_base_tokenizer():
    tokenizer = family("base")
    assert trained(tokenizer, {"text": ANSWER}) == [f"<s>«{ANSWER}</s>»"]
    for row in {"messages": TURNS}, {"instruction": "q", "output": "a"}:
        with pytest.raises(UserError, match="x:1, but the tokenizer has no chat template"):
            trained(tokenizer, row)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "base"])
def test_the_pad_token_changes_nothing(name):
    """Masks come from how a row is made, never from token values: pad may be eos, the end of a turn, or missing."""
    rows = {"messages": TURNS}, {"prompt": "q", "response": "a"}
    for pad in family(name).eos_token, "<|im_end|>" if name == "chatml" else "<|eot_id|>" if name == "llama3" else None:
        assert [trained(family(name, pad_token=pad), row) for row in rows] == [trained(family(name), row) for row in rows]


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "base"])
def test_a_turns_text_comes_back_byte_for_byte(name):
    text = "多行\n\n  « 🇩🇪 👩‍👩‍👧 e\u0301 »\ttab «"
    tokenizer = family(name)
    (example,) = Tokeniser(tokenizer).encode([parse({"messages": messages("q", text)}, "x:1", "responses")], 1000)[0]
    assert tokenizer.decode(example.responses[0].tokens, skip_special_tokens=True).strip() == text
