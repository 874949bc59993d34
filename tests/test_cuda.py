"""On a GPU the numbers are those of a CPU: every algorithm, resumed runs, every form of attention. Skipped
where there is no GPU. `pytest -n 8 --dist load tests/test_cuda.py` takes minutes."""
import math
import shutil

import numpy as np
import pytest
import torch
from helpers import ONLINE, ROOT, byte_tokenizer, config_of, final_weights, metrics, random_lm, run_train
from transformers import AutoConfig, AutoTokenizer

from data.pack import Example, Response
from engine.options import Sampling
from model.compiled import compile_layers
from model.form import VARLEN, Form
from model.head import HeadLogits
from model.policy import Policy
from model.recorded import Recorded
from model.sampler import sample

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
ALGORITHMS = sorted(path.stem[5:] for path in (ROOT / "example").glob("tiny-*.yml"))
BASE = {"base", "pretrain"}                 # runs that make the embedded model
UPDATES = ["max_steps=3", "warmup=0", "eval_every=100", "eval_data=null"]
SMALL = ["batch_size=8", "micro_batch_tokens=1024"]


def train(output, algorithm, *words, device=""):
    """The metrics of three updates; on the CPU, where `device` is not 0."""
    done = run_train(
        [f"example/tiny-{algorithm}.yml", f"output={output}", *UPDATES, *SMALL, *words],
        timeout=300,
        CUDA_VISIBLE_DEVICES=device)
    assert done.returncode == 0, done.stderr
    assert "transformers' loop samples" not in done.stdout + done.stderr
    return metrics(output)


def differences(rows, others):
    """{metric: the largest difference, relative above 1}"""
    found = {}
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        for key, value in row.items():
            if isinstance(value, float):
                error = abs(value - other[key]) / max(1, abs(other[key]))
                found[key] = max(found.get(key, 0), error)
    return found


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    """A random model with the tokenizer of the embedded one."""
    folder = tmp_path_factory.mktemp("other")
    model = ROOT / "example" / "tiny" / "model"
    random_lm(AutoConfig.from_pretrained(model)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name not in BASE])
def test_three_updates_equal_those_of_a_cpu(algorithm, tmp_path, other_model):
    """In fp32, to 1e-4; in bf16 the first loss is near and all are finite. The example's teacher is a run."""
    words = [f"teacher={other_model}"] if algorithm == "distill" else []
    on_cpu = train(tmp_path / "cpu", algorithm, "precision=fp32", *words)
    on_gpu = train(tmp_path / "gpu", algorithm, "precision=fp32", *words, device="0")
    found = differences(on_gpu, on_cpu)
    assert {key: error for key, error in found.items() if not error < 1e-4} == {}
    in_bf16 = train(tmp_path / "bf16", algorithm, *words, device="0")
    assert all(math.isfinite(row["loss"]) for row in in_bf16)
    if algorithm not in ONLINE:             # other rounding may sample other tokens
        assert in_bf16[0]["loss"] == pytest.approx(on_cpu[0]["loss"], rel=2e-2, abs=2e-2)


@pytest.mark.parametrize("algorithm", ["dpo", "grpo"])
def test_a_resumed_run_is_the_same_to_the_bit(algorithm, tmp_path):
    words = ["max_steps=4", "save_every=2", "deterministic=true"]
    whole = tmp_path / "whole"
    train(whole, algorithm, *words, device="0")
    weights = final_weights(whole)
    resumed = tmp_path / "resumed"
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "final")
    shutil.rmtree(resumed / "checkpoints" / "step-000004", ignore_errors=True)
    train(resumed, algorithm, *words, device="0")
    again = final_weights(resumed)
    assert {name for name in weights if not torch.equal(weights[name], again[name])} == set()


LAYOUTS = {      # (prompt, responses), in tokens
    "pairs": [(40, [30, 20]), (5, [1, 60]), (64, [64, 64])],
    "groups": [(33, [5, 9, 17, 1, 30, 2, 8, 8]), (20, [12] * 8)],
    "one token": [(1, [1]), (1, [1, 1]), (7, [1, 1, 1])],
}
KINDS = {
    "grouped heads": dict(hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=32),
    "window": dict(hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
                   use_sliding_window=True, sliding_window=8, layer_types=["sliding_attention"] * 2),
}


def examples_of(layout, prefix=0):
    """Examples of these lengths with random ids, behind a prefix of all prompts."""
    draw = np.random.default_rng(0)
    made = []
    for prompt, lengths in layout:
        responses = [Response.all_trained(draw.integers(0, 256, length)) for length in lengths]
        ids = np.concatenate([np.arange(prefix), draw.integers(0, 256, prompt)])
        made.append(Example(ids.astype(np.int32), responses, "here:1"))
    return made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout, prefix", [("pairs", 0), ("groups", 0), ("one token", 0), ("pairs", 20)])
