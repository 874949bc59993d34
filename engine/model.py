"""The policy: a Hugging Face causal LM that returns log-probs of the trained tokens and never builds the full logits.

Three parts, all used by every algorithm: `segments_attention` (a flat, prompt-shared row without a (T, T) mask),
`ChunkedLogps` (the LM head in chunks) and `Policy` (their composition; `policy(batch) -> (N,)`).
"""
import contextlib
import ctypes
import os
import types

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from data.errors import UserError
from data.pack import Batch, Example, Response, collate
from engine import lora
from engine.load import base_of, check_finite, first_line, is_adapter, load_lm

VALUE_HEAD = "value_head.safetensors"        # beside a reward model's trunk, with these two: (1, D) and (1,)
HEAD_WEIGHT, HEAD_BIAS = "v_head.summary.weight", "v_head.summary.bias"
LOGITS_AT_ONCE = {"cpu": 2 ** 22, "cuda": 2 ** 27}    # 16 MiB fits a CPU's cache, 512 MiB fills a GPU; whatever the batch


def segments_attention(module, query, key, value, attention_mask, scaling=None, segments=None, sliding_window=None, **_):
    """Attention over a flat row: SDPA per prompt-with-its-first-response (causal) and per further response (its queries over
    the prompt's keys and its own). Memory is linear in the row's length.

    query (1, heads, T, head_dim); key, value (1, kv_heads, T, head_dim); segments as in `Batch.segments`.
    Returns (1, T, heads, head_dim), as transformers' attention functions do."""
    query, key = query.to(value.dtype), key.to(value.dtype)      # under bf16 autocast the rotary embedding leaves them in fp32
    units = [length for prompt, responses in segments for length in (prompt + sum(responses[:1]), *responses[1:])]
    # `split` once instead of slicing per unit: the backward of every slice would fill a zero gradient of the whole row
    queries, keys, values = (iter(x.split(units, dim=2)) for x in (query, key, value))
    attended = []

    def attend(q, k, v):
        length, context = q.shape[2], k.shape[2] - q.shape[2]
        if sliding_window is not None and k.shape[2] > sliding_window:
            mask = torch.ones(length, k.shape[2], dtype=torch.bool, device=q.device).tril(context).triu(context - sliding_window + 1)
        else:
            mask = causal_lower_right(length, k.shape[2]) if context else None
        attended.append(F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scaling, enable_gqa=True))

    for prompt, responses in segments:
        key_unit, value_unit = next(keys), next(values)
        attend(next(queries), key_unit, value_unit)
        for _ in responses[1:]:
            attend(next(queries), torch.cat([key_unit[:, :, :prompt], next(keys)], 2),
                   torch.cat([value_unit[:, :, :prompt], next(values)], 2))
    return torch.cat([unit.transpose(1, 2) for unit in attended], 1), None


def visible(segments, sliding_window=None, device=None):
    """The (T, T) boolean mask of the same rule (may see: causal, and key in the prompt or the same response, and same example).
    Quadratic in memory: it is what `attn_implementation: dense` runs and what the tests hold `segments_attention` against."""
    example, response, position, offset = [], [], [], 0
    for number, (prompt, responses) in enumerate(segments):
        example += [number] * (prompt + sum(responses))
        response += [-1] * prompt + [offset + i for i, length in enumerate(responses) for _ in range(length)]
        position += [*range(prompt), *(prompt + i for length in responses for i in range(length))]
        offset += len(responses)
    example, response, position = (torch.tensor(x, device=device) for x in (example, response, position))
    same_example, same_response = example[:, None] == example, response[:, None] == response
    mask = (same_example & (same_response | (response == -1))).tril()
    return mask if sliding_window is None else mask & (position[:, None] - position < sliding_window)


def dense_attention(module, query, key, value, attention_mask, scaling=None, segments=None, sliding_window=None, **_):
    query, key = query.to(value.dtype), key.to(value.dtype)
    mask = visible(segments, sliding_window, query.device)
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scaling, enable_gqa=True).transpose(1, 2), None


AttentionInterface.register("segments", segments_attention)
AttentionInterface.register("dense", dense_attention)


