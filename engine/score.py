"""Numbers for completions: rewards from functions and reward models, and what a model gives to responses that are there already."""
import torch

from data.errors import UserError
from data.pack import Example
from data.plan import pack
from engine import checkpoint
from engine.config import Common
from engine.ranks import from_main
from engine.rollout import Rollout
from model.build import build_policy
from model.check import check_policy
from model.load import load_tokenizer
from model.reward_model import VALUE_HEAD, RewardModel, build_reward_model, is_reward_model
from rewards.functions import is_model, parts_of


def judge(rollout: Rollout, rewards: list, tokenizer, by_functions, by_model) -> None:
    """Set rollout["rewards/<name>"] of every reward and rollout["rewards"], their weighted sum, (G,) per
    prompt; NaN where nothing judges a completion. `by_functions(rewards, prompts, texts, columns)` -> of each
    of those that are functions a number or None per completion; `by_model(reward)` -> (G,) per prompt.

    A reward is rounded to fp32, so that 0.1 + 0.2 is 0.3, and kept in fp64, in which sums of such numbers are
    exact: advantages are computed in that."""
    examples = rollout.examples
    prompts = [example.extras["prompt"] for example in examples for _ in example.responses]
    texts = [text_of(tokenizer, response) for example in examples for response in example.responses]
    names = dict.fromkeys(name for example in examples for name in example.extras["columns"])
    columns = {name: [example.extras["columns"].get(name) for example in examples for _ in example.responses] for name in names}
    responses = [response for example in examples for response in example.responses]
    columns["completion_ids"] = [response.tokens.tolist() for response in responses]
    total, judged = torch.zeros(len(texts), dtype=torch.float64), torch.zeros(len(texts), dtype=torch.bool)
    sizes = [len(example.responses) for example in examples]
    functions = [reward for reward in rewards if not reward.path]
    called = [reward.name for reward in functions]
    returned = dict(zip(called, by_functions(functions, prompts, texts, columns)))
    for reward in rewards:
        if reward.path:
            values = torch.cat(by_model(reward)).double()
        else:
            numbers = [torch.nan if value is None else value for value in returned[reward.name]]
            values = torch.tensor(numbers, dtype=torch.float64)
        rollout[f"rewards/{reward.name}"] = values.float().double().split(sizes)
        judged |= ~values.isnan()
        total += reward.weight * values.nan_to_num()
    rollout["rewards"] = total.float().double().where(judged, torch.nan).split(sizes)


def text_of(tokenizer, response) -> str:
    return tokenizer.decode(response.tokens, skip_special_tokens=True)


@torch.no_grad()
def scores(model, examples: list[Example]) -> list[torch.Tensor]:
    """Per example a number for each of its responses (K,), on the CPU: a reward model's score, or the summed log-prob."""
    found = [None] * len(examples)
    for members in filter(None, pack([example.size(model.share_prompt) for example in examples], Common.micro_batch_tokens)[0]):
        batch = model.collate([examples[i] for i in members])
        values = model(batch) if isinstance(model, RewardModel) else batch.sum(model(batch))
        for i, part in zip(members, values.split([len(examples[i].responses) for i in members])):
            found[i] = part.cpu()
    return found


def load_frozen(path: str, tokenizer, examples: list[Example], notice):
    """The model at `path`, frozen, as a Policy, or a RewardModel where it is one; tried on some of `examples`."""
    common = Common(algorithm="", model=path, data="", max_length=2)          # whether the examples fit is not its business
    policy = build_policy(common, tokenizer, frozen=True).requires_grad_(False)
    check_policy(policy, examples, common.share_prompt, notice)
    if not is_reward_model(path):
        return policy
    return build_reward_model(policy, path, common.seed, notice).requires_grad_(False)


def critic_path(reward: str, tokenizer, notice) -> str | None:
    """The first reward model among the rewards, as which a critic starts; None where all are functions."""
    run = next(filter(is_model, parts_of(reward)), None)
    return run and reward_model_path(run, tokenizer, notice)


def reward_model_path(run: str, tokenizer, notice) -> str:
    """The directory with trunk and head of the run of `rm` that a reward names; UserError where it is none, or its tokenizer is not the
    policy's."""
    path = from_main(checkpoint.model_path, run, notice)
    if not is_reward_model(path):
        raise UserError(f"reward: {run} is not the run of a reward model ({VALUE_HEAD} is missing in {path}); "
                        "fix: pass a run of algorithm: rm")
    if load_tokenizer(path).get_vocab() != tokenizer.get_vocab():
        raise UserError(f"reward: the reward model {run} has another tokenizer than the model; "
                        "fix: train it from a model with the same tokenizer")
    return path
