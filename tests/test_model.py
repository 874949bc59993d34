"""The policy against the plain model: attention, log-probs in chunks, recomputation; what load_lm refuses."""
import itertools
import json
import random

import numpy as np
import pytest
import torch
import transformers
from helpers import byte_tokenizer, config_of, kinds, random_lm, tiny_model
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    DistilBertConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    T5Config,
)

from data.errors import UserError
from data.pack import Example, Response, collate
from model import varlen
from model.actor_critic import ActorCritic
from model.build import build_policy
from model.check import check_policy, use_kernel
from model.form import PLAIN, VARLEN, Form
from model.keys import ModelKeys
from model.load import load_lm
from model.logps import ChunkedLogps
from model.logps import plain_logps as logps_of_full_logits
from model.policy import Policy
from model.reward_model import RewardModel
from model.slices import LOGITS_AT_ONCE, slice_width

ARCHITECTURES = {
    "qwen2": config_of(Qwen2Config),
    "qwen2-tied": config_of(Qwen2Config, tie_word_embeddings=True, pad_token_id=7),    # 7 occurs in texts
    "qwen3": config_of(Qwen3Config),
    "llama": config_of(LlamaConfig),
    "mistral-window": config_of(MistralConfig, sliding_window=5),     # shorter than the prompts and responses
} | kinds()


def examples(responses, count=3, seed=0, prefix=0):
    """Examples of varying lengths, a quarter of whose response tokens are not trained; their prompts begin
    with the same `prefix` tokens."""
    draw = random.Random(seed)

    def tokens(least, most):
        return np.array([draw.randrange(256) for _ in range(draw.randint(least, most))], np.int32)
    made = []
    shared = np.arange(100, 100 + prefix, dtype=np.int32)
    for i in range(count):
        parts = [tokens(1, 12) for _ in range(responses)]
        prompt = np.concatenate([shared, tokens(1, 14)])
        item = Example(prompt, [], f"here:{i}")
        for part in parts:
            trained = np.array([draw.random() < 0.75 for _ in part])
            item.responses.append(Response(part, trained))
        made.append(item)
    return made


def plain_logps(lm, made):
    """Log-probs of the trained tokens from the LM's own forward, full logits, one response at a time."""
    values = []
    for example in made:
        for response in example.responses:
            ids = [*example.prompt.tolist(), *response.tokens.tolist()]
            logps = torch.log_softmax(lm(torch.tensor([ids]), use_cache=False).logits[0], -1)
            for i, trained in enumerate(response.trained, len(example.prompt)):
                if trained:
                    values.append(logps[i - 1, ids[i]])
    return torch.stack(values)


def gradients(lm, values):
    """Gradients of all parameters of a sum with uneven weights, so that no two errors cancel."""
    lm.zero_grad()
    (values * torch.linspace(-1, 2, len(values))).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in lm.named_parameters()}


def assert_same_gradients(ours, theirs):
    assert ours.keys() == theirs.keys()
    errors = {name: float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in ours}
    assert {name: error for name, error in errors.items() if not error < 1e-5} == {}


def check_rows(name, made, layouts):
    """Values and gradients of all parameters in these forms of flat rows against the plain forward."""
    config = ARCHITECTURES[name]
    plain = random_lm(config, attn_implementation="eager")
    expected = plain_logps(plain, made)
    expected_gradients = gradients(plain, expected)
    for form in layouts:
        if form.attention == "varlen" and name in ("gemma2", "gpt_oss"):      # caps and sinks of scores
            continue
        lm = random_lm(config, attn_implementation="eager")
        policy = Policy(lm, form=form)
        values = policy(policy.collate(made))
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)
        assert_same_gradients(gradients(lm, values), expected_gradients)


SHARED = [Form("segments"), Form("varlen"), Form("dense")]
UNSHARED = [form._replace(share_prompt=False) for form in SHARED]


@pytest.mark.parametrize("responses", [1, 2, 8])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_flat_shared_rows_equal_separate_rows(name, responses):
    check_rows(name, examples(responses), SHARED + UNSHARED)


@pytest.mark.parametrize("responses", [1, 3])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_shared_prefix_equals_separate_rows(name, responses):
    """Of more tokens than the window has, too."""
    made = examples(responses, prefix=16)
    assert collate(made).prefix == 16
    check_rows(name, made, [*SHARED, Form(PLAIN)])


