"""Make the data of task 1: sums that a model of 135M parameters gets right one time in ten, and word problems
that are harder for it.

    python example/smollm2/generate.py
        write the files beside this script; the same seed gives the same bytes
    python example/smollm2/generate.py --reasoning-gym chain_sum
        also write prompts of a task of the package reasoning-gym

A sum is "What is 7 + 15?" with numbers from 1 to 20, 200 for training and 200 held out. A pair of numbers
belongs to one side in every file, whatever its order and text: where 7 + 15 is held out, so are 15 + 7 and
the word problems with 7 and 15.

    prompts, sft, preference, feedback   sums: bare, with the right answer, with a right and a wrong answer,
                                         with an answer marked right or wrong
    word-prompts                         word problems with the same numbers, bare
Each has a twin `eval-...` with held-out problems.
"""
import argparse
import json
import os
import random
import secrets
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
LARGEST = 20
HELD_OUT = 100               # pairs of different numbers, each in both orders
WRONG_ANSWERS = 3            # pairs per training sum
WORD_PROBLEMS = 400          # of training, and half as many held out
GYM_PROBLEMS = 400           # the same

NAMES = ["Tom", "Ann", "Ben", "Mia", "Leo", "Eva", "Sam", "Zoe"]
THINGS = ["apples", "pens", "coins", "cards", "books", "eggs"]
# {a} is never smaller than {b} in a difference
WORDS = {
    "+": ["{n} has {a} {t} and buys {b} more. How many {t} does {n} have now?",
          "{n} has {a} {t} and {m} has {b} {t}. How many {t} do they have together?",
          "A box holds {a} {t} and a bag holds {b} {t}. How many {t} are there in all?"],
    "-": ["{n} has {a} {t} and gives away {b}. How many {t} are left?",
          "{n} has {a} {t} and loses {b}. How many {t} does {n} have now?"],
}


class Problem(NamedTuple):
    text: str
    equation: str            # up to its sign of equality
    result: int

    @property
    def answer(self):
        return f"{self.equation} {self.result}"

    @property
    def prompt(self):
        return [{"role": "user", "content": self.text}]


def number_pairs(seed):
    """(pairs of training, held-out pairs): (a, b), a <= b, shuffled. A held-out pair has two different
    numbers."""
    equal = []
    different = []
    for a in range(1, LARGEST + 1):
        equal.append((a, a))
        for b in range(a + 1, LARGEST + 1):
            different.append((a, b))
    random.Random(f"{seed} pairs").shuffle(different)
    return different[HELD_OUT:] + equal, different[:HELD_OUT]


def sums_of(pairs, rng):
    """Every pair in both orders, shuffled."""
    problems = []
    for a, b in pairs:
        for first, second in sorted({(a, b), (b, a)}):
            text = f"What is {first} + {second}?"
            problems.append(Problem(text, f"{first} + {second} =", first + second))
    rng.shuffle(problems)
    return problems


def word_problem(pairs, rng):
    a, b = rng.choice(pairs)
    sign = rng.choice("+-")
    if sign == "-" or rng.random() < 0.5:
        a, b = b, a
    n, m = rng.sample(NAMES, 2)
    text = rng.choice(WORDS[sign]).format(a=a, b=b, n=n, m=m, t=rng.choice(THINGS))
    result = a + b if sign == "+" else a - b
    return Problem(text, f"{a} {sign} {b} =", result)


def wrong_answers(problem, count, rng):
    """Different answers that look like the right one, of the same length: only the last number is wrong, by
    as much as the start model's are."""
    found = []
    for slip in (-10, -3, -2, -1, 1, 2, 3, 10):
        number = problem.result + slip
        if number > 0 and len(str(number)) == len(str(problem.result)):
            found.append(f"{problem.equation} {number}")
    return rng.sample(found, count)


def assistant(text):
    return [{"role": "assistant", "content": text}]


def prompt_rows(problems):
    return [{"prompt": problem.prompt, "answer": str(problem.result)} for problem in problems]


def sft_rows(problems):
    return [{"messages": problem.prompt + assistant(problem.answer)} for problem in problems]


def preference_rows(problems, count, rng):
    rows = []
    for problem in problems:
        chosen = assistant(problem.answer)
        for wrong in wrong_answers(problem, count, rng):
            rows.append({"prompt": problem.prompt, "chosen": chosen, "rejected": assistant(wrong)})
    rng.shuffle(rows)
    return rows


def feedback_rows(problems, rng):
    """Every problem with its right answer and with a wrong one."""
    rows = []
    for problem in problems:
        wrong, = wrong_answers(problem, 1, rng)
        for answer, label in ((problem.answer, True), (wrong, False)):
            rows.append({"prompt": problem.prompt, "completion": assistant(answer), "label": label})
    rng.shuffle(rows)
    return rows


def word_rows(pairs, count, rng):
    """Different word problems."""
    problems = {}
    while len(problems) < count:
        problem = word_problem(pairs, rng)
        problems[problem.text] = problem
    return prompt_rows(problems.values())


def gym_rows(task, count, seed):
    import reasoning_gym  # optional: pip install reasoning-gym

    rows = []
    for entry in reasoning_gym.create_dataset(task, size=count, seed=seed):
        prompt = [{"role": "user", "content": entry["question"]}]
        rows.append({"prompt": prompt, "answer": str(entry["answer"])})
    return rows


def write_rows(path, rows):
    """The file appears whole or not at all."""
    temporary = f"{path}.tmp-{secrets.token_hex(4)}"
    with open(temporary, "w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
    os.replace(temporary, path)


def write(folder=HERE, seed=0):
    """All files of task 1."""
    for pairs, twin, wrong in zip(number_pairs(seed), ("", "eval-"), (WRONG_ANSWERS, 1)):
        rng = random.Random(f"{seed} {twin}")
        sums = sums_of(pairs, rng)
        count = WORD_PROBLEMS // 2 if twin else WORD_PROBLEMS
        files = {
            "prompts": prompt_rows(sums),
            "sft": sft_rows(sums),
            "preference": preference_rows(sums, wrong, rng),
            "feedback": feedback_rows(sums, rng),
            "word-prompts": word_rows(pairs, count, rng),
        }
        for name, rows in files.items():
            write_rows(Path(folder) / f"{twin}{name}.jsonl", rows)


def write_gym(task, folder=HERE, seed=0):
    """`task`-prompts.jsonl and its twin, from the package reasoning-gym; no problem is in both."""
    rows = gym_rows(task, GYM_PROBLEMS * 3 // 2, seed)
    seen = set()
    different = []
    for row in rows:
        text = row["prompt"][0]["content"]
        if text not in seen:
            different.append(row)
        seen.add(text)
    held_out = len(different) // 3
    write_rows(Path(folder) / f"eval-{task}-prompts.jsonl", different[:held_out])
    write_rows(Path(folder) / f"{task}-prompts.jsonl", different[held_out:])


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--reasoning-gym", metavar="TASK", help="such as chain_sum")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write(HERE, args.seed)
    if args.reasoning_gym:
        write_gym(args.reasoning_gym, HERE, args.seed)
    print(f"wrote the data of task 1 into {HERE}")


if __name__ == "__main__":
    main()
