"""An algorithm owns its options: what a Config accepts stands in its file, so a copy under another name
behaves like the original."""
import importlib
import re
import shutil
from dataclasses import asdict, fields
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from helpers import ROOT, refused

from data.errors import UserError
from engine import definition
from engine.config import Common, config_of, hints_of, load_config
from engine.definition import class_of
from engine.help import comments_of, help_text
from engine.options import Options, Sampling

# accepted and refused values, by hand; the limits of a range are among them
POSITIVE = ("1e-6 1 7.5", "0 -1")
NOT_NEGATIVE = ("0 1e-6 7.5", "-1e-6")
COUNT = ("1 7", "0 -1 1.5")
ONLINE = {
    "max_completion_length": COUNT, "temperature": POSITIVE, "top_p": ("1e-6 1", "0 1.1"),
    "top_k": ("0 7", "-1 0.5"), "reward_timeout": POSITIVE, "rollout_batch_size": COUNT,
    "num_mini_batches": ("1 32", "0 33"), "vllm_memory": ("1e-6 1", "0 1.1"),
    "vllm_tensor_parallel": ("1 8", "0 1.5"),
}
GROUP = ONLINE | {"num_generations": ("2 7", "1 0"), "num_iterations": COUNT}
CLIPPED = GROUP | {"epsilon": POSITIVE, "epsilon_high": POSITIVE}
BETA = {"beta": POSITIVE}
SMOOTHING = {"label_smoothing": ("0 0.5", "0.51 -0.1")}
LIMITS = {
    "sft": {"lora_dropout": ("0 0.1 0.99", "1 -0.1")},
    "dft": {"lora_dropout": ("0 0.1 0.99", "1 -0.1")},
    "dpo": BETA | SMOOTHING | {"lora_dropout": ("0", "0.1")},
    "rpo": BETA | SMOOTHING | {"rpo_alpha": NOT_NEGATIVE},
    "ipo": BETA,
    "apo": BETA,
    "kto": BETA | {"desirable_weight": POSITIVE, "undesirable_weight": POSITIVE},
    "orpo": BETA,
    "cpo": BETA | SMOOTHING | {"cpo_alpha": NOT_NEGATIVE},
    "simpo": BETA | SMOOTHING | {"cpo_alpha": NOT_NEGATIVE, "simpo_gamma": NOT_NEGATIVE},
    "rm": {"center_rewards_coefficient": NOT_NEGATIVE},
    "grpo": CLIPPED | {"beta": NOT_NEGATIVE},
    "gdpo": CLIPPED | {"beta": NOT_NEGATIVE},
    "dr_grpo": CLIPPED | {"beta": NOT_NEGATIVE},
    "dapo": CLIPPED | {"max_resample_times": ("0 7", "-1"), "soft_overlong_cache": ("0 7", "-1")},
    "gspo": CLIPPED,
    "cispo": GROUP | {"epsilon_high": ("1 7.5", "0.9 0")},
    "rloo": CLIPPED | {"kl_coef": NOT_NEGATIVE},
    "reinforce_pp": CLIPPED | {"num_generations": ("1 7", "0"), "kl_coef": NOT_NEGATIVE},
    "distill": {key: limits for key, limits in ONLINE.items() if key != "reward_timeout"} | {
        "beta": ("0 0.5 1", "-0.1 1.1"), "lmbda": ("0 0.5 1", "-0.1 1.1"), "num_iterations": COUNT},
    "ppo": ONLINE | {
        "num_ppo_epochs": COUNT, "kl_coef": NOT_NEGATIVE, "cliprange": POSITIVE, "cliprange_value": POSITIVE,
        "vf_coef": NOT_NEGATIVE, "gamma": ("1e-6 1", "0 1.1"), "lam": ("0 1", "-0.1 1.1"),
        "num_sample_generations": ("0 7", "-1"),
    },
}
NAMES = sorted(LIMITS)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """-> a function: read key=value words for an algorithm or its copy, copy_of_<name>."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "algorithms").mkdir()
    for name in NAMES:
        for copy in (name, f"copy_of_{name}"):
            shutil.copy(ROOT / "algorithms" / f"{name}.py", folder / "algorithms" / f"{copy}.py")
    (folder / "x.yml").write_text("model: m\ndata: d\n")

    def read(name, *words):
        return load_config([str(folder / "x.yml"), f"algorithm={name}", *words])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(definition, "ROOT", folder)
        class_of.cache_clear()
        yield read
    class_of.cache_clear()


def required(name):
    """Words without which the algorithm's configuration is not complete."""
    return ["lora_r=8", *(f"{key}={value}" for key, value in required_values(name).items())]


def required_values(name):
    values = {"reward": "gsm8k", "teacher": "t"}
    return {field.name: values[field.name] for field in fields(config_of(name)) if field.name in values}


@pytest.mark.parametrize("name", LIMITS)
def test_limits(name, load):
    for key, (good, bad) in LIMITS[name].items():
        for text in good.split():
            run = load(name, *required(name), f"{key}={text}")
            values = asdict(run.common) | asdict(run.config)
            assert values[key] == float(text)
        for text in bad.split():
            message = refused(load, name, *required(name), f"{key}={text}")
            assert message.startswith(f"{key} (command line) ")


def test_every_number_has_its_limits_in_the_table():
    for name in LIMITS:
        hints = get_type_hints(config_of(name))
        numbers = [key for key, kind in hints.items() if kind in (int, float)]
        assert set(numbers) <= LIMITS[name].keys(), name