LAYOUTS = [Form("segments"), Form("segments", share_prompt=False), Form(VARLEN), Form(PLAIN, False)]


@pytest.mark.parametrize("other, own", itertools.permutations(LAYOUTS, 2))
def test_a_batch_of_a_model_with_another_form(other, own):
    """A reward model, a critic or a teacher may need another form than the policy whose batches it reads."""
    made = examples(2, prefix=16)
    policy = Policy(random_lm(config_of(), attn_implementation="eager"), form=other)
    head = torch.linspace(-1, 1, config_of().hidden_size)[None]

    def second():
        return Policy(random_lm(config_of(), seed=1, attn_implementation="eager"), form=own)

    batch, own_batch = policy.collate(made), second().collate(made)
    expected = plain_logps(random_lm(config_of(), seed=1, attn_implementation="eager"), made)
    torch.testing.assert_close(second()(batch), expected, rtol=1e-5, atol=1e-5)
    scorer = RewardModel(second(), head)
    assert torch.equal(scorer(batch), scorer(own_batch))
    critic = second()
    values = ActorCritic(policy, head, Policy(critic.trunk, form=own))(batch, values=True)[1]
    states, _ = critic.states(own_batch)
    torch.testing.assert_close(values, states @ head[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_right", [True, False])
def test_a_kernel_may_round_as_much_as_other_forms(monkeypatch, is_right):
    """The log-probs of a model with large logits are far from fp32's in every form in bf16."""
    lm = random_lm(config_of(), attn_implementation="segments")
    lm.lm_head.weight.data.mul_(60)
    made, notices = examples(2), []
    exact = Policy(lm)
    own = exact(exact.collate(made)).detach()
    policy = Policy(lm, "bf16")
    with torch.no_grad():
        assert (policy(policy.collate(made)) - own).abs().mean() > policy.tolerance
        if not is_right:
            loop = varlen.one_by_one
            monkeypatch.setattr(varlen, "one_by_one", lambda *inputs: 1.5 * loop(*inputs))
        use_kernel(policy, own, made, "auto", notices.append)
    assert (policy.form.attention, len(notices)) == ((VARLEN, 0) if is_right else ("segments", 1))


@pytest.mark.parametrize("responses", [1, 2])
def test_bf16_autocast_follows_fp32(responses):
    """Shared rows under autocast, where rotary embeddings mix dtypes: equal up to the rounding of bf16."""
    made, results = examples(responses), {}
    for precision in ("fp32", "bf16"):
        lm = random_lm(config_of(), attn_implementation="segments")
        values = Policy(lm, precision)(collate(made))
        assert values.dtype == torch.float32
        grads = [grad.flatten() for grad in gradients(lm, values).values()]
        results[precision] = values.detach(), torch.cat(grads)
    values, grads = results["bf16"]
    exact_values, exact_grads = results["fp32"]
    assert 0 < (values - exact_values).abs().mean() < 0.05
    assert torch.cosine_similarity(grads, exact_grads, dim=0) > 0.99


def test_the_window_matters():
    """Else the Mistral rows above would prove nothing."""
    made = examples(2)
    windowed = plain_logps(random_lm(config_of(MistralConfig, sliding_window=5)), made)
    full = plain_logps(random_lm(config_of(MistralConfig, sliding_window=None)), made)
    assert (windowed - full).abs().max() > 0.01


def test_responses_and_examples_do_not_see_each_other():
    """Bit for bit: other text in a neighbour of the same length changes nothing."""
    made, other = examples(3), examples(3)
    other[0].responses[1].tokens = (other[0].responses[1].tokens + 1) % 256
    other[2].prompt = (other[2].prompt + 1) % 256
    policy = Policy(random_lm(config_of(), attn_implementation="segments"))
    batch = collate(made)
    before = policy(batch).split(batch.lengths)
    after = policy(collate(other)).split(batch.lengths)
    same = [torch.equal(x, y) for x, y in zip(before, after)]
    assert same == [True, False, True, True, True, True, False, False, False]


def test_every_pass_is_the_same_to_the_bit():
    made, lm = examples(8), random_lm(config_of(), attn_implementation="segments")
    policy = Policy(lm)
    first, second = policy(collate(made)), policy(collate(made))
    assert torch.equal(first, second)
    first_gradients, second_gradients = gradients(lm, first), gradients(lm, second)
    assert all(torch.equal(first_gradients[name], second_gradients[name]) for name in first_gradients)


def test_the_filler_has_no_log_probs_and_zero_gradients():
    lm = random_lm(config_of(), attn_implementation="segments")
    values = Policy(lm)(collate([]))
    assert values.shape == (0,)
    values.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in lm.parameters())


# ---- the LM head in chunks ----

def head_inputs(rows=11, trained_head=True):
    """hidden (rows, 8), weight (50, 8), target (rows,)"""
    torch.manual_seed(0)
    hidden = torch.randn(rows, 8, requires_grad=True)
    weight = torch.randn(50, 8, requires_grad=trained_head)
    return hidden, weight, torch.randint(50, (rows,))


def test_slices_begin_at_aligned_places_on_a_gpu():
    """With other widths an H100 took slow kernels: for 50 of the 345 ms of an update of a 1.5B model. The
    buffer keeps its limit of 2^27 numbers."""
    for rows in (1, 4501, 5963, 2 ** 17):
        width = slice_width(rows, "cuda")
        assert width % 128 == 0 and 0.8 * 2 ** 27 < rows * width <= 2 ** 27
    assert slice_width(70000, "cuda", parts=16) == 2 ** 27 // 16 // 70000      # narrower than 128
    assert slice_width(1000, "cpu") == 2 ** 22 // 1000


@pytest.mark.parametrize("width", [1, 7, 50, 100])      # for a vocabulary of 50
@pytest.mark.parametrize("trained_head", [True, False])
def test_chunked_log_probs_equal_full_logits(monkeypatch, width, trained_head):
    monkeypatch.setitem(LOGITS_AT_ONCE, "cpu", width * 11 + 10)
    hidden, weight, target = head_inputs(trained_head=trained_head)
    slopes = torch.randn(11)
    inputs = [hidden, weight][:1 + trained_head]

    def chunked():
        return ChunkedLogps.apply(hidden, weight, target, torch.float32)

    full = torch.log_softmax(hidden @ weight.T, -1)[range(11), target]
    assert torch.equal(logps_of_full_logits(hidden, weight, target), full)
    torch.testing.assert_close(chunked(), full, rtol=1e-6, atol=1e-6)
    ours = torch.autograd.grad((slopes * chunked()).sum(), inputs)
    again = torch.autograd.grad((slopes * chunked()).sum(), inputs)
    theirs = torch.autograd.grad((slopes * full).sum(), inputs)
    for x, y, z in zip(ours, again, theirs):
        assert torch.equal(x, y)
        torch.testing.assert_close(x, z, rtol=1e-5, atol=1e-6)


def test_chunked_log_probs_of_nothing():
    hidden, weight, target = head_inputs(rows=0)
    logps = ChunkedLogps.apply(hidden, weight, target, torch.float32)
    logps.sum().backward()
    assert logps.shape == (0,) and hidden.grad.shape == (0, 8) and not weight.grad.any()


def test_chunked_log_probs_of_bf16_products():
    """The logits are rounded to bf16, the normaliser and the gradient of the head are fp32."""
    hidden, weight, target = head_inputs()
    logps = ChunkedLogps.apply(hidden, weight, target, torch.bfloat16)
    full = torch.log_softmax(hidden @ weight.T, -1)[range(11), target]
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps, full, rtol=0, atol=0.05)
    ours = torch.autograd.grad(logps.sum(), (hidden, weight))
    theirs = torch.autograd.grad(full.sum(), (hidden, weight))
    for x, y in zip(ours, theirs):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, y, rtol=0, atol=0.1)


