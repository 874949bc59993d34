"""The reward models among the rewards of a run: which they are, and whether they can score completions."""
import functools
import itertools
import os

import torch

from data.errors import UserError
from data.pack import Example
from engine import checkpoint
from engine.ranks import from_main, from_shares
from engine.score import decoded
from model.build import build_second_model
from model.classifier import saved_score
from model.load import check_name, load_tokenizer
from model.off_the_shelf import Classifier, check_classifier
from model.reward_model import build_reward_model, is_reward_model
from rewards.functions import is_model, parts_of


def check_reward_models(reward: str, tokenizer) -> None:
    """UserError where a model among the rewards cannot score the completions of a policy with this tokenizer;
    before any weights are loaded."""
    for part in parts_of(reward):
        if is_model(part):
            reward_model_path(part, tokenizer, lambda text: None)


def critic_path(reward: str, tokenizer, notice) -> str | None:
    """The first reward model among the rewards that can initialise the critic: a run of `rm`, or a classifier
    with the policy's tokenizer; None where there is none."""
    for part in parts_of(reward):
        if is_model(part):
            path = reward_model_path(part, tokenizer, notice)
            if is_reward_model(path) or from_main(reads_as, path, tokenizer):
                return path
    return None


def reads_as(path: str, tokenizer) -> bool:
    """Whether the classifier at `path` has this tokenizer, and a head that a critic can take."""
    return load_tokenizer(path).get_vocab() == tokenizer.get_vocab() and saved_score(path) is not None


def reward_model_path(name: str, tokenizer, notice) -> str:
    """The directory of a reward model: of trunk and head of a run of `rm`, which must have the policy's
    tokenizer, or of a sequence classifier (or its hub name). UserError for anything else."""
    check_name(name, "reward")
    path = from_main(checkpoint.model_path, name, notice)
    if not is_reward_model(path):
        check_classifier(path)
        return path
    if load_tokenizer(path).get_vocab() != tokenizer.get_vocab():
        fix = "train it from a model with the same tokenizer"
        classifier = os.path.join(name, "classifier")
        if os.path.isdir(classifier):
            fix = f"reward={classifier}, which reads texts with its own"
        raise UserError(f"reward: the reward model {name} has another tokenizer than the model; fix: {fix}")
    return path


def load_reward_model(engine, name: str):
    """The reward model that a reward of a run names, frozen: a run of `rm`, or a classifier off the shelf."""
    path = reward_model_path(name, engine.tokenizer, engine.notice)
    if not is_reward_model(path):
        common = engine.config
        return load_off_the_shelf(path, engine.tokenizer, common.precision, common.replicate)

    def with_head(trunk):
        return build_reward_model(trunk, path, engine.config.seed, engine.notice)

    return build_second_model(
        path, engine.tokenizer, engine.config, engine.policy, engine.train_set, engine.notice, with_head)


def scores_of(engine, model, examples: list[Example]) -> list[torch.Tensor]:
    """(G,) per prompt: a reward model's scores of all completions, of which each rank computes a share."""
    sizes = [len(example.responses) for example in examples]
    if not isinstance(model, Classifier):
        return engine.collect(model, examples, lambda example: len(example.responses))

    def tokenised(share):      # it may fail on one rank
        return model.rows(examples[share.start:share.stop])

    rows = itertools.chain(*from_shares(tokenised, len(examples)))
    return list(model.of_rows(list(rows)).cpu().split(sizes))


def load_off_the_shelf(path: str, tokenizer, precision: str = "auto", copies: int = 1) -> Classifier:
    """A classifier that scores the completions of a policy with this tokenizer."""
    return Classifier(path, functools.partial(decoded, tokenizer), precision, copies)
