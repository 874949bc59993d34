"""What some families need, each against transformers' own forward in eager mode: heads with a bias and a cap,
plain rows, the check of long rows in fp32, the experts' auxiliary loss. test_model.py and test_rollout.py
have these families among their architectures."""
import copy

import numpy as np
import pytest
import torch
from helpers import config_of, random_lm
from test_model import assert_same_gradients, examples, gradients, plain_logps
from transformers import MixtralConfig, Qwen2Config, Qwen2MoeConfig

from data.pack import collate
from model.check import check_policy, has_exact_cache
from model.entropy import ChunkedEntropy
from model.experts import auxiliary_losses, router_loss, token_shares
from model.form import PLAIN, Form
from model.head import SoftCap
from model.keys import ModelKeys
from model.logps import ChunkedLogps
from model.plain import groups_of, plain_hidden, rows_of
from model.policy import Policy
from model.slices import LOGITS_AT_ONCE

MOE = dict(num_local_experts=4, num_experts_per_tok=2)
WINDOW = dict(sliding_window=20, layer_types=["sliding_attention", "full_attention"])


@pytest.mark.parametrize("width", [1, 7, 50])
def test_bias_and_cap_against_full_logits(monkeypatch, width):
    """In slices of the vocabulary, with their gradients, at a temperature."""
    monkeypatch.setitem(LOGITS_AT_ONCE, "cpu", width * 11)
    torch.manual_seed(0)
    hidden = (3 * torch.randn(11, 8)).requires_grad_()
    weight = torch.randn(50, 8).requires_grad_()
    bias = torch.randn(50).requires_grad_()
    target = torch.randint(50, (11,))
    inputs = [hidden, weight, bias]

    logits = hidden.double() @ weight.double().T + bias.double()
    exact = torch.distributions.Categorical(logits=2.5 * torch.tanh(logits / 2.5) / 0.7)
    factors = torch.linspace(-1, 2, 11).double()
    expected = exact.log_prob(target) @ factors, exact.entropy() @ factors
    for chunked, number in ((ChunkedLogps, expected[0]), (ChunkedEntropy, sum(expected))):
        values = chunked.apply(hidden, weight, target, torch.float32, bias, SoftCap(2.5, 0.7))
        values = sum(values) if isinstance(values, tuple) else values
        ours = values.double() @ factors
        torch.testing.assert_close(ours, number, rtol=1e-5, atol=1e-5)
        theirs = torch.autograd.grad(number, inputs, retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(ours, inputs), theirs, rtol=1e-5, atol=1e-5)


# ---- plain rows --------------------------------------------------------------------------------------------

def test_the_groups_of_plain_rows():
    rows = [np.arange(length) for length in (3, 10, 9, 4, 10, 8)]
    sizes = [[len(row) for row in group] for group in groups_of(rows, 1.25)]
    assert sizes == [[10, 10, 9, 8, 4], [3]]
    sizes = [[len(row) for row in group] for group in groups_of(rows, 1.0)]
    assert sizes == [[10, 10], [9], [8], [4], [3]]


@pytest.mark.parametrize("share, padding", [(True, 1.0), (True, np.inf), (False, 1.25)])
def test_plain_rows_equal_flat_rows(share, padding):
    """In every layout and however far they are padded: log-probs and gradients of an ordinary LM."""
    made = examples(3)
    plain = random_lm(config_of(Qwen2Config), attn_implementation="eager")
    expected = plain_logps(plain, made)
    expected_gradients = gradients(plain, expected)
    lm = random_lm(config_of(Qwen2Config))
    values = Policy(lm, form=Form(PLAIN, share, padding))(collate(made, share))
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients(lm, values), expected_gradients)


def test_all_tokens_of_plain_rows():
    """Every state is that of its own token, also where a prompt is laid out once, and in a prompt alone."""
    made = examples(2)
    lm = random_lm(config_of(Qwen2Config))
    batch = collate(made)
    with torch.no_grad():
        hidden = plain_hidden(Policy(lm, form=Form(PLAIN)), batch)
        for row in rows_of(batch):
            alone = lm.model(input_ids=batch.tokens[row][None]).last_hidden_state[0]
            torch.testing.assert_close(hidden[row], alone, rtol=1e-5, atol=1e-5)


# ---- the check ---------------------------------------------------------------------------------------------

def test_a_window_that_only_the_mask_knows():
    """Qwen2-MoE: two short rows agree, the longest does not."""
    sizes = dict(moe_intermediate_size=16, shared_expert_intermediate_size=16)
    experts = dict(num_experts=4, num_experts_per_tok=2, **sizes)
    config = config_of(Qwen2MoeConfig, **WINDOW, **experts, use_sliding_window=True)
    made = sorted(examples(2, count=3), key=lambda example: example.size())
    long = made[-1]
    long.prompt = np.resize(long.prompt, 40)
    notices = []
    policy = Policy(random_lm(config))
    check_policy(policy, made, ModelKeys(), notices.append)
    assert policy.form.attention == PLAIN and notices[0].startswith("rows: ")
    policy = Policy(random_lm(config))
    check_policy(policy, made[:2], ModelKeys(), notices.append)
    assert policy.form.attention == "segments"


