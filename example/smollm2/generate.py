"""Make the data of task 1: sums that a model of 135M parameters gets right one time in ten, and word problems
that are harder for it.

    python example/smollm2/generate.py
        write the files beside this script; the same seed gives the same bytes
    python example/smollm2/generate.py --reasoning-gym chain_sum
        also write prompts of a task of the package reasoning-gym

A sum is "What is 7 + 5?", in four wordings, with numbers from 1 to 12: 376 for training and 200 held out. A
pair of numbers belongs to one side in every file, whatever its order and wording: where 7 + 5 is held out, so
are 5 + 7 and the word problems with 7 and 5.

    prompts, sft, preference, feedback   sums: bare, with the right answer, with a right and a bad answer,
                                         with an answer marked right or bad
    word-prompts                         word problems with the same numbers, bare
Each has a twin `eval-...` with held-out problems. A bad answer is a wrong sum of the same length, or talk
that gives no sum; the held-out pairs have wrong sums only.
"""
import argparse
import json
import os
import random
import secrets
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
LARGEST = 12
HELD_OUT = 25                # pairs of different numbers, each in both orders and four wordings
WORD_PROBLEMS = 400          # for training, and half as many held out
GYM_PROBLEMS = 400           # the same

SUMS = ["What is {a} + {b}?", "How much is {a} + {b}?", "Add {a} and {b}.", "Calculate {a} + {b}."]
TALK = ["To add {a} and {b}, we first have to look at what a sum means in mathematics.",
        "This is a well-known question about numbers, and there are many ways to think about it.",
        "The sum can be found with a simple rule. First, write both numbers down,",
        "Adding numbers is one of the basic operations that are taught in school."]
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
    numbers: tuple           # a, b
    sign: str
    result: int

    @property
    def answer(self):
        return self.ending_with(self.result)

    def ending_with(self, result):
        a, b = self.numbers
        return f"{a} {self.sign} {b} = {result}"

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
    """Every pair in both orders and all wordings, shuffled."""
    problems = []
    for pair in pairs:
        for a, b in sorted({pair, pair[::-1]}):
            for wording in SUMS:
                problems.append(Problem(wording.format(a=a, b=b), (a, b), "+", a + b))
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
    return Problem(text, (a, b), sign, result)


def wrong_sum(problem, rng):
    """An answer that looks like the right one, of the same length: only its last number is wrong, by as much
    as the start model's are."""
    found = []
    for slip in (-10, -3, -2, -1, 1, 2, 3, 10):
        number = problem.result + slip
        if number > 0 and len(str(number)) == len(str(problem.result)):
            found.append(problem.ending_with(number))
    return rng.choice(found)


def talk(problem, rng):
    """An answer without a sum, as the start model gives many."""
    a, b = problem.numbers
    return rng.choice(TALK).format(a=a, b=b)


def assistant(text):
    return [{"role": "assistant", "content": text}]


def prompt_rows(problems):
    return [{"prompt": problem.prompt, "answer": str(problem.result)} for problem in problems]


def sft_rows(problems):
    return [{"messages": problem.prompt + assistant(problem.answer)} for problem in problems]


def preference_rows(problems, bad_answers, rng):
    """Every problem once with each kind of bad answer."""
    rows = []
    for problem in problems:
        chosen = assistant(problem.answer)
        for bad in bad_answers:
            rejected = assistant(bad(problem, rng))
            rows.append({"prompt": problem.prompt, "chosen": chosen, "rejected": rejected})
    rng.shuffle(rows)
    return rows


def feedback_rows(problems, bad_answers, rng):
    """Every problem with its right answer and with a bad one."""
    rows = []
    for problem in problems:
        bad = rng.choice(bad_answers)(problem, rng)
        for answer, label in ((problem.answer, True), (bad, False)):
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
    for pairs, twin, bad_answers in zip(number_pairs(seed), ("", "eval-"), ((wrong_sum, talk), (wrong_sum,))):
        rng = random.Random(f"{seed} {twin}")
        sums = sums_of(pairs, rng)
        count = WORD_PROBLEMS // 2 if twin else WORD_PROBLEMS
        files = {
            "prompts": prompt_rows(sums),
            "sft": sft_rows(sums),
            "preference": preference_rows(sums, bad_answers, rng),
            "feedback": feedback_rows(sums, bad_answers, rng),
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
