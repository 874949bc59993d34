"""Before the weights are loaded: a small LM of the same kind, with random weights, shows which form of rows
its layers allow."""
import copy

import numpy as np
import torch
from torch import nn

from data.pack import Example, Response
from model.check import check_policy
from model.load import empty_lm, new_lm, text_part
from model.policy import Policy

MOST_PARAMETERS = 2 ** 29                 # 2 GiB in fp32
SIZE = 512                                # of the vocabulary and of the layers' MLPs
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
MOST_EXPERTS = 16
MOST_WINDOW = 512                         # no example is made up to be longer than a larger window


def check_kind(whole, path: str, keys, notice) -> None:
    """`check_policy` for a small LM of the kind of `whole`, with random weights. UserError where it refuses;
    a notice where a small one cannot be built, or is too large."""
    try:
        reduced = small(whole)
        size = empty_lm(reduced, path).num_parameters()
        lm = random_lm(reduced, path) if size <= MOST_PARAMETERS else None
    except Exception:  # noqa: BLE001  somebody else's configuration: its keys may depend on each other
        lm = None
    if lm is None:
        notice("rows: whether flat rows are exact is checked when the weights are loaded")
        return
    check_policy(Policy(lm), made_up_examples(reduced.get_text_config()), keys, notice)


def small(whole):
    """The configuration of the LM `whole` with a small vocabulary, few experts, and as many of its layers as
    contain one of each kind."""
    config = copy.deepcopy(whole.config)
    text = config.get_text_config()
    layers = text.num_hidden_layers
    count = layers_with_all_kinds(text, whole)
    for key, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == layers:
            setattr(text, key, value[:count])
        elif key in EXPERTS and isinstance(value, int):
            setattr(text, key, min(value, MOST_EXPERTS))
        elif isinstance(value, int) and (key.startswith("vocab_size") or key.endswith("intermediate_size")):
            setattr(text, key, min(value, SIZE))
    text.num_hidden_layers = count
    for part in (config, text):
        if getattr(part, "pad_token_id", None) is not None:
            part.pad_token_id = 0
    return config


def layers_with_all_kinds(text, whole) -> int:
    """How many of the first layers contain one of each kind: kinds differ in their parameters, or in a list
    of the configuration that has an entry per layer."""
    layers = text.num_hidden_layers
    lists = [value for value in vars(text).values() if isinstance(value, list) and len(value) == layers]
    stacks = []
    for module in text_part(whole).modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            stacks.append(module)
    kinds = set()
    count = 1
    for i in range(layers):
        kind = [str(values[i]) for values in lists]
        for name, parameter in stacks[0][i].named_parameters():
            kind.append(f"{name} {tuple(parameter.shape)}")
        if tuple(kind) not in kinds:
            kinds.add(tuple(kind))
            count = i + 1
    return count


def random_lm(config, path: str):
    """An LM of this configuration whose random weights make each layer matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lm = new_lm(config, path)
        for parameter in lm.parameters():
            if parameter.ndim > 1 and parameter.is_floating_point():
                parameter.data.normal_(0, parameter.shape[-1] ** -0.5)
    return lm


def made_up_examples(text) -> list[Example]:
    """Two short examples and a long one, longer than the model's window where it has a small one."""
    window = getattr(text, "sliding_window", None) or 0
    long = 40 if window > MOST_WINDOW else max(40, 2 * window)
    longest = getattr(text, "max_position_embeddings", None) or long
    generator = np.random.default_rng(0)
    examples = []
    for prompt, length in ((5, 4), (7, 6), (min(long, longest // 2), 12)):
        drawn = generator.integers(3, text.vocab_size, prompt + 2 * length)
        tokens = drawn.astype(np.int32)
        responses = [tokens[prompt:prompt + length], tokens[prompt + length:]]
        responses = [Response.all_trained(response) for response in responses]
        examples.append(Example(tokens[:prompt], responses, "a made-up example"))
    return examples
