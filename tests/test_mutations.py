"""Tests of the tests: in a copy of the project with one mistake, every exactness test named here must fail."""
import json
import os
import shutil
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from helpers import ROOT

# Imports the libraries once and forks for each copy: pytest's own process may already have the project itself imported.
# What is there before a fork is no garbage: `freeze` keeps the collector of every copy from reading it.
RUNNER = """
import gc, importlib, json, os, sys
import pytest, torch, torch.distributed.fsdp, torch.nn.attention.varlen, torch.optim
import transformers.generation.utils
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2ForCausalLM
for name in ("cohere", "gemma2", "gpt_oss", "granite", "llama", "mistral", "phi", "qwen2", "qwen3"):
    importlib.import_module(f"transformers.models.{name}.modeling_{name}")
gc.freeze()
# only whether a test fails is read: no assertion is rewritten to explain itself
OPTIONS = ["-q", "-p", "no:cacheprovider", "--assert=plain", "--tb=no", "--junitxml=result.xml",
           "--basetemp=made"]
for folder, tests in json.loads(sys.argv[1]).items():
    if os.fork() == 0:
        os.chdir(folder)
        sys.path[0] = folder
        pytest.main(OPTIONS + tests)
        os._exit(0)
    os.wait()
"""



def exact(*names):
    """The six updates of these algorithms against the plain loop."""
    return [f"test_engine_exact.py::test_updates_equal_a_plain_loop[{name}]" for name in names]


def held_out(*names):
    return [f"test_engine_exact.py::test_evaluation_is_the_mean_over_all_held_out_rows[{name}]" for name in names]


def online(*names):
    """Six updates from two rollouts against the plain loop."""
    return [f"test_online.py::test_updates_equal_a_plain_loop[{name}]" for name in names]


def distill(*names):
    """Six updates from two rollouts against the plain loop."""
    return [f"test_distill.py::test_updates_equal_a_plain_loop[{name}]" for name in names]


def divergence(*names):
    return [f"test_divergence.py::test_{name}" for name in names]


def rows(*names):
    """Pairs in flat rows of these architectures against separate ones."""
    return [f"test_model.py::test_flat_shared_rows_equal_separate_rows[{name}-2]" for name in names]


def prefixed(*names):
    """Groups of three in flat rows behind a prefix, of these architectures, against separate ones."""
    return [f"test_model.py::test_a_shared_prefix_equals_separate_rows[{name}-3]" for name in names]


def left_out(*names):
    test = "test_online_signal.py::test_groups_without_a_gradient_can_be_left_out"
    return [f"{test}[{name}]" for name in names]


def refilled(*names):
    """Rows that come to a running batch, for these architectures."""
    return [f"test_rollout.py::test_rows_come_when_others_have_ended[{name}-False]" for name in names]


def family_parts(*names):
    return [f"test_families_parts.py::test_{name}" for name in names]


of_several_rewards = [*online("gdpo"), "test_online_losses.py::test_decoupled_advantages[0]",
                      "test_online_losses.py::test_worked_advantages_of_two_rewards"]
