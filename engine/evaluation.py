"""Frozen models, and what they give to responses that exist already: log-probs or scores."""
from collections import Counter

import torch

from data.dataset import is_local
from data.formats import parse
from data.hub import hub_rows
from data.local import local_data
from data.pack import Example
from data.packing import pack
from data.sources import rename
from engine.config import Common
from model.build import build_policy, check_ids
from model.check import check_policy
from model.keys import ModelKeys
from model.load import is_adapter
from model.off_the_shelf import Classifier, conversation
from model.reward_model import RewardModel, build_reward_model, is_reward_model


def load_frozen(path: str, tokenizer, examples: list[Example], notice, compared_with: str | None = None):
    """The model at `path`, frozen, as a Policy, or as a RewardModel if it is one; checked on some of
    `examples`. Where it or the model that it is `compared_with` is an adapter, it has the dtypes of a run
    that trains one: on a GPU a difference of two arithmetics would be taken for one of the models."""
    has_adapter = is_adapter(path) or bool(compared_with and is_adapter(compared_with))
    policy = build_policy(path, tokenizer, frozen=True, trains_adapter=has_adapter, is_trained=False)
    policy.requires_grad_(False)
    check_ids(examples, policy.lm.get_input_embeddings().num_embeddings, tokenizer)
    check_policy(policy, examples, ModelKeys(), notice)
    if not is_reward_model(path):
        return policy
    return build_reward_model(policy, path, 0, notice).requires_grad_(False)


@torch.no_grad()
def response_scores(model, examples: list[Example]) -> list[torch.Tensor]:
    """Per example a number for each of its responses (K,), on the CPU: a reward model's score, else the
    summed log-prob."""
    if isinstance(model, Classifier):
        counts = [len(example.responses) for example in examples]
        return list(model.of_examples(examples).cpu().split(counts))
    sizes = [example.size(model.share_prompt) for example in examples]
    micro_batches = pack(sizes, Common.micro_batch_tokens)[0]
    scores = [None] * len(examples)
    for members in micro_batches:
        if not members:
            continue
        batch = model.collate([examples[i] for i in members])
        values = model(batch)
        if not isinstance(model, RewardModel):
            values = batch.sum(values)
        done = 0
        for i in members:
            count = len(examples[i].responses)
            scores[i] = values[done:done + count].cpu()
            done += count
    return scores


def conversations_of(source: str, examples: list[Example], seed: int, columns: dict | None) -> list[list]:
    """[with the chosen response, with the rejected one] for each pair in `examples`, read from `source` once
    more: as messages, in which a classifier reads them with a template of its own. `columns`: {our name: the
    file's}."""
    texts = {}
    wanted = {example.where for example in examples}
    rows = local_data(source).rows(Counter()) if is_local(source) else hub_rows(source, "pairs", seed=seed)
    for where, row in rows:
        if where in wanted:
            texts[where] = parse(rename(row, columns or {}, where), where, "pairs", chat=True)
    found = []
    for example in examples:
        text = texts[example.where]
        found.append([conversation(text.prompt, response) for response in text.responses])
    return found


def conversation_scores(classifier: Classifier, pairs: list[list]) -> list[torch.Tensor]:
    """(2,) for each of some pairs of conversations, on the CPU."""
    conversations = []
    for pair in pairs:
        conversations += pair
    return list(classifier.scores(conversations).cpu().view(-1, 2))
