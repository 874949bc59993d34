"""Before anything is trained: do flat rows give the model's own log-probs?"""
import torch

from data.errors import UserError
from data.pack import Example, Response
from model.policy import Policy


def probe(prompt: Example) -> Example:
    """A prompt without responses as an example with two: its own tokens, forwards and backwards."""
    tokens = prompt.prompt[-16:]
    return Example(prompt.prompt, [Response.all_trained(tokens), Response.all_trained(tokens[::-1])], prompt.where)


@torch.no_grad()
def check_policy(policy: Policy, examples, mode: str, notice) -> None:
    """Compare the shortest examples' log-probs with the plain forward of the LM, one response at a time, before anything is
    trained. `share_prompt: auto` falls back to one prompt copy per response where only that agrees.

    Raises UserError where neither does: recurrent layers, or an LM that changes its logits after the head."""
    examples = [example if example.responses else probe(example) for example in sorted(examples, key=Example.size)[:2]]
    with policy.generating() as lm:
        plain = []
        for example in examples:
            for response in example.responses:
                ids = torch.tensor([[*example.prompt, *response.tokens]], device=policy.device)
                logits = lm(ids, use_cache=False, logits_to_keep=len(response.tokens) + 1).logits[0, :-1]
                predicted = logits.float().log_softmax(-1).gather(1, ids[0, len(example.prompt):, None])[:, 0]
                plain.append(predicted[torch.from_numpy(response.trained).to(policy.device)])
    plain = torch.cat(plain)
    if not plain.isfinite().all():             # the weights are finite: `load_lm` has checked them
        raise UserError(f"model: its log-probs of {examples[0].where} are NaN or infinite, so its "
                        "activations overflow; fix: precision=fp32, or another model")
    tolerance = 1e-3 if policy.precision == "fp32" else 0.25
    for share in {"auto": (True, False), "true": (True,), "false": (False,)}[mode]:
        policy.share_prompt = share
        difference = (policy(policy.collate(examples)) - plain).abs()
        if difference.max() <= tolerance:
            if mode == "auto" and not share:
                notice("share_prompt: prompts are laid out once per response, this model's layers do not allow sharing them")
            return
    raise UserError(f"model: log-probs of flat rows differ from the model's own by {difference.max():.2g} (recurrent layers, or "
                    "logits changed after the head); fix: use a model with ordinary attention layers")