def test_one_call_of_attention_equals_the_mask(layout, prefix, kind):
    """Log-probs and gradients of varlen and segments in bf16 against the (T, T) mask in fp32."""
    made = examples_of(LAYOUTS[layout], prefix)
    results = {}
    for attention, precision in (("dense", "fp32"), ("segments", "bf16"), (VARLEN, "bf16")):
        lm = random_lm(config_of(**KINDS[kind]), attn_implementation=attention).cuda()
        policy = Policy(lm, precision, Form(attention))
        logps = policy(policy.collate(made))
        (logps * torch.linspace(-1, 2, len(logps), device="cuda")).sum().backward()
        grads = torch.cat([parameter.grad.flatten() for parameter in lm.parameters()])
        results[attention] = logps.detach(), grads
    exact, exact_grads = results["dense"]
    errors = {}
    for attention in ("segments", VARLEN):
        logps, grads = results[attention]
        errors[attention] = float((logps - exact).abs().mean()), float((grads - exact_grads).norm())
    for error, rounding in zip(errors[VARLEN], errors["segments"]):
        assert error < 1.1 * rounding                   # what bf16 rounds, and no more


def test_a_forward_and_backward_never_wait_for_the_gpu():
    """The host runs ahead: nothing in a micro-batch asks the GPU for a number."""
    lm = random_lm(config_of(**KINDS["grouped heads"]), attn_implementation=VARLEN).cuda()
    policy = Policy(lm, "bf16", Form(VARLEN))
    made = examples_of(LAYOUTS["pairs"], prefix=20)

    def micro_batch():
        batch = policy.collate(made)
        logps = policy(batch)
        chosen, rejected = batch.pairs(batch.sum(logps))
        (chosen - rejected + batch.mean(logps).sum() + batch.expand(batch.sum(logps)).sum()).sum().backward()

    micro_batch()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        micro_batch()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("prefix", [0, 20])
def test_compiled_layers_compute_the_same_with_one_graph(prefix):
    lm = random_lm(config_of(**KINDS["grouped heads"]), attn_implementation=VARLEN).cuda()
    policy = Policy(lm, "bf16", Form(VARLEN))
    layouts = [LAYOUTS["pairs"], LAYOUTS["pairs"][:2], LAYOUTS["pairs"][1:]]
    batches = [policy.collate(examples_of(layout, prefix)) for layout in layouts]
    expected = []
    for batch in batches:
        expected.append(policy(batch).detach())
    compile_layers(policy)
    graphs = []
    for batch, logps in zip(batches, expected):
        found = policy(batch)
        found.sum().backward()
        assert (found - logps).abs().mean() < 0.03
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert len(set(graphs)) == 1


@pytest.mark.parametrize("prefix", [0, 20])
@pytest.mark.parametrize("rows, least", [(64, 1), (6, 2)])       # all at once; as others end
def test_steps_of_sampling_are_recorded(monkeypatch, rows, least, prefix):
    """The log-probs of what they draw are those of the training forward, but for bf16's rounding."""
    graphs = []
    record = Recorded.record

    def noted(recorded, function):
        record(recorded, function)
        graphs.append(recorded.graph is not None)      # to keep it would keep its memory pool in use

    monkeypatch.setattr(Recorded, "record", noted)
    lm = random_lm(config_of(**KINDS["grouped heads"]), attn_implementation=VARLEN).cuda()
    policy = Policy(lm, "bf16", Form(VARLEN))
    prompts = [example.prompt for example in examples_of(LAYOUTS["pairs"], prefix)]
    keys = [(0, number) for number in range(len(prompts))]
    sampling = Sampling(reward="", max_completion_length=40, rollout_batch_size=rows)
    found = sample(policy, byte_tokenizer(), prompts, keys, 8, sampling)
    assert len(graphs) >= least and all(graphs)
    drawn = []
    for prompt, completions in zip(prompts, found):
        responses = [Response.all_trained(completion.tokens) for completion in completions]
        drawn.append(Example(prompt, responses, "here:1"))
    batch = policy.collate(drawn)
    assert batch.prefix == prefix
    own = [completion.logps for completions in found for completion in completions]
    logps = policy(batch).detach().cpu().numpy()
    assert np.abs(logps - np.concatenate(own)).mean() < 0.03


def test_a_step_that_waits_is_never_recorded():
    """Nor does it leave PyTorch as if a recording went on."""
    numbers = torch.zeros(2, device="cuda")

    def step():
        numbers.add_(1).nonzero()

    recorded = Recorded(is_wanted=True)
    for _ in range(4):
        recorded(step)
    assert recorded.graph is None and numbers.tolist() == [4, 4]
    for _ in range(4):
        recorded(lambda: numbers.add_(1))
    assert recorded.graph is not None and numbers.tolist() == [8, 8]


def test_the_logits_of_sampling_are_not_rounded():
    """The sums of bf16 products, as in training: rounded to bf16 they would tie, and choose other tokens."""
    lm = random_lm(config_of()).cuda()
    hidden = 10 * torch.randn(5, 32, device="cuda")
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        logits = HeadLogits(lm, 5)(hidden)
    weight = lm.get_output_embeddings().weight
    exact = hidden.bfloat16().double() @ weight.bfloat16().double().T
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)
