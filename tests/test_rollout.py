"""The sampler against full logits: a float64 softmax of the LM's own forward, inverted by a plain cumulative sum, token by token."""
import copy
import math
import random

import numpy as np
import pytest
import torch
from helpers import (
    ONLINE,
    byte_tokenizer,
    config_of,
    kinds,
    metrics,
    prompt_rows,
    random_lm,
    tiny_model,
    train_here,
    write_config,
    write_jsonl,
)
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from data.pack import Example
from engine.options import Sampling
from model import decoding, lora, varlen
from model.cache import Cache, CacheInPlace
from model.check import check_sampling
from model.decoding import Decoding, last_hidden
from model.draw import BLOCK, draw, inverse_cdf
from model.form import VARLEN, Form
from model.keys import ModelKeys
from model.policy import Policy
from model.sampler import Stops, sample

ARCHITECTURES = {
    "qwen2": config_of(Qwen2Config, tie_word_embeddings=True),
    "qwen3": config_of(Qwen3Config),
    "llama": config_of(LlamaConfig, vocab_size=700),                  # more than the tokenizer has, more than a block
    "mistral-window": config_of(MistralConfig, sliding_window=5),     # shorter than most prompts and completions
} | kinds()
SAMPLINGS = {
    "plain": dict(),
    "cooler": dict(temperature=0.6, top_p=0.7),
    "hotter": dict(temperature=1.5, top_k=20, stop="Q, j,7,k,p"),
    "all": dict(temperature=0.8, top_k=30, top_p=0.9, stop="Q"),
    "greedy": dict(temperature=0.0, stop="Q"),
    "refilled": dict(rollout_batch_size=4),
}
LENGTHS = 1, 9, 4, 20, 9
LIMIT, COPIES = 14, 3


@pytest.fixture(scope="module")
def tokenizer():
    """With two stop tokens, the end of the text and that of a turn."""
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    return tokenizer


def settings(**values):
    return Sampling(reward="", **{"max_completion_length": LIMIT} | values)


def model(config, implementation="segments"):
    """A random LM for which the stop tokens are not too rare."""
    lm = random_lm(config, attn_implementation=implementation)
    lm.get_output_embeddings().weight.data[[256, 258]] *= 3
    return lm


def prompts(lengths=LENGTHS):
    rng = random.Random(5)
    return [np.array([rng.randrange(256) for _ in range(length)], np.int32) for length in lengths]


def keys(count):
    return [(3, 1, i) for i in range(count)]