# ---- loading and checking ----

def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path):
    path, made = tiny_model(tmp_path), examples(2)
    results, calls = [], []
    for recompute in (False, True):
        policy = build_policy(path, byte_tokenizer(), ModelKeys(gradient_checkpointing=recompute))
        mlp = policy.lm.base_model.layers[0].mlp
        mlp.register_forward_pre_hook(lambda *_, recompute=recompute: calls.append(recompute))
        values = policy(collate(made))
        results.append((values, *gradients(policy.lm, values).values()))
    assert calls == [False, True, True]                            # the layer runs again in the backward pass
    assert all(torch.equal(x, y) for x, y in zip(*results))


def test_dropout_is_off(tmp_path):
    path = tiny_model(tmp_path, attention_dropout=0.5)
    for recompute in (False, True):
        policy = build_policy(path, byte_tokenizer(), ModelKeys(gradient_checkpointing=recompute))
        batch = collate(examples(2))
        assert torch.equal(policy(batch), policy(batch))
        plain = AutoModelForCausalLM.from_pretrained(path).eval()
        torch.testing.assert_close(policy(batch), plain_logps(plain, batch.examples))


def test_check_policy_accepts_an_ordinary_model():
    notices = []
    policy = Policy(random_lm(config_of(), attn_implementation="segments"))
    check_policy(policy, examples(2), ModelKeys(), notices.append)
    assert policy.share_prompt and notices == [] and policy.lm.config._attn_implementation == "segments"


