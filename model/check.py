"""Before anything is trained: do flat rows give the model's own log-probs?"""
import torch

from data.errors import UserError
from data.pack import Example, Response
from model.generating import generating
from model.policy import Policy

FORMS = {                          # values of `share_prompt` that each mode tries
    "auto": (True, False),
    "true": (True,),
    "false": (False,),
}


def probe(prompt: Example) -> Example:
    """A prompt without responses as an example with two: its own last tokens, forwards and backwards."""
    tokens = prompt.prompt[-16:]
    responses = [Response.all_trained(tokens), Response.all_trained(tokens[::-1])]
    return Example(prompt.prompt, responses, prompt.where)


@torch.no_grad()
def check_policy(policy: Policy, examples, mode: str, notice) -> None:
    """Compare the log-probs of the two shortest examples with the LM's own forward. With `mode` "auto" the
    policy falls back to a copy of the prompt per response (`share_prompt` is False) where only that agrees.

    Raises UserError where neither agrees: the layers are recurrent, or the LM changes its logits after the
    head."""
    shortest = sorted(examples, key=Example.size)[:2]
    shortest = [example if example.responses else probe(example) for example in shortest]
    own = own_logps(policy, shortest)
    if not own.isfinite().all():               # `load_lm` has checked that the weights are finite
        raise UserError(f"model: its log-probs of {shortest[0].where} are NaN or infinite, so its "
                        "activations overflow; fix: precision=fp32, or another model")
    tolerance = 1e-3 if policy.precision == "fp32" else 0.25
    for share in FORMS[mode]:
        policy.share_prompt = share
        difference = (policy(policy.collate(shortest)) - own).abs().max()
        if difference <= tolerance:
            if mode == "auto" and not share:
                notice("share_prompt: prompts are laid out once per response, this model's layers do not "
                       "allow sharing them")
            return
    raise UserError(f"model: log-probs of flat rows differ from the model's own by {difference:.2g} "
                    "(recurrent layers, or logits changed after the head); fix: use a model with ordinary "
                    "attention layers")


def own_logps(policy: Policy, examples) -> torch.Tensor:
    """Log-probs (N,) of the trained tokens by the LM's own forward, one response at a time."""
    found = []
    with generating(policy) as lm:
        for example in examples:
            for response in example.responses:
                row = torch.tensor([[*example.prompt, *response.tokens]], device=policy.device)
                predicting = len(response.tokens) + 1
                logits = lm(row, use_cache=False, logits_to_keep=predicting).logits[0, :-1]
                targets = row[0, len(example.prompt):, None]
                logps = logits.float().log_softmax(-1).gather(1, targets)[:, 0]
                trained = torch.from_numpy(response.trained).to(policy.device)
                found.append(logps[trained])
    return torch.cat(found)
