"""Which families of language models are trained correctly: `python tests/families.py [family ...]`.

For each family of family_models.py a tiny model is trained by train.py, in a forked process, and every number
that a run reports is compared with that of the model's own class (family_reference.py). A cell of the table:

    ok                  every number agrees to 1e-4, relative; log-probs and values of single tokens absolute
    WRONG <what>        a number, a weight or a key that differs
    refused: <line>     exit code 2 and one line
    CRASH <line>        anything else; the last line of the output

sft           losses of updates 1 and 2, gradient norm; the second loss tests the checkpoint of update 1
dpo, dpo_tied the same, and summed log-probs; with head and embedding as one tensor
grpo          log-probs of every sampled token by the sampler and by the training forward, gradient norm; loss
              and KL of a second update
rm            scores, loss and gradient norm of update 2
ppo           the reward model of `rm` as reward and start of the critic: scores, every value and log-prob,
              gradient norm of both networks
lora          losses of updates 1 and 2, the second and its gradient norm through peft's own loading
checkpointing as sft, with gradient_checkpointing and in small micro-batches
reload        final/ of sft has exactly the keys of its class, its text part the logged held-out loss, and every
              other weight is the start model's
ranks         sft and grpo on two processes report what one reports
dry_run       exit code and line of --dry-run are those of training
"""
import argparse
import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import family_reference as own  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from family_models import FAMILIES, class_named_by, save_model  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from data.errors import run_program  # noqa: E402

TOLERANCE = 1e-4
BF16_TOLERANCE = 3e-4              # of a loss that is a mean over 100 tokens
SECONDS = 150                      # a process that takes longer hangs
BETA = 0.5                         # of dpo
GRPO = dict(num_generations=4, num_iterations=2, beta=0.04, max_completion_length=12, batch_size=2)
PPO = dict(num_ppo_epochs=2, max_completion_length=12, batch_size=4, vf_coef=0.1, lam=0.95)
COMMON = dict(
    lr=1e-3, batch_size=4, max_steps=2, shuffle="false", schedule="constant", warmup=0, max_length=256,
    precision="fp32", save_every=1, resume="never", max_grad_norm=1)
REWARD = """
def varied(prompts, completions, **columns):
    return [sum(map(ord, text)) % 7 / 3 for text in completions]
"""
WORDS = "the lamp hums while seven grey ducks cross a quiet road at noon".split()


# ---- data ------------------------------------------------------------------------------------------------

def text(number: int, length: int) -> str:
    """Words in an order that depends on `number`, cut to `length` characters."""
    chosen = [WORDS[(5 * number + 3 * i + i * i) % len(WORDS)] for i in range(60)]
    return " ".join(chosen)[:length]


def sft_row(i: int, least: int = 9) -> dict:
    prompt = f"Q{i} " + text(i, least + 7 * i % 23)
    return {"prompt": prompt + "?", "response": f"{i} " + text(i + 5, least + 1 + 7 * i % 31)}


def pair_row(i: int) -> dict:
    chosen = f"{i} " + text(i + 2, 10 + 7 * i % 27)
    rejected = text(i + 7, 11 + 7 * i % 21) + f" {i}"
    return {"prompt": f"P{i} " + text(i + 1, 9 + 7 * i % 19) + ":", "chosen": chosen, "rejected": rejected}


def prompt_row(i: int) -> dict:
    return {"prompt": f"{i} and {i + 1}, " + text(i, 6 + 7 * i % 13) + " =", "answer": str(2 * i + 1)}


def data_rows() -> dict[str, list]:
    """The rows of every data file. Prompt and response of a `long` row have 64 tokens or more each."""
    sft = [sft_row(i) for i in range(11)]
    long = [sft_row(i, 64) for i in range(8)]
    return {
        "sft": sft[:8], "held_out": sft[8:],
        "pairs": [pair_row(i) for i in range(8)],
        "prompts": [prompt_row(i) for i in range(6)],
        "long": long, "mixed": sft[:2] + long[2:6] + sft[6:8],
    }


def write_data(folder: Path) -> None:
    for name, rows in data_rows().items():
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    (folder / "reward.py").write_text(REWARD)


# ---- processes -------------------------------------------------------------------------------------------

