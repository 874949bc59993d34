"""Compiled layers: the same log-probs and gradients, and one graph for batches of all lengths. A kernel of
torch stands for the GPU's, since a loop over units would be another graph for each batch."""
import functools
from types import SimpleNamespace

import pytest
import torch
from helpers import byte_tokenizer, config_of, random_lm
from test_model import examples, gradients

from data.errors import UserError
from engine.options import Sampling
from model import slices
from model.actor_critic import ActorCritic, headless
from model.compiled import compile_layers, compile_policy, plain_layers
from model.form import VARLEN, Form
from model.head import SoftCap
from model.logps import ChunkedLogps
from model.policy import Policy
from model.reward_model import build_reward_model
from model.sampler import sample
from model.varlen import Units

BACKEND = "aot_eager"      # graphs and gradients as ever, but operations of torch: no C++ compiler is needed


def attended(queries, keys, values, key_ends, query_ends):
    """Plain attention of units, as a sum over a mask."""
    heads = queries.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(heads, 1) for x in (keys, values))
    query_unit = torch.bucketize(torch.arange(len(queries)), query_ends[1:], right=True)
    key_unit = torch.bucketize(torch.arange(len(keys)), key_ends[1:], right=True)
    keys_before = key_ends.diff() - query_ends.diff()          # of each unit: before its first query
    place = torch.arange(len(queries)) - query_ends[query_unit] + keys_before[query_unit]
    key_place = torch.arange(len(keys)) - key_ends[key_unit]
    mask = (query_unit[:, None] == key_unit) & (key_place <= place[:, None])
    scores = torch.einsum("qhd,khd->hqk", queries, keys) * queries.shape[2] ** -0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values)


@pytest.fixture
def kernel(monkeypatch):
    def stand_in(queries, keys, values, units: Units, scaling, sliding_window):
        return attended(queries, keys, values, units.key_ends, units.query_ends)

    compile_module = functools.partialmethod(torch.nn.Module.compile, backend=BACKEND)
    compile_function = functools.partial(torch.compile, backend=BACKEND)
    monkeypatch.setattr("model.varlen.one_by_one", stand_in)
    monkeypatch.setattr(torch.nn.Module, "compile", compile_module)
    monkeypatch.setattr(torch, "compile", compile_function)
    slices.kernel.cache_clear()
    torch._dynamo.reset()
    yield
    slices.kernel.cache_clear()
    torch._dynamo.reset()


def test_compiled_slices_equal_full_logits(kernel, monkeypatch):
    """Log-probs and all gradients of a head with a bias and a cap, in eight slices of its vocabulary."""
    monkeypatch.setitem(slices.LOGITS_AT_ONCE, "cpu", 7 * 11)
    torch.manual_seed(0)
    inputs = torch.randn(11, 8), torch.randn(50, 8), torch.randn(50)
    hidden, weight, bias = (tensor.requires_grad_() for tensor in inputs)
    target = torch.randint(50, (11,))
    slopes = torch.randn(11)
    cap = SoftCap(3.0)
    found = ChunkedLogps.apply(hidden, weight, target, torch.float32, bias, cap, True)
    logits = 3 * torch.tanh((hidden @ weight.T + bias) / 3)
    expected = logits.log_softmax(1)[range(11), target]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    ours = torch.autograd.grad((slopes * found).sum(), (hidden, weight, bias))
    theirs = torch.autograd.grad((slopes * expected).sum(), (hidden, weight, bias))
    for mine, exact in zip(ours, theirs):
        torch.testing.assert_close(mine, exact, rtol=1e-5, atol=1e-6)


