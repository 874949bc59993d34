"""reasoning-gym's own scorers: `pip install reasoning-gym`.

    python train.py example/smollm2-grpo.yml data=tasks.jsonl \
        reward=example/rewards/reasoning.py:reasoning

A row is what the package gives for a problem: `question`, `answer` and `metadata`, which names the task.
Write them with

    for row in reasoning_gym.create_dataset("chain_sum", size=1000, seed=1):
        print(json.dumps(row))

The answer is what stands between <answer> and </answer>, else the completion without surrounding space.
"""
import re

from reasoning_gym import get_score_answer_fn

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def reasoning(prompts, completions, answer, metadata, **columns):
    """The scorer's number, from 0 to 1; None where a row does not name its task."""
    scores = []
    for completion, gold, facts in zip(completions, answer, metadata):
        if not isinstance(facts, dict) or "source_dataset" not in facts:
            scores.append(None)
            continue
        found = ANSWER.findall(completion)
        text = found[-1].strip() if found else completion.strip()
        score = get_score_answer_fn(facts["source_dataset"])
        scores.append(float(score(text, {"answer": gold, "metadata": facts})))
    return scores
