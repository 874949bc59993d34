"""The runs of train.py whose numbers are compared: their data, their keys, and the forked processes in which
they and the comparisons happen, so that the imports are paid once."""
import importlib
import json
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from functools import partial
from pathlib import Path

import family_cells as cells
import torch
import transformers
from family_models import save_model

from data.errors import run_program

SECONDS = 150                      # a process that takes longer hangs
NOTICES = ("rows: ", "share_prompt: ")
WORDS = "the lamp hums while seven grey ducks cross a quiet road at noon".split()
REWARD = """
def varied(prompts, completions, **columns):
    return [sum(map(ord, text)) % 7 / 3 for text in completions]
"""

COMMON = dict(
    model="model",
    lr=1e-3,
    batch_size=4,
    max_steps=2,
    save_every=1,
    shuffle="false",
    schedule="constant",
    warmup=0,
    max_length=256,
    precision="fp32",
    router_aux_loss_coef=0,
    resume="never",
)
SFT = dict(algorithm="sft", data="../sft.jsonl")
SAMPLED = dict(data="../prompts.jsonl", max_completion_length=12)
RUNS = {                           # name: the keys that differ from COMMON; paths start at a family's folder
    "sft": SFT | dict(eval_data="../held_out.jsonl", eval_every=2),
    "dry": SFT | dict(eval_data="../held_out.jsonl", eval_every=2),
    "checkpointing": SFT | dict(gradient_checkpointing="true", micro_batch_tokens=128),
    "lora": SFT | dict(lora_r=4, lr=1e-2),
    "router": SFT | dict(router_aux_loss_coef=1.0),
    "long": SFT | dict(data="../long.jsonl"),
    "mixed": SFT | dict(data="../mixed.jsonl"),
    "bf16": SFT | dict(precision="bf16"),
    "bf16_single": SFT | dict(precision="bf16", micro_batch_tokens=2),
    "dpo": dict(algorithm="dpo", data="../pairs.jsonl", beta=cells.BETA),
    "dpo_tied": dict(algorithm="dpo", data="../pairs.jsonl", beta=cells.BETA, model="tied"),
    "rm": dict(algorithm="rm", data="../pairs.jsonl"),
    "grpo": SAMPLED | dict(
        algorithm="grpo",
        reward="../reward.py:varied",
        batch_size=2,
        num_generations=cells.GROUP,
        num_iterations=2,
        epsilon=cells.EPSILON,
        beta=cells.KL,
    ),
    "ppo": SAMPLED | dict(
        algorithm="ppo",
        reward="rm/final",
        num_ppo_epochs=2,
        lam=cells.LAM,
        vf_coef=cells.VF_COEF,
    ),
}
CHECKS = {                         # a run: (its comparison, the rows)
    "sft": (cells.sft_cell, "sft"),
    "dpo": (cells.dpo_cell, "pairs"),
    "dpo_tied": (cells.dpo_tied_cell, "pairs"),
    "grpo": (cells.grpo_cell, "prompts"),
    "rm": (cells.rm_cell, "pairs"),
    "ppo": (cells.ppo_cell, "prompts"),
    "lora": (partial(cells.sft_cell, adapter=True), "sft"),
    "checkpointing": (cells.sft_cell, "sft"),
    "router": (cells.router_cell, "sft"),
    "long": (cells.sft_cell, "long"),
    "mixed": (cells.sft_cell, "mixed"),
}


# ---- data ------------------------------------------------------------------------------------------------

def text(number: int, length: int) -> str:
    """Words in an order that depends on `number`, cut to `length` characters."""
    chosen = []
    for i in range(60):
        place = 5 * number + 3 * i + i * i
        chosen.append(WORDS[place % len(WORDS)])
    return " ".join(chosen)[:length]


def sft_row(i: int, least: int = 9) -> dict:
    question = text(i, least + 7 * i % 23)
    answer = text(i + 5, least + 1 + 7 * i % 31)
    return {"prompt": f"Q{i} {question}?", "response": f"{i} {answer}"}


