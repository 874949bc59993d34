"""What this project does on one GPU, in one go and without a network: `python benchmark/gpu.py`.

The models are random ones of real shapes (Qwen2.5 with 0.5B, 1.5B and 7B parameters), the tokens are random,
and the lengths are drawn like those of HH-RLHF: prompts have a median of 117 tokens and a 90 % quantile of
289, responses 31 and 96. `--budget` is in seconds, from the start of the process; give at most what the
machine allows a command. Each section has a share of it, and names the cases that it left out when its share
was used up. `--output gpu.json` stores the report after every row, and TRL's rows in gpu.trl.json, too: a
kill loses only the case that runs. `--cpu` runs everything with narrow models of two layers: its numbers mean
nothing, but it shows that the script works.

env       prints versions, the signature of `varlen_attn`, the rates of bf16 matrix products, and how fast
          memory is copied (bytes read and bytes written).
check     prints how far the log-probs and the gradient are from those of `dense` in fp32, per layout, form
          of attention and precision; and whether two runs give the same bits, as it is and under
          `deterministic: true`. It fails where a difference is too large.
train     prints full fine-tuning updates of one micro-batch each: from the examples to the moved weights,
          with collate, forward, loss, backward, clipping and AdamW. Weights are fp32, products bf16. The
          form `compiled` is varlen with its layers through torch.compile.
peer      prints updates of DPO beside TRL's trainer on rows with the same lengths, with its settings that
          could be the fastest. Loading and the reference's pass are not in the time.
decode    prints the sampling of completions, beside `generate` of transformers.
profile   prints where the time of one DPO update goes: launches per layer (all launches of the update
          divided by the layers), busy share, synchronising calls, the longest kernels.

Columns:
examples/s     an example is a pair (dpo, peer), a row (sft), or a prompt with its eight responses (grpo)
ms             median time of an update (train, peer, profile), or of a token of every row (decode). In
               `train` updates follow each other as in a run, where only the gradient's norm is waited for
host ms        time until the host waits for the norm; where it is close to ms, the launches are the limit
share of limit env: of 989 TFLOP/s, the bf16 rate in NVIDIA's table for the H100. train: the model FLOP
               utilisation (MFU), which is needed FLOP / time / peak, where

                   needed = 6 x body x T  +  3 x 4 x head_dim x heads x layers x visible  +  6 x D x V x N

               body is the parameters of the layers' matrices, visible the (query, key) pairs that may see
               each other, and peak 989 TFLOP/s for an H100 or H200, else the rate that env measures.
               decode: 2 bytes x parameters / bandwidth / ms. profile: time in kernels / ms.
peak GB        largest memory that tensors had, and reserved GB what the allocator had taken for it
forecast GB    what `train.py --dry-run` would say that the same update needs (train)

The end is one markdown table and one line of JSON with everything. Exit code 1: a section failed.
"""
# ruff: noqa: E402
import time

STARTED = time.perf_counter()          # before torch is imported, which takes seconds

import dataclasses
import functools
import gc
import importlib.util
import inspect
import json
import math
import os
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import transformers
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from transformers import AutoModelForCausalLM, Qwen2Config

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from algorithms.dpo import dpo_loss
from algorithms.grpo import grpo_loss
from algorithms.sft import sft_loss
from benchmark import shared
from benchmark.vs_trl import forward_gflop
from data.pack import Example, Response
from data.packing import pack
from engine.config import Common
from engine.forecast import forecast
from engine.optimizer import adamw_arguments
from engine.options import Options
from engine.ranks import start_processes
from model.build import patch_gated_mlps
from model.compiled import compile_layers, plain_layers
from model.form import VARLEN, Form
from model.load import empty_lm
from model.policy import Policy
from model.sampler import sample

H100_FLOPS = 989e12                    # bf16, dense
BANDWIDTHS = {"H100": 3.35e12, "H200": 4.8e12}      # bytes per second, in NVIDIA's tables
LIMIT = "share of limit"
PER_SECOND = ("examples/s", "tokens/s")
COLUMNS = (
    "section", "model", "case", "form", "ms", "host ms", *PER_SECOND, LIMIT, "peak GB", "forecast GB",
    "reserved GB")
# how the budget is divided
SECONDS = {"env": 10, "check": 60, "train": 320, "peer": 150, "decode": 80, "profile": 20}
KEPT_BACK = 30                         # seconds of the budget for a case that begins when its time ends
COMPILE_SECONDS = 30                   # that the first compiled update of a model may take
FORMS = ("dense", "segments", VARLEN)
COMPILED = "compiled"                  # varlen, with its layers through torch.compile
FAST_FORMS = (COMPILED, VARLEN)
# largest and mean difference of log-probs; bf16 rounds this random model's by 5e-3 on average, in every form
TOLERANCES = {"fp32": (1e-4, 1e-4), "bf16": (5e-2, 1e-2)}
GRADIENT_TOLERANCE = 1e-4              # in fp32; in bf16 it is only printed
TOKENIZER = shared.ROOT / "example" / "tiny" / "model"      # bytes are its tokens
SYNCHRONISING = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")
LAUNCHES = ("cudaLaunch", "cuLaunch")
WARM_TOKENS = 16                       # tokens of a completion before those that are timed
LONGEST = 12                           # kernels shown by name
MOST_SECONDS = 10                      # of a case with slow updates, beyond those that warm up
PREFIX = 40                            # tokens with which all prompts of one layout begin


# ---- shapes and scales -------------------------------------------------------------------------------

