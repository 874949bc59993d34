"""Before anything is trained: which form of the forward gives the model's own log-probs?

    segments, prompts shared     flat rows, each prompt laid out once for all its responses
    segments                     flat rows, each prompt laid out once per response
    plain                        a row per response, through the model's own attention

On a GPU in bf16, flat rows get the attention `varlen`, one call per layer, where its kernel agrees.
"""
import contextlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch
import transformers

from data.errors import UserError
from data.pack import Example, Response
from data.store import extremes
from model.cpu import cpu_linears
from model.form import PADDING, PLAIN, VARLEN, Form
from model.generating import called, generating, logps_by, ordinary_state
from model.load import first_line
from model.plain import decode_plain
from model.policy import Policy
from model.sampler import decode

TOLERANCE = 1e-3                   # of a log-prob, in fp32
IN_BF16 = 0.25                     # of eight log-probs in bf16, on average
ROUNDING = 1.5                     # how many times the rounding of another form in bf16 a kernel may have


def probe(prompt: Example) -> Example:
    """A prompt without responses as an example with two: its own last tokens, forwards and backwards."""
    tokens = prompt.prompt[-16:]
    responses = [Response.all_trained(tokens), Response.all_trained(tokens[::-1])]
    return Example(prompt.prompt, responses, prompt.where)


@torch.no_grad()
def check_policy(policy: Policy, examples, keys, notice) -> None:
    """Compare log-probs with the LM's own forward, and give the policy the first form that agrees on the two
    shortest examples and the longest (windows and rotary scalings show in long rows only). `keys`: a
    ModelKeys, or a run's configuration, whose share_prompt and attn_implementation say which forms are
    allowed. A notice names a form that is not the fastest.

    Raises UserError where no form agrees, or the log-probs are not finite."""
    checked = [example if example.responses else probe(example) for example in extremes(examples)]
    if len(checked[0].responses) == 1:         # twice, so that sharing a prompt is checked
        checked[0] = replace(checked[0], responses=checked[0].responses * 2)
    kind = policy.lm.config.model_type
    with in_fp32(policy):
        own = own_logps(policy, checked)
        if not own.isfinite().all():           # `load_lm` has checked that the weights are finite
            raise UserError(f"model: its log-probs of {checked[0].where} are NaN or infinite, so its "
                            "activations overflow; fix: precision=fp32, or another model")
        reduce, tolerance = torch.max, TOLERANCE
        if policy.precision != "fp32":         # weights in 4 bits are multiplied in bf16
            reduce, tolerance = torch.mean, policy.rounding
        difference = torch.inf
        for form in forms_of(keys, policy.lm):
            policy.use(form)
            difference = difference_to(own, policy, checked, reduce)
            if difference <= tolerance:
                break
    if not difference <= tolerance:
        raise UserError(f"model: the log-probs of a {kind} differ by {difference:.2g} from its own in every "
                        "form of rows that share_prompt and attn_implementation allow; fix: leave both at "
                        "auto, or use another model")
    if policy.device.type == "cuda" and policy.precision == "bf16":
        use_kernel(policy, own, checked, keys.attn_implementation, notice)
    if form.attention == PLAIN:
        exact = all(has_exact_cache(policy, example) for example in checked)
        policy.use(form._replace(padding=min(form.padding, PADDING), has_exact_cache=exact))
        if keys.attn_implementation != PLAIN:
            notice(f"rows: one response per row, through the model's own attention: flat rows are wrong for "
                   f"a {kind}; this is exact, but slower")
        if not exact:
            notice(f"sampling: the cache of a {kind} gives other log-probs than its forward, so every token "
                   "is sampled from the whole row; this is exact, but slow")
    elif not form.share_prompt and keys.share_prompt == "auto":
        notice("share_prompt: prompts are laid out once per response, this model's layers do not allow "
               "sharing them")


def forms_of(keys, lm) -> list[Form]:
    """The forms to try, the fastest first. Plain rows are padded as far as possible first, then not at all:
    there are rotary embeddings that depend on the length of the row."""
    asked = keys.attn_implementation
    sharing = {"auto": (True, False), "true": (True,), "false": (False,)}[keys.share_prompt]
    forms = []
    if asked != PLAIN and lm._can_set_attn_implementation():
        flat = "segments" if asked == "auto" else asked
        for shared in sharing:
            forms.append(Form(flat, shared))
    if asked in ("auto", PLAIN) and False in sharing:
        forms += [Form(PLAIN, False, padding=torch.inf), Form(PLAIN, False, padding=1.0)]
    return forms


