"""Decoder layers through torch.compile: on a GPU a small model's layers take longer to launch than to run.

All layers of a kind share one compiled graph, whose lengths are symbols, so that batches of other lengths
compile nothing. Their attention must be one call per layer (varlen.py): a call per response would be another
graph for every batch. Sampling does not take them; it records its steps (recorded.py).
"""
import time
from collections import defaultdict

import torch

from data.errors import UserError
from data.pack import Example
from data.store import extremes
from model.check import probe
from model.form import VARLEN
from model.generating import logps_by

FEWEST_UPDATES = 200      # of a run in which compiling, about a minute, pays


def decoder_layers(module) -> list:
    """The decoder layers in a module, those inside another one first, as in Mamba."""
    names = set()                                  # the classes of decoder layers, also of a critic's trunk
    for part in module.modules():
        names.update(getattr(part, "_no_split_modules", None) or ())
    layers = []
    for part in module.modules():
        kinds = {kind.__name__ for kind in type(part).__mro__}      # FSDP2 makes a subclass
        if kinds & names:
            layers.append(part)
    return layers[::-1]


def by_layer(module, weights: dict) -> list[dict]:
    """A module's weights by name, in groups: those of each decoder layer, which transformers may join or
    split when it saves them, and the others."""
    layer_of = {}
    for number, layer in enumerate(decoder_layers(module)):      # an outer layer comes after those inside it
        for weight in layer.state_dict(keep_vars=True).values():
            layer_of[id(weight)] = number
    groups = defaultdict(dict)
    for name, weight in weights.items():
        groups[layer_of.get(id(weight))][name] = weight
    return list(groups.values())


def obstacle(policy, common) -> str | None:
    """Why the layers of a policy cannot be compiled in this run, with a fix; None where they may be."""
    form = policy.form.attention
    if form != VARLEN:
        return (f"attention has the form {form} here, and only varlen can be compiled; fix: compile=false, "
                "or attn_implementation=varlen")
    if common.deterministic:
        return ("the compiler may choose other kernels in each run, so the run would not be deterministic; "
                "fix: compile=false, or deterministic=false")
    return None


def compile_policy(policy, common, updates: int, examples: list[Example], notice) -> None:
    """Compile the layers of a policy as `common.compile` asks, if they compute what they did before; a notice
    says that, or why they are not. UserError where `compile: true` cannot be done."""
    reason = obstacle(policy, common)
    pays = on_gpu(policy) and updates >= FEWEST_UPDATES
    if common.compile == "false" or common.compile == "auto" and (reason or not pays):
        return
    if reason:
        raise UserError(f"compile: {reason}")
    started = time.perf_counter()
    shortest = extremes(examples)[:2]
    fault = trial(policy, [example if example.responses else probe(example) for example in shortest])
    if fault is None:
        seconds = time.perf_counter() - started
        notice(f"compile: the decoder layers are compiled ({seconds:.0f} s); compile=false leaves that out")
        return
    plain_layers(policy)
    kind = policy.lm.config.model_type
    if common.compile == "true":
        raise UserError(f"compile: the layers of a {kind} cannot be compiled ({fault}); fix: compile=false")
    notice(f"compile: the layers of a {kind} are not compiled ({fault})")


def on_gpu(policy) -> bool:
    return policy.device.type == "cuda"


def trial(policy, examples: list[Example]) -> str | None:
    """Compile the layers, and compute the log-probs of `examples` and their gradients; what is wrong with
    that, or None."""
    batch = policy.collate(examples)
    with torch.no_grad():
        before = logps_by(policy, batch)
    compile_layers(policy)
    try:
        after = logps_by(policy, batch)
        after.sum().backward()
    except Exception as error:  # noqa: BLE001  the compiler's, of a model that somebody else wrote
        return str(error).strip().partition("\n")[0]
    finally:
        for parameter in policy.parameters():
            parameter.grad = None
    difference = float((after.detach() - before).abs().mean())
    return None if difference <= policy.rounding else f"their log-probs differ by {difference:.2g}"


def compile_layers(policy) -> None:
    policy.is_compiled = True
    for layer in decoder_layers(policy):
        layer.compile(dynamic=True)


def plain_layers(policy) -> None:
    """Undo `compile_layers`."""
    policy.is_compiled = False
    for layer in decoder_layers(policy):
        layer._compiled_call_impl = None