def forked(function) -> int:
    """Start `function()` in a forked process; its number. The process ends with the function's result as its
    exit code, and with 70 and a traceback after an exception."""
    number = os.fork()
    if number:
        return number
    code = 70
    try:
        code = function() or 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:  # noqa: BLE001  it may not return into the caller of `forked`
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def exit_codes(numbers: list[int]) -> list[int]:
    """Wait for processes; after SECONDS, or once another one has failed, they are killed."""
    codes, end = {}, time.time() + SECONDS
    while len(codes) < len(numbers):
        for number in numbers:
            if number in codes:
                continue
            if time.time() > end:
                os.kill(number, signal.SIGKILL)
            done, status = os.waitpid(number, os.WNOHANG)
            if done:
                codes[number] = os.waitstatus_to_exitcode(status)
                if codes[number]:                # its partner may wait for it
                    end = min(end, time.time() + 5)
        time.sleep(0.01)
    return [codes[number] for number in numbers]


def answer(function, *arguments):
    """The result of `function`, as JSON, from a forked process; a text for an exception."""
    reader, writer = os.pipe()

    def run():
        try:
            result = function(*arguments)
        except Exception as error:  # noqa: BLE001  somebody else's model
            last = traceback.extract_tb(error.__traceback__)[-1]
            result = f"CRASH in the reference: {type(error).__name__}: {error} ({last.filename}:{last.lineno})"
        with os.fdopen(writer, "w") as file:
            json.dump(result, file)

    number = forked(run)
    os.close(writer)
    with os.fdopen(reader) as file:
        result = file.read()
    exit_codes([number])
    return json.loads(result) if result else "CRASH in the reference: its process died"