def use_kernel(policy: Policy, own, examples, asked: str, notice) -> None:
    """Give flat rows the attention of one call per layer, where the log-probs (N,) of `examples` differ from
    `own` by no more than bf16 rounds, on average: a model that was trained for something else than
    predictions, such as a reward model, is far from them in every form. `asked`: the attn_implementation of
    the run."""
    form = policy.form
    if form.attention != VARLEN and (asked, form.attention) != ("auto", "segments"):
        return

    def difference(attention):
        policy.use(form._replace(attention=attention))
        return difference_to(own, policy, examples, torch.mean)

    of_kernel = difference(VARLEN)
    if of_kernel <= policy.tolerance:
        return
    if of_kernel <= ROUNDING * difference("segments"):
        policy.use(form._replace(attention=VARLEN))
        return
    kind = policy.lm.config.model_type
    fault = "does not take the attention of" if of_kernel == torch.inf else "gives other log-probs for"
    if asked == VARLEN:
        raise UserError(f"attn_implementation: the kernel of varlen {fault} a {kind}; "
                        "fix: attn_implementation=auto")
    policy.use(form)
    notice(f"attention: one call per response and layer, not one per layer: its kernel {fault} a {kind}; "
           "this is exact, but slower")


def difference_to(own, policy: Policy, examples, reduce=torch.max) -> float:
    """The largest difference of the policy's log-probs of `examples` to `own` (N,), or what else `reduce`
    makes of them; infinite where this form cannot be computed."""
    try:
        logps = logps_by(policy, policy.collate(examples))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # noqa: BLE001  somebody else's layers: they need not know our attention
        if policy.form.attention == PLAIN:
            raise
        return torch.inf
    return float(reduce((logps - own).abs()))


@torch.no_grad()
def check_sampling(policy: Policy, examples, notice) -> None:
    """For a policy that answers prompts, `examples` without responses: let transformers' loop sample where
    the layers, somebody else's, do not take our cache, or give other log-probs with it. A notice says so."""
    prompts = [example for example in extremes(examples) if not example.responses]
    if not prompts or policy.form.attention == PLAIN:
        return
    if all(takes_our_cache(policy, prompt) for prompt in prompts):
        return
    exact = all(has_exact_cache(policy, prompt) for prompt in prompts)
    policy.use(policy.form._replace(takes_our_cache=False, has_exact_cache=exact))
    kind = policy.lm.config.model_type
    notice(f"sampling: transformers' loop samples, since a {kind}'s layers do not take our cache in this "
           "version of transformers; this is exact, but slower")


def takes_our_cache(policy: Policy, example: Example) -> bool:
    """Whether the log-probs of two short completions that our loop draws are those of the forward: on
    average, since bf16 rounds a few of them far."""
    sampling = SimpleNamespace(
        temperature=1.0, top_p=1.0, top_k=0, max_completion_length=4, rollout_batch_size=2)
    prompts = [example.prompt] * 2
    try:
        with generating(policy, "rollout") as lm, cpu_linears(lm):
            drawn = decode(policy, prompts, [(0,), (1,)], sampling, never, lambda count: None)
    except Exception:  # noqa: BLE001  somebody else's layers
        return False
    tolerance = TOLERANCE if policy.precision == "fp32" else IN_BF16
    return bool(differences_to_training(policy, example, drawn).mean() <= tolerance)


def has_exact_cache(policy: Policy, example: Example) -> bool:
    """Whether the log-probs of two completions that the LM generates together with its cache are those of its
    forward, to 1e-4 where the run has fp32, else to 1e-3; with weights in 4 bits on average only."""
    length = 16
    tolerance = policy.tolerance if policy.precision == "fp32" else TOLERANCE
    sampling = SimpleNamespace(temperature=1.0, top_p=1.0, top_k=0, max_completion_length=length)
    uniforms = np.random.default_rng(0).random((2, length))
    with in_fp32(policy):
        try:
            with generating(policy) as lm:
                drawn = decode_plain(lm, [example.prompt] * 2, uniforms, sampling, never)
        except Exception:  # noqa: BLE001  somebody else's cache
            return False
        differences = differences_to_training(policy, example, drawn)
        if policy.precision != "fp32":         # weights in 4 bits
            return bool(differences.mean() <= policy.rounding)
        return bool(differences.max() <= tolerance)