@pytest.mark.parametrize("dtype, precision", [(torch.float32, "bf16"), (torch.bfloat16, "bf16")])
def test_the_check_is_in_fp32(dtype, precision):
    """A difference of 0.02 per token, which bf16 would hide, in weights of either kind; they are as before
    afterwards."""
    for shift, attention in ((0.0, "segments"), (0.02, None)):
        lm = random_lm(config_of(Qwen2Config)).to(dtype)
        before = copy.deepcopy(lm.state_dict())
        policy = Policy(lm, precision)
        policy.register_forward_hook(lambda module, inputs, logps, shift=shift: logps + shift)
        if attention:
            check_policy(policy, examples(2), ModelKeys(), lambda text: None)
            assert policy.form.attention == attention and policy.precision == precision
        else:
            with pytest.raises(Exception, match="differ by 0.02"):
                check_policy(policy, examples(2), ModelKeys(), lambda text: None)
        after = lm.state_dict()
        for key, tensor in after.items():
            assert tensor.dtype == dtype
            assert torch.equal(tensor, before[key])


def test_a_frozen_tied_model_in_bf16_has_flat_rows():
    """The base of an adapter on a GPU: its embedding is cast for the check, too."""
    lm = random_lm(config_of(Qwen2Config, tie_word_embeddings=True))
    lm.get_input_embeddings().weight.data *= 20        # so that rounding it is seen
    policy = Policy(lm.to(torch.bfloat16).requires_grad_(False), "bf16")
    check_policy(policy, examples(2), ModelKeys(share_prompt="true", attn_implementation="segments"), None)
    assert policy.form == Form("segments", True)


def four_bit_policy(error):
    """A stand-in for weights in 4 bits, which are multiplied in bf16 and cannot be cast; `error(logps)` is
    added to its log-probs."""
    lm = random_lm(config_of(Qwen2Config))
    packed = torch.zeros(1, dtype=torch.uint8)
    lm.register_parameter("packed", torch.nn.Parameter(packed, requires_grad=False))
    policy = Policy(lm, "bf16")
    policy.register_forward_hook(lambda module, inputs, logps: logps + error(logps))
    return policy


def test_weights_in_4_bits_are_checked_on_average():
    """The rounding of single log-probs in bf16 refuses no form, and a shift of all of them does."""
    def one_token(logps):
        return torch.zeros_like(logps).index_fill_(0, torch.tensor([0]), 0.4)

    policy = four_bit_policy(one_token)
    check_policy(policy, examples(2), ModelKeys(), None)
    assert policy.form == Form("segments", True)
    policy.use(Form(PLAIN, False))
    assert has_exact_cache(policy, examples(1)[0])
    shifted = four_bit_policy(lambda logps: torch.full_like(logps, 0.2))
    with pytest.raises(Exception, match="differ by 0.2"):
        check_policy(shifted, examples(2), ModelKeys(), None)


# ---- mixtures of experts -----------------------------------------------------------------------------------

def mixtral():
    return random_lm(config_of(MixtralConfig, **MOE, router_aux_loss_coef=0.5), attn_implementation="eager")


@pytest.mark.parametrize("form", [Form(), Form(share_prompt=False), Form(PLAIN, False)])
def test_the_auxiliary_loss_is_transformers_own(form):
    """Value and gradient: each example by itself, all its responses in one forward with their prompts."""
    made = examples(2, prefix=16)
    plain = mixtral()
    losses = []
    for example in made:
        rows = [[*example.prompt, *response.tokens] for response in example.responses]
        most = max(map(len, rows))
        ids = torch.tensor([row + [0] * (most - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (most - len(row)) for row in rows])
        losses.append(plain(ids, attention_mask=mask, output_router_logits=True, use_cache=False).aux_loss)
    total = plain_logps(plain, made).sum() + 0.5 * sum(losses) / 7
    plain.zero_grad()
    total.backward()
    expected = {name: parameter.grad.clone() for name, parameter in plain.named_parameters()}

    lm = mixtral()
    policy = Policy(lm, form=form)
    policy.router_loss = router_loss(lm, None)
    policy.router_loss.open(num_examples=7)
    batch = collate(made, form.share_prompt)
    policy(batch).sum().backward()
    found = {name: parameter.grad for name, parameter in lm.named_parameters()}
    assert_same_gradients(found, expected)
    torch.testing.assert_close(policy.router_loss.metrics()["aux_loss"], torch.stack(losses).detach())


def test_an_even_load_costs_top_k():
    shares = token_shares(collate(examples(2)))
    torch.testing.assert_close(shares.sum(1), torch.ones(3))
    even = torch.zeros(shares.shape[1], 4)
    torch.testing.assert_close(auxiliary_losses([even, even], 4, shares), torch.full((3,), 4.0))


def test_who_has_an_auxiliary_loss():
    assert router_loss(mixtral(), None).coefficient == 0.5
    assert router_loss(mixtral(), 0.1).coefficient == 0.1
    assert router_loss(mixtral(), 0.0) is None
    assert router_loss(random_lm(config_of()), 0.1) is None