def outcome(load, name, words):
    """The configuration or the error, with the original's name."""
    try:
        run = load(name, *required(name), *words)
    except UserError as error:
        fault = str(error).partition(" is used by")[0]       # the lists of users differ by the copy
        return fault.replace("copy_of_", "")
    return asdict(run.common) | asdict(run.config) | {"algorithm": ""}


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_accepts_and_refuses_what_the_original_does(name, load):
    """Every option with many values, and LoRA's dropout, which the algorithm allows or not."""
    copy = f"copy_of_{name}"
    words = [[], ["lora_dropout=0.1"], ["num_generations=1", "baseline=true"], ["gamma=1.5"]]
    for field in fields(config_of(name)):
        kind = get_type_hints(config_of(name))[field.name]
        values = ["-1", "0", "1e-9", "0.5", "0.6", "1", "1.5", "2", "1e9", "true", "null", "a,b"]
        if get_origin(kind) is Literal:
            values += get_args(kind)
        words += [[f"{field.name}={value}"] for value in values]
    for given in words:
        assert outcome(load, name, given) == outcome(load, copy, given), given
    ours = load(name, *required(name)).config
    theirs = load(copy, *required(name)).config
    assert ours.uses_reference() == theirs.uses_reference() and ours.uses_critic() == theirs.uses_critic()
    assert ours.rollout_shape() == theirs.rollout_shape()


def test_an_option_of_ones_own_has_no_range_by_its_name(load, tmp_path):
    """gamma is a discount in ppo, from 0 to 1."""
    text = (ROOT / "algorithms" / "dpo.py").read_text()
    changed = text.replace("class Config(Options):\n", "class Config(Options):\n    gamma: float = 0.0\n")
    assert changed != text
    (definition.ROOT / "algorithms" / "mine.py").write_text(changed)
    assert load("mine", "gamma=1.5").config.gamma == 1.5
    assert load("mine", "gamma=0").config.gamma == 0


def test_a_range_of_ones_own(load):
    (definition.ROOT / "algorithms" / "even.py").write_text("""
from dataclasses import dataclass
from typing import Annotated
from engine.options import Options, Range
@dataclass
class Config(Options):
    half: Annotated[int, Range("an even number", lambda x: x % 2 == 0)] | None = None
""")
    assert load("even", "half=4").config.half == 4 and load("even", "half=null").config.half is None
    assert refused(load, "even", "half=3") == "half (command line) is 3; fix: give an even number"


def test_what_the_engine_is_told():
    """By hand, of the defaults and of the options that change it."""
    def made(name, **values):
        return config_of(name)(**required_values(name) | values)

    with_reference = ("apo", "dpo", "gdpo", "grpo", "ipo", "kto", "ppo", "reinforce_pp", "rloo", "rpo")
    for name in NAMES:
        assert made(name).uses_reference() == (name in with_reference)
        assert made(name).uses_critic() == (name == "ppo")
        assert made(name).allows_dropout == (name in ("sft", "dft"))
    assert not made("dpo", reference_free=True).uses_reference()
    assert not made("grpo", beta=0.0).uses_reference()
    assert not made("gdpo", beta=0.0).uses_reference()
    assert made("dr_grpo", beta=0.1).uses_reference()
    assert not made("rloo", kl_coef=0.0).uses_reference()
    assert not made("reinforce_pp", kl_coef=0.0).uses_reference()
    assert not made("ppo", share_value_trunk=True).uses_critic()
    assert made("ppo", num_ppo_epochs=3, num_mini_batches=2).rollout_shape() == (1, 3, 2)
    assert made("grpo", num_iterations=3, num_mini_batches=2).rollout_shape() == (8, 3, 2)
    assert made("sft").rollout_shape() == (1, 1, 1)
    assert made("distill", num_iterations=3, num_mini_batches=2).rollout_shape() == (1, 3, 2)
    assert made("distill").frozen_models() == {"teacher": "t"} and made("grpo").frozen_models() == {}
    assert made("distill", lmbda=0.3).sampled_share() == 0.3 and made("grpo").sampled_share() == 1
    assert made("grpo").uses_reward() and not made("distill").uses_reward() and not made("sft").uses_reward()


def test_the_defaults_are_no_options():
    assert not hasattr(Options, "__dataclass_fields__") and not get_type_hints(Options)
    assert not hints_of(Sampling).keys() & hints_of(Common).keys()


@pytest.mark.parametrize("name", NAMES)
def test_keys_are_commented_and_repeat_none_of_the_common_ones(name):
    assert importlib.import_module(f"algorithms.{name}").DATA in ("responses", "pairs", "labelled", "prompts")
    comments = comments_of(config_of(name)) | comments_of(Common)
    for field in fields(config_of(name)) + fields(Common):
        comment = comments[field.name]
        assert len(comment) > 10 and not comment.lower().startswith("of "), f"{name}.{field.name}"
    assert not hints_of(config_of(name)).keys() & hints_of(Common).keys()


@pytest.mark.parametrize("name", [None, *NAMES])
def test_help_fits_80_columns_and_shows_no_other_algorithm_s_keys(name):
    text = help_text(name)
    assert max(map(len, text.splitlines())) <= 80
    shown = re.findall(r"^    (\w+): .* \((?:required|default .*)\)$", text, re.MULTILINE)
    expected = [field.name for field in fields(config_of(name))] if name else []
    expected += [field.name for field in fields(Common)]
    assert shown == expected
