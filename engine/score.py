"""Score the completions of a rollout: with functions, with reward models, and their weighted sum."""
import itertools

import torch

from engine.ranks import from_shares
from engine.rollout import Rollout
from rewards.functions import score_all


def score_rollout(rollout: Rollout, rewards: list, tokenizer, by_functions, by_model) -> None:
    """Set rollout["rewards/<name>"] of every reward and rollout["rewards"], their weighted sum, (G,) per
    prompt. NaN: the reward returned None for the completion; in the sum, every reward did.

    `by_functions(rewards, prompts, texts, columns)` returns, for each of those rewards that are functions, a
    number or None per completion; `by_model(reward)` returns (G,) per prompt.

    A reward is rounded to fp32, so that 0.1 + 0.2 is 0.3, and kept in fp64, in which sums of such numbers are
    exact: advantages are computed in that."""
    prompts = []
    texts = []
    token_ids = []
    for example in rollout.examples:
        for response in example.responses:
            prompts.append(example.extras["prompt"])
            texts.append(decoded(tokenizer, response.tokens))
            token_ids.append(response.tokens.tolist())
    columns = columns_per_completion(rollout.examples)
    columns["completion_ids"] = token_ids

    functions = [reward for reward in rewards if not reward.path]
    returned = {}
    for reward, numbers in zip(functions, by_functions(functions, prompts, texts, columns)):
        returned[reward.name] = with_nan(numbers)

    sizes = [len(example.responses) for example in rollout.examples]
    total = torch.zeros(len(texts), dtype=torch.float64)
    has_reward = torch.zeros(len(texts), dtype=torch.bool)
    for reward in rewards:
        if reward.path:
            values = torch.cat(by_model(reward)).double()
        else:
            values = returned[reward.name]
        rollout[f"rewards/{reward.name}"] = rounded(values).split(sizes)
        has_reward |= ~values.isnan()
        total += reward.weight * values.nan_to_num()
    rollout["rewards"] = rounded(total).where(has_reward, torch.nan).split(sizes)


def by_all_ranks(sizes: list[int], timeout: float):
    """The `by_functions` in which every rank scores the completions of its share of the prompts. `sizes`: the
    completions of each prompt, which stay together; `timeout`: seconds for each call."""
    starts = [0, *itertools.accumulate(sizes)]

    def by_functions(rewards, prompts, texts, columns):
        def score(share):
            part = slice(starts[share.start], starts[share.stop])
            if not texts[part]:
                return [[] for _ in rewards]
            of_part = {name: values[part] for name, values in columns.items()}
            return score_all(rewards, prompts[part], texts[part], of_part, timeout)

        shares = from_shares(score, len(sizes))
        returned = []
        for numbers in zip(*shares):
            returned.append(list(itertools.chain(*numbers)))
        return returned
    return by_functions


def columns_per_completion(examples: list) -> dict[str, list]:
    """The rows' columns, an entry per completion; None where a row lacks the column."""
    columns = {}
    for example in examples:
        for name in example.extras["columns"]:
            columns[name] = []
    for example in examples:
        for name, values in columns.items():
            value = example.extras["columns"].get(name)
            values += [value] * len(example.responses)
    return columns


def with_nan(numbers: list) -> torch.Tensor:
    """Numbers or None -> fp64, NaN for None."""
    known = [torch.nan if number is None else number for number in numbers]
    return torch.tensor(known, dtype=torch.float64)


def rounded(values: torch.Tensor) -> torch.Tensor:
    return values.float().double()


def decoded(tokenizer, tokens) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True)