def pair_row(i: int) -> dict:
    question = text(i + 1, 9 + 7 * i % 19)
    chosen = text(i + 2, 10 + 7 * i % 27)
    rejected = text(i + 7, 11 + 7 * i % 21)
    return {"prompt": f"P{i} {question}:", "chosen": f"{i} {chosen}", "rejected": f"{rejected} {i}"}


def prompt_row(i: int) -> dict:
    question = text(i, 6 + 7 * i % 13)
    return {"prompt": f"{i} and {i + 1}, {question} ="}


def data_rows() -> dict[str, list]:
    """The rows of every data file. Prompt and response of a `long` row have 64 tokens or more each, those of
    the first two `mixed` rows less than 32 together."""
    sft = [sft_row(i) for i in range(11)]
    pairs = [pair_row(i) for i in range(8)]
    prompts = [prompt_row(i) for i in range(6)]
    long = [sft_row(i, least=64) for i in range(8)]
    short = [{"prompt": "Who?", "response": "ducks"}, {"prompt": "When?", "response": "noon"}]
    return {
        "sft": sft[:8],
        "held_out": sft[8:],
        "pairs": pairs,
        "prompts": prompts,
        "long": long,
        "mixed": short + long[2:6] + sft[6:8],
    }


def write_data(folder: Path) -> None:
    for name, rows in data_rows().items():
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    (folder / "reward.py").write_text(REWARD)


# ---- processes -------------------------------------------------------------------------------------------

def prepare() -> None:
    """Import what the forked processes need."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    for name in ("train", "peft", "engine.build", "engine.dry_run", "engine.claim"):
        importlib.import_module(name)


def forked(function) -> int:
    """Start `function()` in a forked process; its number. The process ends with code 0, with that of its
    SystemExit, or with 70 and a traceback after another exception."""
    number = os.fork()
    if number:
        return number
    code = 70
    try:
        function()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:  # noqa: BLE001  it may not return into the caller of `forked`
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def exit_codes(numbers: list[int]) -> list[int]:
    """Wait for processes. They are killed after SECONDS, or 5 seconds after another one has failed, for which
    they may wait."""
    codes = {}
    end = time.monotonic() + SECONDS
    while len(codes) < len(numbers):
        time.sleep(0.01)
        for number in numbers:
            if number in codes:
                continue
            if time.monotonic() > end:
                os.kill(number, signal.SIGKILL)
            done, status = os.waitpid(number, os.WNOHANG)
            if done:
                codes[number] = os.waitstatus_to_exitcode(status)
                if codes[number]:
                    end = min(end, time.monotonic() + 5)
    return [codes[number] for number in numbers]


def answer(function, *arguments):
    """What `function` returns in a forked process, as JSON; a text for an exception."""
    reader, writer = os.pipe()

    def run():
        try:
            result = function(*arguments)
        except Exception as error:  # noqa: BLE001  somebody else's model
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(place.filename).name}:{place.lineno}"
            result = f"CRASH of the comparison: {type(error).__name__}: {error} ({where})"
        with os.fdopen(writer, "w") as file:
            json.dump(result, file)

    number = forked(run)
    os.close(writer)
    with os.fdopen(reader) as file:
        result = file.read()
    exit_codes([number])
    return json.loads(result) if result else "CRASH of the comparison: its process died"


def train(folder: Path, name: str, ranks: int, *arguments: str) -> tuple[int, str]:
    """train.py with the file `name`.yml of a folder, in one forked process or in several as under torchrun.
    -> (exit code, output) of the first process, or of one that failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(rank):
        redirect(folder / f"{name}.{rank}.log")
        os.chdir(folder)
        sys.argv = ["train.py", f"{name}.yml", *arguments]
        if ranks > 1:
            os.environ.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(ranks),
                LOCAL_WORLD_SIZE=str(ranks),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
            )
        from engine import console
        from train import main
        run_program(main, console.close)

    numbers = [forked(partial(run, rank)) for rank in range(ranks)]
    codes = exit_codes(numbers)
    failed = [rank for rank in range(ranks) if codes[rank]] or [0]
    log = folder / f"{name}.{failed[0]}.log"
    return codes[failed[0]], log.read_text()


