"""What a model says of the completions of a rollout before its first update, in the micro-batches that train.

In bf16 a token's log-prob is rounded otherwise beside other rows, by 0.03 on average in a small model. gspo
clips at 0.0003, and the ratio of a whole completion of 100 tokens may be 0.5. So the log-probs before the
first of several updates are computed in the micro-batches in which the first pass trains: in its first
update every ratio is exactly 1.
"""
import torch

from data.pack import Example
from engine.rollout import PerPrompt, Rollout
from engine.step import with_gradient


def parts_of(rollout: Rollout, kept: list[list[int]]) -> list[Example]:
    """The prompts of a rollout with those responses only that are `kept`, some of each prompt's or none."""
    return [example.part(which) for example, which in zip(rollout.examples, kept) if which]


def in_first_pass(rollouts, rollout: Rollout, function, kept: list[list[int]] | None = None,
                  width: int = 1) -> PerPrompt:
    """`function(batch)`, `width` numbers for each trained token of a batch, for all completions: per prompt
    (tokens * width,). With `kept`, the responses that the updates train, only those that the first pass
    computes; the others have no gradient, and get the sampler's log-probs."""
    engine = rollouts.engine
    examples = rollout.examples if kept is None else parts_of(rollout, kept)
    known = {}                # by the identity of a response, which all examples that hold it share
    for update in range(rollouts.mini_batches):
        trained = rollouts.mini_batch(rollout.number, update, examples)
        if kept is not None:
            trained = with_gradient(trained)
        found = engine.collect(function, trained, lambda example: width * example.num_trained, len(trained))
        for example, numbers in zip(trained, found):
            sizes = [width * response.num_trained for response in example.responses]
            known |= zip(map(id, example.responses), numbers.split(sizes))
    per_prompt = []
    for example, sampled in zip(rollout.examples, rollout.sampler_logps):
        others = example.per_response("sampler_logps", sampled)
        pairs = zip(example.responses, others)
        per_prompt.append(torch.cat([known.get(id(response), other) for response, other in pairs]))
    return per_prompt
