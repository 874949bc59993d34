"""What tests share: a tokenizer and tiny models built in memory, small data files, runs of train.py here or
as a process."""
import atexit
import copy
import dataclasses
import importlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GptOssConfig,
    GraniteConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

import algorithms
from data.errors import UserError
from engine import definition

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)    # more threads only cost time on matrices this small

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def byte_tokenizer(chat_template=True):
    """Byte-level tokenizer without merges: an id per UTF-8 byte; 256 <|endoftext|> (pad), 257 <|im_start|>,
    258 <|im_end|> (eos).

    `chat_template`: True (ChatML), False (none) or a template's text.
    """
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"], clean_up_tokenization_spaces=False)
    if chat_template:
        fast.chat_template = CHATML if chat_template is True else chat_template
    return fast


def config_of(config_class=Qwen2Config, **values):
    """A configuration of two layers, width 32, for the byte tokenizer."""
    tiny = dict(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512, initializer_range=0.2,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=258, pad_token_id=256)
    return config_class(**tiny | values)


def kinds() -> dict:
    """Configurations of families with something beside the plain transformer: a logit scale, a bias of the
    head, caps of scores and logits, sinks, windows."""
    window = dict(sliding_window=5, layer_types=["sliding_attention", "full_attention"])
    caps = dict(query_pre_attn_scalar=8, attn_logit_softcapping=2.0, final_logit_softcapping=1.5)
    experts = dict(num_local_experts=4, num_experts_per_tok=2)
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return {
        "cohere": config_of(CohereConfig, logit_scale=0.25),
        "granite": config_of(GraniteConfig, logits_scaling=4.0),
        "phi": config_of(PhiConfig),
        "gemma2": config_of(Gemma2Config, **window, **caps),
        "gpt_oss": config_of(GptOssConfig, **window, **experts, rope_parameters=rope),
    }


def random_lm(config, seed=0, **options):
    """The model of a configuration in eval mode, with random weights, biases and norms, the same for the same
    seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        lm = AutoModelForCausalLM.from_config(copy.deepcopy(config), **options).eval()
        for parameter in lm.parameters():
            if parameter.ndim == 1:    # as initialised they are 0 and 1, with which some mistakes do not show
                parameter.data += 0.1 * torch.randn_like(parameter)
    return lm


def tiny_model(directory, seed=0, chat_template=True, **config):
    """Save a tiny random Qwen2 and the byte tokenizer in `directory`; its path as a string."""
    random_lm(config_of(**config), seed).save_pretrained(directory)
    byte_tokenizer(chat_template).save_pretrained(directory)
    return str(directory)


def algorithms_of(project, monkeypatch):
    """A folder `project`/algorithms, whose files train.py finds beside ours; its path."""
    folder = project / "algorithms"
    folder.mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(definition, "ROOT", project)
    monkeypatch.setattr(algorithms, "__path__", [str(folder), *algorithms.__path__])
    return folder


def write_jsonl(path, rows):
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **parts):
    return {"role": "assistant", "content": content, **parts}


def ending_model(folder):
    """The directory of a random model whose completions do end, with the bytes' tokenizer."""
    lm = random_lm(config_of())
    lm.lm_head.weight.data[258] *= 3
    lm.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def messages(*turns):
    return [{"role": "assistant" if i % 2 else "user", "content": turn} for i, turn in enumerate(turns)]


def pair_rows(count, first=0):
    """Pairs with prompts and answers of varying lengths."""
    rows = []
    for i in range(first, first + count):
        prompt = messages(f"Q{i}: " + "what is it? " * (i % 3 + 1))
        chosen = assistant(f"it is {i} " * (i % 4 + 1))
        rejected = assistant("no " * (5 - i % 5) + str(i))
        rows.append({"prompt": prompt, "chosen": [chosen], "rejected": [rejected]})
    return rows


def sft_rows(count, first=0):
    """Conversations of one and of two turns, and plain strings, of varying lengths."""
    rows = []
    for i in range(first, first + count):
        one = messages(f"Say {i}", f"{i} " * (i % 4 + 1))
        two = messages(f"Add {i}.", f"Done, {i}.", "And again" + "!" * (i % 5), f"Now {2 * i}.")
        plain = {"prompt": f"{i} plus {i} = " * (i % 2 + 1), "response": f"{2 * i}"}
        rows.append([{"messages": one}, {"messages": two}, plain][i % 3])
    return rows


def labelled_rows(count, first=0):
    """Responses marked good or bad; of three rows two have the same prompt."""
    rows = []
    for i in range(count):
        pair, = pair_rows(1, first + i // 3 * 2 + i % 3 // 2)
        is_good = i % 2 == 0
        completion = pair["chosen"] if is_good else pair["rejected"]
        rows.append({"prompt": pair["prompt"], "completion": completion, "label": is_good})
    return rows


def prompt_rows(count, first=0):
    """Conversations and plain strings of varying lengths, with the answer that rewards read."""
    rows = []
    for i in range(first, first + count):
        prompt = messages(f"Add {i}." + " Go!" * (i % 4)) if i % 3 else f"{i} plus {i} = "
        rows.append({"prompt": prompt, "answer": str(i)})
    return rows


def refused(function, *arguments, **options):
    """The one line with which a call refuses bad input."""
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value) and "; fix: " in str(caught.value)
    return str(caught.value)


