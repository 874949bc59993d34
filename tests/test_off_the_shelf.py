"""Sequence classifiers that somebody else trained, as rewards: their scores are transformers' own."""
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    ONLINE,
    byte_tokenizer,
    messages,
    metrics,
    prompt_rows,
    run_train,
    tiny_model,
    train_here,
    write_config,
    write_jsonl,
)
from robust_helpers import join, train_on_ranks
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

import evaluate
from data.errors import RunError, UserError
from engine.forecast import reward_model_bytes
from model.off_the_shelf import Classifier, together
from rewards.functions import is_model

TEMPLATE = ("{{ bos_token }}{% for message in messages %}[{{ message.role }}] {{ message.content }} [end]\n"
            "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}")
CONVERSATIONS = [messages("Why?", "Because."), messages("one two three", "it is " * 9), messages("a", ""),
                 messages("Say 3", "three", "and then?", "four, of course")]


def other_tokenizer(padding=True, template=TEMPLATE):
    """One that joins bytes, unlike the policies' here."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=special)
    texts = ["it is what it is", "one two three", "[assistant]", "[user]", "[end]"]
    tokenizer.train_from_iterator(texts, trainer)
    pad = {"pad_token": "<pad>"} if padding else {}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **pad)
    wrapped.chat_template = template
    return wrapped


def save_classifier(folder, padding=True, labels=1, template=TEMPLATE, **values):
    tokenizer = other_tokenizer(padding, template)
    sizes = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, num_labels=labels,
                 initializer_range=0.3, pad_token_id=tokenizer.pad_token_id, bos_token_id=0, eos_token_id=1)
    torch.manual_seed(1)
    LlamaForSequenceClassification(LlamaConfig(**sizes | values)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return save_classifier(tmp_path_factory.mktemp("rewards") / "skywork")


def own_scores(path, conversations):
    """Transformers' own scores, one conversation at a time."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    scores = []
    for conversation in conversations:
        ids = tokenizer.apply_chat_template(conversation, return_tensors="pt", return_dict=False)
        with torch.no_grad():
            scores.append(model(ids).logits[0, 0])
    return torch.stack(scores)


def texts(tokens):
    return byte_tokenizer().decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("padding", [True, False])
def test_scores_are_transformers_own(tmp_path, padding):
    """Rows of any lengths, with a token for padding and without."""
    path = save_classifier(tmp_path / "rm", padding)
    expected = own_scores(path, CONVERSATIONS)
    assert len(set(expected.tolist())) == 4
    found = Classifier(path, texts)
    torch.testing.assert_close(found.scores(CONVERSATIONS), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.scores(CONVERSATIONS[::-1]), expected.flip(0), rtol=1e-5, atol=1e-5)
    assert found.scores([]).shape == (0,)
    assert found.model.config.pad_token_id == (2 if padding else None)


def test_rows_of_similar_length_are_computed_together():
    assert together([10, 100, 12, 12, 13, 99]) == [[0, 2, 3], [4], [5, 1]]
    assert together([]) == []
    assert together([4096, 4096, 4096]) == [[0, 1], [2]]      # at most 8192 tokens


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    return tiny_model(folder / "model"), write_jsonl(folder / "prompts.jsonl", prompt_rows(6))


def grpo(folder, policy, reward, **values):
    model, data = policy
    options = ONLINE["grpo"] | dict(algorithm="grpo", model=model, data=data, output=folder / "run")
    options |= dict(max_steps=2, batch_size=2, lr=1e-3, reward=reward, num_iterations=1, sample_every=1)
    options |= dict(max_length=200)
    return write_config(folder / "config.yml", **options | values)