SHAPES = {
    "0.5B": shared.SHAPE | {"num_hidden_layers": 24, "tie_word_embeddings": True},
    "1.5B": {
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "intermediate_size": 8960,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "7B": {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}
NARROW = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 512,
}


class Scale(NamedTuple):
    """How large everything is: for a GPU, or for the trial on a CPU."""
    device: str = "cuda"
    precision: str = "bf16"
    is_narrow: bool = False
    shorter: int = 1                       # what lengths in tokens are divided by
    micro_batches: tuple = (8192, 16384, 24576, 32768)      # tokens
    depths: tuple = (2, 6)                 # layers from which the whole 7B model is extrapolated
    warm: int = 3                          # updates before those that are timed
    timed: int = 10
    product: int = 8192                    # rows and columns of the matrices whose product is timed
    copied: int = 2 ** 30                  # bytes
    pairs: int = 64                        # an update of `peer`
    updates: int = 6
    per_device: tuple = (16, 8)            # pairs in a forward of TRL's
    rows: tuple = (64, 256)                # completions that are decoded together
    new_tokens: int = 128
    prompt: int = 128                      # tokens of a prompt in `decode`
    forms: tuple = FAST_FORMS

    @property
    def is_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def dtype(self):
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def shape(self, name: str) -> dict:
        if not self.is_narrow:
            return SHAPES[name]
        return NARROW | {"tie_word_embeddings": SHAPES[name]["tie_word_embeddings"]}

    def label(self, name: str) -> str:
        return f"{name}, narrow" if self.is_narrow else name


GPU = Scale()
CPU = Scale(
    device="cpu",
    precision="fp32",
    is_narrow=True,
    shorter=8,
    micro_batches=(512, 640, 768, 1024),
    depths=(1, 2),
    warm=1,
    timed=2,
    product=256,
    copied=2 ** 20,
    pairs=8,
    updates=3,
    per_device=(4,),
    rows=(4, 8),
    new_tokens=4,
    prompt=16,
    forms=(VARLEN,))        # on a CPU a loop stands for the kernel, and each batch would be compiled


# ---- sections and their rows -------------------------------------------------------------------------

class Section:
    """One section of the report: its rows, the cases that it left out and why, and its errors. `keep()`
    stores the report after each row."""
    compiled = set()      # the models whose layers this process has compiled

    def __init__(self, name: str, seconds: float, output: Path | None = None, keep=lambda: None):
        self.name, self.output, self.keep = name, output, keep
        self.deadline = time.perf_counter() + seconds
        self.rows = []
        self.left_out = []
        self.errors = []

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.perf_counter()

    def has_time(self, label: dict) -> bool:
        """Whether the case may begin: an update that compiles would take the time of the next sections."""
        is_new = label.get("form") == COMPILED and label["model"] not in self.compiled
        return self.seconds_left > (COMPILE_SECONDS if is_new else 0)

    def measure(self, label: dict, function, *arguments) -> dict | None:
        """Add the row `label` with the numbers that function(*arguments) returns, and print it; None where
        there is no time left, or it failed."""
        title = ", ".join(label.values())
        if not self.has_time(label):
            self.leave_out(title, "no time left")
            return None
        if label.get("form") == COMPILED:
            self.compiled.add(label["model"])
        numbers = None
        try:
            numbers = function(*arguments)
        except torch.OutOfMemoryError:
            self.leave_out(title, "out of memory")
        except Exception as error:  # noqa: BLE001  the other cases go on
            self.fail(title, error)
        free_memory()      # here, since what was raised has kept tensors until now
        if numbers is None:
            return None
        row = label | numbers
        self.add(row)
        return row

    def add(self, row: dict) -> None:
        self.rows.append(row)
        words = []
        for key, value in row.items():
            if not isinstance(value, list):
                words.append(f"{key} {shown(value)}")
        print("  " + ", ".join(words))
        self.keep()

    def leave_out(self, title: str, reason: str) -> None:
        self.left_out.append(f"{title}: {reason}")
        print(f"  left out: {title}: {reason}")

    def fail(self, title: str, error: Exception) -> None:
        self.errors.append(f"{title}: {type(error).__name__}: {error}")
        print("".join(traceback.format_exception(error)))

    def result(self) -> dict:
        return {"rows": self.rows, "left_out": self.left_out, "errors": self.errors}


def shown(value) -> str:
    """A value as a person reads it: numbers with four digits."""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float) and value:
        digits = max(0, 3 - math.floor(math.log10(abs(value)))) if math.isfinite(value) else 0
        return f"{value:.1e}" if digits > 5 else f"{value:,.{digits}f}"
    return str(value)


