"""`benchmark/vs_trl.py` compares like with like: for every algorithm both sides see the same token ids and
agree over three updates."""
import importlib.util
import math
import signal

import pytest
from helpers import ROOT
from transformers import AutoTokenizer

from benchmark import shared, vs_trl, vs_trl_accuracy, vs_trl_grpo

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 260,
}
HAS_TRL = importlib.util.find_spec("trl") is not None
MISSING = "trl is not installed: pip install -r requirements-dev.txt"
pytestmark = pytest.mark.skipif(not HAS_TRL, reason=MISSING)


@pytest.fixture(autouse=True)
def restore_signals():
    """The engine catches signals; the rest of the test run should not."""
    terminate = signal.getsignal(signal.SIGTERM)
    interrupt = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGTERM, terminate)
    signal.signal(signal.SIGINT, interrupt)


def job_of(algorithm, directory):
    return {
        "algorithm": algorithm,
        "data": None,
        "tokenizer": None,
        "source": None,
        "pairs": 12,
        "batch": 4,
        "lr": 1e-3,
        "shape": SHAPE,
        "max_length": 2048,
        "work": str(directory),
        "model": f"{directory}/model",
        "ours_rows": f"{directory}/ours.jsonl",
        "trl_rows": f"{directory}/trl.jsonl",
        "precision": "fp32",
        "overrides": ["micro_batch_tokens=600"],      # several micro-batches per update
        "per_device": 4,
        "precompute": False,
    }


# one run for each algorithm, and those in which TRL's loss depends on how an update is cut into forwards
CASES = [(algorithm, {}) for algorithm in vs_trl.PEERS]
CASES += [
    ("kto", {"precompute": True}),
    ("kto", {"per_device": 2}),
    ("cpo", {"per_device": 1}),
    ("simpo", {"per_device": 1}),
    ("rm", {"per_device": 1}),
]


@pytest.mark.parametrize(("algorithm", "changes"), CASES)
def test_both_sides_agree(algorithm, changes, tmp_path):
    job = job_of(algorithm, tmp_path) | changes
    vs_trl.prepare(job)
    ours = vs_trl.train_ours(job)
    theirs = vs_trl.train_trl(job)
    assert ours["ids"] == theirs["ids"]
    assert len(ours["metrics"]) == 3
    rows = vs_trl.disagreements(job, ours, theirs)
    wrong = [row for row in rows if not row[-1] <= 1]
    assert wrong == []
    same_loss = algorithm != "orpo"
    if algorithm in ("kto", "cpo") and job["per_device"] < 4:
        same_loss = False
    updates = {row[0] for row in rows}
    metrics = {row[1] for row in rows}
    assert updates == ({1, 2, 3} if same_loss else {1})
    assert ("loss" in metrics) == same_loss


def test_any_model_directory(tmp_path):
    """Another shape, context and tokenizer than the random model's; the reward head lies beside links."""
    source = str(ROOT / "example" / "tiny" / "model")
    shape = shared.shape_of(source)
    assert (shape["hidden_size"], shape["num_hidden_layers"], shape["vocab_size"]) == (128, 4, 259)
    assert shared.end_of_turn(AutoTokenizer.from_pretrained(source)) == "<|im_end|>"
    limits = {"max_length": shape["max_position_embeddings"], "pairs": 8}
    for algorithm in ("dpo", "rm"):
        folder = tmp_path / algorithm
        folder.mkdir()
        job = job_of(algorithm, folder) | limits | {"source": source, "shape": shape, "lr": 1e-4}
        vs_trl.prepare(job)
        assert (folder / "model" / "model.safetensors").is_symlink()
        ours = vs_trl.train_ours(job)
        theirs = vs_trl.train_trl(job)
        assert ours["ids"] == theirs["ids"]
        rows = vs_trl.disagreements(job, ours, theirs)
        assert [row for row in rows if not row[-1] <= 1] == []


def test_accuracy_is_measured_on_prompts_that_were_not_trained_on(tmp_path):
    job = job_of("dpo", tmp_path) | {"held_out": 6, "held_out_rows": f"{tmp_path}/held-out.jsonl"}
    vs_trl_accuracy.prepare(job)
    trained = shared.read_jsonl(job["ours_rows"])
    held_out = shared.read_jsonl(job["held_out_rows"])
    assert (len(trained), len(held_out), len(shared.read_jsonl(job["trl_rows"]))) == (12, 6, 12)
    prompts = {row["chosen"].rpartition("\n\nAssistant:")[0] for row in trained}
    assert not prompts & {row["chosen"].rpartition("\n\nAssistant:")[0] for row in held_out}


def test_held_out_numbers():
    """Three pairs: gained and preferred, gained but not preferred, lost but preferred."""
    start = [[-5.0, -5.0], [-9.0, -2.0], [-1.0, -8.0]]
    scores = [[-4.0, -6.0], [-6.0, -4.0], [-3.0, -7.0]]
    found = vs_trl_accuracy.numbers_of(scores, start)
    assert found["log-prob"] == [1.0, 0.0, 1.0]
    assert found["implicit reward"] == [1.0, 1.0, 0.0]
    margins = (2.0, 5.0, -3.0)
    wanted = sum(-math.log(1 / (1 + math.exp(-0.1 * margin))) for margin in margins) / 3
    assert found["loss"] == pytest.approx(wanted)


def test_grpo_makes_trls_update_from_trls_completions(tmp_path):
    job = job_of("grpo", tmp_path) | {
        "prompts": 2,
        "group": 4,
        "length": 12,
        "rollouts": 1,
        "stop_share": 0.1,
        "per_device": 8,
    }
    vs_trl_grpo.prepare(job)
    theirs = vs_trl_grpo.train_trl(job)
    ours = vs_trl_grpo.train_ours(job | {"replay": theirs["completions"]})
    assert ours["prompts"] == theirs["prompts"]
    lengths = set()
    for group in theirs["completions"]:
        lengths.update(len(ids) for ids in group)
    assert len(lengths) > 1
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=shared.TOLERANCE)