def test_grpo_learns_from_a_classifier(tmp_path, policy, classifier):
    """The logged reward is the classifier's score of prompt and completion; two processes are one."""
    train_here(grpo(tmp_path, policy, classifier))
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert len(rows) > 2
    prompts = {row["prompt"][0]["content"] if isinstance(row["prompt"], list) else row["prompt"]: row
               for row in prompt_rows(6)}
    conversations = []
    for row in rows:
        prompt, = [text for text in prompts if text in row["prompt"]]
        completion = row["completion"].replace("<|im_end|>", "").replace("<|endoftext|>", "")
        conversations.append(messages(prompt, completion))
    expected = own_scores(classifier, conversations)
    assert [row["reward"] for row in rows] == pytest.approx(expected.tolist(), abs=1e-5)
    (tmp_path / "two").mkdir()
    done = run_train([grpo(tmp_path / "two", policy, classifier)], processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    for two, one in zip(metrics(tmp_path / "two" / "run"), metrics(tmp_path / "run"), strict=True):
        assert two.pop("split") == one.pop("split") and two == pytest.approx(one, rel=1e-4, abs=1e-4)


def test_ppo_and_several_rewards(tmp_path, policy, classifier):
    """A classifier reads other tokens than the policy, so the critic starts from the start model."""
    model, data = policy
    keys = ONLINE["ppo"] | dict(algorithm="ppo", model=model, data=data, output=tmp_path / "run", max_steps=2)
    keys |= dict(reward=f"{classifier}, {keys['reward']}", reward_weights="1, 0.5")
    keys |= dict(max_length=200, eval_data="null")
    train_here(write_config(tmp_path / "config.yml", **keys))
    assert "rewards/skywork/mean" in metrics(tmp_path / "run")[0]
    events = (tmp_path / "run" / "events.log").read_text()
    assert "critic: the start model's trunk under a head of 0" in events


def test_the_classifier_of_an_rm_run(tmp_path, policy, classifier):
    """A run of rm whose tokenizer is another one: the error names its classifier, which is taken."""
    from helpers import pair_rows
    other = tiny_model(tmp_path / "other", vocab_size=259)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<x>"])
    tokenizer.save_pretrained(tmp_path / "other")
    from transformers import AutoModelForCausalLM
    lm = AutoModelForCausalLM.from_pretrained(other)
    lm.resize_token_embeddings(260)
    lm.save_pretrained(other)
    data = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(6))
    train_here(write_config(tmp_path / "rm.yml", algorithm="rm", model=other, data=data, max_length=200,
                            output=tmp_path / "rm", max_steps=1, batch_size=2))
    with pytest.raises(UserError, match=f"another tokenizer .*; fix: reward={tmp_path}/rm/classifier, "):
        train_here(grpo(tmp_path, policy, tmp_path / "rm"))
    train_here(grpo(tmp_path, policy, tmp_path / "rm" / "classifier"))
    assert (tmp_path / "run" / "final").exists()


