"""The reward model: its scores, its margin, and what other programs load of it."""
import json
import math
from types import SimpleNamespace

import family_models
import numpy as np
import pytest
import torch
from helpers import (
    byte_tokenizer,
    final_weights,
    metrics,
    pair_rows,
    random_lm,
    train_here,
    trained_weights,
    write_config,
    write_jsonl,
)
from helpers import config_of as tiny_config
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from data.pack import Example, Response
from model.off_the_shelf import Classifier
from model.policy import Policy
from model.reward_model import build_reward_model


def pad_is_eos(tokenizer):
    tokenizer.pad_token = tokenizer.eos_token


def no_spare_token(tokenizer):
    """Pad is eos, and the only other added token ends turns, too."""
    pad_is_eos(tokenizer)
    tokenizer.eos_token = tokenizer.pad_token = "<|endoftext|>"
    tokenizer.bos_token = "<|im_start|>"


TOKENIZERS = {"pad": lambda tokenizer: None, "pad is eos": pad_is_eos, "no spare token": no_spare_token}


@pytest.fixture(scope="module", params=TOKENIZERS)
def trained(request, tmp_path_factory):
    """A finished run of four updates: .run, .rows (its pairs), .printed"""
    folder = tmp_path_factory.mktemp("rm")
    tokenizer = byte_tokenizer()
    TOKENIZERS[request.param](tokenizer)
    random_lm(tiny_config()).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    data = write_jsonl(folder / "data.jsonl", pair_rows(10))
    run = train(folder, "run", model=folder / "model", data=data, eval_data=data, max_steps=4)
    return SimpleNamespace(folder=folder, run=run, data=data)


def train(folder, name, **values):
    values = dict(batch_size=4, lr=1e-2, max_length=256, save_every="null", seed=3) | values
    train_here(write_config(folder / f"{name}.yml", algorithm="rm", output=folder / name, **values))
    return folder / name


def sequences(tokenizer):
    """Token ids of every response after its prompt: (ids of the prompt, ids of the response)."""
    found = []
    for row in pair_rows(10):
        prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        for side in ("chosen", "rejected"):
            response = row[side][0]["content"] + "<|im_end|>"
            found.append((tokenizer(prompt).input_ids, tokenizer(response).input_ids))
    return found


def plain_scores(run, found):
    """One response at a time: the model's last hidden state at the response's end, times the head."""
    lm = AutoModelForCausalLM.from_pretrained(run / "final", dtype=torch.float32)
    head = load_file(run / "final" / "value_head.safetensors")["v_head.summary.weight"]
    assert head.shape == (1, 32)
    scores = []
    for prompt, response in found:
        with torch.no_grad():
            output = lm(torch.tensor([prompt + response]), output_hidden_states=True)
        scores.append(output.hidden_states[-1][0, -1] @ head[0])
    return torch.stack(scores)


def test_scores_equal_a_plain_forward(trained):
    final = str(trained.run / "final")
    found = sequences(AutoTokenizer.from_pretrained(final))
    expected = plain_scores(trained.run, found)
    lm = AutoModelForCausalLM.from_pretrained(final, attn_implementation="segments")
    reward_model = build_reward_model(Policy(lm), final, seed=0)
    pairs = []
    for (prompt, chosen), (_, rejected) in zip(found[::2], found[1::2]):
        responses = [Response.all_trained(chosen), Response.all_trained(rejected)]
        pairs.append(Example(np.array(prompt, np.int32), responses, ""))
    with torch.no_grad():
        scores = reward_model(reward_model.collate(pairs))
    assert torch.allclose(scores, expected, rtol=1e-5, atol=1e-5) and expected.std() > 0.01
    losses = torch.nn.functional.softplus(expected[1::2] - expected[::2])
    last = metrics(trained.run, "eval")[-1]                  # on the same pairs
    assert last["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert last["accuracy"] == pytest.approx((expected[::2] > expected[1::2]).float().mean().item())


def test_the_classifier_gives_equal_scores(trained):
    """One by one and in padded batches, right and left; with the tokenizer that was saved with it."""
    folder = trained.run / "classifier"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    assert classifier.config.pad_token_id == tokenizer.pad_token_id
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id, end_of_turn)
    found = sequences(AutoTokenizer.from_pretrained(trained.run / "final"))
    expected = plain_scores(trained.run, found)
    rows = [prompt + response for prompt, response in found]
    with torch.no_grad():
        single = torch.cat([classifier(torch.tensor([row])).logits[:, 0] for row in rows])
        assert torch.allclose(single, expected, rtol=1e-5, atol=1e-5)
        for side in ("right", "left"):
            tokenizer.padding_side = side
            batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
            assert torch.allclose(classifier(**batch).logits[:, 0], expected, rtol=1e-5, atol=1e-5), side


