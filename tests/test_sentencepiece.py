"""Real sentencepiece tokenizers, which put a space before every text. Prompts and responses get the ids that
TRL gives them, and that the sentencepiece library itself gives. Whole runs equal TRL's. Generation starts
with the ids of training.

The tokenizers are Mistral's v1 and v3 out of the package mistral-common, in the three conversions that are in
use. The space stands before the first section of a text only (transformers' own default), or before every
section between special tokens (legacy), or the normalizer puts it there (tokenizer.json files of Llama-2's
time)."""
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from helpers import config_of, messages, random_lm
from test_trl_parity import assert_equal_metrics, train_ours, train_trl
from tokenizers import normalizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
)

from data.formats import parse
from data.tokenise import Tokeniser, stop_ids
from model.load import load_tokenizer

PACKAGES = "trl", "mistral_common", "sentencepiece"
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
WHY = f"{MISSING} not installed: pip install -r requirements-dev.txt"
pytestmark = pytest.mark.skipif(bool(MISSING), reason=WHY)

FILES = {"v1": "tokenizer.model.v1", "v3": "mistral_instruct_tokenizer_240323.model.v3"}
FORMS = [("v1", "first"), ("v1", "always"), ("v1", "normalizer"), ("v3", "first")]
# `generation` marks for TRL what is trained; the texts are the same without it.
ZEPHYR = """{% for m in messages %}{{ '<|' + m['role'] + '|>\n' }}{% if m['role'] == 'assistant' %}
{%- generation %}{{ m['content'] + eos_token }}{% endgeneration %}{% else %}{{ m['content'] + eos_token }}
{%- endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""
INST = """{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}
{{- '[INST] ' + m['content'] + ' [/INST]' }}
{%- else %}{% generation %}{{ ' ' + m['content'] + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"""
# What follows a special token is a section of its own, here without a space of the template's.
TIGHT = INST.replace("' ' + m['content'] + eos_token", "m['content'] + eos_token")
TEMPLATES = {"zephyr": ZEPHYR, "inst": INST, "tight": TIGHT}

STRINGS = [("2+2=", "4"), ("Name a fruit:", " Plum, of course."), ("Name a fruit: ", "Plum"), ("a ", " b "),
           ("问：你好吗？\n答：", "很好，谢谢 😀"), ("\n\nHuman: Hi\n\nAssistant:", " Hello\n\nthere"),
           ("<b>", "bold</b>")]
CODE = ("def f(x):\n", "    return x  # done\n")    # the library cuts runs of spaces in another way
CHATS = [messages("fruit?", "Plum.", "more?", "Fig."),
         messages("  two  spaces ", " led by one", "\nq", "def f():\n    pass"),
         messages("你好", "很好 😀", "naïve café?", "4")]


# ---- tokenizers and models ----

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def saved(folder, version, legacy):
    """A directory with Mistral's .model file, as a model's author publishes it."""
    import mistral_common
    source = Path(mistral_common.__file__).parent / "data" / FILES[version]
    shutil.copy(source, folder / "tokenizer.model")
    config = SPECIAL | {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": legacy}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """(version, form) -> tokenizer."""
    found = {}
    for version, form in FORMS:
        folder = saved(tmp_path_factory.mktemp("tokenizer"), version, form == "always")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if form == "normalizer":
            backend = tokenizer.backend_tokenizer
            steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            backend.normalizer = normalizers.Sequence(steps)
            backend.pre_tokenizer = None
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)
        tokenizer.pad_token = "<unk>"
        found[version, form] = tokenizer
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{version: the directory of a tiny random model}, without a tokenizer."""
    values = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.05}
    found = {}
    for version, config_class, vocabulary in (("v1", LlamaConfig, 32000), ("v3", MistralConfig, 32768)):
        found[version] = tmp_path_factory.mktemp(version)
        config = config_of(config_class, vocab_size=vocabulary, **values)
        random_lm(config).save_pretrained(found[version])
    return found


def with_template(tokenizer, name):
    """The tokenizer with one of TEMPLATES, or none."""
    tokenizer.chat_template = TEMPLATES.get(name)
    return tokenizer


def examples(tokenizer, row, kind="responses"):
    """-> a row's examples, and whether a response was tokenised apart from its prompt."""
    tokeniser = Tokeniser(tokenizer)
    found = tokeniser.encode([parse(row, "x:1", kind)], 1000)[0]
    assert not isinstance(found, str), found
    return found, "x:1" in tokeniser.continued


def ids(example):
    """[prompt, responses ...], as lists."""
    return [example.prompt.tolist(), *(response.tokens.tolist() for response in example.responses)]


def labels(example):
    """The tokens of an example with one response; and the same with -100 where they are not trained."""
    response, = example.responses
    prompt, tokens = example.prompt.tolist(), response.tokens.tolist()
    trained = [token if keep else -100 for token, keep in zip(tokens, response.trained)]
    return prompt + tokens, [-100] * len(prompt) + trained


# ---- TRL's ids ----

def trl_rows(trainer_name, model, tokenizer, rows, folder, **options):
    """What one of TRL's trainers makes of the rows: its own, tokenised dataset."""
    import trl
    from datasets import Dataset
    trainer_class = getattr(trl, f"{trainer_name}Trainer")
    config_class = getattr(trl, f"{trainer_name}Config")
    arguments = config_class(output_dir=str(folder), max_length=1000, bf16=False, use_cpu=True,
                             report_to="none", disable_tqdm=True, **options)
    policy = AutoModelForCausalLM.from_pretrained(model)
    trainer = trainer_class(model=policy, args=arguments, processing_class=tokenizer,
                            train_dataset=Dataset.from_list(rows))
    return list(trainer.train_dataset)


@pytest.mark.parametrize("version, form", FORMS)
def test_strings_have_trls_ids(version, form, tokenizers, models, tmp_path):
    tokenizer = with_template(tokenizers[version, form], None)
    rows = [{"prompt": prompt, "completion": response} for prompt, response in [*STRINGS, CODE]]
    theirs = trl_rows("SFT", models[version], tokenizer, rows, tmp_path)
    for row, their in zip(rows, theirs, strict=True):
        (example,), apart = examples(tokenizer, row)
        spans = labels(example)[0] != their["input_ids"]       # then TRL's context is not the prompt's own
        assert apart == spans
        if not spans:
            assert labels(example) == (their["input_ids"], their["labels"]), row
    pairs = []
    for prompt, response in STRINGS:
        pairs.append({"prompt": prompt, "chosen": response, "rejected": f"{response} No"})
    theirs = trl_rows("DPO", models[version], tokenizer, pairs, tmp_path)
    for row, their in zip(pairs, theirs, strict=True):
        (example,), apart = examples(tokenizer, row, "pairs")
        if not apart:
            assert ids(example) == [their["prompt_ids"], their["chosen_ids"], their["rejected_ids"]], row


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("version, form", FORMS)
def test_chats_have_trls_ids(version, form, template, tokenizers, models, tmp_path):
    tokenizer = with_template(tokenizers[version, form], template)
    rows = [{"messages": chat} for chat in CHATS]
    theirs = trl_rows("SFT", models[version], tokenizer, rows, tmp_path, assistant_only_loss=True)
    for row, their in zip(rows, theirs, strict=True):          # every turn of the assistant's is trained
        (example,), apart = examples(tokenizer, row)
        tokens, trained = labels(example)
        if template == "zephyr":                               # it writes a line feed behind the last turn
            for column in "input_ids", "labels":
                their[column] = their[column][:len(tokens)]
        assert not apart
        assert (tokens, trained) == (their["input_ids"], their["labels"]), row
    pairs = []
    for chat in CHATS:
        pairs.append({"prompt": chat[:3], "chosen": chat[3:], "rejected": messages("", "No")[1:]})
    theirs = trl_rows("DPO", models[version], tokenizer, pairs, tmp_path)
    for row, their in zip(pairs, theirs, strict=True):
        (example,), apart = examples(tokenizer, row, "pairs")
        prompt, chosen, rejected = ids(example)
        assert not apart
        assert prompt == their["prompt_ids"]
        assert chosen == their["chosen_ids"][:len(chosen)]
        assert rejected == their["rejected_ids"][:len(rejected)]


# ---- without TRL ----

@pytest.mark.parametrize("version, form", FORMS)
def test_strings_have_the_ids_of_the_sentencepiece_library(version, form, tokenizers, tmp_path):
    from sentencepiece import SentencePieceProcessor
    path = saved(tmp_path, version, False) / "tokenizer.model"
    encode = SentencePieceProcessor(model_file=str(path)).encode
    tokenizer = with_template(tokenizers[version, form], None)
    for prompt, response in STRINGS:
        (example,), apart = examples(tokenizer, {"prompt": prompt, "response": response})
        ours, reply = ids(example)
        assert ours == Tokeniser(tokenizer).prompt_ids(prompt) == [1, *encode(prompt)]
        assert reply[-1] == 2
        if not apart:
            assert ours[1:] + reply[:-1] == encode(prompt + response)


@pytest.mark.parametrize("version, form", FORMS)
def test_no_space_that_the_data_has_not(version, form, tokenizers):
    tokenizer = with_template(tokenizers[version, form], None)
    for prompt, response in STRINGS:
        (example,), _ = examples(tokenizer, {"prompt": prompt, "response": response})
        ours, reply = ids(example)
        assert tokenizer.decode(ours[1:]) == prompt
        assert tokenizer.decode(ours[1:] + reply[:-1]) == prompt + response


@pytest.mark.parametrize("prompt, response", [
    ("Hello wor", "ld"), ("The ans", "wer is 4."), ("caf", "és and bars"), ("q: ", "four"),
    ("问：你", "们好吗"),
    ("a\n", "\nb"), ("1", "234"), ("x  ", "  y")])
@pytest.mark.parametrize("version, form", FORMS)
def test_a_token_that_would_span_both(version, form, prompt, response, tokenizers):
    """Generation has the prompt's own ids before it, so training has them too. The rest spells the response,
    and is counted."""
    tokenizer = with_template(tokenizers[version, form], None)
    (example,), apart = examples(tokenizer, {"prompt": prompt, "response": response})
    ours, reply = ids(example)
    whole = tokenizer(prompt + response).input_ids
    assert ours == tokenizer(prompt).input_ids
    assert apart == (whole[:len(ours)] != ours)
    assert tokenizer.decode(ours[1:] + reply[:-1]) == prompt + response
    assert reply[-1] == 2
    pair = {"prompt": prompt, "chosen": response, "rejected": " no"}
    (example,), _ = examples(tokenizer, pair, "pairs")         # one prompt for both
    assert ids(example)[:2] == [ours, reply]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("version, form", FORMS)
def test_generation_starts_with_the_ids_of_training(version, form, template, tokenizers):
    tokenizer = with_template(tokenizers[version, form], template)
    tokeniser = Tokeniser(tokenizer)
    for chat in CHATS:
        (example,), _ = examples(tokenizer, {"messages": chat})
        whole, trained = labels(example)
        starts = [i for i in range(1, len(whole)) if trained[i - 1] == -100 != trained[i]]
        for start, history in zip(starts, (chat[:1], chat[:3]), strict=True):
            text = tokenizer.apply_chat_template(history, tokenize=False, add_generation_prompt=True)
            expected = tokenizer(text, add_special_tokens=False).input_ids
            assert tokeniser.prompt_ids(history) == whole[:start] == expected
        ends = [token for token, after in zip(trained, [*trained[1:], -100]) if token != -100 == after]
        assert ends == stop_ids(tokenizer) * 2


# ---- whole runs ----

CHAT_ROWS, STRING_ROWS, PAIR_ROWS, CHAT_PAIRS = [], [], [], []
for i in range(12):
    chat = messages(f"Say {i}", f"{i} it is" * (i % 3 + 1), "Why?", f"Because {i}.")
    prompt, reply = "what " * (i % 3) + f"{i}+{i}=", f"{2 * i}" + " it is" * (i % 4)
    CHAT_ROWS.append({"messages": chat})
    STRING_ROWS.append({"prompt": prompt, "completion": reply})
    PAIR_ROWS.append({"prompt": prompt, "chosen": reply, "rejected": "no" * (5 - i % 5)})
    rejected = messages("", "No" + "!" * (i % 3))[1:]
    CHAT_PAIRS.append({"prompt": chat[:3], "chosen": chat[3:], "rejected": rejected})
REWARDS = ["rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"]


@pytest.mark.parametrize("version, algorithm, template, rows, options, compared", [
    ("v1", "sft", None, STRING_ROWS, {}, []),
    ("v3", "sft", "inst", CHAT_ROWS, {"assistant_only_loss": True}, []),
    ("v3", "dpo", None, PAIR_ROWS, {}, REWARDS),
    ("v1", "dpo", "tight", CHAT_PAIRS, {}, REWARDS)])
def test_runs_equal_trls(version, algorithm, template, rows, options, compared, tokenizers, models, tmp_path):
    tokenizer = with_template(tokenizers[version, "first"], template)
    model = str(shutil.copytree(models[version], tmp_path / "model"))
    tokenizer.save_pretrained(model)
    ours = train_ours(tmp_path, algorithm, model, rows, batch_size=4)
    theirs = train_trl(tmp_path, f"trl.{algorithm.upper()}Trainer", options, model, rows, 4, tokenizer)
    assert_equal_metrics(ours, theirs, compared)


@pytest.mark.parametrize("legacy", [True, False])
def test_final_tokenises_as_training_did(legacy, models, tmp_path):
    model = saved(Path(shutil.copytree(models["v1"], tmp_path / "model")), "v1", legacy)
    (model / "chat_template.jinja").write_text(ZEPHYR)
    train_ours(tmp_path, "sft", str(model), CHAT_ROWS, batch_size=6)
    before = Tokeniser(load_tokenizer(str(model)))
    after = Tokeniser(load_tokenizer(str(tmp_path / "ours" / "final")))
    assert ("▁" in before.tokenizer.tokenize("a</s>\nb")) == legacy
    for chat in CHATS:
        assert before.prompt_ids(chat[:3]) == after.prompt_ids(chat[:3])