def plain_softmax(logits, temperature):
    """A list of logits -> a list of probabilities."""
    highest = max(logits)
    weights = [math.exp((logit - highest) / temperature) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def plain_choice(probabilities, top_k, top_p):
    """The tokens that may be drawn: of the `top_k` likeliest, as few as together have `top_p`."""
    ordered = sorted(range(len(probabilities)), key=lambda token: -probabilities[token])[:top_k or None]
    total, share, allowed = sum(probabilities[token] for token in ordered), 0.0, set()
    for token in ordered:
        if share < top_p * total:
            allowed.add(token)
        share += probabilities[token]
    return allowed


def plain_draw(probabilities, uniform, allowed):
    """The first allowed token at which the running sum passes `uniform` times the sum of all allowed."""
    target, share = uniform * sum(probabilities[token] for token in sorted(allowed)), 0.0
    for token in sorted(allowed):
        share += probabilities[token]
        if share > target:
            break
    return token


def check(lm, tokenizer, prompt, completion, uniforms, sampling):
    """Token by token what a plain loop draws, given that all before it are right."""
    tokens = completion.tokens.tolist()
    with torch.no_grad():
        logits = lm(torch.tensor([[*prompt.tolist(), *tokens]]), use_cache=False).logits[0, len(prompt) - 1:-1].double().tolist()
    strings = [string.strip() for string in (sampling.stop or "").split(",") if string]
    for i, (token, row) in enumerate(zip(tokens, logits)):
        probabilities = plain_softmax(row, sampling.temperature or 1.0)
        if sampling.temperature:
            allowed = plain_choice(probabilities, sampling.top_k, sampling.top_p)
            assert token == plain_draw(probabilities, uniforms[i], allowed)
        else:
            assert token == max(range(len(row)), key=row.__getitem__)
        assert completion.logps[i] == pytest.approx(math.log(probabilities[token]), abs=1e-5)
        text = tokenizer.decode(tokens[:i + 1])
        stopped = token in (256, 258) or any(string in text for string in strings)
        assert stopped == (i == len(tokens) - 1 and completion.finished)
    assert completion.finished or len(tokens) == LIMIT
    assert completion.tokens.dtype == np.int32 and completion.logps.dtype == np.float32


def check_all(lm, tokenizer, given, completions, sampling):
    for prompt, key, group in zip(given, keys(len(given)), completions, strict=True):
        assert len(group) == COPIES
        for number, completion in enumerate(group):
            check(lm, tokenizer, prompt, completion, np.random.default_rng((*key, number)).random(LIMIT), sampling)


@pytest.mark.parametrize("how", SAMPLINGS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sampler_equals_a_plain_loop(tokenizer, name, how):
    given, sampling = prompts(), settings(**SAMPLINGS[how])
    reports = []
    completions = sample(Policy(model(ARCHITECTURES[name])), tokenizer, given, keys(len(given)), COPIES, sampling,
                         lambda *numbers: reports.append(numbers))
    check_all(model(ARCHITECTURES[name], "eager"), tokenizer, given, completions, sampling)
    everything = [completion for group in completions for completion in group]
    assert reports[-1] == (15, 15) and [done for done, _ in reports] == sorted(done for done, _ in reports)
    if name in kinds():                 # their caps and scales make some tokens likely
        return
    # else the loop above would not have seen rows that end at different times
    if how in ("plain", "hotter", "refilled"):
        assert len({len(completion.tokens) for completion in everything}) >= 4
        assert {completion.finished for completion in everything} == {True, False}
    if how == "greedy":
        assert all(np.array_equal(completion.tokens, group[0].tokens) for group in completions for completion in group)
    elif how != "cooler":
        assert len({completion.tokens.tobytes() for completion in everything}) > 10


@pytest.mark.parametrize("how", SAMPLINGS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_steps_in_place_equal_a_plain_loop(tokenizer, monkeypatch, name, how):
    """What a GPU does: tensors that stay where they are, and several steps before the host looks at one."""
    monkeypatch.setattr("model.decoding.Cache", CacheInPlace)
    monkeypatch.setattr("model.cache.SHOWN", 4)        # so that steps come to show more columns
    monkeypatch.setattr("model.sampler.STEPS_AT_ONCE", {"cpu": 5})
    given, sampling = prompts(), settings(**SAMPLINGS[how])
    policy = Policy(model(ARCHITECTURES[name]))
    completions = sample(policy, tokenizer, given, keys(len(given)), COPIES, sampling)
    check_all(model(ARCHITECTURES[name], "eager"), tokenizer, given, completions, sampling)


def test_both_stop_tokens_and_stop_strings_occur(tokenizer):
    """Else the test above would prove less than it says."""
    given = prompts()
    completions = sample(Policy(model(ARCHITECTURES["qwen3"])), tokenizer, given, keys(5), 8, settings(temperature=1.5, stop="Q, j,7,k,p"))
    ends = {int(completion.tokens[-1]) for group in completions for completion in group if completion.finished}
    assert {256, 258} < ends


# ---- what draws depend on ----

def assert_same_completions(ours, theirs):
    for group, other in zip(ours, theirs, strict=True):
        for completion, expected in zip(group, other, strict=True):
            assert np.array_equal(completion.tokens, expected.tokens) and completion.finished == expected.finished
            np.testing.assert_allclose(completion.logps, expected.logps, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen2", "mistral-window"])
def test_draws_depend_on_nothing_but_their_key(tokenizer, name):
    """Neither on how many are decoded together, nor on the other prompts, nor on how many copies there are."""
    policy, given = Policy(model(ARCHITECTURES[name])), prompts()
    whole = sample(policy, tokenizer, given, keys(5), COPIES, settings())
    for size in (1, 2, 7):
        assert_same_completions(sample(policy, tokenizer, given, keys(5), COPIES, settings(rollout_batch_size=size)), whole)
    some = [3, 0, 4]
    part = sample(policy, tokenizer, [given[i] for i in some], [keys(5)[i] for i in some], COPIES, settings())
    assert_same_completions(part, [whole[i] for i in some])
    assert_same_completions(sample(policy, tokenizer, given, keys(5), 1, settings()), [group[:1] for group in whole])
    other = sample(policy, tokenizer, given, [(4, 1, i) for i in range(5)], COPIES, settings())
    alike = [np.array_equal(a.tokens, b.tokens) for ours, theirs in zip(other, whole) for a, b in zip(ours, theirs)]
    assert sum(alike) < 4                                             # a stop token at once


def test_many_prompts_are_computed_in_several_forwards(tokenizer, monkeypatch):
    policy, given = Policy(model(ARCHITECTURES["llama"])), prompts()
    whole = sample(policy, tokenizer, given, keys(5), COPIES, settings())
    for tokens in (1, 13, 30):
        monkeypatch.setattr("model.decoding.PREFILL_TOKENS", tokens)
        assert_same_completions(sample(policy, tokenizer, given, keys(5), COPIES, settings()), whole)


def test_memory_bounds_the_rows(tokenizer, monkeypatch):
    """Those that come to a batch included, which is wider for the tokens that others have drawn."""
    policy, given, shapes = Policy(model(ARCHITECTURES["llama"])), prompts(), []
    original = Cache.add

    def add(cache, groups, room):
        original(cache, groups, room)
        shapes.append((cache.rows, cache.width))

    monkeypatch.setattr(Cache, "add", add)
    whole = sample(policy, tokenizer, given, keys(5), COPIES, settings())
    assert shapes == [(15, 20 + LIMIT)]
    token = 2 * 2 * 2 * 8 * 4                      # layers x keys and values x heads x their width x bytes
    shapes.clear()
    monkeypatch.setattr("model.cache.CACHE_BYTES", 4 * (20 + LIMIT) * token)
    assert_same_completions(sample(policy, tokenizer, given, keys(5), COPIES, settings()), whole)
    assert shapes[0] == (4, 9 + LIMIT) or shapes[0] == (4, 4 + LIMIT)
    assert max(width for _, width in shapes) > 20 + LIMIT
    assert all(rows * width <= 4 * (20 + LIMIT) for rows, width in shapes)
    shapes.clear()
    monkeypatch.setattr("model.cache.CACHE_BYTES", (20 + LIMIT) * token - 1)
    sample(policy, tokenizer, given[:1], keys(1), 2, settings())
    assert shapes == [(2, 1 + LIMIT)]              # a prompt of one token is shorter than a row of 20
    shapes.clear()
    assert_same_completions(sample(policy, tokenizer, given, keys(5), COPIES, settings()), whole)
    assert {rows for rows, _ in shapes} == {1}     # one row at a time, whatever it takes


# ---- rows that come to a running batch ----

def static_steps(lengths, size):
    """How many forwards of one token per row draw completions of these lengths, where `size` rows at a time
    wait for the longest of them."""
    return sum(max(lengths[start:start + size]) - 1 for start in range(0, len(lengths), size))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", ["qwen2", "mistral-window", "gemma2", "gpt_oss"])
def test_rows_come_when_others_have_ended(tokenizer, monkeypatch, name, in_place):
    """The same completions in fewer steps, with no position that the longest prompt could not reach."""
    if in_place:
        monkeypatch.setattr("model.decoding.Cache", CacheInPlace)
        monkeypatch.setattr("model.cache.SHOWN", 4)
        monkeypatch.setattr("model.sampler.STEPS_AT_ONCE", {"cpu": 2})
    lengths = 3, 17, 5, 2, 11, 30, 8, 1, 5, 23
    given = prompts(lengths)
    policy = Policy(model(ARCHITECTURES[name]))
    values = dict(max_completion_length=60, temperature=1.6, stop="Q, j,7,k,p")
    whole = sample(policy, tokenizer, given, keys(10), 2, settings(**values))
    steps = []
    step = Decoding.step

    def counted(decoding):
        assert 0 <= int(decoding.positions.max()) < 30 + 60
        steps.append(len(decoding.positions))
        step(decoding)

    monkeypatch.setattr(Decoding, "step", counted)
    reports = []
    refilled = sample(policy, tokenizer, given, keys(10), 2, settings(rollout_batch_size=3, **values),
                      lambda *numbers: reports.append(numbers))
    assert_same_completions(refilled, whole)
    assert reports[-1] == (20, 20) and max(steps) <= 3
    order = sorted(range(10), key=lengths.__getitem__)
    drawn = [len(completion.tokens) for prompt in order for completion in whole[prompt]]
    assert min(drawn) < 5 and max(drawn) > 25
    tokens = sum(drawn) - len(drawn)               # the first of each comes with its prompt
    assert tokens / 3 <= len(steps) < 0.8 * static_steps(drawn, 3)


def test_rows_that_fit_one_batch_are_filled_once(tokenizer, monkeypatch):
    added = []
    add = Decoding.add

    def counted(decoding, given, uniforms):
        added.append(len(given))
        return add(decoding, given, uniforms)

    monkeypatch.setattr(Decoding, "add", counted)
    policy, sampling = Policy(model(ARCHITECTURES["qwen2"])), settings(rollout_batch_size=15)
    sample(policy, tokenizer, prompts(), keys(5), COPIES, sampling)
    assert added == [15]


@pytest.mark.parametrize("name", ["qwen2", "mistral-window"])
def test_prompts_are_computed_in_the_form_of_the_policy(tokenizer, monkeypatch, name):
    """With varlen one call per layer and forward, here a loop in the kernel's place."""
    calls = []
    loop = varlen.one_by_one

    def counted(*arguments):
        calls.append(len(arguments[0]))
        return loop(*arguments)

    monkeypatch.setattr("model.varlen.one_by_one", counted)
    sampling = settings()
    lm = model(ARCHITECTURES[name], VARLEN)
    completions = sample(Policy(lm, form=Form(VARLEN)), tokenizer, prompts(), keys(5), COPIES, sampling)
    assert calls == [sum(LENGTHS)] * 2                       # two layers
    check_all(model(ARCHITECTURES[name], "eager"), tokenizer, prompts(), completions, sampling)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name, attention", [
    ("qwen2", "segments"), ("qwen2", VARLEN), ("mistral-window", "segments"), ("gpt_oss", "segments")])
def test_a_common_prefix_is_computed_once(tokenizer, monkeypatch, name, attention, in_place):
    """For the prompts of one forward."""
    if in_place:
        monkeypatch.setattr("model.decoding.Cache", CacheInPlace)
    calls = []
    forward = decoding.last_hidden

    def counted(lm, cache, ids, positions, **layout):
        if layout:
            calls.append(ids.shape[1])
        return forward(lm, cache, ids, positions, **layout)

    monkeypatch.setattr("model.decoding.last_hidden", counted)
    prefix = np.arange(50, 70, dtype=np.int32)
    given = [np.concatenate([prefix, prompt]) for prompt in prompts()]
    policy = Policy(model(ARCHITECTURES[name], attention), form=Form(attention))
    completions = sample(policy, tokenizer, given, keys(5), COPIES, settings())
    assert calls == [20 + sum(LENGTHS)]
    check_all(model(ARCHITECTURES[name], "eager"), tokenizer, given, completions, settings())
    policy.use(policy.form._replace(share_prompt=False))
    assert_same_completions(sample(policy, tokenizer, given, keys(5), COPIES, settings()), completions)
    assert calls[1:] == [5 * 20 + sum(LENGTHS)]


def test_the_policy_is_as_before(tokenizer):
    """Attention, the layers' forwards and gradients."""
    lm = model(ARCHITECTURES["qwen2"])
    forwards = [module.forward for module in lm.modules()]
    sample(Policy(lm), tokenizer, prompts(), keys(5), 1, settings())
    assert lm.config._attn_implementation == "segments" and torch.is_grad_enabled()
    assert [module.forward for module in lm.modules()] == forwards
    assert all("forward" not in vars(module) for module in lm.modules())


@pytest.mark.parametrize("use_cache", [True, False])
def test_plain_rows(tokenizer, use_cache):
    """Through transformers' `generate`, where the LM's own settings have no say; they stay as they are
    meanwhile, for a save in the background."""
    given, sampling = prompts(), settings(stop="Q, j", temperature=0.8)
    lm = model(ARCHITECTURES["qwen2"])
    lm.generation_config.repetition_penalty = 3.0
    policy = Policy(lm, form=Form("plain", False, has_exact_cache=use_cache))
    reports, penalties = [], set()

    def report(*numbers):
        reports.append(numbers)
        penalties.add(lm.generation_config.repetition_penalty)

    completions = sample(policy, tokenizer, given, keys(len(given)), COPIES, sampling, report)
    check_all(model(ARCHITECTURES["qwen2"], "eager"), tokenizer, given, completions, sampling)
    assert penalties == {lm.generation_config.repetition_penalty} == {3.0} and reports[-1] == (15, 15)


def test_under_lora(tokenizer):
    """A trained adapter: as the plain model whose weights have W + scale B A."""
    pytest.importorskip("peft")
    lm = model(ARCHITECTURES["qwen2"])
    plain = model(ARCHITECTURES["qwen2"], "eager")
    lora.attach(lm, lora.new_settings(ModelKeys(lora_r=4, lora_alpha=8), lm))
    generator = torch.Generator().manual_seed(1)
    for name, module in lm.named_modules():
        if hasattr(module, "lora_A"):
            a, b = module.lora_A["default"].weight.data, module.lora_B["default"].weight.data
            b.copy_(0.2 * torch.randn(b.shape, generator=generator))
            plain.get_submodule(name).weight.data += 2.0 * b @ a
    given, sampling = prompts(), settings()
    completions = sample(Policy(lm), tokenizer, given, keys(5), COPIES, sampling)
    check_all(plain, tokenizer, given, completions, sampling)
    assert_same_completions(sample(Policy(lm), tokenizer, given, keys(5), COPIES, settings(rollout_batch_size=4)), completions)


def test_bf16_follows_fp32(tokenizer):
    """The same draws for most first tokens: log-probs within bf16's rounding."""
    given = prompts()
    exact, rounded = (sample(Policy(model(ARCHITECTURES["qwen2"]), precision), tokenizer, given, keys(5), 8, settings())
                      for precision in ("fp32", "bf16"))
    pairs = [(a, b) for ours, theirs in zip(exact, rounded) for a, b in zip(ours, theirs) if a.tokens[0] == b.tokens[0]]
    assert len(pairs) >= 30
    differences = [abs(float(a.logps[0] - b.logps[0])) for a, b in pairs]
    assert 0 < sum(differences) / len(differences) < 0.05


# ---- one draw ----

def random_weights(rng, rows, size):
    """Rows of which many weights, whole blocks among them, are 0."""
    weights = rng.random((rows, size)) ** 4 * (rng.random((rows, size)) < rng.choice([0.01, 0.3, 1.0], (rows, 1)))
    weights *= np.repeat(rng.random((rows, -(-size // BLOCK))) < 0.6, BLOCK, axis=1)[:, :size]
    weights[np.arange(rows), rng.integers(size, size=rows)] += 0.5           # at least one has weight
    return torch.from_numpy(weights).float()


def inverted(weights, uniforms):
    """`inverse_cdf` with the sums it needs, over blocks of BLOCK tokens."""
    padded = torch.nn.functional.pad(weights.double(), (0, -weights.shape[1] % BLOCK))
    sums = padded.unflatten(1, (-1, BLOCK)).sum(2)
    uniforms = torch.as_tensor(uniforms, dtype=torch.float64)
    return inverse_cdf(weights, sums, uniforms).tolist()


@pytest.mark.parametrize("size", [1, 3, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK + 7])
def test_inverse_cdf_finds_the_first_token_whose_running_sum_passes(size):
    rng = np.random.default_rng(size)
    weights, uniforms = random_weights(rng, 200, size), rng.random(200)
    uniforms[:20], uniforms[20:40] = 0.0, np.nextafter(1.0, 0.0)
    for row, uniform, token in zip(weights.double().numpy(), uniforms, inverted(weights, uniforms)):
        running = np.cumsum(row)
        assert row[token] > 0
        assert token == min(int((running <= uniform * running[-1]).sum()), int(row.nonzero()[0][-1]))


def test_a_token_without_weight_is_never_drawn():
    """Not even where a uniform number lies on the border between two blocks, to the last bit."""
    rng = np.random.default_rng(0)
    weights = random_weights(rng, 1000, 3 * BLOCK + 7)
    weights[:, ::BLOCK] = 0.0                                         # the first token of every block
    weights[:, 1] += 0.1
    sums = torch.nn.functional.pad(weights.double(), (0, -weights.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK)).sum(2)
    running = sums.cumsum(1)
    for block in range(3):
        border = (running[:, block] / running[:, -1]).numpy()
        for uniforms in (np.nextafter(border, 0), border, np.nextafter(border, 1)):
            tokens = inverted(weights, np.minimum(uniforms, np.nextafter(1.0, 0.0)))
            assert (weights[torch.arange(len(weights)), torch.tensor(tokens)] > 0).all()


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_draws_have_the_softmax_distribution(temperature):
    """At 4,000 evenly spaced numbers every token comes up as often as its probability says, to within one."""
    logits, count = torch.randn(BLOCK + 90, generator=torch.Generator().manual_seed(0)) * 3, 4000
    tokens, logps = draw(logits.repeat(count, 1), (torch.arange(count, dtype=torch.float64) + 0.5) / count, temperature)
    expected = torch.softmax(logits.double() / temperature, 0)
    assert (torch.bincount(tokens, minlength=len(logits)) - expected * count).abs().max() <= 1
    assert torch.equal(tokens, tokens.sort().values)
    torch.testing.assert_close(logps, expected.log()[tokens].float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("top_k, top_p", [(1, 1.0), (7, 1.0), (0, 0.5), (0, 1e-9), (40, 0.8), (10_000, 1.0), (5, 0.999)])
def test_exactly_the_likeliest_tokens_are_drawn(top_k, top_p):
    """Log-probs stay those of the whole distribution."""
    logits, count = torch.randn(BLOCK + 3, generator=torch.Generator().manual_seed(1)) * 2, 3000
    probabilities = plain_softmax(logits.tolist(), 1.0)
    allowed = plain_choice(probabilities, top_k, top_p)
    tokens, logps = draw(logits.repeat(count, 1), (torch.arange(count, dtype=torch.float64) + 0.5) / count, 1.0, top_p, top_k)
    total = sum(probabilities[token] for token in allowed)
    expected = torch.tensor([probabilities[token] / total * (token in allowed) for token in range(len(logits))])
    assert set(tokens.tolist()) <= allowed and (torch.bincount(tokens, minlength=len(logits)) - expected * count).abs().max() <= 1
    assert logps.tolist() == pytest.approx([math.log(probabilities[token]) for token in tokens.tolist()], abs=1e-5)


def test_temperature_zero_takes_the_likeliest():
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, -1.0, 5.0]])
    tokens, logps = draw(logits.clone(), torch.zeros(2, dtype=torch.float64), 0.0)
    assert tokens.tolist() == [1, 2]
    torch.testing.assert_close(logps, torch.log_softmax(logits, 1).amax(1))


# ---- stop strings ----

@pytest.mark.parametrize("strings", ["</é>", "é, </a>", "a</,>é", "🙂,é🙂"])
def test_stop_strings_are_found_with_the_token_that_completes_them(strings):
    """Tokens are bytes, of which é has two and 🙂 four, or pieces of the strings with more around them."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["</a", "a>a<", "/", "é<"])
    rng, wanted = random.Random(0), [string.strip() for string in strings.split(",")]
    stops, found = Stops(tokenizer, wanted), 0
    for _ in range(300):
        tokens = np.array(tokenizer.encode("".join(rng.choices(["<", "/", "é", ">", "a", "🙂", *wanted], k=12))), np.int32)
        for i in range(1, len(tokens) + 1):
            stopped = any(string in tokenizer.decode(tokens[:i]) for string in wanted)
            assert stops(tokens[:i]) == stopped
            if stopped:
                found += 1
                break
    assert found > 50


# ---- the cache ----

def test_rows_that_go_on_keep_their_keys_and_values():
    rng = random.Random(0)
    for _ in range(200):
        count, column = rng.randint(1, 9), rng.randint(1, 4)
        alive = [row for row in range(count) if rng.random() < rng.choice([0.1, 0.5, 0.9])]
        groups = [(np.zeros(rng.randint(1, column)), slice(row, row + 1)) for row in range(count)]
        cache = Cache("cpu")
        cache.add(groups, 3)
        cache.column = column
        cache.layers = {layer: [torch.randn(count, 2, column + 3, 4) for _ in range(2)] for layer in range(2)}
        before, mask = copy.deepcopy(cache.layers), cache.mask
        order = cache.compact(alive)
        assert sorted(order) == alive
        assert (mask is None) == (cache.mask is None)
        for place, row in enumerate(order):
            assert mask is None or torch.equal(cache.mask[place], mask[row])
            for layer in range(2):
                for kept, old in zip(cache.layers[layer], before[layer]):
                    assert len(kept) == len(alive) and torch.equal(kept[place, :, :column], old[row, :, :column])


# ---- layers that do not take our cache ----

def made(policy, tokenizer):
    """The completions of all prompts, as pairs of tokens and log-probs."""
    found = []
    for group in sample(policy, tokenizer, prompts(), keys(len(LENGTHS)), COPIES, settings()):
        found += [(completion.tokens.tolist(), completion.logps.tolist()) for completion in group]
    return found


def unanswered():
    return [Example(prompt, [], "prompts:1") for prompt in prompts()]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_these_layers_take_our_cache(name):
    policy = Policy(model(ARCHITECTURES[name]), "fp32")
    check_sampling(policy, unanswered(), notice=None)      # it would be called
    assert policy.form == Form() and policy.form.samples_itself


def refuses(*_, **__):
    raise AttributeError("'Cache' object has no attribute 'update'")


def misreads(*arguments, **keywords):
    """Other hidden states, as of layers that leave out a part of the cache."""
    return last_hidden(*arguments, **keywords) + 0.1


@pytest.mark.parametrize("other", [refuses, misreads])
def test_layers_that_do_not_take_our_cache_are_sampled_by_transformers(tokenizer, monkeypatch, other):
    """The draws are the same: they depend on keys, and probabilities are those of the LM. Where its own cache
    is wrong, too, every token is sampled from the whole row."""
    policy = Policy(model(ARCHITECTURES["llama"]), "fp32")
    expected = made(policy, tokenizer)
    monkeypatch.setattr(decoding, "last_hidden", other)
    said = []
    check_sampling(policy, unanswered(), said.append)
    assert len(said) == 1 and "transformers' loop samples, since a llama's layers" in said[0]
    assert not policy.form.samples_itself and policy.form.has_exact_cache
    for (tokens, logps), (wanted, wanted_logps) in zip(made(policy, tokenizer), expected, strict=True):
        assert tokens == wanted and logps == pytest.approx(wanted_logps, abs=1e-5)


def test_a_run_goes_on_with_layers_that_do_not_take_our_cache(tmp_path, monkeypatch):
    """Its numbers are those of a run whose layers do."""
    rows = []
    for name in ("own", "other"):
        options = ONLINE["grpo"] | dict(algorithm="grpo", model=tiny_model(tmp_path / "model"), max_steps=2,
                                         max_length=200)
        options |= dict(data=write_jsonl(tmp_path / "rows.jsonl", prompt_rows(4)), output=tmp_path / name)
        train_here(write_config(tmp_path / f"{name}.yml", **options))
        rows.append(metrics(tmp_path / name))
        monkeypatch.setattr(decoding, "last_hidden", refuses)
    assert "transformers' loop samples" in (tmp_path / "other" / "events.log").read_text()
    for own, other in zip(*rows, strict=True):
        assert own.pop("split") == other.pop("split")
        for number in ("loss", "grad_norm", "reward", "completions/mean_length"):
            assert other[number] == pytest.approx(own[number], rel=1e-4, abs=1e-6), number