class OtherModel:
    """The path of a model beside the start model, with its tokenizer and other weights; it is made where the
    path is first written into a configuration."""
    folder = None

    def __str__(self):
        if self.folder is None:
            self.folder = tempfile.mkdtemp(prefix="other-model-")
            tiny_model(self.folder, seed=1)
            atexit.register(self.remove, os.getpid())
        return self.folder

    def remove(self, maker):
        """At the end of the process that made it, not of one that was forked from it."""
        if os.getpid() == maker:
            shutil.rmtree(self.folder)


ALGORITHMS = {    # name -> the rows it trains on
    "sft": sft_rows,
    "dft": sft_rows,
    "kto": labelled_rows,
    **dict.fromkeys(("dpo", "rpo", "ipo", "apo", "orpo", "simpo", "cpo", "rm"), pair_rows),
}
REWARDS = f"{ROOT}/tests/some_rewards.py"
SAMPLED = dict(reward=f"{REWARDS}:varied", max_completion_length=10)
GROUPS = dict(SAMPLED, num_generations=4, num_iterations=2, num_mini_batches=2)
ONLINE = {    # name -> keys with which it makes four updates per rollout
    "ppo": dict(SAMPLED, num_ppo_epochs=2, num_mini_batches=2),
    **dict.fromkeys(("grpo", "dr_grpo", "gspo", "cispo", "rloo", "reinforce_pp"), GROUPS),
    "gdpo": GROUPS | dict(reward=f"{REWARDS}:varied, {REWARDS}:coarse", reward_weights="1, 0.5"),
    "dapo": GROUPS | dict(reward=f"{REWARDS}:coarse", soft_overlong_cache=6),
}
REWARDED = tuple(ONLINE)      # those that learn from rewards
ONLINE["distill"] = dict(
    teacher=OtherModel(), max_completion_length=10, num_iterations=2, num_mini_batches=2)
ROWS = ALGORITHMS | dict.fromkeys(ONLINE, prompt_rows)
CLOCK = "tokens_per_second", "eps"      # what metrics.jsonl holds of it


OF_KIND = {"responses": sft_rows, "pairs": pair_rows, "labelled": labelled_rows, "prompts": prompt_rows}


def rows_for(algorithm):
    """The rows that any file of algorithms/ trains on, by its DATA; offline with a number in every column
    that it reads through batch.extra."""
    module = importlib.import_module(f"algorithms.{algorithm}")
    make = OF_KIND[module.DATA]
    columns = re.findall(r'batch\.extra\("(\w+)"\)', Path(module.__file__).read_text(encoding="utf-8"))
    if module.DATA == "prompts":
        return make

    def rows(count, first=0):
        made = make(count, first)
        for i, row in enumerate(made):
            row.update(dict.fromkeys(columns, 1 + i % 3))
        return made
    return rows


def keys_for(algorithm):
    """Keys for any file of algorithms/: an online one makes four updates per rollout, as far as its Config
    has the options for that."""
    module = importlib.import_module(f"algorithms.{algorithm}")
    if module.DATA != "prompts":
        return {}
    wanted = GROUPS | ONLINE["distill"] | {"num_ppo_epochs": 2}
    options = {field.name for field in dataclasses.fields(module.Config)}
    return {name: value for name, value in wanted.items() if name in options}