@pytest.mark.parametrize("mode, shared", [("auto", False), ("false", False), ("true", None)])
def test_check_policy_falls_back_where_sharing_is_wrong(mode, shared):
    """A stand-in for such a model: its log-probs are wrong wherever a prompt has two responses."""
    def wrong(policy, inputs, logps):
        shared = any(len(lengths) > 1 for _, lengths in inputs[0].segments)
        return logps + shared

    policy, notices = Policy(random_lm(config_of(), attn_implementation="segments")), []
    keys = ModelKeys(share_prompt=mode)
    policy.register_forward_hook(wrong)
    if shared is None:
        with pytest.raises(UserError, match="differ by 1 from its own"):
            check_policy(policy, examples(2), keys, notices.append)
    else:
        check_policy(policy, examples(2), keys, notices.append)
        assert policy.share_prompt is shared and len(notices) == (mode == "auto")
        assert policy.form.attention == "segments"


def test_check_policy_names_a_forward_that_fails():
    """As Llama 4 with images in transformers 5.24: its forward wants an output that its layers do not
    give."""
    lm = random_lm(config_of())

    def fail(*_):
        raise AttributeError("'MoeCausalLMOutputWithPast' object has no attribute 'image_outputs'")

    lm.lm_head.register_forward_hook(fail)
    with pytest.raises(UserError) as caught:
        check_policy(Policy(lm), examples(2), ModelKeys(), lambda text: None)
    says = f"the forward of a qwen2 fails in transformers {transformers.__version__} (AttributeError: 'Moe"
    assert says in str(caught.value)


@pytest.mark.parametrize("hidden_scale", [1.0, 0.5])
def test_check_policy_refuses_logits_that_no_head_gives(hidden_scale):
    """A stand-in for a family with its own logits: they are scaled by a number that nothing names."""
    lm = random_lm(config_of())
    lm.lm_head.register_forward_hook(lambda module, inputs, logits: logits * hidden_scale)
    policy = Policy(lm)
    if hidden_scale == 1:
        check_policy(policy, examples(2), ModelKeys(), lambda text: None)
        return
    with pytest.raises(UserError, match="differ by .* from its own") as caught:
        check_policy(policy, examples(2), ModelKeys(), lambda text: None)
    assert "\n" not in str(caught.value)


