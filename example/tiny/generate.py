"""Make everything the tiny default needs: problems, answers of several qualities, a byte tokenizer, a
random-weight model.

    python example/tiny/generate.py
        rewrite the small data files beside this script (the committed ones)
    python example/tiny/generate.py --init runs/tiny-init
        write a random-weight model with its tokenizer there, and the two large files
        runs/tiny-data/{pretrain,base}.jsonl

The task: a word problem with numbers below 100, answered as
`<think>47+38=77+8=85</think> <answer>85</answer>`. A careful answer adds or subtracts the tens first and the
ones afterwards, so every step is a fact that a 0.8M-parameter model can learn. The same seed gives the same
bytes.
"""
import argparse
import json
import random
import zlib
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
# rows of the committed training files, and of their eval- twins
SMALL = {"sft": 2000, "preference": 2000, "feedback": 2000, "prompts": 1000}
EVAL = {"sft": 200, "preference": 200, "feedback": 200, "prompts": 500}
LARGE_ROWS = 83_200      # 1300 updates of 64 rows

NAMES = ["Tom", "Ann", "Ben", "Mia", "Leo", "Eva", "Sam", "Zoe", "Max", "Amy"]
THINGS = ["apples", "pens", "coins", "cards", "books", "eggs", "stamps", "shells"]
# (operations, text): {a} {b} {c} are the numbers in the order in which the operations use them
ENGLISH = [
    ("+", "{n} has {a} {t} and buys {b} more. How many now?"),
    ("+", "{n} has {a} {t}, {m} has {b}. How many together?"),
    ("+", "{n} finds {a} {t}, then {b} more. How many in all?"),
    ("+", "A box holds {a} {t}, a bag holds {b}. How many in total?"),
    ("+", "{m} gives {b} {t} to {n}, who had {a}. How many has {n} now?"),
    ("-", "{n} has {a} {t} and gives {b} away. How many are left?"),
    ("-", "{n} had {a} {t} but lost {b}. How many now?"),
    ("-", "{n} has {a} {t}, {m} has {b}. How many more has {n}?"),
    ("-", "A box holds {a} {t}. {n} takes {b}. How many stay?"),
    ("-", "{n} sold {b} of {a} {t}. How many are left?"),
    ("+-", "{n} has {a} {t}, buys {b} and loses {c}. How many now?"),
    ("-+", "{n} has {a} {t}, sells {b} and finds {c}. How many now?"),
]
CHINESE_NAMES = ["小明", "小红", "小华", "小丽"]
CHINESE_THINGS = ["苹果", "鸡蛋", "球", "梨"]
CHINESE = [
    ("+", "{n}有{a}个{t}，又买{b}个，一共几个？"),
    ("+", "{n}有{a}个{t}，{m}有{b}个，一共几个？"),
    ("-", "{n}有{a}个{t}，送走{b}个，还剩几个？"),
    ("-", "{n}有{a}个{t}，丢了{b}个，还剩几个？"),
    ("+-", "{n}有{a}个{t}，买{b}个，丢{c}个，还剩几个？"),
]
CHINESE_SHARE = 0.2
TWO_STEP_SHARE = 0.1


class Problem(NamedTuple):
    text: str
    numbers: tuple   # 2 or 3 numbers
    operations: str  # "+", "-" or one sign per step
    chinese: bool

    @property
    def answer(self):
        return results(self.numbers, self.operations)[-1]


def apply(a, sign, b):
    return a + b if sign == "+" else a - b


def results(numbers, operations):
    """The first number and the result after each operation."""
    found = [numbers[0]]
    for sign, b in zip(operations, numbers[1:]):
        found.append(apply(found[-1], sign, b))
    return found


def draw_numbers(operations, rng):
    """Numbers whose every intermediate result lies in 0..99; the third one has a single digit, to keep the
    thought short."""
    while True:
        numbers = rng.randint(2, 97), rng.randint(2, 97), rng.randint(2, 9)
        found = results(numbers, operations)
        if min(found) >= 0 and max(found) <= 99:
            return numbers[:len(operations) + 1]


def draw_problem(rng, held_out=False):
    """A random problem. A template with its numbers always belongs to training or, one in ten, to the
    held-out files."""
    while True:
        chinese = rng.random() < CHINESE_SHARE
        steps = 2 if rng.random() < TWO_STEP_SHARE else 1
        names = CHINESE_NAMES if chinese else NAMES
        things = CHINESE_THINGS if chinese else THINGS
        templates = CHINESE if chinese else ENGLISH
        fitting = [entry for entry in templates if len(entry[0]) == steps]
        operations, template = rng.choice(fitting)
        numbers = draw_numbers(operations, rng)
        n, m = rng.sample(names, 2)
        words = dict(zip("abc", numbers), n=n, m=m, t=rng.choice(things))
        is_held_out = zlib.crc32(f"{template} {numbers}".encode()) % 10 == 0
        if is_held_out == held_out:
            return Problem(template.format(**words), numbers, operations, chinese)


def equation(a, sign, b, slip=0):
    """`47+38=77+8=85`: tens first, then ones. `slip` is an error in the last result."""
    ones = b % 10
    tens = b - ones
    middle = f"={apply(a, sign, tens)}{sign}{ones}" if tens and ones else ""
    return f"{a}{sign}{b}{middle}={apply(a, sign, b) + slip}"


def solution(problem, slip=0):
    """The equations of all steps; `slip` is an error in the last one."""
    slips = [0] * (len(problem.operations) - 1) + [slip]
    starts = results(problem.numbers, problem.operations)
    steps = map(equation, starts, problem.operations, problem.numbers[1:], slips)
    return ", ".join(steps)


