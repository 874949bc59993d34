"""The log-probs of completions before the first of several updates that are made from them.

In bf16 a token's log-prob is rounded otherwise beside other rows, by 0.03 on average in a small model, and
gspo clips at 0.0003. So they are computed in the micro-batches in which the first pass trains: in its first
update every ratio is exactly 1.
"""
import torch

from data.pack import Example
from engine.rollout import PerPrompt, Rollout
from engine.step import with_gradient


def parts_of(rollout: Rollout, kept: list[list[int]]) -> list[Example]:
    """The prompts of a rollout with those responses only that are `kept`, some of each prompt's or none."""
    return [example.part(which) for example, which in zip(rollout.examples, kept) if which]


def of_first_pass(rollouts, rollout: Rollout, kept: list[list[int]]) -> PerPrompt:
    """Per prompt of a rollout: the log-probs of its completions' tokens. Responses that are not `kept`, and
    those that no update computes, get the sampler's."""
    examples = parts_of(rollout, kept)
    known = {}                # by the identity of a response, which all examples that hold it share
    for update in range(rollouts.mini_batches):
        trained = with_gradient(rollouts.mini_batch(rollout.number, update, examples))
        for example, logps in zip(trained, rollouts.logps_of(rollouts.engine.policy, trained)):
            numbers = example.per_response("old_logps", logps)
            known |= zip(map(id, example.responses), numbers)
    found = []
    for example, sampled in zip(rollout.examples, rollout.sampler_logps):
        numbers = example.per_response("sampler_logps", sampled)
        pairs = zip(example.responses, numbers)
        found.append(torch.cat([known.get(id(response), number) for response, number in pairs]))
    return found