# algorithms that take log-probs of pairs; rm takes scores
PAIRS = "dpo", "ipo", "apo", "orpo", "simpo", "cpo"
TOKENS = "sft", "dft", "kto", *PAIRS
GROUPS = "grpo", "gdpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_pp"
SHIFT = "data/pack.py", "source.append(predictors[response.trained])", "source.append(predictors[response.trained] + 1)"
UNCHECKED = "; import model.check; model.check.check_policy = lambda *_: None"
MUTATIONS = {    # name: (file, text, what it becomes, the tests that must fail)
    "groups without a gradient do not count": (
        "engine/step.py", "in examples))\n        self.num_tokens",
        "in examples if example.has_gradient))\n        self.num_tokens",
        left_out("grpo", "dr_grpo", "gspo")),
    "source shifted by one": (
        *SHIFT, [*exact("sft", "dpo"), "test_pack.py::test_pairs_share_their_prompt",
                 "test_pack.py::test_source_and_target_by_content[2-True-prefix]",
                 "test_model.py::test_flat_shared_rows_equal_separate_rows[qwen2-2]"]),
    "source shifted by one, without the model's check": (
        *SHIFT[:2], SHIFT[2] + UNCHECKED, [*exact(*TOKENS), *held_out("sft", "dpo"), *online("grpo", "gspo")]),
    "the reward read one token early": (
        "data/pack.py", "last.append(start - 1)", "last.append(start - 2)",
        [*exact("rm"), *held_out("rm"), "test_rm.py::test_scores_equal_a_plain_forward[pad]"]),
    "chosen and rejected swapped": (
        "data/pack.py", "return y.view(-1, 2).unbind(1)", "return y.view(-1, 2).flip(1).unbind(1)",
        [*exact(*PAIRS, "cdpo", "rm"), *held_out(*PAIRS, "rm")]),
    "a sum against a mean": (
        "algorithms/dpo.py", "per_response(reference(batch)) if", "batch.sum(reference(batch)) if",
        exact("dpo-means")),
    "the chosen response anchored to the rejected one": (
        "algorithms/apo.py", "(-chosen_rewards).sigmoid()", "(-margins).sigmoid()",
        [*exact("apo", "apo-beta"), *held_out("apo")]),
    "the likelihood of the rejected responses": (
        "data/pack.py", "x.split(self.lengths)[::2]", "x.split(self.lengths)[1::2]", exact("orpo", "cpo", "rpo", "cpo-simpo")),
    "labels flipped": (
        "data/formats.py", "    return bool(label)", "    return not label", [*exact("kto", "kto-weights"), *held_out("kto")]),
    "labels of pairs flipped": (
        "data/reading.py", "zip(pair.responses, (True, False))", "zip(pair.responses, (False, True))",
        ["test_kto.py::test_chosen_is_the_desirable_one"]),
    "a response to the same prompt for the KL": (
        "algorithms/kto.py", "prompts[i - k] != prompts[i] and ", "",
        [*exact("kto"), "test_kto.py::test_lenders_are_the_nearest_before",
         "test_kto.py::test_data_with_one_prompt_is_refused"]),
    "a response of the data for the KL, not of the update": (
        "algorithms/kto.py", "if None in places:", "if of_data:", exact("kto")),
    "the last stop token dropped from conversations": (
        "data/chat.py", "return rendered[:end + len(self.end_of_turn)]", "return rendered[:end]",
        [*exact(*TOKENS, "cdpo", "rm"), *held_out("sft", "dpo", "kto", "rm")]),
    "the last stop token dropped from plain text": (
        "data/tokenise.py", "return [*ids, self.eos]", "return ids",
        [*exact("sft", "dft"), *held_out("sft", "dft")]),
    "the sign of advantages": (
        "engine/rollout.py", "example.extras[name] = checked(name, value, example)",
        "example.extras[name] = (-1 if name == 'advantages' else 1) * checked(name, value, example)",
        online(*GROUPS)),
    "log-probs at temperature 1": (
        "model/head.py", "head.at(temperature)", "head", online("grpo", "rloo")),
    "the gradient of the entropy without H": (
        "model/entropy.py", "logps.add_(entropy).mul_(grad_entropies)", "logps.mul_(grad_entropies)",
        ["test_entropy.py::test_values_and_gradients_equal_full_logits[True-7]",
         "test_entropy.py::test_equal_logits_have_the_entropy_of_a_fair_die",
         "test_entropy.py::test_policy_equals_the_models_own_logits[False-False-1.0]"]),
    "the slopes of a divergence without their sum": (
        "model/divergence.py", "slopes - logps.exp_().mul_(slope_total)", "slopes",
        [*divergence("values_and_gradients_equal_full_logits[False-None-7-0.5]"),
         *distill("reverse", "jensen-shannon", "half of the data")]),
    "the teacher beyond the student's tokens": (
        "model/divergence.py", "weight=other.weight[:rows]", "weight=other.weight[-rows:]",
        [*divergence("values_and_gradients_equal_full_logits[False-None-7-0.5]"),
         *distill("forward", "reverse")]),
    "student and teacher exchanged": (
        "algorithms/distill.py", "def distill_loss(student_logps, teacher_logps,",
        "def distill_loss(teacher_logps, student_logps,",
        [*divergence("values_and_gradients_equal_full_logits[False-None-7-0.0]",
                     "values_and_gradients_equal_full_logits[False-None-7-1.0]", "two_tokens_by_hand[0.0]"),
         *distill("forward", "reverse", "jensen-shannon")]),
    "own samples in the place of the data's responses": (
        "engine/mixture.py", "random() < share", "random() >= share",
        ["test_distill.py::test_each_prompt_is_drawn_to_be_sampled_or_not",
         "test_distill.py::test_the_responses_of_the_data_are_trained_as_they_are"]),
    "completions cut before their stop token": (
        "model/completions.py", "Completion(tokens, logps, stopped)",
        "Completion(*((x[:-1] if stopped and length > 1 else x) for x in (tokens, logps)), stopped)",
        [*online("grpo", "dapo"), *(f"test_rollout.py::test_sampler_equals_a_plain_loop[{name}-plain]" for name in ("qwen2", "llama"))]),
    "rewards that are normalised after their sum": (
        "algorithms/gdpo.py", "[group_advantages(groups) for groups in rewards]", "rewards",
        of_several_rewards),
    "no deviation over the rollout": (
        "algorithms/gdpo.py", "total / (known.std() + 1e-4)", "total", of_several_rewards),
    "every reward weighs the same": (
        "engine/rollout_record.py", "[reward.weight for", "[1.0 for", online("gdpo")),
    "one completion's draws for another": (
        "model/sampler.py", "(*keys[prompt], copy)", "(*keys[prompt], copy + 1)",
        ["test_rollout.py::test_sampler_equals_a_plain_loop[qwen2-plain]"]),
    "a collective in a loop over a set": (
        "engine/frozen.py", "enumerate(blocks_of(groups, size), 1)",
        "enumerate(set(blocks_of(groups, size)), 1)",
        ["test_ranks.py::test_no_collective_in_a_loop_over_a_set"]),
    "old log-probs in blocks of batch_size": (
        "engine/first_pass.py", "width * example.num_trained, len(trained))", "width * example.num_trained)",
        ["test_online_signal.py::test_old_logps_are_computed_in_the_micro_batches_that_train[gspo-keys2-1]"]),
    "the copies of a prompt without a gradient": (
        "model/varlen.py", "total.index_add_(0, copied, filled[copies].sum(0, dtype=grad.dtype))", "pass",
        rows("qwen2")),
    "the copies of a prefix without a gradient": (
        "model/varlen.py", "total[:prefixes.shape[1]] += grad[prefixes].sum(0)", "pass", prefixed("qwen2")),
    "responses that do not see the prefix": (
        "model/attention.py", "end = prefix + prompt\n", "end = prompt\n", prefixed("qwen2", "gpt_oss")),
    "prompts that begin where their prefix does": (
        "data/pack.py", "lay_out(prompt, prefix)", "lay_out(prompt, 0)",
        [*prefixed("qwen2"), "test_pack.py::test_what_prompts_begin_with_is_laid_out_once"]),
    "the last prompt's prefix for all rows": (
        "model/cache.py", "new[:, :self.prefix]", "new[:, start:start + self.prefix]",
        ["test_rollout.py::test_a_common_prefix_is_computed_once[qwen2-segments-False]"]),
    "a window one key too wide": (
        "model/varlen.py", "            sliding_window)\n        attended",
        "            sliding_window and sliding_window + 1)\n        attended",
        rows("mistral-window")),
    "steps in place that see the columns after them": (
        "model/cache.py", "self.mask.index_fill_(3, self.place, True)", "self.mask.fill_(True)",
        ["test_rollout.py::test_steps_in_place_equal_a_plain_loop[qwen2-plain]"]),
    "a row that goes on and sees what lies before its prompt": (
        "model/cache.py", "lengths[:self.rows] = self.column - self.start",
        "lengths[:self.rows] = self.column",
        refilled("qwen2", "gpt_oss")),
    "a new row that sees what lies before its prompt": (
        "model/cache.py", ">= self.start[:, None]\n            self.mask",
        ">= self.start.where(self.start < 12, 0)[:, None]\n            self.mask",
        refilled("qwen2", "gpt_oss")),
    "a row that goes on without its keys and values": (
        "model/cache.py", "= old[:, :, old_column - count:old_column]", "= old[:, :, :count]",
        refilled("qwen2", "mistral-window", "gpt_oss")),
    "a row that goes on with draws of tokens that it has": (
        "model/decoding.py", "self.uniforms[:, used:], (0, used)", "self.uniforms, (0, 0)",
        refilled("qwen2", "mistral-window", "gpt_oss")),
    "positions that no completion reaches": (
        "model/decoding.py", ".clamp_(max=self.last_position)", "", refilled("gemma2")),
    "the bias of a head": (
        "model/slices.py", "logits += bias[rows]", "pass", rows("phi")),
    "the scale of a head": (
        "model/head.py", "states = states * scale", "pass", rows("cohere", "granite")),
    "the slope of capped logits": (
        "model/slices.py", "error *= slope", "pass", rows("gemma2")),
    "the target in every compiled slice": (
        "model/slices.py", "(hit & (places == column))", "(places == column)",
        ["test_compiled.py::test_compiled_slices_equal_full_logits"]),
    "the cap of scores": (
        "model/scores.py", "softcap * torch.tanh(scores / softcap)", "scores", rows("gemma2")),
    "a sink outside the window": (
        "model/scores.py", "value=True)", "value=False)", rows("gpt_oss")),
    "plain rows in another order": (
        "model/plain.py", "+ done\n            done += length", "+ done\n        done += length * len(group)",
        family_parts("plain_rows_equal_flat_rows[True-inf]", "all_tokens_of_plain_rows")),
    "the check without the longest example": (
        "data/store.py", "order[2:][-1:]", "[]", family_parts("a_window_that_only_the_mask_knows")),
    "the check in bf16": (
        "model/check.py", 'policy.precision = "fp32"', "pass",
        family_parts("the_check_is_in_fp32[dtype0-bf16]")),
    "prompts counted once in the router's loss": (
        "model/experts.py", "] = len(lengths)", "] = 1.0",
        family_parts("the_auxiliary_loss_is_transformers_own[form0]")),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """mutation -> pytest's report (junit xml) of its copy"""
    folders = {}
    for mutation, (path, old, new, _) in MUTATIONS.items():
        folder = folders[mutation] = tmp_path_factory.mktemp("copy")
        for name in ("algorithms", "data", "engine", "model", "rewards", "tests"):
            unfinished = shutil.ignore_patterns("*.pyc.*")      # of what Python has compiled already
            shutil.copytree(ROOT / name, folder / name, ignore=unfinished)
        shutil.copy(ROOT / "train.py", folder)
        source = (folder / path).read_text()
        assert source.count(old) == 1, f"{path} holds {old!r} {source.count(old)} times"
        (folder / path).write_text(source.replace(old, new))
    jobs = {str(folder): [f"tests/{killer}" for killer in MUTATIONS[mutation][3]] for mutation, folder in folders.items()}
    command = [sys.executable, "-c", RUNNER, json.dumps(jobs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    subprocess.run(command, env=environment, timeout=1500, capture_output=True, check=True)
    return {mutation: ElementTree.parse(folder / "result.xml").getroot() for mutation, folder in folders.items()}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_every_named_test_kills_the_mutation(results, mutation):
    killers = {killer.partition("::")[2] for killer in MUTATIONS[mutation][3]}
    assert {case.get("name") for case in results[mutation].iter("testcase") if case.find("failure") is not None} == killers
