"""Plain rows: each response in a row of its own behind its prompt, through the model's own attention.

For every causal LM whose layers do not compute flat rows: linear attention, state spaces, convolutions, ALiBi
and others. A causal layer never sees what follows, so rows of similar length share a forward, padded on the
right. Prompts are computed once per response.
"""
import copy
import itertools

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from data.pack import Batch
from model.completions import Completion, Drawn, Stops
from model.draw import draw
from model.experts import router_options, with_router_loss


def rows_of(batch: Batch) -> list[np.ndarray]:
    """Per row its tokens' places in the flat row: a prompt and one of its responses."""
    rows = []
    start = batch.prefix
    for prompt, responses in batch.segments:
        own = np.arange(start, start + prompt)
        context = np.concatenate([np.arange(batch.prefix), own])
        start += prompt
        for length in responses or [0]:
            response = np.arange(start, start + length)
            rows.append(np.concatenate([context, response]))
            start += length
    return rows


def groups_of(rows: list[np.ndarray], padding: float) -> list[list[np.ndarray]]:
    """The rows in groups that share a forward, the longest rows first."""
    groups = []
    own = 0                                        # the tokens of the last group without what pads them
    for row in sorted(rows, key=len, reverse=True):
        padded = len(groups[-1][0]) * (len(groups[-1]) + 1) if groups else 0
        if groups and padded <= padding * (own + len(row)):
            groups[-1].append(row)
            own += len(row)
        else:
            groups.append([row])
            own = len(row)
    return groups


def plain_hidden(policy, batch: Batch):
    """The last hidden states (T, D) of a batch. Where a prompt is laid out once, its states are those of one
    of its rows."""
    groups = groups_of(rows_of(batch), policy.form.padding)
    count = len(groups)
    if policy.is_sharded:                          # every forward gathers weights: all ranks make as many
        most = torch.tensor(count, device=batch.tokens.device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        count = int(most)
    groups += [[np.zeros(1, int)]] * (count - len(groups))
    states = []
    routers = []
    place = np.zeros(len(batch.tokens), int)       # of each token's state among those of all forwards
    done = 0
    for group in groups:
        length = len(group[0])
        padded = np.zeros((len(group), length), int)
        for i, row in enumerate(group):
            padded[i, :len(row)] = row
            place[row] = np.arange(len(row)) + done
            done += length
        ids = batch.tokens[torch.from_numpy(padded).to(batch.tokens.device)]
        output = policy.trunk(input_ids=ids, use_cache=False, **router_options(policy))
        states.append(output.last_hidden_state.flatten(0, 1))
        routers.append(output.get("router_logits") or ())
    place = torch.from_numpy(place).to(batch.tokens.device)
    router_logits = [torch.cat(layer).index_select(0, place) for layer in zip(*routers)]
    hidden = torch.cat(states).index_select(0, place)
    return with_router_loss(policy, batch, hidden, router_logits)


def decode_plain(
    lm,
    prompts: list[np.ndarray],
    uniforms: np.ndarray,
    sampling,
    stops,
    ended=lambda count: None,
    use_cache: bool = True,
) -> list[Completion]:
    """What sampler.decode does, through the LM's own `generate` and the cache it has, or without one.
    Neighbours of the same length are computed together, so nothing is padded."""
    drawn = Drawn(len(prompts), sampling.max_completion_length)
    # the same modules without the LM's own settings, which may penalise or forbid tokens: a thread that saves
    # the LM reads these meanwhile
    own = copy.copy(lm)
    own.generation_config = GenerationConfig(pad_token_id=0)
    start = 0
    for _, group in itertools.groupby(prompts, key=len):
        group = list(group)
        rows = list(range(start, start + len(group)))
        start += len(group)
        draws = Draws(drawn, rows, uniforms, sampling, stops, ended)
        ids = torch.from_numpy(np.stack(group)).long().to(lm.device)
        own.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=sampling.max_completion_length,
            do_sample=False,
            use_cache=use_cache,
            synced_gpus=False,
            logits_processor=LogitsProcessorList([draws.process]),
            stopping_criteria=StoppingCriteriaList([draws.all_ended]),
        )
    return [drawn.completions[row] for row in range(len(prompts))]


class Draws:
    """Our draws inside of transformers' `generate`, for the `rows` of one call."""

    def __init__(self, drawn: Drawn, rows: list[int], uniforms, sampling, stops: Stops, ended):
        self.drawn = drawn
        self.rows = rows
        self.uniforms = uniforms
        self.sampling = sampling
        self.stops = stops
        self.ended = ended
        self.step = 0

    def process(self, ids, scores):
        """The logits (n, V) of the next token, with the token that is drawn as the only possible one."""
        sampling = self.sampling
        uniform = torch.from_numpy(self.uniforms[self.rows, self.step])
        tokens, logps = draw(
            scores.float().clone(),
            uniform.to(scores.device),
            sampling.temperature,
            sampling.top_p,
            sampling.top_k,
        )
        if self.drawn.add(self.rows, tokens[:, None], logps[:, None], self.stops):
            self.ended(len(self.drawn.completions))
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)

    def all_ended(self, ids, scores):
        """(n,): whether generation stops, which all rows do together."""
        running = [row for row in self.rows if row not in self.drawn.completions]
        return torch.full((len(ids),), not running, device=ids.device)