def redirect(log: Path) -> None:
    """Write what this process prints into a file."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)      # pytest has put others in their place
    sys.stderr = open(2, "w", buffering=1, closefd=False)


def cell_of(code: int, output: str) -> str | None:
    """The cell of a run that did not end well; None for one that did."""
    if code == 0:
        return None
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    if code == 2 and len(errors) == 1 and "Traceback" not in output:
        return "refused: " + errors[0].removeprefix("error: ")
    last = lines[-1] if lines else "no output"
    kind = f"signal {-code}, it may hang" if code < 0 else f"exit code {code}"
    return f"CRASH ({kind}): {last}"


# ---- one family ------------------------------------------------------------------------------------------

class Family:
    """One family in a folder of its own: its runs, each made once, and their cells."""

    def __init__(self, name: str, data: Path, changed: dict | None = None, title: str = ""):
        """`changed`: keys of the model's configuration that differ from the table's, for a case `title`."""
        self.name = name
        self.changed = changed or {}
        self.folder = data / (title or name)
        self.folder.mkdir()
        self.rows = data_rows()
        self.runs = {}             # name -> (cell_of it, its output)
        self.made = answer(self.save, "model", False)

    def save(self, name: str, tied: bool) -> dict:
        return save_model(self.name, self.folder / name, tied, **self.changed)

    def cell(self, name: str) -> str:
        if isinstance(self.made, str):
            return self.made
        if name in CHECKS:
            return self.checked(name)
        return getattr(self, name)()

    def checked(self, name: str) -> str:
        """The cell of a run with a comparison of its own."""
        needed = "rm" if name == "ppo" else name
        if name == "router" and not self.made["router"]:
            return "-"
        if name == "dpo_tied":
            made = answer(self.save, "tied", True)
            if isinstance(made, str):
                return made
            if self.made["tied"] or not made["tied"]:
                return "-"
        check, rows = CHECKS[name]
        failed = self.run(needed) or self.run(name)
        return failed or answer(check, self.folder, name, self.rows[rows])

    def run(self, name: str, *arguments: str) -> str | None:
        """Make a run once, `<name>_ranks` on two processes; its cell if it did not end well."""
        if name not in self.runs:
            on_ranks = name.endswith("_ranks")
            keys = COMMON | RUNS[name.removesuffix("_ranks")] | {"output": name}
            lines = [f"{key}: {value}\n" for key, value in keys.items()]
            (self.folder / f"{name}.yml").write_text("".join(lines))
            code, output = train(self.folder, name, 2 if on_ranks else 1, *arguments)
            self.runs[name] = cell_of(code, output), output
        return self.runs[name][0]

    def reload(self) -> str:
        return self.run("sft") or answer(cells.reload_cell, self.folder, self.rows["held_out"])

    def ranks(self) -> str:
        """The first bad cell of sft and of grpo."""
        for one in ("sft", "grpo"):
            two = f"{one}_ranks"
            failed = self.run(one) or self.run(two)
            cell = failed or answer(cells.ranks_cell, self.folder, one, two)
            if cell != "ok":
                return f"{cell} ({one})"
        return "ok"

    def bf16(self) -> str:
        failed = self.run("bf16") or self.run("bf16_single")
        return failed or answer(cells.bf16_cell, self.folder, "bf16", "bf16_single")

    def dry_run(self) -> str:
        """Its verdict, and what it says about rows, are those of training."""
        trained = self.run("sft")
        said = self.run("dry", "--dry-run")
        if said != trained:
            return f"WRONG --dry-run: {said or 'no error'}; training: {trained or 'no error'}"
        for line in self.notices("sft"):
            if line not in self.notices("dry"):
                return f"WRONG only training says: {line}"
        return said or "ok"

    def notices(self, name: str) -> list[str]:
        """What a run said about the form of its rows."""
        lines = [line.strip() for line in self.runs[name][1].splitlines()]
        return [line for line in lines if line.startswith(NOTICES)]