def train(arguments: list[str], log: Path, ranks: int = 1) -> tuple[int, str]:
    """train.py in one forked process, or in several as under torchrun: (exit code, output of the first)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [log.with_suffix(f".{rank}.log") for rank in range(ranks)]

    def run(rank):
        with open(logs[rank], "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout = open(1, "w", buffering=1, closefd=False)      # pytest has put others in their place
        sys.stderr = open(2, "w", buffering=1, closefd=False)
        sys.argv = ["train.py", *arguments]
        if ranks > 1:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        from engine import console
        from train import main
        run_program(main, console.close)

    codes = exit_codes([forked(lambda rank=rank: run(rank)) for rank in range(ranks)])
    code = next((code for code in codes if code), 0)
    failed = codes.index(code)
    return code, logs[failed].read_text()


def cell_of(code: int, output: str) -> str | None:
    """What the table says of a run that did not end well."""
    lines = [line for line in output.splitlines() if line.strip()] or ["(no output)"]
    if code == 0:
        return None
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if code == 2 and len(errors) == 1 and "Traceback" not in output:
        return f"refused: {errors[0]}"
    if code < 0:
        return f"CRASH killed by signal {-code} (hung?) after: {lines[-1]}"
    return f"CRASH exit code {code}: {lines[-1]}"


# ---- comparison ------------------------------------------------------------------------------------------

def compared(numbers: list[tuple[str, float, float]], tokens=()) -> str:
    """"ok", or what differs of `numbers`, each (name, ours, reference), and of `tokens`, the same with tensors
    that hold a number per token."""
    wrong = []
    for name, ours, reference in numbers:
        if not abs(ours - reference) <= TOLERANCE * max(abs(reference), 0.01):
            wrong.append(f"{name} {ours:.6g} not {reference:.6g}")
    for name, ours, reference in tokens:
        difference = float((ours - reference.detach()).abs().max())
        if not difference <= TOLERANCE:
            wrong.append(f"{name} of a token off by {difference:.2g}")
    return "WRONG " + ", ".join(wrong) if wrong else "ok"


def joined(cells: list[str]) -> str:
    """One cell of several parts."""
    bad = [cell for cell in cells if cell != "ok"]
    return "; ".join(bad) or "ok"


def sft_cell(model, run, rows, adapter=False) -> str:
    texts, ours = own.Texts(model), own.metrics(run)
    first = run / "checkpoints" / "step-000001"
    lm = own.load(model)
    loss = own.sft_loss(lm, texts, rows[:4])
    numbers = [("loss 1", ours[1]["loss"], own.number(loss))]
    if not adapter:
        numbers.append(("norm 1", ours[1]["grad_norm"], own.norm(loss, lm)))
    second = own.load(model, first) if adapter else own.load(first)
    loss = own.sft_loss(second, texts, rows[4:8])
    numbers.append(("loss 2", ours[2]["loss"], own.number(loss)))
    numbers.append(("norm 2", ours[2]["grad_norm"], own.norm(loss, second)))
    return joined([compared(numbers), adapted(run) if adapter else "ok"])


def adapted(run) -> str:
    """Only the text part has an adapter."""
    names = load_file(run / "final" / "adapter_model.safetensors")
    others = [name for name in names if is_other_part(name)]
    return f"WRONG {len(others)} tensors of the adapter are no text's ({others[0]})" if others else "ok"


def is_other_part(name: str) -> bool:
    """Whether a weight belongs to what reads pictures or sound."""
    return any(word in name for word in ("vision", "visual", "audio", "multi_modal_projector"))


def reload_cell(model, run, rows, held_out) -> str:
    """`final/` in its own class."""
    final = run / "final"
    model_class = class_named_by(final)
    lm, info = model_class.from_pretrained(final, output_loading_info=True)
    parts = []
    if model_class is not class_named_by(model):
        parts.append(f"WRONG final/ is a {model_class.__name__}")
    for name in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(name):
            parts.append(f"WRONG {name} {sorted(info[name])[:3]}")
    start = own.load(model).state_dict()
    for name, weight in lm.state_dict().items():
        if is_other_part(name) and not torch.equal(weight, start[name]):
            parts.append(f"WRONG {name} was changed")
    loss = own.number(own.sft_loss(own.load(final), own.Texts(model), held_out))
    parts.append(compared([("held-out loss of final/", own.metrics(run, "eval")[2]["loss"], loss)]))
    return joined(parts)


def dpo_cell(model, run, rows) -> str:
    texts, ours = own.Texts(model), own.metrics(run)
    lm = own.load(model)
    policy = own.pair_logps(lm, texts, rows[:4])
    loss = own.dpo_loss(policy, [side.detach() for side in policy], BETA)
    chosen, rejected = policy
    numbers = [
        ("loss 1", ours[1]["loss"], own.number(loss)),
        ("logps/chosen 1", ours[1]["logps/chosen"], own.number(chosen.mean())),
        ("logps/rejected 1", ours[1]["logps/rejected"], own.number(rejected.mean())),
        ("norm 1", ours[1]["grad_norm"], own.norm(loss, lm))]
    with torch.no_grad():
        reference = own.pair_logps(lm, texts, rows[4:8])
        policy = own.pair_logps(own.load(run / "checkpoints" / "step-000001"), texts, rows[4:8])
    numbers.append(("loss 2", ours[2]["loss"], float(own.dpo_loss(policy, reference, BETA))))
    return compared(numbers)


def rm_cell(model, run, rows) -> str:
    """Update 2, whose start is known: the trunk and the head in the checkpoint of update 1."""
    first = run / "checkpoints" / "step-000001"
    texts, ours = own.Texts(model), own.metrics(run)[2]
    lm, head = own.load(first), own.value_head(first)
    chosen, rejected = own.pair_scores(lm, head, texts, rows[4:8])
    loss = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
    return compared([
        ("loss 2", ours["loss"], own.number(loss)),
        ("rewards/chosen 2", ours["rewards/chosen"], own.number(chosen.mean())),
        ("rewards/rejected 2", ours["rewards/rejected"], own.number(rejected.mean())),
        ("norm 2", ours["grad_norm"], own.norm(loss, lm, head))])


def grpo_cell(model, run, rows) -> str:
    texts, ours = own.Texts(model), own.metrics(run)
    rollout, stored = own.stored_rollout(run, texts, rows)
    rewards = [sum(map(ord, texts.completion(completion))) % 7 / 3 for _, completion in rollout]
    advantages = own.group_advantages(rewards, GRPO["num_generations"])
    lm = own.load(model)
    start_logps = [own.logps(lm, *row).detach() for row in rollout]
    loss, _ = own.grpo_loss(lm, rollout, advantages, start_logps, 0.2, GRPO["beta"])
    numbers = [
        ("reward", ours[1]["reward"], sum(rewards) / len(rewards)),
        ("norm 1", ours[1]["grad_norm"], own.norm(loss, lm))]
    tokens = []
    for name in ("sampler_logps", "old_logps"):
        tokens.append((name, stored[f"extras/{name}"], torch.cat(start_logps)))
    second = own.load(run / "checkpoints" / "step-000001")
    loss, kl = own.grpo_loss(second, rollout, advantages, start_logps, 0.2, GRPO["beta"])
    numbers += [("loss 2", ours[2]["loss"], own.number(loss)), ("kl 2", ours[2]["kl"], own.number(kl))]
    return compared(numbers, tokens)


def ppo_cell(model, run, reward_model, rows) -> str:
    texts, ours = own.Texts(model), own.metrics(run)[1]
    rollout, stored = own.stored_rollout(run, texts, rows)
    lm, critic, head = own.load(model), own.load(reward_model), own.value_head(reward_model)
    all_logps = [own.logps(lm, *row) for row in rollout]
    all_values = [own.values(critic, head, *row) for row in rollout]
    scores = [own.number(own.score(critic, head, *row)) for row in rollout]
    all_advantages, all_returns = [], []
    for score, found in zip(scores, all_values):
        rewards = torch.zeros(len(found), dtype=torch.float64)
        rewards[-1] = score                      # no KL yet: the policy is the reference
        advantages, returns = own.returns_of(rewards, found.detach().double(), PPO["lam"])
        all_advantages.append(advantages)
        all_returns.append(returns)
    advantages = torch.cat(all_advantages)
    whitened = (advantages - advantages.mean()) / advantages.std()
    logps, values = torch.cat(all_logps), torch.cat(all_values)
    ratios = (logps - logps.detach()).exp()
    errors = (values - torch.cat(all_returns)) ** 2
    loss = (PPO["vf_coef"] * errors / 2 - ratios * whitened).mean()
    numbers = [
        ("mean score", ours["objective/scores"], sum(scores) / len(scores)),
        ("value loss", ours["loss/value_avg"], own.number(errors.mean() / 2)),
        ("norm 1", ours["grad_norm"], own.norm(loss, lm, critic, head))]
    tokens = [
        ("old_logps", stored["extras/old_logps"], logps),
        ("reference_logps", stored["extras/reference_logps"], logps),
        ("old_values", stored["extras/old_values"], values)]
    return compared(numbers, tokens)


def ranks_cell(one, two) -> str:
    """Two runs of the same configuration report the same."""
    numbers, ours = [], own.metrics(two)
    for step, row in own.metrics(one).items():
        for name in ("loss", "grad_norm", "reward"):
            if name in row:
                numbers.append((f"{name} {step} on two ranks", ours[step][name], row[name]))
    return compared(numbers)


# ---- one family ------------------------------------------------------------------------------------------

class Family:
    """The runs of one family in a directory of its own, each made once, and the cells of the table."""

    def __init__(self, name: str, data: Path, changed: dict | None = None, title: str = ""):
        self.name, self.data, self.rows = name, data, data_rows()
        self.changed = changed or {}
        self.folder = data / (title or name)
        self.folder.mkdir()
        self.runs = {}             # name -> (cell of a run that did not end well, its output)
        self.made = self.make("model")

    def make(self, name: str, tied: bool = False):
        """Save a model as `name`; what `save_model` says, or a text where it cannot be built."""
        return answer(save_model_of, self.name, self.folder / name, tied, self.changed)

    def settings(self, run: str) -> dict:
        """The keys of a run, by the name of its directory."""
        name = run.removesuffix("_ranks").removesuffix("_tied")
        sft = dict(algorithm="sft", data=self.data / "sft.jsonl")
        with_evaluation = dict(eval_data=self.data / "held_out.jsonl", eval_every=2)
        pairs = dict(data=self.data / "pairs.jsonl")
        prompts = dict(data=self.data / "prompts.jsonl")
        if name in ("sft", "dry"):
            return sft | with_evaluation
        if name == "checkpointing":
            return sft | dict(gradient_checkpointing="true", micro_batch_tokens=128)
        if name == "lora":
            return sft | dict(lora_r=4, lr=1e-2)
        if name == "dpo":
            return pairs | dict(algorithm="dpo", beta=BETA)
        if name == "rm":
            return pairs | dict(algorithm="rm")
        if name == "grpo":
            return prompts | GRPO | dict(algorithm="grpo", reward=f"{self.data / 'reward.py'}:varied")
        if name == "ppo":
            return prompts | PPO | dict(algorithm="ppo", reward=self.folder / "rm" / "final")
        if name == "bf16":
            return sft | dict(precision="bf16")
        if name == "bf16_single":
            return sft | dict(precision="bf16", micro_batch_tokens=2)
        return sft | dict(data=self.data / f"{name}.jsonl")

    def run(self, name: str, *arguments: str) -> str | None:
        """Make the run once; its cell if it did not end well."""
        if name not in self.runs:
            ranks = 2 if name.endswith("_ranks") else 1
            model = self.folder / ("tied" if name.endswith("_tied") else "model")
            keys = COMMON | self.settings(name) | dict(model=model, output=self.folder / name)
            lines = [f"{key}: {value}\n" for key, value in keys.items()]
            file = self.folder / f"{name}.yml"
            file.write_text("".join(lines))
            code, output = train([str(file), *arguments], self.folder / name, ranks)
            self.runs[name] = cell_of(code, output), output
        return self.runs[name][0]

    def cell(self, name: str) -> str:
        if isinstance(self.made, str):
            return self.made
        if name not in CHECKS:
            return getattr(self, name)()
        check, rows = CHECKS[name]
        more = (True,) if name == "lora" else ()
        return self.run(name) or answer(check, self.folder / "model", self.folder / name, self.rows[rows], *more)

    def dpo_tied(self) -> str:
        made = self.make("tied", tied=True)
        if isinstance(made, str):
            return made
        if self.made["tied"] or not made["tied"]:
            return "-"
        rows = self.rows["pairs"]
        return self.run("dpo_tied") or answer(dpo_cell, self.folder / "tied", self.folder / "dpo_tied", rows)

    def reload(self) -> str:
        rows = self.rows["sft"], self.rows["held_out"]
        return self.run("sft") or answer(reload_cell, self.folder / "model", self.folder / "sft", *rows)

    def ppo(self) -> str:
        reward_model = self.folder / "rm" / "final"
        arguments = self.folder / "model", self.folder / "ppo", reward_model, self.rows["prompts"]
        return self.run("rm") or self.run("ppo") or answer(ppo_cell, *arguments)

    def ranks(self) -> str:
        cells = []
        for name in ("sft", "grpo"):
            both = f"{name}_ranks"
            arguments = self.folder / name, self.folder / both
            cells.append(self.run(name) or self.run(both) or answer(ranks_cell, *arguments))
        return joined(list(dict.fromkeys(cells)))

    def bf16(self) -> str:
        arguments = self.folder / "model", self.folder / "bf16", self.folder / "bf16_single", self.rows["sft"]
        return self.run("bf16") or self.run("bf16_single") or answer(bf16_cell, *arguments)

    def dry_run(self) -> str:
        """Its verdict, and what it says about rows, are those of training."""
        trained, said = self.run("sft"), self.run("dry", "--dry-run")
        if said and said.startswith("CRASH"):
            return said
        if said != trained:
            return f"WRONG --dry-run says {said}, training {trained}"
        lines = [line for line in self.runs["sft"][1].splitlines() if line.startswith("rows: ")]
        unsaid = [line for line in lines if line not in self.runs["dry"][1]]
        return f"WRONG --dry-run does not say {unsaid[0]}" if unsaid else said or "ok"


def save_model_of(name, folder, tied, changed):
    return save_model(name, folder, tied, **changed)


CHECKS = {                         # a cell whose run has its name: (comparison, rows)
    "sft": (sft_cell, "sft"),
    "dpo": (dpo_cell, "pairs"),
    "grpo": (grpo_cell, "prompts"),
    "rm": (rm_cell, "pairs"),
    "lora": (sft_cell, "sft"),
    "checkpointing": (sft_cell, "sft"),
    "long": (sft_cell, "long"),
    "mixed": (sft_cell, "mixed"),
}
CELLS = (
    "sft", "dpo", "dpo_tied", "grpo", "rm", "ppo", "lora", "checkpointing", "reload", "ranks", "dry_run")


# ---- cases that only some rows or precisions show -------------------------------------------------------

LONG = {                           # name: (family, what differs); cells: long rows alone, and among short ones
    "qwen2_moe, window 32": ("qwen2_moe_window", dict(sliding_window=32)),
    "phimoe, window 32": ("phimoe", dict(sliding_window=32, lm_head_bias=False)),
    "mistral, window 32": ("mistral", dict(sliding_window=32)),
    "phi3_longrope, 32 positions": ("phi3_longrope", {}),
    "deepseek_v32, 32 best": ("deepseek_v32", dict(index_topk=32)),
    "llama4, chunks of 32": ("llama4_text", dict(attention_chunk_size=32, floor_scale=32)),
    "gemma3n, no soft-cap": ("gemma3n_text", dict(final_logit_softcapping=1e4)),
}
BF16 = ("qwen3", "qwen3_5_text", "lfm2", "mamba2")


def bf16_cell(model, together, single, rows) -> str:
    """bf16 products: the loss of update 1 is that of rows which were alone in their micro-batch, and of the
    class under autocast, but for the rounding of bf16."""
    loss = own.metrics(together)[1]["loss"]
    alone = own.metrics(single)[1]["loss"]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        reference = float(own.sft_loss(own.load(model), own.Texts(model), rows[:4]))
    wrong = []
    for name, expected in (("alone", alone), ("of the class", reference)):
        if not abs(loss - expected) <= BF16_TOLERANCE:
            wrong.append(f"loss 1 {loss:.6g}, {name} {expected:.6g}")
    return "WRONG " + ", ".join(wrong) if wrong else "ok"


# ---- the command -----------------------------------------------------------------------------------------

def shown(family: Family, cells: dict[str, str], seconds: float) -> str:
    """A line per different cell, after the names of the runs that have it."""
    made = family.made if isinstance(family.made, dict) else {"class": "not built"}
    lines = [f"{family.folder.name} ({made['class']}, {seconds:.0f} s)"]
    for said in dict.fromkeys(cells.values()):
        names = [name for name, cell in cells.items() if cell == said]
        if said != "-":
            lines.append(f"    {' '.join(names)}: {said[:400]}")
    for _, output in family.runs.values():
        notices = [line for line in output.splitlines() if line.startswith(("rows: ", "share_prompt: "))]
        lines += [f"    {line}" for line in notices[:1] if f"    {line}" not in lines]
    return "\n".join(lines)


def is_right(cells: dict[str, str]) -> bool:
    return set(cells.values()) <= {"ok", "-"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="family", help="default: all, and the cases in LONG "
                        "and BF16")
    parser.add_argument("--cells", help="default: " + ",".join(CELLS))
    parser.add_argument("--out", help="an empty directory for models and runs; default: a temporary one")
    options = parser.parse_args()
    prepare()
    data = Path(options.out or tempfile.mkdtemp(prefix="families-")).resolve()
    data.mkdir(exist_ok=True)
    write_data(data)
    names = options.families or list(FAMILIES)
    cells = options.cells.split(",") if options.cells else CELLS
    right = [name for name in names if tell(Family(name, data), cells)]
    if not options.families:
        print("\nCases that only some rows or precisions show\n")
        for title, (name, changed) in LONG.items():
            tell(Family(name, data, changed, title), ("long", "mixed"))
        for name in BF16:
            tell(Family(name, data, title=f"{name}, bf16"), ("bf16",))
    print(f"\n{len(right)} of {len(names)} families are right in every cell")
    sys.exit(len(right) != len(names))


def tell(family: Family, names) -> bool:
    """Compute and print the cells of a family; whether all are right."""
    since = time.time()
    cells = {name: family.cell(name) for name in names}
    print(shown(family, cells, time.time() - since), flush=True)
    return is_right(cells)


def prepare() -> None:
    """What forked processes need is imported once."""
    import importlib
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    for name in ("train", "peft", "engine.build", "engine.dry_run", "engine.claim"):
        importlib.import_module(name)


if __name__ == "__main__":
    main()
