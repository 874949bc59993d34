"""What an unknown key is answered: names of other projects against answers written by hand, and misspellings
of ours."""
import dataclasses
import functools
import re
from pathlib import Path

import pytest
from helpers import tracked

import evaluate
import sample
from engine.advice import MEANINGS, OTHERS, REASONS, advice, is_secret, is_slip, plain
from engine.cast import nearest
from engine.command_line import FLAGS
from engine.config import Common, all_configs, hints_of, unknown_key

TEXT = (Path(__file__).parent / "foreign_names.txt").read_text()
CORPUS = [line.split(maxsplit=2) for line in TEXT.splitlines() if line.strip() and not line.startswith("#")]
PROGRAMS = {"evaluate.py": evaluate.Config, "sample.py": sample.Config}
TRACKED = {path.stem for path in tracked("algorithms/*.py")}
OURS = {name: hints_of(Common) | hints_of(kind) for name, kind in all_configs().items() if name in TRACKED}
KNOWN = OURS | {program: hints_of(kind) for program, kind in PROGRAMS.items()}


@pytest.fixture(autouse=True)
def memory(monkeypatch):
    """Some 50,000 answers ask the same of the same words and files: each is computed once."""
    monkeypatch.setattr("engine.advice.plain", functools.cache(plain))
    monkeypatch.setattr("engine.advice.is_slip", functools.cache(is_slip))
    monkeypatch.setattr("engine.config.all_configs", functools.cache(all_configs))


def answer(name, user):
    """The sentence that a user sees."""
    if user in PROGRAMS:
        return f"unknown key {name!r} (command line)" + advice(name, KNOWN[user], user, user)
    return str(unknown_key(name, "x.yml:4", user, KNOWN[user]))


def test_the_corpus_is_large_and_of_every_project():
    names = [name for name, *_ in CORPUS]
    assert len(set(names)) >= 300
    for project in ("TRL", "ms-swift", "LLaMA-Factory", "verl", "OpenRLHF", "axolotl", "Minimal-LLM", "GRPO"):
        assert re.search(rf"^# ---- .*{project}", TEXT, re.MULTILINE)
    pairs = [(name, user) for name, user, _ in CORPUS]
    assert len(pairs) == len(set(pairs))


def test_every_name_of_other_projects():
    """All at once: a failure shows every wrong answer."""
    wrong = []
    for name, user, expected in CORPUS:
        said = answer(name, user)
        fault, fix = said.rsplit("; fix: ", 1)
        if expected == "-":
            told = fault.startswith(("unknown key", f"{name} (x.yml:4) is used"))
            right = told and fix.startswith("remove it (")
        elif expected.startswith("because "):
            right = expected.removeprefix("because ") in fault.partition(": ")[2] and fix == "remove it"
        else:
            key = expected.partition(":")[0]
            right = re.fullmatch(rf"write {expected}( and \w+)?( \(.*\))?", fix) and key in KNOWN[user]
        if not right:
            wrong.append(f"{name} in {user}: expected {expected!r}, got {said!r}")
    assert not wrong, "\n".join(wrong)


def test_tables_lead_to_keys_and_hide_none():
    """Every answer is a key of something, no key is called needless, and a foreign name of two answers is
    meant so."""
    keys = set().union(*KNOWN.values())
    for meanings in MEANINGS.values():
        for meaning in meanings:
            assert set(meaning.key.split(" and ")) <= keys
            assert set(meaning.users) <= KNOWN.keys()
    own = set().union(*OURS.values())
    assert not {plain(key) for key in own} & REASONS.keys()
    common = {plain(field.name) for field in dataclasses.fields(Common)}
    assert common & MEANINGS.keys() <= {"batchsize", "columns"}      # batch_size is no key of evaluate.py


def typos(key):
    """Every single slip in a word of at least four letters: a letter lost, doubled, wrong, or swapped with
    the next."""
    for word in re.finditer(r"[a-z]{4,}", key):
        for i in range(*word.span()):
            yield key[:i] + key[i + 1:]
            yield key[:i] + key[i] + key[i:]
            yield key[:i] + "q" + key[i + 1:]
            if i + 1 < word.end():
                yield key[:i] + key[i + 1] + key[i] + key[i + 2:]


def test_misspellings_of_our_keys():
    tried, wrong = 0, []
    for user, known in KNOWN.items():
        for key in known:
            for typo in {*typos(key), key.upper(), key.replace("_", "-"), key.replace("_", "")} - set(known):
                meant = plain(typo) in MEANINGS or plain(typo) in REASONS
                if meant or typo in OTHERS or any(typo in other for other in OURS.values()):
                    continue
                tried += 1
                said = advice(typo, known, user)
                if not re.match(rf"; fix: write {key}( |$)", said):
                    wrong.append(f"{typo} for {key}: {said}")
    assert tried > 5000 and not wrong, "\n".join(sorted(set(wrong))[:40])


@pytest.mark.parametrize("name", [
    "eval_model", "data_model", "lora_beta", "top_n", "min_grad_norm", "load_in_8bit", "max_reward",
    "model_data", "sample_model", "keep_model", "save_model", "eval_precision", "reference_model_data",
    "batch_tokens", "epochs_per_save", "lr_model", "x", "lo",
])
def test_another_word_is_no_misspelling(name):
    assert advice(name, KNOWN["dpo"], "dpo") == "; fix: remove it (python train.py --help lists the keys)"


def test_no_key_is_taken_for_a_flag():
    assert not [key for known in KNOWN.values() for key in known if nearest(key, FLAGS.values())]


@pytest.mark.parametrize("name", [
    "hf_token", "HF_TOKEN", "token", "hub_token", "access_token", "my_token", "hf_token_2", "wandb_api_key",
    "swanlab_api_key", "password", "client_secret", "apikey", "api_key",
])
def test_secrets(name):
    assert is_secret(name)


@pytest.mark.parametrize("name", [
    "stop_token", "stop_token_id", "stop_token_ids", "eos_token", "pad_token_id", "bos_token", "image_token",
    "token_level_loss", "per_token_loss", "max_tokens", "tokenizer", "special_tokens", "token_ids",
])
def test_tokens_of_a_text_are_no_secrets(name):
    assert not is_secret(name)