def draw_slip(problem, rng):
    slips = [slip for slip in (-10, -2, -1, 1, 2, 10) if 0 <= problem.answer + slip <= 99]
    return rng.choice(slips)


def careful(problem, rng):
    return f"<think>{solution(problem)}</think> <answer>{problem.answer}</answer>"


def mistaken(problem, rng):
    """Looks careful, but the last result is wrong."""
    slip = draw_slip(problem, rng)
    return f"<think>{solution(problem, slip)}</think> <answer>{problem.answer + slip}</answer>"


def hasty(problem, rng):
    """In format, but without thinking and wrong."""
    english = ["Easy.", "Just a guess.", "No need to think."]
    thought = rng.choice(["很简单。", "不用想。"] if problem.chinese else english)
    return f"<think>{thought}</think> <answer>{problem.answer + draw_slip(problem, rng)}</answer>"


def free_text(problem, rng):
    """Right, but without tags."""
    english = ["The answer is {}.", "That makes {}."]
    texts = ["答案是{}。", "算一下：{}。"] if problem.chinese else english
    return rng.choice(texts).format(solution(problem))


def vague(problem, rng):
    english = ["Hard to say.", "It depends.", "Quite a few, I think."]
    return rng.choice(["不好说。", "大概有一些吧。"] if problem.chinese else english)


def draw_answer(problem, rng, kinds):
    """`kinds` maps an answer function to its share."""
    return rng.choices(list(kinds), list(kinds.values()))[0](problem, rng)


# half of them differ from a careful answer only in the final number
BAD = {mistaken: 0.5, hasty: 0.2, free_text: 0.15, vague: 0.15}
# a capable but unaligned model: it can give careful answers, but often does not
BASE = {careful: 0.4, hasty: 0.25, free_text: 0.2, vague: 0.15}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def sft_row(rng, held_out=False):
    problem = draw_problem(rng, held_out)
    return {"messages": [user(problem.text), assistant(careful(problem, rng))]}


def preference_row(rng, held_out=False):
    problem = draw_problem(rng, held_out)
    chosen = [assistant(careful(problem, rng))]
    rejected = [assistant(draw_answer(problem, rng, BAD))]
    return {"prompt": [user(problem.text)], "chosen": chosen, "rejected": rejected}


def feedback_row(rng, held_out=False):
    problem = draw_problem(rng, held_out)
    label = rng.random() < 0.5
    answer = careful(problem, rng) if label else draw_answer(problem, rng, BAD)
    return {"prompt": [user(problem.text)], "completion": [assistant(answer)], "label": label}


def prompts_row(rng, held_out=False):
    problem = draw_problem(rng, held_out)
    return {"prompt": [user(problem.text)], "answer": str(problem.answer)}


def base_row(rng):
    problem = draw_problem(rng)
    return {"messages": [user(problem.text), assistant(draw_answer(problem, rng, BASE))]}


def pretrain_row(rng):
    """Half worked problems, half bare equations; half of these have a one-digit second number, the fact
    behind every carry."""
    if rng.random() < 0.5:
        problem = draw_problem(rng)
        return {"text": f"{problem.text}\n{solution(problem)}"}
    equations = []
    for _ in range(8):
        sign = rng.choice("+-")
        a, b = draw_numbers(sign, rng)
        if rng.random() < 0.5:
            room = a if sign == "-" else 99 - a
            b = rng.randint(1, min(9, room))
        equations.append(equation(a, sign, b))
    return {"text": "\n".join(equations)}


SMALL_ROWS = {"sft": sft_row, "preference": preference_row, "feedback": feedback_row, "prompts": prompts_row}


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(f"wrote {path}")


def write_small(folder, seed=0):
    """The committed files: four for training, and their eval- twins, whose problems occur in no training
    file."""
    for kind, row in SMALL_ROWS.items():
        rng = random.Random(f"{seed} {kind}")  # one stream per file: a longer file does not move the others
        write_rows(folder / f"{kind}.jsonl", [row(rng) for _ in range(SMALL[kind])])
        write_rows(folder / f"eval-{kind}.jsonl", [row(rng, held_out=True) for _ in range(EVAL[kind])])


def write_large(folder, seed=0, rows=LARGE_ROWS):
    """pretrain.jsonl (raw text) and base.jsonl (conversations): the data of the two stages from random
    weights to the embedded model."""
    for kind, row in {"pretrain": pretrain_row, "base": base_row}.items():
        rng = random.Random(f"{seed} {kind}")
        write_rows(folder / f"{kind}.jsonl", (row(rng) for _ in range(rows)))


CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer():
    """256 bytes and three special tokens: nothing is unknown, in any language. ChatML without a default
    system prompt."""
    from tokenizers import pre_tokenizers

    # AutoTokenizer picks this class for every Qwen2 model, even if another one was saved
    from transformers import Qwen2Tokenizer

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    symbols = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    return Qwen2Tokenizer(
        vocab={symbol: i for i, symbol in enumerate(symbols)},
        merges=[],
        pad_token=special[0],
        eos_token=special[2],
        extra_special_tokens=[special[1]],
        model_max_length=512,
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer, seed=0):
    """Qwen2 with 0.8M parameters and seeded random weights."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        dtype="float32",
        initializer_range=0.06,  # the usual 0.02 suits wider models; at width 128 it costs some fifty updates
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--init", type=Path, metavar="DIR",
                        help="write the random-weight model there and the large data files")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.init is None:
        write_small(HERE, args.seed)
        return
    tokenizer = build_tokenizer()
    build_model(tokenizer, args.seed).save_pretrained(args.init)
    tokenizer.save_pretrained(args.init)
    print(f"wrote {args.init}")
    write_large(args.init.parent / "tiny-data", args.seed)


if __name__ == "__main__":
    main()