def test_load_lm_names_what_is_not_a_causal_lm(tmp_path):
    def directory(name, **files):
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / f"{file}.json").write_text(json.dumps(content))
        return str(tmp_path / name)

    adapter = directory("adapter", adapter_config={"peft_type": "LORA"})
    quantization = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    quantized = directory("quantized", config=config_of().to_dict() | quantization)
    (tmp_path / "file").write_text("")
    cut = tiny_model(tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    cases = [
        (str(tmp_path / "missing"), "there is no directory"), ("./missing", "there is no directory"),
        (str(tmp_path / "file"), "is a file, not a directory with a model"),
        (directory("empty"), "cannot be loaded"),
        (adapter, "holds a LoRA adapter"),
        (quantized, "is quantized"),
        (directory("t5", config=T5Config().to_dict()), "not a causal language model"),
        (directory("distilbert", config=DistilBertConfig().to_dict()), "not a causal language model"),
        (directory("weightless", config=config_of().to_dict()), "cannot be loaded"),
        (cut, "cannot be loaded"),
    ]
    for path, expected in cases:
        with pytest.raises(UserError) as caught:
            load_lm(path)
        text = str(caught.value)
        assert expected in text and path in text and "; fix: " in text and "\n" not in text


def test_an_encoder_is_refused(tmp_path):
    """BERT can be loaded as a causal LM, but its attention looks ahead."""
    AutoModelForCausalLM.from_config(config_of(BertConfig, is_decoder=False)).save_pretrained(tmp_path)
    with pytest.raises(UserError) as caught:
        check_policy(Policy(load_lm(str(tmp_path)).eval()), examples(2), ModelKeys(), lambda text: None)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    path = tiny_model(tmp_path, vocab_size=200, eos_token_id=1, pad_token_id=0)
    with pytest.raises(UserError, match="259 tokens but the embedding only 200 rows"):
        build_policy(path, byte_tokenizer())


@pytest.mark.parametrize("is_special, role, fits", [
    (True, None, True), (False, None, False), (True, "pad_token", False), (True, "eos_token", False)])
def test_a_token_without_a_row(is_special, role, fits, tmp_path):
    """Gemma 3 1B has one for images, behind the last row; no text needs it. Other tokens are needed."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=is_special)
    if role:
        setattr(tokenizer, role, "<image>")
    path = tiny_model(tmp_path)
    if fits:
        assert build_policy(path, tokenizer).lm.get_input_embeddings().num_embeddings == 259
        return
    with pytest.raises(UserError, match="260 tokens but the embedding only 259 rows"):
        build_policy(path, tokenizer)


# ---- linear layers whose weights are cast again in the backward

@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recast_linear_layers_compute_what_autocast_does(bias, dtype):
    from model.recast import recast
    torch.manual_seed(0)
    first, second = torch.nn.Linear(24, 40, bias=bias), torch.nn.Linear(40, 8, bias=bias)
    layer = torch.nn.Sequential(first, torch.nn.SiLU(), second)
    rows = torch.randn(1, 7, 24).to(dtype)
    results, kept = [], []

    def pack(tensor):
        kept.append(tuple(tensor.shape) if tensor.dtype == torch.bfloat16 else None)
        return tensor
    for is_recast in (False, True):
        if is_recast:
            recast(layer)
        x = rows.clone().requires_grad_()
        kept.clear()
        watch = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with torch.autocast("cpu", torch.bfloat16), watch:
            y = layer(x)
        weights = [shape for shape in kept if shape in ((40, 24), (24, 40), (8, 40), (40, 8))]
        assert len(weights) == (0 if is_recast else 2)
        y.float().square().sum().backward()
        results.append([y, x.grad, *[parameter.grad for parameter in layer.parameters()]])
        layer.zero_grad()
    for ours, theirs in zip(*results):
        assert ours.dtype == theirs.dtype and torch.allclose(ours, theirs, rtol=1e-2, atol=1e-3)
    assert torch.equal(results[0][0], results[1][0])
    x = torch.randn(3, 24)
    inner = torch.nn.functional.silu(torch.nn.functional.linear(x, first.weight, first.bias))
    expected = torch.nn.functional.linear(inner, second.weight, second.bias)
    assert torch.equal(layer(x), expected)      # no autocast: no bf16


@pytest.mark.parametrize("kind", ["tied", "untied", "phi"])
def test_a_frozen_model_in_bf16_keeps_half_and_computes_the_same(kind, tmp_path):
    """The linear layers lie in bf16, as autocast would round them in every forward; all else, a tied head
    too, in fp32. Phi's head has a bias, which is added in fp32."""
    path, tied = str(tmp_path), kind == "tied"
    if kind == "phi":
        random_lm(kinds()["phi"]).save_pretrained(path)
    else:
        tiny_model(path, tie_word_embeddings=tied)
    keys = ModelKeys(precision="bf16")
    trained = build_policy(path, byte_tokenizer(), keys)
    frozen = build_policy(path, byte_tokenizer(), keys, frozen=True, is_trained=False)
    batch = trained.collate(examples(2))
    with torch.no_grad():
        assert torch.equal(trained(batch), frozen(batch))
    for name, weight in frozen.lm.named_parameters():
        is_linear = any(part in name for part in ("proj", "dense", "fc"))
        is_linear = is_linear or name == "lm_head.weight" and not tied
        assert weight.dtype == (torch.bfloat16 if is_linear else torch.float32), name
    assert {weight.dtype for weight in trained.lm.parameters()} == {torch.float32}
