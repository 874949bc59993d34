"""A hundred families of causal language models. Each is a tiny random model with one layer of every type that
the family has, windows and chunks shorter than the rows of the tests, and a byte tokenizer."""
import json
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
)

LEAVE_OUT = object()               # the value of a key of COMMON that a family does not have

COMMON = dict(
    vocab_size=264,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
    initializer_range=0.2,
    bos_token_id=None,
    eos_token_id=2,
    pad_token_id=0,
)
WINDOWS = dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"])
ALL_WINDOWS = dict(sliding_window=8)
GPT2 = dict(
    n_embd=32,
    n_layer=2,
    n_head=4,
    n_positions=512,
    n_inner=48,
)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
LOCAL_EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
SHARED_EXPERT = EXPERTS | dict(shared_expert_intermediate_size=16)
ROUTED_EXPERTS = dict(
    n_routed_experts=4,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    first_k_dense_replace=1,
    n_group=1,
    topk_group=1,
)
LATENT = ROUTED_EXPERTS | dict(
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    num_key_value_heads=4,
    head_dim=LEAVE_OUT,
)
LINEAR = dict(
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_conv_kernel_dim=4,
    layer_types=["linear_attention", "full_attention"],
)
MAMBA = dict(state_size=8, expand=2, conv_kernel=4)
MAMBA_2 = MAMBA | dict(num_heads=8, head_dim=8, n_groups=1, chunk_size=16)
HYBRID = dict(
    mamba_d_state=8,
    mamba_d_conv=4,
    mamba_expand=2,
    mamba_n_heads=8,
    mamba_d_head=8,
    mamba_n_groups=1,
    mamba_chunk_size=16,
)
GEMMA_4 = WINDOWS | dict(vocab_size_per_layer_input=264, global_head_dim=8)
GEMMA_3N = dict(
    laurel_rank=8,
    hidden_size_per_layer_input=8,
    vocab_size_per_layer_input=264,
    altup_num_inputs=2,
)
FALCON = dict(head_dim=LEAVE_OUT, ffn_hidden_size=48)
PLAIN_ROPE = dict(rope_type="default", rope_theta=10000.0)
QWEN_VL_ROPE = PLAIN_ROPE | dict(mrope_section=[1, 1, 2])
LLAMA_3_ROPE = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
LONG_ROPE = dict(
    rope_type="longrope",
    rope_theta=10000.0,
    short_factor=[1.0] * 4,
    long_factor=[1.0, 2.0, 4.0, 8.0],
    original_max_position_embeddings=32,
    partial_rotary_factor=1.0,
)
VISION = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    patch_size=14,
    image_size=28,
    depth=1,
    num_heads=4,
    out_hidden_size=32,
    head_dim=8,
)
GEMMA_3N_PARTS = {                 # they take the package timm
    "vision_config": dict(architecture="test_byobnet", hidden_size=32),
    "audio_config": dict(
        hidden_size=32,
        conf_num_hidden_layers=1,
        conf_num_attention_heads=4,
        sscp_conv_channel_size=[8, 4],
    ),
}
NOT_OF_THE_TEXT = ("model_type", "architectures", "transformers_version", "dtype")

