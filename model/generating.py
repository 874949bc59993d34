"""The LM of a policy in the state that generation needs."""
import contextlib

import torch
from torch.distributed.fsdp import FSDPModule

from model.form import PLAIN, ordinary_attention


def within(policy, function, *arguments):
    """`function(*arguments)`. Where the policy is sharded this is a forward of it, in which its weights are
    gathered layer by layer; every rank calls it then."""
    return function(*arguments)


def called(policy, function, *arguments):
    """`function(*arguments)`, which runs the LM inside `policy` past its forward."""
    return policy.within(function, *arguments) if policy.is_sharded else function(*arguments)


def logps_by(policy, batch):
    """The log-probs (N,) of a policy, also of a reward model, whose forward returns scores."""
    if hasattr(policy, "token_logps"):
        return called(policy, policy.token_logps, batch)
    return policy(batch)


@contextlib.contextmanager
def generating(policy, attention: str | None = None):
    """Yield the LM inside `policy` in its `ordinary_state`, with every sharded weight gathered."""
    sharded = [module for module in policy.modules() if isinstance(module, FSDPModule)]
    if sharded:
        # One forward through the root on every rank gathers all weights; after it, ranks may run the LM a
        # different number of times.
        policy.set_reshard_after_forward(False)
        with torch.no_grad():
            policy(policy.collate([]))
    try:
        with ordinary_state(policy, attention) as lm:
            yield lm
    finally:
        if sharded:
            # The next backward gathers in advance what ran before its forward: on every rank the same then,
            # also where a rank had nothing to generate. All weights are there, so this costs no collective.
            with torch.no_grad():
                policy(policy.collate([]))
        for module in sharded:
            module.reshard()
            module.set_reshard_after_forward(True, recurse=False)


@contextlib.contextmanager
def ordinary_state(policy, attention: str | None = None):
    """Yield the LM inside `policy`, without gradients, and with ordinary attention that takes a KV cache (or
    the registered form of attention `attention`). Where the policy has plain rows, that is the attention it
    has already."""
    lm = policy.lm
    implementation = lm.config._attn_implementation
    if policy.form.attention != PLAIN:
        lm.set_attn_implementation(attention or ordinary_attention(lm))
    # LoRA's dropout is in train mode, and so are checkpointed layers, which would ignore the cache.
    training = [module for module in lm.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad(), policy.autocast(), torch.compiler.set_stance("force_eager"):
            yield lm
    finally:
        if policy.form.attention != PLAIN:
            lm.set_attn_implementation(implementation)
        for module in training:
            module.training = True