class ChunkedLogps(torch.autograd.Function):
    """log softmax(hidden @ weight.T)[target], a slice of the vocabulary at a time: the (N, V) logits never exist.

    The forward keeps each row's running maximum and sum of exponentials; the backward computes each slice's logits again and
    writes its rows of the weight gradient once. Slicing the vocabulary, not the rows, reads the large head once per pass.
    `dtype` is that of the matrix products; everything else is fp32."""

    @staticmethod
    def slices(hidden, weight, target):
        """Yield, per slice of the vocabulary: the slice, its rows of the head, its logits (N, slice), and each row's target in
        it: column (N, 1) and hit (N, 1), whether the target lies in this slice. The logits share one buffer of at most
        LOGITS_AT_ONCE numbers."""
        width = max(1, LOGITS_AT_ONCE[weight.device.type] // max(1, len(target)))
        buffer = hidden.new_empty(len(target), min(width, len(weight)))
        for start in range(0, len(weight), width):
            head = weight[start:start + width].to(hidden.dtype)
            offset = target[:, None] - start
            column = offset.clamp(0, len(head) - 1)
            logits = torch.mm(hidden, head.T, out=buffer[:, :len(head)]).float()
            yield slice(start, start + len(head)), head, logits, column, column == offset

    @staticmethod
    def forward(ctx, hidden, weight, target, dtype):
        hidden = hidden.to(dtype)                                                        # (N, D)
        maximum = torch.full((len(target), 1), -torch.inf, device=hidden.device)         # (N, 1)
        total, chosen = torch.zeros_like(maximum), torch.zeros_like(maximum)             # (N, 1)
        for _, _, logits, column, hit in ChunkedLogps.slices(hidden, weight, target):
            chosen = torch.where(hit, logits.gather(1, column), chosen)
            higher = torch.maximum(maximum, logits.amax(1, keepdim=True))
            total = total * (maximum - higher).exp() + logits.sub_(higher).exp_().sum(1, keepdim=True)
            maximum = higher
        normalizer = maximum + total.log()
        ctx.save_for_backward(hidden, weight, target, normalizer)
        return chosen[:, 0] - normalizer[:, 0]

    @staticmethod
    def backward(ctx, grad_logps):
        hidden, weight, target, normalizer = ctx.saved_tensors
        slope = -grad_logps[:, None]                                                     # (N, 1)
        scaled = (hidden * slope).to(hidden.dtype)         # scales (N, D) numbers here instead of (N, V) in the loop
        grad_hidden = torch.zeros(hidden.shape, device=hidden.device)
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for vocabulary, head, logits, column, hit in ChunkedLogps.slices(hidden, weight, target):
            error = logits.sub_(normalizer).exp_()         # softmax - onehot(target) = -d logp / d logits, in place
            error = error.scatter_(1, column, error.gather(1, column) - hit.float()).to(hidden.dtype)
            grad_hidden += error @ head
            if grad_weight is None:
                continue
            if grad_weight.dtype == error.dtype:           # straight into its place
                torch.mm(error.T, scaled, out=grad_weight[vocabulary])
            else:
                grad_weight[vocabulary] = error.T @ scaled
        return grad_hidden * slope, grad_weight, None, None


class TiedEmbedding(torch.autograd.Function):
    """(weight[tokens], weight), for a weight that is embedding and head at once: the gradients of both uses are joined in place.
    Autograd alone would fill a second gradient of the vocabulary's size with zeros and add it."""

    @staticmethod
    def forward(ctx, weight, tokens, padding_idx):
        ctx.save_for_backward(tokens)
        ctx.padding_idx = padding_idx
        return weight.index_select(0, tokens), weight.view_as(weight)                    # (T, D), (V, D)

    @staticmethod
    def backward(ctx, grad_embedded, grad_head):
        tokens, = ctx.saved_tensors
        if ctx.padding_idx is not None:                    # as nn.Embedding does: this row learns nothing as an input
            grad_embedded = grad_embedded.masked_fill((tokens == ctx.padding_idx)[:, None], 0.0)
        return grad_head.index_add_(0, tokens, grad_embedded), None, None


def gated_mlp(self, x):
    """The forward of a gated MLP, down(act(gate(x)) * up(x)), that keeps two of the four wide activations: the other two cost no
    matrix product to compute again. A third of a layer's activations less."""
    def down(gate, up):
        return self.down_proj(self.act_fn(gate) * up)

    gate, up = self.gate_proj(x), self.up_proj(x)
    if not torch.is_grad_enabled():
        return down(gate, up)
    return checkpoint(down, gate, up, use_reentrant=False, preserve_rng_state=bool(lora.dropouts(self.down_proj)))


class Policy(nn.Module):
    """A causal LM as the algorithms see it: `policy(batch)` -> (N,) fp32 log-probs of the batch's trained tokens, in order; where
    they were sampled at a temperature, `policy(batch, temperature)`.

    `precision` is that of the matrix products: weights stay as loaded (fp32 when trained) and run under bf16 autocast.
    Under `torchrun` this module, not the LM inside, is the FSDP root: its forward gathers embedding, norm and head."""

    def __init__(self, lm, precision: str = "fp32", share_prompt: bool = True):
        super().__init__()
        self.lm, self.precision, self.share_prompt, self.dropouts = lm, precision, share_prompt, lora.dropouts(lm)

    @property
    def device(self):
        return self.lm.device

    def collate(self, examples) -> Batch:
        return collate(examples, self.share_prompt).to(self.device)

    @property
    def tolerance(self) -> float:
        """How far two computations of the same log-probs may be apart, per token or on average."""
        return 1e-4 if self.precision == "fp32" else 5e-2

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def forward(self, batch: Batch, temperature: float = 1.0):
        return self.logps(*self.states(batch), batch.target, temperature)

    def states(self, batch: Batch):
        """The last hidden states (N, D) that predict the trained tokens, and the weight (V, D) of the head above them."""
        embedding, head = self.lm.get_input_embeddings(), self.lm.get_output_embeddings().weight
        inputs = {"input_ids": batch.tokens[None]}
        if embedding.weight is head and type(embedding) is nn.Embedding:      # Gemma 3's scales what it looks up
            embedded, head = TiedEmbedding.apply(head, batch.tokens, embedding.padding_idx)
            inputs = {"inputs_embeds": embedded[None]}
        # `hidden[source]` has a non-deterministic backward
        return self.hidden(batch, **inputs).index_select(0, batch.source), head

    def logps(self, states, head, target, temperature: float):
        dtype = torch.bfloat16 if self.precision == "bf16" else states.dtype
        return ChunkedLogps.apply(states if temperature == 1 else states / temperature, head, target, dtype)

    def hidden(self, batch: Batch, **inputs):
        """The last hidden states (T, D) of a batch, whose tokens `inputs` gives in one of transformers' two forms."""
        for dropout in self.dropouts:              # acts in training only; everything without a gradient sees the plain model
            dropout.train(torch.is_grad_enabled())
        with self.autocast():
            return self.lm.base_model(**inputs, position_ids=batch.positions[None], use_cache=False,
                                      segments=batch.segments).last_hidden_state[0]

    @contextlib.contextmanager
    def generating(self, attention: str | None = None):
        """The LM itself, in the state that generation needs: ordinary attention with a KV cache (or the registered `attention`), no
        gradients, every sharded weight gathered."""
        sharded = [module for module in self.modules() if isinstance(module, FSDPModule)]
        if sharded:      # a forward through this root on every rank gathers everything; after it each rank runs the LM as often as it likes
            self.set_reshard_after_forward(False)
            with torch.no_grad():
                self(self.collate([]))
        implementation = self.lm.config._attn_implementation
        self.lm.set_attn_implementation(attention or ("sdpa" if self.lm._supports_sdpa else "eager"))       # eager: Gemma 2
        training = [module for module in self.lm.modules() if module.training]       # dropout of LoRA, and checkpointed layers,
        for module in training:                                                       # which ignore the cache
            module.training = False
        try:
            with torch.no_grad(), self.autocast():
                yield self.lm
        finally:
            self.lm.set_attn_implementation(implementation)
            for module in training:
                module.training = True
            for module in sharded:
                module.reshard()
                module.set_reshard_after_forward(True, recurse=False)


def saved_head(path: str, notice) -> torch.Tensor:
    """The head (1, D) of the reward model at `path`. Ours has no bias: a notice says that one is left out."""
    file = os.path.join(path, VALUE_HEAD)
    try:
        tensors = load_file(file)
    except Exception as error:  # noqa: BLE001  somebody else's file
        said = first_line(error)
        raise UserError(f"model: {file} cannot be loaded ({said}); fix: check the file") from error
    if HEAD_WEIGHT not in tensors:
        found = ", ".join(tensors) or "nothing"
        raise UserError(f"model: {file} holds {found}, not {HEAD_WEIGHT}; fix: pass a reward model")
    if HEAD_BIAS in tensors and tensors[HEAD_BIAS].any():
        bias = float(tensors[HEAD_BIAS])
        notice(f"{file}: its bias {bias:.4g}, the same for every response, is left out of the scores")
    check_finite([(VALUE_HEAD, tensors[HEAD_WEIGHT])], path)
    return tensors[HEAD_WEIGHT]


class RewardModel(Policy):
    """A causal LM's trunk under a linear head without bias: `reward_model(batch)` -> (S,) fp32, a score per response.

    The score is read at the response's last token, by position, so a pad token equal to eos cannot move it."""

    def __init__(self, policy: Policy, head: torch.Tensor):
        super().__init__(policy.lm, policy.precision, policy.share_prompt)
        self.value_head = nn.Linear(head.shape[1], 1, bias=False, device=policy.device)
        self.value_head.weight.data.copy_(head)

    def forward(self, batch: Batch):
        hidden = self.hidden(batch, input_ids=batch.tokens[None]).index_select(0, batch.last)      # (S, D)
        return self.value_head(hidden.float())[:, 0]


def is_reward_model(path: str) -> bool:
    return os.path.exists(os.path.join(path, VALUE_HEAD))


def build_reward_model(policy: Policy, path: str, seed: int, notice=print) -> RewardModel:
    """The head saved at `path`, else a fresh one from N(0, 1 / (D + 1)), on the trunk of `policy`."""
    if is_reward_model(path):
        return RewardModel(policy, saved_head(path, notice))
    size = policy.lm.config.get_text_config().hidden_size
    return RewardModel(policy, torch.randn(1, size, generator=torch.Generator().manual_seed(seed)) / (size + 1) ** 0.5)


def return_freed_memory() -> None:
    """Make glibc give freed activations back at once: kept in its heap they raise the peak of CPU training by a tenth."""
    with contextlib.suppress(OSError, AttributeError):                  # another C library does as it likes
        ctypes.CDLL("libc.so.6").mallopt(-3, 2 << 20)                   # M_MMAP_THRESHOLD: 2 MiB


def build_policy(config, tokenizer, path: str | None = None, frozen: bool = False) -> Policy:
    """Load `config.model` (or `path`, a checkpoint of it) as a Policy on this process's device, in eval mode: dropout is 0. Where
    it is an adapter, its base model with it; else, if LoRA is asked for, with a fresh one, which a `frozen` model does not need."""
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if config.precision == "bf16" and device.type == "cuda" and not bf16:
        raise UserError("precision: this GPU has no bf16; fix: precision=fp32")
    precision = config.precision if config.precision != "auto" else "bf16" if bf16 else "fp32"
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")      # torch asks Linux for pages of 2 MiB: fewer page faults
    path, train_adapter = path or config.model, config.lora_r > 0 or is_adapter(config.model)
    dtype = torch.bfloat16 if train_adapter and precision == "bf16" and device.type == "cuda" else torch.float32
    quantized = lora.quantization(config, device, dtype)
    lm = load_lm(base_of(path), dtype, config.attn_implementation, **quantized).eval()
    lm = lm if quantized else lm.to(device)
    if device.type == "cpu" and lm.num_parameters() > 2 ** 26:          # a small model has memory to spare, and is a third faster so
        return_freed_memory()
    if len(tokenizer) > lm.get_input_embeddings().num_embeddings:
        raise UserError(f"model: the tokenizer has {len(tokenizer)} tokens but the embedding only "
                        f"{lm.get_input_embeddings().num_embeddings} rows; fix: use the tokenizer this model was saved with")
    context = getattr(lm.config.get_text_config(), "max_position_embeddings", None)
    if context and config.max_length > context:
        raise UserError(f"max_length is {config.max_length}, but the model {config.model} knows only {context} positions; "
                        "fix: lower max_length")
    if is_adapter(path):
        lora.attach_saved(lm, path, config, check=not frozen)
    elif config.lora_r and not frozen:
        lora.attach(lm, lora.new_settings(config, lm), config.seed)
    for module in lm.modules():
        if {"gate_proj", "up_proj", "down_proj"} <= dict(module.named_children()).keys() and hasattr(module, "act_fn"):
            module.forward = types.MethodType(gated_mlp, module)
    if config.gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
        for module in lm.modules():      # transformers checkpoints in train mode only; everything else stays in eval, without dropout
            module.training = getattr(module, "gradient_checkpointing", False)
    return Policy(lm, precision, share_prompt=config.share_prompt != "false")


def reshard(policy: Policy) -> None:
    """Give up what a forward without a backward has gathered: until then the parameters of the root are other
    objects than those that the optimizer knows."""
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def shard(policy: Policy):
    """FSDP2 over all ranks: one group per decoder layer and one for the rest. Gradients are summed, not averaged, over ranks:
    the algorithms divide by counts of the whole step."""
    names = {name for module in policy.modules() for name in getattr(module, "_no_split_modules", None) or ()}      # of a critic's too
    layers = [module for module in policy.modules() if type(module).__name__ in names]
    for module in (*layers, policy):
        # 4-bit weights are integers, which cannot be split like this: every rank keeps them whole
        fully_shard(module, ignored_params={p for p in policy.parameters() if not p.is_floating_point()})
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)       # without it gloo fails: it has no PREMUL_SUM
    return policy


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