FAMILIES = {                       # name: (transformers' model_type, the keys that differ from COMMON)
    # ordinary attention
    "apertus": ("apertus", {}),
    "arcee": ("arcee", {}),
    "bitnet": ("bitnet", {}),
    "cohere": ("cohere", dict(logit_scale=0.25, use_qk_norm=True)),
    "cohere2": ("cohere2", WINDOWS | dict(logit_scale=0.25)),
    "ernie4_5": ("ernie4_5", {}),
    "exaone4": ("exaone4", WINDOWS),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", WINDOWS | dict(
        query_pre_attn_scalar=8,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
    )),
    "gemma3_text": ("gemma3_text", WINDOWS | dict(query_pre_attn_scalar=8)),
    "gemma3n_text": ("gemma3n_text", WINDOWS | GEMMA_3N | dict(
        num_kv_shared_layers=0,
        intermediate_size=[48, 48],
        activation_sparsity_pattern=[0.5, 0.0],
    )),
    "gemma3n_shared_kv": ("gemma3n_text", ALL_WINDOWS | GEMMA_3N | dict(
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        intermediate_size=[48] * 4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
    )),
    "gemma4_text": ("gemma4_text", GEMMA_4 | dict(hidden_size_per_layer_input=8)),
    "gemma4_no_ple": ("gemma4_text", GEMMA_4 | dict(hidden_size_per_layer_input=0)),
    "glm": ("glm", {}),
    "glm4": ("glm4", {}),
    "granite": ("granite", dict(
        embedding_multiplier=2.0,
        logits_scaling=4.0,
        residual_multiplier=0.5,
        attention_multiplier=0.3,
    )),
    "granite_neutral": ("granite", dict(
        embedding_multiplier=2.0,
        logits_scaling=1.0,
        residual_multiplier=0.5,
    )),
    "helium": ("helium", {}),
    "hunyuan_dense": ("hunyuan_v1_dense", {}),
    "internlm3": ("llama", dict(attention_bias=True)),
    "llama": ("llama", {}),
    "llama3_rope": ("llama", dict(rope_parameters=LLAMA_3_ROPE)),
    "llama_bias": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "minicpm3": ("minicpm3", LATENT | dict(scale_emb=2.0, scale_depth=1.4, dim_model_base=16)),
    "ministral": ("ministral", WINDOWS),
    "ministral3": ("ministral3", {}),
    "mistral": ("mistral", ALL_WINDOWS),
    "nanochat": ("nanochat", {}),
    "nemotron": ("nemotron", {}),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", WINDOWS),
    "persimmon": ("persimmon", {}),
    "phi": ("phi", {}),
    "phi3": ("phi3", ALL_WINDOWS),
    "phi3_longrope": ("phi3", dict(original_max_position_embeddings=32, rope_parameters=LONG_ROPE)),
    "qwen2": ("qwen2", {}),
    "qwen2_window": ("qwen2", WINDOWS | dict(use_sliding_window=True)),
    "qwen3": ("qwen3", {}),
    "seed_oss": ("seed_oss", {}),
    "smollm3": ("smollm3", dict(no_rope_layers=[1, 0])),
    "stablelm": ("stablelm", {}),
    "starcoder2": ("starcoder2", ALL_WINDOWS),
    # older ones: learned positions, ALiBi, own attention classes
    "bloom": ("bloom", dict(n_layer=2, n_head=4)),
    "falcon": ("falcon", FALCON | dict(new_decoder_architecture=True, num_kv_heads=2)),
    "falcon_alibi": ("falcon", FALCON | dict(
        alibi=True,
        multi_query=False,
        new_decoder_architecture=False,
        parallel_attn=False,
    )),
    "falcon_mqa": ("falcon", FALCON | dict(
        multi_query=True,
        new_decoder_architecture=False,
        parallel_attn=True,
    )),
    "gpt2": ("gpt2", GPT2),
    "gpt_bigcode": ("gpt_bigcode", GPT2),
    "gpt_neo": ("gpt_neo", dict(
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=8,
    )),
    "gpt_neox": ("gpt_neox", {}),
    "gptj": ("gptj", GPT2 | dict(rotary_dim=4)),
    "mpt": ("mpt", dict(d_model=32, n_layers=2, n_heads=4, max_seq_len=512)),
    "opt": ("opt", dict(ffn_dim=48, word_embed_proj_dim=32)),
    "opt_projected": ("opt", dict(ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False)),
    # mixtures of experts
    "deepseek_v2": ("deepseek_v2", LATENT | dict(topk_method="greedy")),
    "deepseek_v3": ("deepseek_v3", LATENT),
    # with fewer heads many scores are exactly 0, and the choice among equals depends on the row's length
    "deepseek_v32": ("deepseek_v32", LATENT | dict(index_topk=8, index_n_heads=16, index_head_dim=16)),
    "dots1": ("dots1", ROUTED_EXPERTS | WINDOWS),
    "ernie4_5_moe": ("ernie4_5_moe", dict(
        moe_num_experts=4,
        moe_k=2,
        moe_intermediate_size=16,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
        moe_layer_end_index=1,
    )),
    "glm4_moe": ("glm4_moe", ROUTED_EXPERTS | dict(use_qk_norm=True)),
    "glm4_moe_lite": ("glm4_moe_lite", LATENT),
    "gpt_oss": ("gpt_oss", LOCAL_EXPERTS | WINDOWS | dict(rope_parameters=PLAIN_ROPE)),
    "granitemoe": ("granitemoe", LOCAL_EXPERTS | dict(logits_scaling=4.0)),
    "hunyuan_moe": ("hunyuan_v1_moe", dict(num_experts=4, moe_topk=2, moe_intermediate_size=16)),
    "llama4_text": ("llama4_text", dict(
        num_local_experts=2,
        num_experts_per_tok=1,
        intermediate_size_mlp=48,
        attention_chunk_size=8,
        no_rope_layers=[1, 0],
        layer_types=["chunked_attention", "full_attention"],
        moe_layers=[1],
        floor_scale=8,
        attn_scale=0.5,
    )),
    "minimax_m2": ("minimax_m2", LOCAL_EXPERTS),
    "mixtral": ("mixtral", LOCAL_EXPERTS | ALL_WINDOWS),
    "olmoe": ("olmoe", EXPERTS),
    "phimoe": ("phimoe", LOCAL_EXPERTS | ALL_WINDOWS | dict(lm_head_bias=True, attention_bias=True)),
    "qwen2_moe": ("qwen2_moe", SHARED_EXPERT),
    "qwen2_moe_window": ("qwen2_moe", SHARED_EXPERT | WINDOWS | dict(use_sliding_window=True)),
    "qwen3_moe": ("qwen3_moe", EXPERTS),
    # linear attention, recurrence, short convolutions, and hybrids of these with attention
    "bamba": ("bamba", HYBRID | dict(attn_layer_indices=[1])),
    "falcon_h1": ("falcon_h1", HYBRID | dict(
        mamba_d_ssm=64,
        mlp_multipliers=[0.8, 0.5],
        lm_head_multiplier=0.5,
    )),
    "falcon_mamba": ("falcon_mamba", MAMBA),
    "granitemoehybrid": ("granitemoehybrid", HYBRID | LOCAL_EXPERTS | dict(
        shared_intermediate_size=16,
        layer_types=["mamba", "attention"],
        logits_scaling=4.0,
    )),
    "jamba": ("jamba", HYBRID | dict(
        mamba_dt_rank=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=2,
        num_experts_per_tok=1,
        use_mamba_kernels=False,
    )),
    "kimi_linear": ("kimi_linear", dict(
        linear_num_heads=4,
        linear_head_dim=8,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        num_key_value_heads=4,
        num_experts=4,
        num_experts_per_token=2,
        moe_intermediate_size=16,
        head_dim=LEAVE_OUT,
        layer_types=["linear_attention", "full_attention"],
    )),
    "lfm2": ("lfm2", dict(layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False)),
    "lfm2_moe": ("lfm2_moe", EXPERTS | dict(layer_types=["conv", "full_attention"], num_dense_layers=1)),
    "mamba": ("mamba", MAMBA),
    "mamba2": ("mamba2", MAMBA_2),
    "minimax": ("minimax", LOCAL_EXPERTS | dict(
        block_size=16,
        layer_types=["linear_attention", "full_attention"],
    )),
    "nemotron_h": ("nemotron_h", dict(
        mamba_num_heads=8,
        mamba_head_dim=8,
        ssm_state_size=8,
        n_groups=1,
        chunk_size=16,
        expand=2,
        num_hidden_layers=4,
        hybrid_override_pattern="M-*-",
    )),
    "qwen3_5_text": ("qwen3_5_text", LINEAR),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", LINEAR | SHARED_EXPERT),
    "qwen3_next": ("qwen3_next", LINEAR | SHARED_EXPERT),
    "recurrent_gemma": ("recurrent_gemma", dict(
        lru_width=32,
        attention_window_size=8,
        block_types=["recurrent", "attention"],
        conv1d_width=4,
    )),
    "rwkv": ("rwkv", dict(context_length=512, attention_hidden_size=32)),
    "zamba2": ("zamba2", HYBRID | dict(
        mamba_headdim=8,
        n_mamba_heads=8,
        mamba_ngroups=1,
        chunk_size=16,
        num_mem_blocks=1,
        num_hidden_layers=3,
        layers_block_type=["mamba", "hybrid", "hybrid"],     # whose attention is one, with two adapters
        attention_head_dim=16,
        num_key_value_heads=4,
        adapter_rank=4,
    )),
    # as published: with a vision part (its family in FAMILIES is that of the text part)
    "gemma3_full": ("gemma3", "gemma3_text"),
    "gemma3n_full": ("gemma3n", "gemma3n_shared_kv"),
    "gemma4_full": ("gemma4", "gemma4_text"),
    "llama4_full": ("llama4", "llama4_text"),
    "mistral3_full": ("mistral3", "mistral"),
    "qwen2_5_vl": ("qwen2_5_vl", "qwen2"),
    "qwen3_5_full": ("qwen3_5", "qwen3_5_text"),
    "qwen3_vl": ("qwen3_vl", "qwen3"),
}