def test_the_classifier_reads_what_its_template_renders(trained):
    """A conversation as transformers renders it ends where the response did in training."""
    folder = str(trained.run / "classifier")
    expected = plain_scores(trained.run, sequences(AutoTokenizer.from_pretrained(trained.run / "final")))
    conversations = []
    for row in pair_rows(10):
        conversations += [row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder)
    batch = tokenizer.apply_chat_template(conversations, padding=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        theirs = classifier(**batch).logits[:, 0]
    assert torch.allclose(theirs, expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(Classifier(folder).scores(conversations), expected, rtol=1e-5, atol=1e-5)


def test_a_classifier_of_a_model_that_reads_images(tmp_path):
    """Its class takes the pad token from the part that reads text."""
    family_models.save_model("qwen3_5_full", tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    data = write_jsonl(tmp_path / "data.jsonl", pair_rows(4))
    run = train(tmp_path, "run", model=tmp_path / "model", data=data, max_steps=1)
    classifier = AutoModelForSequenceClassification.from_pretrained(run / "classifier")
    rows = [[65, 66, 67, 258], [65, 258]]
    with torch.no_grad():
        one_by_one = torch.cat([classifier(torch.tensor([row])).logits for row in rows])
        tokenizer = AutoTokenizer.from_pretrained(run / "classifier")
        batch = tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
        assert torch.allclose(classifier(**batch).logits, one_by_one, rtol=1e-5, atol=1e-5)


def test_a_run_continues_a_reward_model(trained):
    """Its head is loaded with the trunk: before the first update it scores as the finished run does."""
    data = dict(data=trained.data, eval_data=trained.data)
    again = train(trained.folder, "again", model=trained.run / "final", max_steps=1, **data)
    before, after = metrics(again, "eval")
    last = metrics(trained.run, "eval")[-1]
    for name in last.keys() - {"step", "split"}:
        assert before[name] == pytest.approx(last[name]), name
    assert after["loss"] != before["loss"]
    ours, theirs = trained_weights(again), trained_weights(trained.run)
    assert not torch.equal(ours["v_head.summary.weight"], theirs["v_head.summary.weight"])


def test_margins(tmp_path):
    """One pair per update: -log sigmoid(difference - margin), and another first update than without."""
    random_lm(tiny_config()).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    margins = [0.5, 2.0, -1.0, 0.0, 3.0]
    rows = [row | {"margin": margin} for row, margin in zip(pair_rows(5), margins)]
    options = dict(model=tmp_path / "model", batch_size=1, epochs=1, shuffle="false")
    run = train(tmp_path, "run", data=write_jsonl(tmp_path / "margins.jsonl", rows), **options)
    for row, margin in zip(metrics(run), margins, strict=True):
        assert row["loss"] == pytest.approx(math.log(1 + math.exp(margin - row["margin"])), rel=1e-5)
    without = train(tmp_path, "without", data=write_jsonl(tmp_path / "plain.jsonl", pair_rows(5)), **options)
    first, second = metrics(run)[:2]
    first_without, second_without = metrics(without)[:2]
    assert first["margin"] == first_without["margin"] and second["margin"] != second_without["margin"]


def test_what_is_printed_and_saved(trained, capsys):
    """No command to talk to it; the language model's files are those of any run."""
    train(trained.folder, "printed", model=trained.folder / "model", data=trained.data, max_steps=1)
    printed = capsys.readouterr().out
    assert "model    " in printed and "metrics  " in printed and "chat" not in printed
    assert "lm_head.weight" in final_weights(trained.run)
    config = json.loads((trained.run / "classifier" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForSequenceClassification"]