def num_graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("prefix", [0, 30])
@pytest.mark.parametrize("responses", [(2, 2, 2, 2), (3, 5, 4, 9)])
def test_layers_are_compiled_once_and_compute_the_same(kernel, responses, prefix):
    lm = random_lm(config_of(), attn_implementation=VARLEN)
    policy = Policy(lm, form=Form(VARLEN))
    batches = []
    sizes = (6, 5, 2, 7)      # with 8 of anything in the first batch, 8 would be taken for a head's size; two
    #                           sizes that are equal there would have to be equal in all
    for seed, count in enumerate(sizes):
        batches.append(policy.collate(examples(responses[seed], count, seed, prefix and prefix + seed)))
        assert batches[-1].prefix == (prefix and prefix + seed)
    expected = []
    for batch in batches:
        logps = policy(batch)
        expected.append((logps.detach(), gradients(lm, logps)))
    torch._dynamo.utils.counters.clear()
    compile_layers(policy)
    assert policy.is_compiled
    counts = []
    for batch, (logps, grads) in zip(batches, expected):
        values = policy(batch)
        torch.testing.assert_close(values, logps, rtol=1e-5, atol=1e-5)
        found = gradients(lm, values)
        errors = {name: float((found[name] - grads[name]).norm() / grads[name].norm()) for name in grads}
        assert max(errors.values()) < 1e-5
        counts.append(num_graphs())
    assert counts[0] > 0 and len(set(counts)) == 1
    sampling = Sampling(reward="", max_completion_length=3)
    sample(policy, byte_tokenizer(), [batches[0].examples[0].prompt], [(0,)], 2, sampling)
    assert num_graphs() == counts[0]                                          # sampling compiles nothing
    plain_layers(policy)
    assert torch.equal(policy(batches[0]), expected[0][0]) and not policy.is_compiled


def test_a_head_on_compiled_layers(kernel, tmp_path):
    """A critic or a reward model says as its policy that the layers are compiled, and the critic's trunk for
    its own."""
    policy, other = (Policy(random_lm(config_of(), attn_implementation=VARLEN), form=Form(VARLEN))
                     for _ in range(2))
    for expected in (False, True):
        trunk = headless(other, policy, seed=0)
        critic = ActorCritic(policy, torch.zeros(1, 32), trunk)
        reward = build_reward_model(policy, str(tmp_path), seed=0)
        flags = [made.is_compiled for made in (trunk, critic, reward)]
        assert flags == [expected] * 3
        compile_layers(policy)
        compile_layers(other)


@pytest.mark.parametrize("form, deterministic, message", [
    ("segments", False, "attention has the form segments here, and only varlen can be compiled"),
    (VARLEN, True, "would not be deterministic")])
def test_what_cannot_be_compiled_is_refused(form, deterministic, message):
    policy = Policy(random_lm(config_of(), attn_implementation=form), form=Form(form))
    common = SimpleNamespace(compile="true", deterministic=deterministic)
    with pytest.raises(UserError, match=message):
        compile_policy(policy, common, 1000, examples(2), notice=None)
    assert not policy.is_compiled


@pytest.mark.parametrize("compile", ["true", "auto"])
def test_layers_that_cannot_be_compiled_stay_as_they_are(kernel, monkeypatch, compile):
    lm = random_lm(config_of(), attn_implementation=VARLEN)
    policy = Policy(lm, form=Form(VARLEN))
    made = examples(2)

    def broken(*args, **options):
        raise RuntimeError("no such kernel\nin line 3")

    def compile_broken(layer, **options):
        layer._compiled_call_impl = broken

    notices = []
    common = SimpleNamespace(compile=compile, deterministic=False)
    monkeypatch.setattr("model.compiled.on_gpu", lambda policy: True)      # auto compiles there only
    monkeypatch.setattr(torch.nn.Module, "compile", compile_broken)
    if compile == "true":
        with pytest.raises(UserError, match=r"layers of a qwen2 cannot be compiled \(no such kernel\)"):
            compile_policy(policy, common, 1000, made, notices.append)
    else:
        compile_policy(policy, common, 1000, made, notices.append)
        assert notices == ["compile: the layers of a qwen2 are not compiled (no such kernel)"]
    assert not policy.is_compiled
