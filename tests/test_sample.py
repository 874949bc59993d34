"""sample.py: what is kept of the completions, files that train.py reads, and the loop sample -> sft, sample -> dpo."""
import json

import pytest
from helpers import REWARDS, ROOT, byte_tokenizer, messages, metrics, prompt_rows, tiny_model, train_here, write_config, write_jsonl

import sample
from data.dataset import build_dataset
from data.errors import RunError, UserError

Q = messages("q")


def group(id, *completions, prompt=Q):
    """Rows of one prompt from (text, reward) or (text, reward, whether it ended by itself)."""
    return [{"id": id, "prompt": prompt, "generation": text, "metrics": {"reward": reward}, "finished": all(finished)}
            for text, reward, *finished in completions]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_best_and_worst_of_hand_made_completions():
    rows = [*group(0, ("a", 0.0), ("b", 1.0), ("c", 1.0), ("d", -1.0)), *group(1, ("x", 2.0), ("y", 0.5), prompt="p ")]
    best, pairs, counts = sample.select(rows, None)
    assert best == [{"messages": messages("q", "b"), "reward": 1.0}, {"prompt": "p ", "response": "x", "reward": 2.0}]
    assert pairs == [{"prompt": Q, "chosen": messages("q", "b")[1:], "rejected": messages("q", "d")[1:], "rewards": [1.0, -1.0]},
                     {"prompt": "p ", "chosen": "x", "rejected": "y", "rewards": [2.0, 0.5]}]
    assert (counts["prompts"], counts["completions"], counts["mean reward"], counts["mean reward of sft.jsonl"]) == (2, 6, 3.5 / 6, 1.5)


def test_what_is_left_out_is_counted():
    rows = [*group(0, ("cut", 9.0, False), ("b", 1.0), ("c", 0.0)), *group(1, ("cut", 1.0, False), ("cut", 0.0, False)),
            *group(2, ("same", 1.0), ("as", 1.0)), *group(3, (" ", 5.0), ("b", None), ("c", 0.5)), *group(4, ("a", 0.0), ("b", 0.2))]
    best, pairs, counts = sample.select(rows, None)
    assert [row["messages"][-1]["content"] for row in best] == ["b", "same", "c", "b"] and len(pairs) == 2
    assert [counts[name] for name in ("not finished", "empty", "without reward", "prompts without a choice",
                                      "prompts with equal rewards", "prompts below min_reward")] == [3, 1, 1, 1, 2, 0]
    best, pairs, counts = sample.select(rows, 0.5)
    assert [row["reward"] for row in best] == [1.0, 1.0, 0.5] and len(pairs) == 1 and counts["prompts below min_reward"] == 1


def test_files_are_read_by_train(tmp_path, capsys):
    """Conversations and plain strings, real completions; another min_reward draws nothing again."""
    model, data = tiny_model(tmp_path / "model"), write_jsonl(tmp_path / "prompts.jsonl", prompt_rows(9))
    words = [model, f"data={data}", f"reward={REWARDS}:varied", f"output={tmp_path / 'out'}", "max_completion_length=100", "n=4"]
    sample.main(words)
    rows, summary = read(tmp_path / "out" / "samples_results.jsonl"), json.loads((tmp_path / "out" / "summary.json").read_text())
    best, pairs, counts = sample.select(rows, None)
    assert len(rows) == 36 and counts == {key: value for key, value in summary.items() if key != "settings"}
    tokenizer, kinds = byte_tokenizer(), {"sft.jsonl": ("responses", best), "preference.jsonl": ("pairs", pairs)}
    for name, (kind, expected) in kinds.items():
        dataset = build_dataset(str(tmp_path / "out" / name), kind, tokenizer, 512)
        assert len(dataset.examples) == len(expected) > 5 and not dataset.report["dropped"]
        assert all(example.responses[0].tokens[-1] == 258 for example in dataset.examples)
    sft = build_dataset(str(tmp_path / "out" / "sft.jsonl"), "responses", tokenizer, 512).examples
    prompts = build_dataset(data, "prompts", tokenizer, 512).examples
    assert {example.prompt.tobytes() for example in sft} <= {example.prompt.tobytes() for example in prompts}
    before = (tmp_path / "out" / "samples_results.jsonl").read_bytes()
    sample.main([*words, "min_reward=0.9"])
    assert (tmp_path / "out" / "samples_results.jsonl").read_bytes() == before
    assert all(row["reward"] >= 0.9 for row in read(tmp_path / "out" / "sft.jsonl"))
    with pytest.raises(RunError, match="no completion is kept .*min_reward"):
        sample.main([*words, "min_reward=2"])
    with pytest.raises(UserError, match=r"\(temperature differ\)"):
        sample.main([*words, "temperature=0.7"])


@pytest.mark.parametrize("algorithm, file", [("sft", "sft.jsonl"), ("dpo", "preference.jsonl")])
def test_training_on_what_was_kept(kept, monkeypatch, algorithm, file):
    """The loop on a small part of the embedded data: what was kept becomes likelier, what was not does not."""
    monkeypatch.chdir(ROOT)
    config = write_config(kept / f"{algorithm}.yml", algorithm=algorithm, model="example/tiny/model", data=kept / file,
                          eval_data=kept / file, output=kept / algorithm, lr=1e-4, batch_size=8, epochs=2, max_length=256)
    train_here(config)
    first, *_, last = metrics(kept / algorithm, "eval")
    assert last["loss"] < 0.9 * first["loss"]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        sample.main(["example/tiny/model", "data=example/tiny/prompts.jsonl", "reward=r1_zero", "min_reward=1", "limit=24", "n=4",
                     "max_completion_length=80", f"output={folder}"])
    best = read(folder / "sft.jsonl")
    assert 12 <= len(best) <= 24 and all("</think> <answer>" in row["messages"][1]["content"] for row in best)
    return folder


@pytest.mark.parametrize("keys, message", [
    (["n=1"], "n .* is 1, which leaves no choice"), (["temperature=0"], "temperature 0"), (["min_rewards=1"], "fix: write min_reward")])
def test_refused(tmp_path, keys, message):
    with pytest.raises(UserError, match=message):
        sample.main([str(tmp_path), "data=x.jsonl", "reward=gsm8k", *keys])
    with pytest.raises(UserError, match="reward is missing"):
        sample.main([str(tmp_path), "data=x.jsonl"])