def never(tokens) -> bool:
    """Stops no completion before its limit."""
    return False


def differences_to_training(policy: Policy, example: Example, drawn) -> torch.Tensor:
    """(N,): how far the log-probs of completions of an example's prompt are from those of the forward."""
    responses = [Response.all_trained(completion.tokens) for completion in drawn]
    logps = logps_by(policy, policy.collate([Example(example.prompt, responses, example.where)])).cpu()
    generated = np.concatenate([completion.logps for completion in drawn])
    return (logps - torch.from_numpy(generated)).abs()


def own_logps(policy: Policy, examples) -> torch.Tensor:
    """Log-probs (N,) of the trained tokens by the LM's own forward, one response at a time. Raises UserError
    where that fails, or a later token changes what is predicted before it."""
    found = []
    with ordinary_state(policy) as lm, unpatched(lm):
        for example in examples:
            prompt = len(example.prompt)
            for response in example.responses:
                row = torch.tensor([[*example.prompt, *response.tokens]], device=policy.device)
                logits = called(policy, own_logits, lm, row, prompt)
                if not found:
                    other = row.clone()
                    other[0, -1] = row[0, -1] - 1 if row[0, -1] > 0 else 1
                    change = (called(policy, own_logits, lm, other, prompt) - logits).abs().max()
                    if change > TOLERANCE:
                        raise UserError(f"model: a {lm.config.model_type} is no causal language model here: "
                                        "later tokens change its predictions; fix: pass a causal LM")
                logps = logits.log_softmax(-1).gather(1, row[0, prompt:, None])[:, 0]
                trained = torch.from_numpy(response.trained).to(policy.device)
                found.append(logps[trained])
    return torch.cat(found)


def own_logits(lm, row, start: int):
    """The logits (L, V) fp32 that predict the tokens of a row (1, T) from `start` on. UserError where the
    LM's own forward fails."""
    predicting = row.shape[1] - start + 1
    mask = torch.ones_like(row)
    try:
        logits = lm(row, attention_mask=mask, use_cache=False, logits_to_keep=predicting).logits[0]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001  somebody else's layers
        raise UserError(f"model: the forward of a {lm.config.model_type} fails in transformers "
                        f"{transformers.__version__} ({first_line(error)}); fix: another version of it, or "
                        "another model") from error
    # some families keep all; a copy, since FSDP warns of a view
    return logits[-predicting:-1].to(torch.float32, copy=True)


@contextlib.contextmanager
def unpatched(lm):
    """The LM with the forwards of its own classes, without those that we gave to its modules."""
    patched = {module: vars(module).pop("forward") for module in lm.modules() if "forward" in vars(module)}
    try:
        yield
    finally:
        for module, forward in patched.items():
            module.forward = forward


@contextlib.contextmanager
def in_fp32(policy: Policy):
    """The policy with products and weights in fp32: bf16 would hide a leak from one example to the next. A
    weight that is kept in bf16 is cast while its module runs. Weights in 4 bits stay."""
    parameters = list(policy.lm.parameters())
    if not all(parameter.is_floating_point() for parameter in parameters):
        yield
        return
    kept = {}
    hooks = []

    def cast(module, _):
        kept[module] = [(parameter, parameter.data) for parameter in module.parameters(recurse=False)]
        for parameter, data in kept[module]:
            parameter.data = data.float()

    def restore(module, *_):                       # its parameters may be sharded again, and others
        for parameter, data in kept.pop(module):
            parameter.data = data

    for module in policy.lm.modules():
        own = list(module.parameters(recurse=False))
        if any(parameter.dtype != torch.float32 for parameter in own):
            hooks.append(module.register_forward_pre_hook(cast))
            hooks.append(module.register_forward_hook(restore))
    precision = policy.precision
    policy.precision = "fp32"
    try:
        yield
    finally:
        policy.precision = precision
        for hook in hooks:
            hook.remove()
        for module in list(kept):                  # those that raised an error
            restore(module)