def test_completions_scored_by_a_classifier(tmp_path, policy, classifier):
    model, data = policy
    output = tmp_path / "results"
    words = [model, f"data={data}", f"reward={classifier}", "n=2", "max_completion_length=4"]
    evaluate.main([*words, f"output={output}"])
    file, = output.glob("*_results.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    conversations = []
    for row in rows:
        prompt = row["prompt"]
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        conversations.append([*turns, {"role": "assistant", "content": row["generation"]}])
    expected = own_scores(classifier, conversations).tolist()
    assert [row["metrics"]["reward"] for row in rows] == pytest.approx(expected, abs=1e-5)


# ---- refused, before the policy's weights are loaded

def refuses(folder, policy, reward, text, kind=UserError, monkeypatch=None):
    with pytest.raises(kind, match=text):
        train_here(grpo(folder, policy, reward))
    assert not (folder / "run").exists()


def test_what_is_no_reward_model(tmp_path, policy, monkeypatch):
    def no_weights(*_, **__):
        raise AssertionError("weights are loaded")
    monkeypatch.setattr("engine.build.build_policy", no_weights)
    save_classifier(tmp_path / "two", labels=2)
    refuses(tmp_path, policy, tmp_path / "two", "has 2 labels and gives no single score; fix: pass a")
    save_classifier(tmp_path / "bare", template=None)
    refuses(tmp_path, policy, tmp_path / "bare", "has no chat template, so nothing says how it reads")
    refuses(tmp_path, policy, policy[0], "is a Qwen2ForCausalLM, which gives no score; fix: pass a run of")
    refuses(tmp_path, policy, "owner/rm", "reward: .*owner/rm is neither a local directory nor")


def test_weights_that_are_not_there(tmp_path, policy, classifier):
    """transformers would draw a head from random numbers."""
    from safetensors.torch import load_file, save_file
    path = shutil.copytree(classifier, tmp_path / "rm")
    weights = load_file(path / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights of a LlamaForSequenceClass\w+ \(score.weight"):
        Classifier(str(path), texts)


def test_conversations_that_are_too_long(tmp_path):
    path = save_classifier(tmp_path / "rm", max_position_embeddings=16)
    with pytest.raises(RunError, match="reads 16 tokens, and .* its prompt has .* fix: lower max_completion"):
        Classifier(path, texts).scores(CONVERSATIONS)


def test_a_template_that_refuses_a_conversation(tmp_path):
    refusing = "{{ raise_exception('no system turn') }}"
    path = save_classifier(tmp_path / "rm", template=refusing)
    with pytest.raises(RunError, match="the chat template of .* refuses a conversation .*no system turn"):
        Classifier(path, texts).scores(CONVERSATIONS)


def fail_on_one_rank(*place):
    """The classifier reads too few tokens, on rank 1 only."""
    join(*place)
    from model import off_the_shelf
    start = off_the_shelf.Classifier.__init__

    def shorter(self, *arguments):
        start(self, *arguments)
        self.longest = 3 if place[0] == 1 else self.longest
    off_the_shelf.Classifier.__init__ = shorter


def note_share(*place):
    """Write how many numbers of the classifier's weights this rank keeps."""
    join(*place)
    from model import off_the_shelf
    start = off_the_shelf.Classifier.__init__

    def noted(self, *arguments):
        start(self, *arguments)
        kept = sum(weight.to_local().numel() for weight in self.model.parameters())
        Path("kept").write_text(str(kept))
    off_the_shelf.Classifier.__init__ = noted


def test_each_rank_keeps_its_share_of_a_classifier(tmp_path, policy, classifier):
    """Of every weight: sizes are even here. A rank whose share of the rows is smaller computes as often."""
    config = Path(grpo(tmp_path, policy, classifier, max_steps=1))
    done = train_on_ranks(config, patch=note_share)
    assert [rank.code for rank in done] == [0, 0], done[0].err
    count = AutoModelForSequenceClassification.from_pretrained(classifier).num_parameters()
    kept = [int((tmp_path / f"rank{rank}" / "kept").read_text()) for rank in (0, 1)]
    assert sum(kept) == count and max(kept) < 0.6 * count


def test_a_failure_of_one_rank_ends_all(tmp_path, policy, classifier):
    done = train_on_ranks(Path(grpo(tmp_path, policy, classifier)), patch=fail_on_one_rank)
    for rank in done:
        assert rank.code == 1 and "Traceback" not in rank.err
        assert "reads 3 tokens, and a completion with its prompt has" in rank.err.splitlines()[-1]


@pytest.mark.parametrize("name, is_one", [
    ("Skywork/Skywork-Reward-V2-Qwen3-0.6B", True), ("gsm8k", False), ("rewards/mine.py", False),
    ("runs/typo", False), ("", False), ("reward.py:function", False)])
def test_names_of_the_hub(name, is_one):
    assert is_model(name) == is_one


def test_a_directory_beside_the_hubs_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("owner")
    (tmp_path / "owner" / "file").write_text("")
    assert not is_model("owner/file")


def test_pairs_are_evaluated_by_a_classifier(tmp_path, classifier):
    """Its scores of the whole conversations are transformers' own, for rows of strings and of messages."""
    prompt = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "And four?"}]
    good, bad = ([{"role": "assistant", "content": text}] for text in ("Four it is.", "No."))
    rows = [{"prompt": "Why?", "chosen": "Because.", "rejected": "one two three"},
            {"prompt": prompt, "chosen": good, "rejected": bad},
            {"prompt": "Say", "chosen": "it is what it is", "rejected": "three"}]
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    evaluate.main([classifier, f"data={data}", f"output={tmp_path}/out"])
    found = [json.loads(line) for line in (tmp_path / "out" / "pairs_eval_results.jsonl").open()]
    right = []
    for row, result in zip(rows, found, strict=True):
        turns = row["prompt"] if isinstance(row["prompt"], list) else messages(row["prompt"])
        both = []
        for side in ("chosen", "rejected"):
            is_list = isinstance(row[side], list)
            both.append([*turns, *(row[side] if is_list else messages("", row[side])[1:])])
        scores = own_scores(classifier, both)
        got = [result["metrics"]["chosen"], result["metrics"]["rejected"]]
        torch.testing.assert_close(torch.tensor(got), scores, rtol=1e-5, atol=1e-5)
        right.append(float(scores[0] > scores[1]))
    summary = json.loads((tmp_path / "out" / "pairs_eval_summary.json").read_text())
    assert summary["accuracy"] == sum(right) / 3 and summary["preferred_by"] == "the reward model's score"
    with pytest.raises(UserError, match="is a reward model, which needs none"):
        evaluate.main([classifier, f"data={data}", f"reference={classifier}", f"output={tmp_path}/other"])


def test_each_pair_of_a_question_is_scored_by_its_own_texts(tmp_path, classifier, monkeypatch):
    """A question of se has several ranked pairs, and others that are left out."""
    texts = ["Say three.", "Never", "Because.", "No."]
    answers = [{"text": f"<p>{text}</p>", "pm_score": score} for text, score in zip(texts, (3, 1, 2, 1))]
    rows = [{"question": "<p>Why?</p>", "answers": answers},
            {"question": "<p>And then?</p>", "answers": answers[:2]}]
    monkeypatch.setattr("datasets.load_dataset", lambda *names, **options: rows)
    evaluate.main([classifier, "data=HuggingFaceH4/stack-exchange-preferences:train", f"output={tmp_path}"])
    name = "stack-exchange-preferences_eval_results.jsonl"
    found = [json.loads(line) for line in (tmp_path / name).open()]
    ranked = [("Why?", *pair) for pair in ((0, 1), (0, 2), (0, 3), (2, 1), (2, 3))]
    ranked.append(("And then?", 0, 1))
    for (question, good, bad), result in zip(ranked, found, strict=True):
        scores = own_scores(classifier, [messages(question, texts[good]), messages(question, texts[bad])])
        got = [result["metrics"]["chosen"], result["metrics"]["rejected"]]
        torch.testing.assert_close(torch.tensor(got), scores, rtol=1e-5, atol=1e-5)


def test_the_forecast_counts_reward_models(tmp_path, policy, classifier):
    """A classifier with all its weights in fp32, as a CPU has it."""
    count = AutoModelForSequenceClassification.from_pretrained(classifier).num_parameters()
    for replicate, world, shards in [(1, 1, 1), (1, 2, 2), (2, 4, 2)]:
        common = SimpleNamespace(replicate=replicate)
        found = reward_model_bytes(common, f"gsm8k, {classifier}", 4, False, world)
        assert found == {f"reward model {classifier}": 4 * count / shards}
    done = run_train([grpo(tmp_path, policy, classifier), "--dry-run"])
    assert done.returncode == 0 and f"reward model {classifier}" in done.stdout + done.stderr