def print_table(sections: dict) -> None:
    """All rows of all sections as one markdown table; what has no column of its own stands in the last."""
    print("\n| " + " | ".join([*COLUMNS, "other"]) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for name, section in sections.items():
        for row in section["rows"]:
            row = {"section": name} | row
            cells = [shown(row.pop(column, "")) for column in COLUMNS]
            rest = []
            for key, value in row.items():
                if not isinstance(value, list):
                    rest.append(f"{key} {shown(value)}")
            cells.append(", ".join(rest))
            line = " | ".join(cell.replace("|", "\\|") for cell in cells)
            print(f"| {line} |")
    print()


# ---- the device --------------------------------------------------------------------------------------

def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def memory(scale: Scale) -> dict:
    """The largest memory since `reset_peak`; on a CPU that of the process since its start."""
    if not scale.is_gpu:
        return {"peak GB": shared.measured(0)["peak"]}
    return {
        "peak GB": torch.cuda.max_memory_allocated() / 1e9,
        "reserved GB": torch.cuda.max_memory_reserved() / 1e9,
    }


def timed(function, *arguments) -> tuple:
    """Seconds until the work is done, and what the function returns."""
    synchronize()
    started = time.perf_counter()
    found = function(*arguments)
    synchronize()
    return time.perf_counter() - started, found


def median(numbers) -> float:
    return float(np.median(numbers))


def median_seconds(function, *arguments, repeats: int = 10) -> float:
    """The median of `repeats` calls, after two that warm up."""
    seconds = []
    for _ in range(2 + repeats):
        done, _ = timed(function, *arguments)
        seconds.append(done)
    return median(seconds[2:])


@functools.cache
def product_rate(scale: Scale, m: int, k: int, n: int) -> float:
    """FLOP/s of the matrix product (m, k) x (k, n)."""
    a = torch.randn(m, k, device=scale.device, dtype=scale.dtype)
    b = torch.randn(n, k, device=scale.device, dtype=scale.dtype)
    seconds = median_seconds(torch.matmul, a, b.T)
    return 2 * m * k * n / seconds


@functools.cache
def copy_bandwidth(scale: Scale) -> float:
    """Bytes per second, read and written, while memory is copied."""
    source = torch.zeros(scale.copied // 4, device=scale.device)
    target = torch.empty_like(source)
    return 2 * scale.copied / median_seconds(target.copy_, source)


def device_name(scale: Scale) -> str:
    return torch.cuda.get_device_name() if scale.is_gpu else "CPU"


def peak_flops(scale: Scale) -> float:
    """FLOP/s that the MFU refers to."""
    name = device_name(scale)
    if "H100" in name or "H200" in name:
        return H100_FLOPS
    size = scale.product
    return product_rate(scale, size, size, size)


def bandwidth_limit(scale: Scale) -> float:
    """Bytes per second with which weights can be read."""
    for name, bandwidth in BANDWIDTHS.items():
        if name in device_name(scale):
            return bandwidth
    return copy_bandwidth(scale)


# ---- models, examples, updates -----------------------------------------------------------------------

def random_lm(scale: Scale, shape: dict, **options):
    """A Qwen2 with random fp32 weights, the same each time."""
    config = Qwen2Config(**shape, max_position_embeddings=32768, **options)
    torch.manual_seed(0)
    with torch.device(scale.device):
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    return lm.to(scale.device)


def new_policy(scale: Scale, shape: dict, **options) -> Policy:
    """A random model as a run has it: in eval mode, and with our forward of its gated MLPs."""
    lm = random_lm(scale, shape, **options).eval()
    patch_gated_mlps(lm)
    return Policy(lm, scale.precision)


def use_form(policy: Policy, form: str) -> None:
    """Let the policy compute its layers in this form."""
    plain_layers(policy)
    if form == COMPILED:
        compile_layers(policy)
        form = VARLEN
    policy.use(Form(form, True))


def log_normal(rng, median: float, high: float) -> int:
    """A length whose 50 % and 90 % quantiles are `median` and `high`."""
    sigma = math.log(high / median) / 1.2816      # 90 % of a normal lie below 1.2816 sigma
    length = rng.lognormal(math.log(median), sigma)
    return min(shared.MAX_LENGTH, max(1, round(length)))


def drawn_lengths(rng, kind: str, shorter: int = 1) -> list[int]:
    """The lengths of a prompt and its responses, in tokens: a pair of HH-RLHF (dpo), a long row (sft), or a
    group of eight (grpo)."""
    if kind == "dpo":
        lengths = [log_normal(rng, 117, 289), log_normal(rng, 31, 96), log_normal(rng, 31, 96)]
    elif kind == "sft":
        total = int(rng.integers(512, 2049))
        lengths = [total // 4, total - total // 4]
    else:
        responses = rng.integers(200, 401, 8).tolist()
        lengths = [int(rng.integers(150, 251)), *responses]
    return [max(1, length // shorter) for length in lengths]


def example_of(rng, lengths: list[int], vocabulary: int) -> Example:
    """Random tokens of these lengths, with what the losses take beside them: a reference that is as likely
    as a random policy, and advantages."""
    prompt, *responses = [rng.integers(0, vocabulary, length).astype(np.int32) for length in lengths]
    trained = sum(len(response) for response in responses)
    extras = {
        "reference_logps": torch.full((trained,), -math.log(vocabulary)),
        "advantages": torch.from_numpy(rng.standard_normal(len(responses))).float(),
    }
    return Example(prompt, [Response.all_trained(response) for response in responses], "random", extras)


def drawn_micro_batch(rng, kind: str, tokens: int, scale: Scale, vocabulary: int) -> list[Example]:
    """As many examples as `tokens` laid-out tokens hold; at least one."""
    examples = []
    size = 0
    while True:
        example = example_of(rng, drawn_lengths(rng, kind, scale.shorter), vocabulary)
        size += example.size()
        if examples and size > tokens:
            return examples
        examples.append(example)


def losses_of(policy: Policy, batch, algorithm: str):
    """The losses and metrics of a micro-batch, as the file of the algorithm computes them."""
    logps = policy(batch)
    if algorithm == "sft":
        return sft_loss(logps)
    reference_logps = batch.extra("reference_logps")
    if algorithm == "dpo":
        chosen, rejected = batch.pairs(batch.sum(logps))
        reference_chosen, reference_rejected = batch.pairs(batch.sum(reference_logps))
        return dpo_loss(chosen, rejected, reference_chosen, reference_rejected, tie=policy.tolerance)
    advantages = batch.expand(batch.extra("advantages"))
    losses, metrics = grpo_loss(logps, logps.detach(), advantages, reference_logps)
    return batch.mean(losses), metrics


def num_losses(examples: list[Example], algorithm: str) -> int:
    """How many losses an update has: its pairs, its responses or its trained tokens."""
    if algorithm == "dpo":
        return len(examples)
    if algorithm == "sft":
        return sum(example.num_trained for example in examples)
    return sum(len(example.responses) for example in examples)


def update(policy: Policy, optimizer, micro_batches: list, algorithm: str) -> tuple[list[dict], float]:
    """One update, as engine/loop.py makes it; the metrics of every micro-batch, and how many seconds pass
    until the host waits for the gradient's norm."""
    started = time.perf_counter()
    count = 0
    for examples in micro_batches:
        count += num_losses(examples, algorithm)
    found = []
    for examples in micro_batches:
        batch = policy.collate(examples)
        losses, metrics = losses_of(policy, batch, algorithm)
        (losses.sum() / count).backward()
        found.append(metrics)
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    host = time.perf_counter() - started
    float(norm)
    optimizer.step()
    optimizer.zero_grad()
    return found, host


def needed_flop(shape: dict, algorithm: str, examples: list[Example]) -> float:
    """What the MFU counts for an update: three times the forward."""
    rows = []
    for example in examples:
        responses = [response.tokens for response in example.responses]
        rows.append([example.prompt, *responses])
    job = {"shape": shape, "algorithm": algorithm, "batch": len(rows)}
    return 3e9 * forward_gflop(job, rows)


# ---- env ---------------------------------------------------------------------------------------------

def versions(scale: Scale) -> dict:
    found = {"device": device_name(scale)}
    found["torch"] = torch.__version__
    found["transformers"] = transformers.__version__
    found["CUDA"] = torch.version.cuda or "none"
    for name in ("trl", "liger_kernel", "flash_attn", "vllm"):
        found[name] = "importable" if importlib.util.find_spec(name) else "not there"
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        found["varlen_attn"] = "not there"
    else:
        found["varlen_attn"] = str(inspect.signature(varlen_attn))
    return found


def product_numbers(scale: Scale, m: int, k: int, n: int) -> dict:
    rate = product_rate(scale, m, k, n)
    return {"ms": 2e3 * m * k * n / rate, "TFLOP/s": rate / 1e12, LIMIT: rate / H100_FLOPS}


def env(section: Section, scale: Scale) -> None:
    section.measure({"case": "versions"}, versions, scale)
    size = scale.product
    products = {"square": (size, size, size)}
    for name in SHAPES:
        shape = scale.shape(name)
        products[f"MLP of {scale.label(name)}"] = (size, shape["hidden_size"], shape["intermediate_size"])
    for name, (m, k, n) in products.items():
        case = f"{name}, ({m} x {k}) x ({k} x {n}), {scale.precision}"
        section.measure({"case": case}, product_numbers, scale, m, k, n)
    section.measure({"case": "copy"}, lambda: {"TB/s": copy_bandwidth(scale) / 1e12})


# ---- check -------------------------------------------------------------------------------------------

def layouts(scale: Scale, vocabulary: int) -> dict:
    """{name: examples}"""
    rng = np.random.default_rng(0)
    lengths = {"pairs": [], "groups of 8": [], "one-token responses": []}
    for _ in range(6):
        lengths["pairs"].append(drawn_lengths(rng, "dpo", scale.shorter))
    for _ in range(2):
        responses = rng.integers(1, 150 // scale.shorter, 8).tolist()
        lengths["groups of 8"].append([200 // scale.shorter, *responses])
    for prompt in (1, 2, 17, 64, 117, 200, 289, 65):
        lengths["one-token responses"].append([prompt, 1, 1])
    found = {}
    for name, rows in lengths.items():
        found[name] = [example_of(rng, row, vocabulary) for row in rows]
    prefix = rng.integers(0, vocabulary, PREFIX).astype(np.int32)
    behind = []
    for example in found["pairs"]:
        prompt = np.concatenate([prefix, example.prompt])
        behind.append(dataclasses.replace(example, prompt=prompt))
    found["pairs behind a prefix"] = behind
    return found


def logps_and_gradient(policy: Policy, examples: list[Example]) -> list:
    """The log-probs (N,), and the gradient of chosen minus rejected ones for every parameter."""
    policy.zero_grad()
    batch = policy.collate(examples)
    logps = policy(batch)
    signs = torch.ones(len(batch.lengths), device=logps.device)
    signs[1::2] = -1
    (logps * batch.expand(signs)).mean().backward()
    found = [logps.detach()]
    for parameter in policy.parameters():
        found.append(parameter.grad)
        parameter.grad = None
    return found


def same_bits(policy: Policy, examples: list[Example], first: list) -> bool:
    second = logps_and_gradient(policy, examples)
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def compare(policy: Policy, form: str, precision: str, examples: list[Example], wanted: list) -> dict:
    """How far the policy in this form and precision is from the wanted log-probs and gradient."""
    use_form(policy, form)
    policy.precision = precision
    found = logps_and_gradient(policy, examples)
    difference = (found[0] - wanted[0]).abs()
    error = norm = 0.0
    for ours, theirs in zip(found[1:], wanted[1:], strict=True):
        error += float((ours - theirs).double().pow(2).sum())
        norm += float(theirs.double().pow(2).sum())
    numbers = {
        "max difference": float(difference.max()),
        "mean difference": float(difference.mean()),
        "gradient error": math.sqrt(error / norm),
        "same bits": same_bits(policy, examples, found),
    }
    return numbers | deterministic_bits(policy, examples)


def deterministic_bits(policy: Policy, examples: list[Example]) -> dict:
    """Whether two runs give the same bits under `deterministic: true`; where torch refuses an operation, what
    it says."""
    torch.use_deterministic_algorithms(True)
    try:
        first = logps_and_gradient(policy, examples)
        return {"same bits if deterministic": same_bits(policy, examples, first)}
    except RuntimeError as error:
        return {"deterministic": f"refused: {str(error)[:200]}"}
    finally:
        torch.use_deterministic_algorithms(False)


def judge(section: Section, row: dict, precision: str) -> None:
    """Note an error where a row is too far from dense fp32."""
    largest, mean = TOLERANCES[precision]
    is_right = row["max difference"] <= largest and row["mean difference"] <= mean
    if precision == "fp32":
        is_right = is_right and row["gradient error"] <= GRADIENT_TOLERANCE
    if not is_right:
        text = f"{row['case']} {row['form']}: too far from dense in fp32"
        section.errors.append(text)
        print(f"  ERROR: {text}")


def check_layout(section: Section, policy: Policy, scale: Scale, layout: str, examples: list) -> None:
    """Every form and precision of one layout."""
    policy.precision = "fp32"
    use_form(policy, "dense")
    wanted = logps_and_gradient(policy, examples)
    for form in FORMS:
        for precision in TOLERANCES:
            label = {"model": scale.label("0.5B"), "case": f"{layout}, {precision}", "form": form}
            row = section.measure(label, compare, policy, form, precision, examples, wanted)
            if row:
                judge(section, row, precision)


def check(section: Section, scale: Scale) -> None:
    """Four layers of the 0.5B model; two of them have a sliding window in the last layout."""
    depth = 2 if scale.is_narrow else 4
    shape = scale.shape("0.5B") | {"num_hidden_layers": depth}
    made = layouts(scale, shape["vocab_size"])
    policy = new_policy(scale, shape)
    for name, examples in made.items():
        check_layout(section, policy, scale, name, examples)
    del policy
    free_memory()
    windows = {
        "use_sliding_window": True,
        "sliding_window": 64 // scale.shorter,
        "layer_types": ["sliding_attention", "full_attention"] * (depth // 2),
    }
    policy = new_policy(scale, shape, **windows)
    check_layout(section, policy, scale, "sliding window", made["pairs"])


# ---- train -------------------------------------------------------------------------------------------

# each line: the model, and what it is trained with; the most telling come first
SMALL, MIDDLE, LARGE, LARGEST = range(4)      # places in Scale.micro_batches
TRAINED = (
    ("1.5B", (
        ("dpo", LARGE, (COMPILED,)),
        ("dpo", MIDDLE, FAST_FORMS),
        ("dpo", SMALL, FAST_FORMS),
        ("sft", SMALL, FAST_FORMS),
        ("grpo", SMALL, FAST_FORMS))),
    ("0.5B", (
        ("dpo", SMALL, FAST_FORMS),
        ("dpo", LARGEST, FAST_FORMS),
        ("sft", SMALL, (VARLEN,)),
        ("grpo", SMALL, (VARLEN,)),
        ("dpo", SMALL, ("segments",)))),
    ("7B", (("dpo", MIDDLE, (COMPILED,)), ("dpo", SMALL, FAST_FORMS))),
    ("7B", (("sft", SMALL, (COMPILED,)), ("grpo", SMALL, (COMPILED,)))),      # both depths of dpo come first
)


class Update(NamedTuple):
    """One timed update."""
    seconds: float
    host: float          # seconds until the host waits
    examples: int
    tokens: int          # laid out
    flop: float          # needed


class Trainee(NamedTuple):
    """What is trained, and its shape."""
    policy: Policy
    optimizer: torch.optim.AdamW
    shape: dict


def new_trainee(scale: Scale, shape: dict) -> Trainee:
    policy = new_policy(scale, shape)
    return Trainee(policy, torch.optim.AdamW(**adamw_arguments(policy, lr=1e-6, weight_decay=0.01)), shape)


def timed_updates(trainee: Trainee, algorithm: str, tokens: int, scale: Scale) -> list[Update]:
    """Updates of one micro-batch each, which all differ, after those that warm up: the first may compile."""
    policy, optimizer, shape = trainee
    rng = np.random.default_rng(1)
    drawn = []
    for _ in range(scale.warm + scale.timed):
        drawn.append(drawn_micro_batch(rng, algorithm, tokens, scale, shape["vocab_size"]))
    ends, hosts = [], []
    for examples in drawn:
        if len(ends) >= scale.warm and ends[-1] - ends[scale.warm - 1] > MOST_SECONDS:
            break
        _, host = update(policy, optimizer, [examples], algorithm)
        ends.append(time.perf_counter())
        hosts.append(host)
    synchronize()
    check_finite(policy)
    found = []
    for number in range(scale.warm, len(ends)):
        examples = drawn[number]
        size = sum(example.size() for example in examples)
        flop = needed_flop(shape, algorithm, examples)
        found.append(Update(ends[number] - ends[number - 1], hosts[number], len(examples), size, flop))
    return found


def check_finite(policy: Policy) -> None:
    """RuntimeError where the updates have made a weight infinite or NaN."""
    weight = policy.lm.get_input_embeddings().weight
    if not bool(weight.isfinite().all()):
        raise RuntimeError("a weight is no longer finite after the updates")


def forecast_memory(scale: Scale, shape: dict, form: str, algorithm: str, tokens: int) -> float:
    """GB of an update with micro-batches of `tokens`, as `train.py --dry-run` adds them up."""
    common = Common(
        algorithm=algorithm,
        model="/nonexistent",
        data="",
        precision=scale.precision,
        compile="true" if form == COMPILED else "false")
    lm = empty_lm(Qwen2Config(**shape), common.model)
    lines = forecast(common, Options(), lm, tokens, in_one=True)
    total, = [line for line in lines if line.startswith("total")]
    return float(total.split()[-2])


def train_numbers(trainee: Trainee, form: str, algorithm: str, tokens: int, scale: Scale) -> dict:
    """Medians over the timed updates."""
    use_form(trainee.policy, form)
    reset_peak()
    try:
        updates = timed_updates(trainee, algorithm, tokens, scale)
    finally:
        trainee.optimizer.zero_grad()      # after a lack of memory, too
    seconds, host, examples, laid_out, flop = np.array(updates).T
    return {
        "ms": 1e3 * median(seconds),
        "host ms": 1e3 * median(host),
        "examples/s": median(examples / seconds),
        "tokens/s": median(laid_out / seconds),
        LIMIT: median(flop / seconds) / peak_flops(scale),
        **memory(scale),
        "forecast GB": forecast_memory(scale, trainee.shape, form, algorithm, tokens),
        "examples": float(examples.mean()),
        "tokens": float(laid_out.mean()),
        "needed TFLOP": float(flop.mean()) / 1e12,
    }


def train_model(section: Section, scale: Scale, name: str, shape: dict, cases: tuple) -> dict:
    """Measure these cases of one model; {case and form: row}"""
    trainee = None
    if section.seconds_left > 0:
        trainee = new_trainee(scale, shape)
    rows = {}
    for algorithm, place, forms in cases:
        tokens = scale.micro_batches[place]
        for form in forms:
            if form == COMPILED and form not in scale.forms:
                continue
            label = {"model": name, "case": f"{algorithm}, {tokens} tokens", "form": form}
            row = section.measure(label, train_numbers, trainee, form, algorithm, tokens, scale)
            rows[label["case"], form] = row
    return rows


def extrapolated(low: dict, high: dict, depths: tuple, layers: int, peak: float) -> dict:
    """The numbers of a model with all `layers`, from those with two depths: each layer more adds the same."""
    numbers = {}
    for key in ("ms", "host ms", "needed TFLOP"):
        per_layer = (high[key] - low[key]) / (depths[1] - depths[0])
        numbers[key] = high[key] + per_layer * (layers - depths[1])
    seconds = numbers["ms"] / 1e3
    numbers["examples/s"] = high["examples"] / seconds
    numbers["tokens/s"] = high["tokens"] / seconds
    numbers[LIMIT] = 1e12 * numbers["needed TFLOP"] / seconds / peak
    return numbers


def train(section: Section, scale: Scale) -> None:
    for name, cases in TRAINED:
        label = scale.label(name)
        shape = scale.shape(name)
        if name != "7B":
            train_model(section, scale, label, shape, cases)
            free_memory()
            continue
        found = []
        for depth in scale.depths:
            part = shape | {"num_hidden_layers": depth}
            found.append(train_model(section, scale, f"{label}, {depth} layers", part, cases))
            free_memory()
        layers = SHAPES[name]["num_hidden_layers"]
        whole = {"model": f"{label}, extrapolated to {layers} layers"}
        for (case, form), low in found[0].items():
            high = found[1][case, form]
            if low and high:
                numbers = extrapolated(low, high, scale.depths, layers, peak_flops(scale))
                section.add(whole | {"case": case, "form": form} | numbers)


# ---- peer --------------------------------------------------------------------------------------------

def our_updates(policy, form: str, examples: list[Example], tokens: int, scale: Scale) -> dict:
    """Median time of updates of `scale.pairs` pairs; like TRL's, they compute the metrics and read them."""
    use_form(policy, form)
    optimizer = torch.optim.AdamW(**adamw_arguments(policy, lr=1e-6, weight_decay=0.01))
    seconds = []
    reset_peak()

    def one_update(micro_batches):
        found, _ = update(policy, optimizer, micro_batches, "dpo")
        for metrics in found:
            for values in metrics.values():
                float(values.detach().sum(dtype=torch.float64))

    for start in range(0, len(examples), scale.pairs):
        block = examples[start:start + scale.pairs]
        sizes = [example.size() for example in block]
        micro_batches = []
        for members in pack(sizes, tokens)[0]:
            micro_batches.append([block[i] for i in members])
        done, _ = timed(one_update, micro_batches)
        seconds.append(done)
    check_finite(policy)
    return peer_numbers(seconds[1:], scale)


def peer_numbers(seconds: list[float], scale: Scale) -> dict:
    """A row from the times of the updates after the first one."""
    middle = median(seconds)
    return {"ms": 1e3 * middle, "examples/s": scale.pairs / middle, **memory(scale)}


def trl_variants(scale: Scale) -> list[dict]:
    """TRL's settings that could be its fastest. TRL 1.16 has no padding-free batches for DPO."""
    has_liger = scale.is_gpu and importlib.util.find_spec("liger_kernel")
    variants = []
    for size in scale.per_device:
        variants.append({"per_device": size})
        if has_liger:
            variants.append({"per_device": size, "use_liger_kernel": True})
    return variants


def text_rows(lengths: list) -> list[dict]:
    """Rows of text whose bytes, with the token that ends a response, are as many as the wanted tokens."""
    rng = np.random.default_rng(3)
    letters = np.array(list("etaoinshrdlu"))
    rows = []
    for prompt, *responses in lengths:
        texts = []
        for length in (prompt, responses[0] - 1, responses[1] - 1):
            texts.append("".join(rng.choice(letters, length)))
        end = "<|im_end|>"
        rows.append({"prompt": texts[0], "chosen": texts[1] + end, "rejected": texts[2] + end})
    return rows


def trl_config(scale: Scale, variant: dict, work: str):
    """TRL's configuration of one variant, without the settings that this version of TRL does not know."""
    from trl import DPOConfig

    job = {"work": work, "lr": 1e-6, "per_device": variant["per_device"], "precision": scale.precision}
    settings = shared.trl_arguments(job) | {
        "use_cpu": not scale.is_gpu,
        "dataloader_pin_memory": scale.is_gpu,
        "logging_steps": 10,
        "gradient_accumulation_steps": scale.pairs // variant["per_device"],
        "precompute_ref_log_probs": True,
        "max_length": 2 * shared.MAX_LENGTH,
        "train_sampling_strategy": "sequential",
        "use_liger_kernel": variant.get("use_liger_kernel", False),
    }
    known = {field.name for field in dataclasses.fields(DPOConfig)}
    return DPOConfig(**{key: value for key, value in settings.items() if key in known})


def trl_trainer(scale: Scale, variant: dict, lengths: list, work: str):
    """TRL's trainer with a random model."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    return DPOTrainer(
        model=random_lm(scale, scale.shape("0.5B")),
        args=trl_config(scale, variant, work),
        train_dataset=Dataset.from_list(text_rows(lengths)),
        processing_class=tokenizer)


def trl_updates(scale: Scale, variant: dict, lengths: list) -> dict:
    """Median time of TRL's updates: from the end of one to the end of the next."""
    from transformers import TrainerCallback

    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            synchronize()
            ends.append(time.perf_counter())
            if len(ends) == 1:      # the reference's pass is over
                reset_peak()

    with tempfile.TemporaryDirectory() as work:
        trainer = trl_trainer(scale, variant, lengths, work)
        trainer.add_callback(Clock())
        trainer.train()
    seconds = np.diff(ends).tolist()
    return peer_numbers(seconds, scale)


def trl_child(job: dict) -> None:
    """Every variant of TRL, in a process of its own; all results so far are in the file job["results"]."""
    scale = CPU if job["cpu"] else GPU
    results = Path(job["results"])
    section = Section("peer", job["until"] - time.time())
    variants = trl_variants(scale)
    try:
        from trl import DPOTrainer  # noqa: F401
    except Exception as error:  # noqa: BLE001  its libraries may be of other versions
        section.leave_out("TRL", f"it cannot be imported: {error}")
        variants = []
    shared.store(results, section.result())
    for variant in variants:
        case = f"TRL, {variant['per_device']} per forward"
        if "use_liger_kernel" in variant:
            case += ", Liger kernels"
        label = {"model": scale.label("0.5B"), "case": case}
        section.measure(label, trl_updates, scale, variant, job["lengths"])
        shared.store(results, section.result())


def run_trl(section: Section, scale: Scale, lengths: list) -> list[dict]:
    """The rows of TRL's trainer, which has the time that is left. What its process has stored beside the
    report outlives a kill, also of this process."""
    if not (importlib.util.find_spec("trl") and importlib.util.find_spec("datasets")):
        section.leave_out("TRL", "it is not installed")
        return []
    if section.seconds_left <= 0:
        section.leave_out("TRL", "no time left")
        return []
    with tempfile.TemporaryDirectory() as work:
        results = (section.output or Path(work, "gpu")).with_suffix(".trl.json")
        results.unlink(missing_ok=True)      # of an earlier report
        log = call_trl(section, scale, lengths, results)
        if not results.exists():
            raise RuntimeError(f"TRL gave no result:\n{log[-3000:]}")
        result = json.loads(results.read_text())
    for row in result["rows"]:
        section.add(row)
    section.left_out += result["left_out"]
    section.errors += result["errors"]
    for text in result["left_out"] + result["errors"]:
        print(f"  {text}")
    return result["rows"]


def call_trl(section: Section, scale: Scale, lengths: list, results: Path) -> str:
    """Run the process of TRL until the section's time is over; what it has written to stderr."""
    seconds = section.seconds_left
    job = {
        "cpu": not scale.is_gpu,
        "until": time.time() + seconds,
        "lengths": lengths,
        "results": str(results),
    }
    command = [sys.executable, __file__, "--child", "trl", json.dumps(job)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=seconds + KEPT_BACK / 2)
        return done.stderr
    except subprocess.TimeoutExpired as late:
        section.leave_out("TRL's other cases", "its process was ended after its time")
        return (late.stderr or b"").decode()


def peer(section: Section, scale: Scale) -> None:
    rng = np.random.default_rng(2)
    shape = scale.shape("0.5B")
    lengths = []
    for _ in range(scale.pairs * scale.updates):
        prompt, *responses = drawn_lengths(rng, "dpo", scale.shorter)
        responses = [max(2, length) for length in responses]
        lengths.append([prompt, *responses])
    examples = [example_of(rng, row, shape["vocab_size"]) for row in lengths]
    policy = new_policy(scale, shape)
    ours = []
    for tokens in (scale.micro_batches[SMALL], scale.micro_batches[LARGEST]):
        for form in scale.forms:
            label = {"model": scale.label("0.5B"), "case": f"ours, {tokens} tokens", "form": form}
            ours.append(section.measure(label, our_updates, policy, form, examples, tokens, scale))
    del policy
    free_memory()
    theirs = run_trl(section, scale, lengths)
    if not theirs:
        return
    fastest = max(row["examples/s"] for row in theirs)
    for row in filter(None, ours):
        row["ratio to TRL's fastest"] = row["examples/s"] / fastest
        print(f"  {row['case']}, {row['form']}: {shown(row['examples/s'] / fastest)} x TRL's fastest")


# ---- decode ------------------------------------------------------------------------------------------

def decode_numbers(scale: Scale, lm, tokens: int, seconds: float) -> dict:
    """A row from `tokens` that all rows together got within `seconds`."""
    per_token = seconds / scale.new_tokens
    width = 2 if scale.precision == "bf16" else 4
    least = width * lm.num_parameters() / bandwidth_limit(scale)
    return {"ms": 1e3 * per_token, "tokens/s": tokens / seconds, LIMIT: least / per_token, **memory(scale)}


def our_decoding(policy: Policy, tokenizer, prompts: list, scale: Scale) -> dict:
    count = len(prompts)
    keys = [(0, number) for number in range(count)]
    settings = SimpleNamespace(
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_completion_length=WARM_TOKENS,
        rollout_batch_size=count,
        stop_strings=list)
    sample(policy, tokenizer, prompts, keys, 1, settings)
    settings.max_completion_length = scale.new_tokens
    reset_peak()
    synchronize()
    started = time.perf_counter()
    found = sample(policy, tokenizer, prompts, keys, 1, settings)
    synchronize()
    seconds = time.perf_counter() - started
    tokens = 0
    for completions in found:
        tokens += len(completions[0].tokens)
    return decode_numbers(scale, policy.lm, tokens, seconds)


def generate_decoding(lm, prompts: list, scale: Scale) -> dict:
    """`generate` with the weights in the precision of the products, and its dynamic cache."""
    ids = torch.from_numpy(np.stack(prompts)).long().to(scale.device)
    lm.generation_config.eos_token_id = None
    options = {
        "attention_mask": torch.ones_like(ids),
        "do_sample": True,
        "top_k": 0,
        "top_p": 1.0,
        "pad_token_id": 0,
    }

    @torch.no_grad()
    def generate(length):
        return lm.generate(ids, max_new_tokens=length, min_new_tokens=length, **options)

    generate(WARM_TOKENS)
    reset_peak()
    seconds, _ = timed(generate, scale.new_tokens)
    return decode_numbers(scale, lm, ids.shape[0] * scale.new_tokens, seconds)


def decode(section: Section, scale: Scale) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    rng = np.random.default_rng(4)
    for name in ("0.5B", "1.5B"):
        model = scale.label(name)
        prompts = list(rng.integers(0, scale.shape(name)["vocab_size"], (max(scale.rows), scale.prompt)))
        policy = None
        if section.seconds_left > 0:
            policy = new_policy(scale, scale.shape(name))
            use_form(policy, VARLEN)
        for rows in scale.rows:
            label = {"model": model, "case": f"ours, {rows} rows"}
            section.measure(label, our_decoding, policy, tokenizer, prompts[:rows], scale)
        lm = None
        if policy:
            lm = policy.lm.to(scale.dtype)
            lm.set_attn_implementation("sdpa")
        for rows in scale.rows:
            label = {"model": model, "case": f"generate, {rows} rows"}
            section.measure(label, generate_decoding, lm, prompts[:rows], scale)
        del policy, lm
        free_memory()


# ---- profile -----------------------------------------------------------------------------------------

def kernel_times(events, scale: Scale) -> Counter:
    """{name: microseconds in kernels and copies of this name}; on a CPU, in operations that call no other."""
    times = Counter()
    for event in events:
        if not scale.is_gpu:
            if event.device_type == DeviceType.CPU and not event.cpu_children:
                times[event.name] += event.time_range.elapsed_us()
            continue
        is_note = getattr(event, "is_user_annotation", False) or event.name.startswith("Optimizer.")
        if event.device_type == DeviceType.CUDA and not is_note:
            times[event.name] += event.time_range.elapsed_us()
    return times


def count_calls(events, scale: Scale) -> tuple[int, dict]:
    """The number of launches (on a CPU, of operations that call no other), and that of each synchronising
    call."""
    launches = 0
    calls = dict.fromkeys((*SYNCHRONISING, "aten::item"), 0)
    for event in events:
        if event.device_type != DeviceType.CPU:
            continue
        if scale.is_gpu:
            launches += event.name.startswith(LAUNCHES)
        else:
            launches += not event.cpu_children
        if event.name in calls:
            calls[event.name] += 1
    return launches, calls


def profile_numbers(trainee: Trainee, form: str, examples: list[Example], scale: Scale) -> dict:
    """Where the time of one update goes: its times without the profiler, its launches and kernels with it."""
    policy, optimizer, shape = trainee
    use_form(policy, form)
    arguments = (policy, optimizer, [examples], "dpo")
    for _ in range(scale.warm):      # the first may compile
        timed(update, *arguments)
    times = []
    while len(times) < scale.timed and sum(done for done, _ in times) < MOST_SECONDS:
        done, (_, host) = timed(update, *arguments)
        times.append((done, host))
    seconds, host = np.median(times, axis=0).tolist()
    collate = median_seconds(policy.collate, examples, repeats=5)
    activities = [ProfilerActivity.CPU]
    if scale.is_gpu:
        activities.append(ProfilerActivity.CUDA)
    synchronize()
    with torch.profiler.profile(activities=activities) as profiler:
        update(*arguments)
        synchronize()
    events = profiler.events()
    kernels = kernel_times(events, scale)
    launches, calls = count_calls(events, scale)
    total = sum(kernels.values()) or 1.0
    longest = []
    for name, microseconds in kernels.most_common(LONGEST):
        longest.append([name, microseconds / 1e3, microseconds / total])
        print(f"    {microseconds / 1e3:9.3f} ms {microseconds / total:6.1%}  {name[:80]}")
    synchronising = sum(calls[name] for name in SYNCHRONISING)
    return {
        "ms": 1e3 * seconds,
        "host ms": 1e3 * host,
        LIMIT: total / 1e6 / seconds,
        "launches": launches,
        "launches per layer": launches / shape["num_hidden_layers"],
        "synchronising calls": synchronising,
        **calls,
        "collate ms": 1e3 * collate,
        "longest kernels": longest,
    }


def profile(section: Section, scale: Scale) -> None:
    shape = scale.shape("1.5B")
    trainee = new_trainee(scale, shape)
    rng = np.random.default_rng(5)
    tokens = scale.micro_batches[MIDDLE]
    examples = drawn_micro_batch(rng, "dpo", tokens, scale, shape["vocab_size"])
    for form in scale.forms:
        label = {"model": scale.label("1.5B"), "case": f"dpo, {tokens} tokens", "form": form}
        section.measure(label, profile_numbers, trainee, form, examples, scale)


# ---- all sections ------------------------------------------------------------------------------------

SECTIONS = {
    "env": env,
    "check": check,
    "train": train,
    "peer": peer,
    "decode": decode,
    "profile": profile,
}


def run_section(name: str, seconds: float, scale: Scale, report: dict, output: Path | None) -> None:
    """One section, whatever happens in it. `report` gets its results, and is stored after each row."""
    print(f"\n{name}, {seconds:.0f} s at most")

    def keep():
        if output:
            shared.store(output, report)

    section = Section(name, seconds, output, keep)
    report[name] = section.result()
    started = time.perf_counter()
    try:
        SECTIONS[name](section, scale)
    except Exception as error:  # noqa: BLE001  the other sections go on
        section.fail(name, error)
    free_memory()
    report[name]["seconds"] = time.perf_counter() - started
    keep()


def main() -> None:
    gc.freeze()      # what was imported is no garbage, and `free_memory` need not read it after every case
    sys.stdout.reconfigure(line_buffering=True)
    parser = shared.new_parser(__doc__)
    parser.add_argument(
        "--budget",
        type=float,
        default=540,
        help="seconds for everything, at most what the machine allows a command")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, with commas between them")
    parser.add_argument("--cpu", action="store_true", help="a trial of every section with narrow models")
    parser.add_argument("--output", type=Path, help="a JSON file, written after every row")
    args = parser.parse_args()
    wanted = args.only.split(",")
    if not set(wanted) <= set(SECTIONS):
        parser.error(f"--only takes {', '.join(SECTIONS)}")
    if not (args.cpu or torch.cuda.is_available()):
        parser.error("there is no GPU; fix: --cpu tries the script with narrow models")
    start_processes(deterministic=False)                             # what a run sets
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")      # `check` compares bits
    scale = CPU if args.cpu else GPU
    names = [name for name in SECTIONS if name in wanted]
    report = {}
    for place, name in enumerate(names):
        left = args.budget - KEPT_BACK - (time.perf_counter() - STARTED)
        weight = sum(SECONDS[other] for other in names[place:])
        run_section(name, max(0.0, left) * SECONDS[name] / weight, scale, report, args.output)
    sys.exit(1 if show(report) else 0)


def show(report: dict) -> bool:
    """Print the table, what was left out, the errors and the line of JSON; whether there are errors."""
    print_table(report)
    failed = False
    for name, section in report.items():
        for text in section["left_out"]:
            print(f"left out in {name}: {text}")
        for text in section["errors"]:
            print(f"ERROR in {name}: {text}")
            failed = True
    print(json.dumps(report))
    return failed


if __name__ == "__main__":
    shared.start({"trl": trl_child}, main)