def tracked(pattern):
    """The files of this project that match a pattern such as "algorithms/*.py" and that git tracks, so that a
    file which is still being written breaks no test; all that match where git does not know this project."""
    names = []
    if shutil.which("git"):
        command = ["git", "ls-files", "-z", f":(glob){pattern}"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        names = listed.stdout.split("\0")[:-1]
    paths = [ROOT / name for name in names] or list(ROOT.glob(pattern))
    return sorted(path for path in paths if path.exists())


def write_config(path, **values):
    lines = [f"{key}: {value}\n" for key, value in values.items()]
    path.write_text("".join(lines))
    return str(path)


def train_here(*arguments):
    """Call train.py's `main` in this process: quick, and tests can patch what it calls."""
    from train import main
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        main([str(argument) for argument in arguments])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run_train(arguments, processes=1, timeout=120, **environment):
    """Run `python train.py ...` as a user does, under torchrun for more than one process. -> CompletedProcess
    with texts."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["train.py", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, timeout=timeout, capture_output=True, text=True)


def metrics(run, split="train"):
    """The rows of a run's metrics.jsonl, without what depends on the clock."""
    rows = []
    for line in (Path(run) / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["split"] == split:
            rows.append({key: value for key, value in row.items() if key not in CLOCK})
    return rows


def left_in(folder):
    """What lies below a folder, but for the tokens that every run leaves beside itself, and their folders."""
    paths = [path for path in folder.rglob("*") if ".tokens" not in path.parts]
    holders = [store.parent for store in folder.rglob(".tokens") if len(list(store.parent.iterdir())) == 1]
    return sorted(set(paths) - set(holders))


def final_weights(run):
    return load_file(Path(run) / "final" / "model.safetensors")


def trained_weights(run):
    """Those of final/, a reward model's head included, without the bias of 0 that other projects read."""
    head = Path(run) / "final" / "value_head.safetensors"
    weights = final_weights(run) | (load_file(head) if head.exists() else {})
    weights.pop("v_head.summary.bias", None)
    return weights


# ---- two computations of the same updates ----
# AdamW divides a gradient by its own size. Where a gradient is nothing but rounding (that of a bias of the
# keys is, for the softmax does not see it), its sign is that of the rounding, and two exact runs move this
# weight up to 2 lr apart in every update, on one CPU and not on another. So the weights of two runs have no
# close bound. Their gradients have one, and the weights of each run are, but for the rounding of fp32, what
# AdamW makes of its own gradients: both are asserted.

def name_in_final(name):
    """A trained parameter's name in the files of weights; a critic's is the same."""
    return name.removeprefix("lm.").replace("value_head", "v_head.summary")


def watch_updates(monkeypatch):
    """-> a dictionary that runs in this process fill: directory -> (the start weights, the clipped gradients
    of every update), both by the names that weights have in final/; those of a critic by theirs."""
    from engine.loop import Engine
    seen, clip = {}, Engine.clip_gradients

    def clip_gradients(engine):
        clip(engine)
        if engine.step.index and engine.step.examples:      # else nothing moves
            trained = {}
            for name, parameter in engine.policy.named_parameters():
                if parameter.grad is not None:
                    trained[name_in_final(name)] = parameter
            start = {name: parameter.detach().clone() for name, parameter in trained.items()}
            _, gradients = seen.setdefault(Path(engine.run.directory), (start, []))
            gradients.append({name: parameter.grad.clone() for name, parameter in trained.items()})

    monkeypatch.setattr(Engine, "clip_gradients", clip_gradients)
    return seen


def saved_gradients(run, updates):
    """Of a run that saved a checkpoint after every update: its clipped gradients as they stand in AdamW's
    first moments."""
    before, gradients = {}, []
    for update in range(1, updates + 1):
        state = load_file(Path(run) / "checkpoints" / f"step-{update:06d}" / "optimizer.safetensors")
        moments = {}
        for name, tensor in state.items():
            if name.endswith(":exp_avg"):
                moments[name_in_final(name.removesuffix(":exp_avg"))] = tensor.double()
        gradients.append({name: 10 * moment - 9 * before.get(name, 0.0) for name, moment in moments.items()})
        before = moments
    return gradients


def assert_same_gradients(ours, theirs, first=1e-6, later=1e-5, least=0.0):
    """Per update a dictionary; no number differs by more than that share of the norm of all, or by `least`.
    The first update starts from equal weights, so that fp32's rounding (6e-8) is all that there is; later
    ones from weights that AdamW has moved apart, above all those that the loss hardly sees."""
    assert len(ours) == len(theirs)
    for update, (one, other) in enumerate(zip(ours, theirs), 1):
        squares = [float((gradient.double() ** 2).sum()) for gradient in other.values()]
        norm = math.sqrt(sum(squares))
        bound = max(least, norm * (first if update == 1 else later))
        assert_same_weights(one, other, bound, f"gradients of update {update}, whose norm is {norm:g}")


def after_adam(start, gradients, lr, decay=0.0):
    """What AdamW (betas 0.9 and 0.999, eps 1e-8) makes of one tensor, from the paper's algorithm and in
    fp64."""
    weights, first, second = start.double(), 0.0, 0.0
    for update, gradient in enumerate(gradients, 1):
        first = 0.9 * first + 0.1 * gradient.double()
        second = 0.999 * second + 0.001 * gradient.double() ** 2
        step = first / (1 - 0.9 ** update) / ((second / (1 - 0.999 ** update)).sqrt() + 1e-8)
        weights = weights - lr * decay * weights - lr * step
    return weights


def assert_adam_made(weights, start, gradients, lr=1e-3, decay=0.0):
    """`weights` are what AdamW makes of the start weights and the gradients of every update, as far as
    `weights` names them. A thousandth of an update may be missing: every update rounds a weight of about 1 to
    6e-8. Only matrices decay."""
    made = {}
    for name in start.keys() & weights.keys():
        rate = decay if start[name].ndim > 1 else 0.0
        made[name] = after_adam(start[name], [update[name] for update in gradients], lr, rate)
    assert made
    assert_same_weights({name: weights[name].double() for name in made}, made, lr / 1000)


def assert_same_weights(ours, theirs, tolerance=0.0, what=""):
    """Of two dictionaries; without a tolerance bit for bit."""
    assert ours.keys() == theirs.keys()
    wrong = {}
    for name in ours:
        difference = float((ours[name] - theirs[name]).abs().max())
        if not difference <= tolerance:
            wrong[name] = difference
    assert not wrong, (what, wrong)