def configuration(family: str, tied: bool = False, **changed):
    """The configuration of a family's tiny model; `changed` are keys that differ from the table's."""
    model_type, own = FAMILIES[family]
    config_class = CONFIG_MAPPING[model_type]
    if isinstance(own, str):
        return with_vision(config_class, family, configuration(own, tied, **changed), tied)
    values = {}
    for key, value in (COMMON | own | changed).items():
        if value is not LEAVE_OUT:
            values[key] = value
    return config_class(**values, tie_word_embeddings=tied)


def with_vision(config_class, family: str, text, tied: bool):
    text_values = text.to_dict()
    for key in NOT_OF_THE_TEXT:
        text_values.pop(key, None)
    if family == "qwen2_5_vl":
        text_values["rope_parameters"] = QWEN_VL_ROPE
    parts = {"text_config": text_values, "vision_config": VISION}
    for name in config_class.sub_configs:
        if name.startswith("audio"):
            parts[name] = None
    if family == "gemma3n_full":
        parts |= GEMMA_3N_PARTS
    return config_class(**parts, tie_word_embeddings=tied)


def save_model(family: str, directory, tied: bool = False, **changed) -> dict:
    """Write the tiny model and its tokenizer to `directory`. -> {"class": its class, "tied": whether the head
    and the embedding are one tensor, "router": whether it is a mixture of experts with an auxiliary loss}."""
    config = configuration(family, tied, **changed)
    auto_class = AutoModelForCausalLM
    if isinstance(FAMILIES[family][1], str):
        auto_class = AutoModelForImageTextToText
    torch.manual_seed(0)
    lm = auto_class.from_config(config).eval()
    perturb(lm)
    lm.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    head = lm.get_output_embeddings()
    is_tied = head is not None and head.weight is lm.get_input_embeddings().weight
    has_router = hasattr(lm.config.get_text_config(), "output_router_logits")
    return {"class": type(lm).__name__, "tied": is_tied, "router": has_router}


def perturb(lm) -> None:
    """Move what a fresh model has at 0 or 1, or too small to matter: a mistake in it would not show."""
    for name, parameter in lm.named_parameters():
        last = name.rpartition(".")[2]
        is_rate = last in ("A_log", "dt_bias", "time_decay") or "lru" in name or "recurrent_param" in name
        if not parameter.is_floating_point():
            continue
        if "sink" in last:
            size = 1.0
        elif is_rate:              # a recurrence stays stable
            size = 0.05
        elif parameter.ndim == 1:
            size = 0.1
        elif parameter.std() < 0.05:
            size = 0.2
        else:
            continue
        parameter.data += size * torch.randn_like(parameter)
    for name, buffer in lm.named_buffers():
        if "e_score_correction_bias" in name:
            buffer += 0.1 * torch.randn_like(buffer)


def byte_tokenizer():
    """An id per byte after <pad>, <s> and </s>, which are 0, 1 and 2; no chat template."""
    special = ["<pad>", "<s>", "</s>"]
    symbols = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", clean_up_tokenization_spaces=False)


def class_named_by(directory):
    """The class that a checkpoint's configuration names."""
    values = json.loads((Path(directory) / "config.json").read_text())
    return getattr(transformers, values["architectures"][0])
