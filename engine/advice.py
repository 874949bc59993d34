"""What to write for a key that a program does not know: the key that means the same here, why none is needed,
the key that was misspelt, or nothing.

An unknown key comes from another project more often than from a slip of the hand, so its name is looked up
first, and only a slip of a letter counts as a misspelling: a word in place of another (`value_model` for
`model`) means something else. The tables hold judgements, each checked against tests/foreign_names.txt.
"""
import difflib
import os
import re
from typing import NamedTuple

# "our key of users: value (note)": what other projects call it. `users` are the algorithms or programs in
# which it means the same, all that have the key if there are none. Of several entries with a name,
# the first one that can be used counts.
SAME = {
    "algorithm":
        "loss_type loss_name loss loss.name rlhf_type rlhf stage trainer rl pref_loss dpo_loss_type "
        "advantage_estimator adv_estimator policy_loss_type loss_mode policy_loss.loss_mode algo "
        "algorithm.name trainer_type training_type",
    "algorithm of dpo: ipo": "ipo",
    "algorithm of dpo: rpo (its rpo_alpha is the weight of the chosen responses' likelihood)":
        "rpo_alpha pref_ftx cpo_alpha sft_weight nll_weight nll_loss_coef sft_loss_weight sft_coef dpo_ftx",
    "algorithm of grpo dr_grpo (grpo divides by the standard deviation of a group's rewards, dr_grpo does "
    "not)":
        "scale_rewards use_std_normalization norm_adv_by_std_in_grpo normalize_by_std scale_advantages "
        "std_normalization no_advantage_std_norm",
    "algorithm of grpo: gdpo (it normalises each reward by itself)": "multi_objective_aggregation",
    "algorithm of grpo gdpo dr_grpo gspo cispo: dapo (it has mask_truncated_completions)":
        "mask_truncated_completions overlong_filter overlong_filtering mask_truncated",
    "algorithm of grpo gdpo dr_grpo dapo gspo cispo rloo reinforce_pp ppo (gspo has one ratio per "
    "completion)":
        "importance_sampling_level",
    "algorithm of grpo gdpo dr_grpo dapo gspo cispo rloo reinforce_pp ppo (dr_grpo divides by a constant "
    "length, dapo by all tokens)":
        "loss_agg_mode length_normalization_type loss_aggregation token_level_loss",
    "model":
        "model_name_or_path model_name model_path model_id model_id_or_path base_model pretrain "
        "pretrained_model pretrained_model_name_or_path name_or_path hf_model policy_model actor_model "
        "policy_path model.path model.name",
    "model (the adapter's directory)":
        "adapter_name_or_path adapters adapter_path lora_model_dir peft_model_id lora_path",
    "reference":
        "ref_model reference_model ref_model_path ref_model_name_or_path reference_model_path "
        "ref_pretrain ref_policy ref_model_id ref_adapters ref_model_adapters ref_model.path "
        "ref.model.path",
    "reference_free": "ref_free use_reference_free",
    "teacher": "teacher_model teacher_model_name_or_path teacher_model_path teacher_model_id",
    "lmbda (the share of the prompts that the student answers itself)": "lambda",
    "data":
        "dataset_name dataset datasets dataset_path dataset_id data_path data_file data_files train_file "
        "train_files train_data train_dataset train_path train_data_path prompt_data in_path dataset.name "
        "dataset.path data.path datasets.path",
    "data (a list whose entries have a path and a weight)":
        "dataset_mixer dataset_mixture dataset_probs prompt_data_probs interleave_probs interleave_prob "
        "mix_strategy data_weights dataset_weights",
    "data (owner/name/subset)": "dataset_config dataset_config_name dataset_subset",
    "data (name:split)": "dataset_train_split train_split dataset_split dataset_splits prompt_split split",
    "columns":
        "prompt_key input_key output_key chosen_key rejected_key label_key answer_key prompt_column "
        "response_column chosen_column rejected_column column_mapping dataset_text_field text_column "
        "field_mapping",
    "eval_data":
        "eval_dataset eval_datasets eval_file eval_files eval_path eval_data_path val_data val_file "
        "val_files val_dataset validation_file validation_data test_path test_data test_datasets "
        "test_file",
    "eval_data (name:split)": "eval_split dataset_test_split test_split dataset_eval_split val_split",
    "eval_fraction":
        "val_size test_size val_set_size split_dataset_ratio validation_split validation_size eval_ratio "
        "val_ratio eval_split_ratio",
    "limit":
        "max_samples max_examples num_examples num_eval_examples eval_limit max_eval_samples "
        "n_eval_examples",
    "output":
        "exp_name experiment_name output_dir output_dirs output_path run_name save_dir save_path out_dir "
        "results_dir ckpt_dir ckpt_path default_local_dir trial_name",
    "truncate": "truncation truncation_mode truncation_strategy truncation_side",
    "shuffle": "shuffle_dataset dataset_shuffle shuffle_data train_dataloader_shuffle",
    "batch_size (examples per update, over all devices)":
        "total_batch_size global_batch_size train_batch_size effective_batch_size train_global_batch_size",
    "batch_size (examples per update: theirs times the accumulation steps times the devices)":
        "per_device_train_batch_size per_device_batch_size micro_batch_size device_train_batch_size "
        "per_gpu_train_batch_size",
    "num_mini_batches (batch_size / mini-batch size)": "ppo_mini_batch_size mini_batch_size",
    "rollout_batch_size of evaluate.py sample.py":
        "batch_size eval_batch_size per_device_eval_batch_size val_batch_size",
    "rollout_batch_size": "local_rollout_forward_batch_size",
    "max_length":
        "max_seq_length max_seq_len max_sequence_length cutoff_len sequence_len seq_length seq_len "
        "max_len model_max_length context_length max_context_length",
    "epochs": "n_epochs num_train_epochs num_epochs total_epochs num_episodes train_epochs",
    "epochs of sft dft dpo rpo ipo apo kto orpo simpo cpo rm": "max_epochs",
    "max_steps":
        "max_train_steps total_steps num_steps n_steps train_steps num_train_steps num_training_steps "
        "training_steps total_training_steps max_iters max_iterations n_grpo_steps n_sft_steps "
        "n_train_steps",
    "lr": "learning_rate init_lr peak_lr base_lr max_lr actor_learning_rate actor_lr policy_lr",
    "schedule":
        "lr_scheduler_type lr_scheduler lr_schedule scheduler scheduler_type lr_decay_style warmup_style",
    "warmup (below 1: a share of all updates; from 1: a number of updates)":
        "warmup_ratio warmup_steps num_warmup_steps lr_warmup_ratio lr_warmup_steps lr_warmup_steps_ratio "
        "lr_warmup_iters warmup_iters warmup_proportion warmup_fraction",
    "weight_decay": "l2 wd adam_weight_decay",
    "max_grad_norm":
        "grad_clip gradient_clipping clip_grad clip_grad_norm max_norm gradient_clip_val "
        "max_gradient_norm",
    "precision (of the arithmetic: auto, fp32 or bf16)":
        "bf16 fp16 dtype torch_dtype model_dtype compute_dtype policy_dtype mixed_precision amp",
    "gradient_checkpointing":
        "activation_checkpointing use_gradient_checkpointing enable_gradient_checkpointing",
    "deterministic": "full_determinism",
    "compile": "torch_compile use_torch_compile compile_model enable_compile",
    "lora_r": "lora_rank lora_dim",
    "lora_r (a rank such as 16; 0 trains every weight)":
        "use_lora use_peft train_type tuner_type sft_type finetuning_type adapter peft_type lora "
        "tune_type",
    "lora_targets": "lora_target lora_target_modules target_modules lora_modules",
    "load_in_4bit (true: there are 4 bits only)": "quantization_bit quant_bits qlora load_4bit",
    "merge": "merge_lora merge_adapter merge_and_unload",
    "eval_every":
        "eval_steps evaluation_steps eval_freq eval_interval eval_every_steps eval_step test_freq "
        "val_check_interval validation_steps",
    "save_every":
        "save_steps save_freq save_interval save_every_steps save_step save_model_step checkpoint_every "
        "checkpointing_steps save_iters",
    "log_every":
        "logging_steps log_steps log_freq log_interval logging_interval print_log_step log_every_steps "
        "log_every_n_steps",
    "keep":
        "save_total_limit max_ckpt_num max_actor_ckpt_to_keep save_limit keep_last_n max_checkpoints "
        "checkpoints_total_limit max_to_keep",
    "resume":
        "resume_from_checkpoint resume_from_path resume_from resume_mode load_checkpoint resume_training "
        "auto_resume_from_checkpoints",
    "report_to (tensorboard, wandb, swanlab or trackio)":
        "report_to_tensorboard logger loggers wandb wandb.enabled use_wandb use_swanlab swanlab tensorboard "
        "use_tensorboard tracker trackers",
    "quiet (true: no progress bar and no lines of updates)": "disable_tqdm silent no_progress_bar",
    "rollout_engine (vllm, http://host:port, or null for the own sampler)":
        "use_vllm infer_backend inference_backend rollout_backend rollout.name",
    "vllm_memory (a share of the GPU's memory)": "vllm_gpu_memory_utilization gpu_memory_utilization",
    "vllm_tensor_parallel (processes that share an engine)":
        "vllm_tensor_parallel_size rollout.tensor_model_parallel_size rollout_tp_size",
    "importance_sampling (truncate, mask or off)":
        "vllm_importance_sampling_correction enable_vllm_is_correction vllm_importance_sampling_mode",
    "sample_every (a number of updates)": "log_completions sample_during_eval",
    "seed": "random_seed global_seed",
    "chat_template":
        "template chat_template_path chat_template_jinja custom_chat_template chat_template_name",
    "system_prompt": "system default_system system_message default_system_prompt default_system_message",
    "chat_template_kwargs": "apply_chat_template_kwargs",
    "chat_template_kwargs (a mapping such as {enable_thinking: false})": "enable_thinking",
    "train_on (assistant is the default)":
        "assistant_only_loss completion_only_loss train_on_responses_only mask_prompt "
        "loss_on_completions_only response_only_loss",
    "train_on (all trains the prompts too)": "train_on_prompt train_on_inputs train_on_prompts",

    # preferences
    "beta of dpo rpo ipo apo kto orpo simpo cpo": "pref_beta rl_beta dpo_beta",
    "beta of kto": "kto_beta",
    "beta of simpo": "simpo_beta",
    "beta of cpo": "cpo_beta",
    "beta of ipo": "ipo_beta ipo_tau tau",
    "beta of orpo": "orpo_alpha orpo_beta orpo_lambda lambda lambda_orpo lambda_or",
    "rpo_alpha": "pref_ftx cpo_alpha sft_weight nll_weight nll_loss_coef sft_loss_weight sft_coef dpo_ftx",
    "cpo_alpha":
        "pref_ftx rpo_alpha sft_weight nll_weight nll_loss_coef sft_loss_weight sft_coef cpo_weight "
        "bc_weight",
    "label_smoothing": "dpo_label_smoothing",
    "average_log_prob of dpo": "dpo_norm_loss preference_average_log_probs",
    "simpo_gamma (their ratio times beta)": "gamma_beta_ratio",
    "simpo_gamma of simpo": "gamma",
    "desirable_weight": "kto_chosen_weight kto_desirable_weight",
    "undesirable_weight": "kto_rejected_weight kto_undesirable_weight",

    # rollouts and rewards
    "reward":
        "reward_model reward_funcs reward_func reward_fn reward_function reward_functions "
        "reward_model_path reward_model_name_or_path reward_model_id reward_pretrain "
        "custom_reward_function custom_reward_function.path reward_model.path reward_model.model.path "
        "reward_models reward_function_path verifier",
    "reward_weights": "reward_funcs_weights reward_func_weights reward_fn_weights",
    "max_completion_length":
        "max_new_tokens generate_max_len max_response_length response_length sampling_max_tokens "
        "max_gen_len max_tokens max_completion_len max_generate_len max_generation_length "
        "completion_length",
    "temperature": "sampling_temperature rollout_temperature",
    "stop": "stop_strings stop_sequences stop_words stop_str stop_sequence",
    "num_generations":
        "group_size n_samples_per_prompt num_return_sequences num_samples_per_prompt "
        "num_responses_per_prompt samples_per_prompt num_samples_per_question rollout_n rollout.n rloo_k "
        "num_generations_per_prompt n",
    "n":
        "num_generations group_size n_samples_per_prompt num_return_sequences num_samples_per_prompt "
        "samples_per_prompt n_samples num_samples best_of_n",
    "num_iterations":
        "num_ppo_epochs ppo_epochs epochs_per_rollout_batch update_epochs mu ppo_inner_epochs "
        "num_inner_epochs",
    "num_ppo_epochs":
        "num_iterations ppo_epochs epochs_per_rollout_batch update_epochs noptepochs ppo_inner_epochs",
    "epsilon of grpo gdpo dr_grpo dapo gspo rloo reinforce_pp (epsilon_high bounds the ratio above)":
        "cliprange clip_range eps_clip clip_eps clip_epsilon clip_ratio ppo_clip clip_param",
    "epsilon of grpo gdpo dr_grpo dapo gspo rloo reinforce_pp":
        "clip_ratio_low epsilon_low eps_low clip_low eps_clip_low",
    "epsilon_high of grpo gdpo dr_grpo dapo gspo rloo reinforce_pp":
        "clip_ratio_high eps_high clip_high eps_clip_high",
    "epsilon and epsilon_high of grpo gdpo dr_grpo dapo gspo rloo reinforce_pp": "eps_clip_low_high",
    "cliprange": "epsilon clip_range eps_clip clip_eps clip_epsilon clip_ratio ppo_clip clip_param",
    "cliprange_value": "value_clip clip_range_vf value_clip_range vf_clip",
    "beta of grpo gdpo (weight of the KL to the reference)":
        "kl_coef kl_loss_coef kl_beta kl_coeff init_kl_coef kl_coefficient kl_weight kl_penalty_coef "
        "kl_ctrl.kl_coef",
    "kl_coef (weight of the KL to the reference)":
        "beta kl_beta kl_coeff init_kl_coef kl_coefficient kl_weight kl_penalty_coef kl_ctrl.kl_coef",
    "kl_estimator": "kl_penalty kl_penalty_type kl_type",
    "vf_coef": "value_loss_coef vf_coeff value_coef critic_loss_coef",
    "lam": "lambda lambd gae_lambda gae_lam",
    "gamma": "discount discount_factor gae_gamma",
    "whiten_rewards": "ppo_whiten_rewards",
    "baseline": "use_baseline",
    "mask_truncated_completions": "overlong_filter overlong_filtering mask_truncated",
    "dynamic_sample": "dynamic_sampling dynamic_filtering filter_groups filter_groups.enable",
    "skip_zero_std": "filter_zero_std_samples",
    "soft_overlong_cache": "soft_cache_length overlong_buffer_len overlong_buffer.len",
}

# why there is no such key: its names elsewhere. A name that ends in * stands for all that begin so.
NOT_NEEDED = {
    "batch_size counts the examples of an update, and micro_batch_tokens cuts them to fit the memory":
        "gradient_accumulation_steps gradient_accumulation grad_accum grad_accum_steps accumulation_steps "
        "accumulate_grad_batches micro_train_batch_size ppo_micro_batch_size ppo_micro_batch_size_per_gpu "
        "micro_batch_size_per_gpu train_micro_batch_size_per_gpu use_dynamic_bsz use_dynamic_batch "
        "auto_find_batch_size ppo_max_token_len_per_gpu train_max_tokens_per_gpu "
        "micro_batch_size_per_device",
    "micro_batch_tokens bounds the memory of evaluation too":
        "per_device_eval_batch_size eval_batch_size val_batch_size eval_accumulation_steps",
    "a rollout has batch_size prompts":
        "generation_batch_size steps_per_generation gen_batch_size n_prompts_per_rollout_batch",
    "examples are always packed, without padding":
        "packing sample_packing neat_packing packing_samples eval_packing eval_sample_packing "
        "padding_free packing_strategy packing_length pad_to_sequence_len pad_to_multiple_of "
        "use_remove_padding group_by_length length_column_name train_sampling_strategy padding_value "
        "ignore_pad_token_for_loss multipack_real_batches padding",
    "rows are read and tokenised once, at the start":
        "dataset_num_proc preprocessing_num_workers num_workers dataloader_num_workers "
        "dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor dataset_processes "
        "preprocessing_batch_size overwrite_cache load_from_cache_file lazy_tokenize streaming "
        "dataset_streaming tokenized_path dataset_prepared_path dataset_kwargs buffer_size "
        "shuffle_buffer_size",
    "columns that are not used are ignored": "remove_unused_columns",
    "the tokenizer beside the model is used":
        "tokenizer tokenizer_name_or_path tokenizer_path tokenizer_name tokenizer_type "
        "disable_fast_tokenizer use_fast_tokenizer",
    "the type stands in the model's config.json": "model_type",
    "code that comes with a model or a dataset is never run": "trust_remote_code",
    "the chat template is applied wherever the data are messages": "apply_chat_template",
    "max_length bounds a prompt and its response together":
        "max_prompt_length prompt_max_len max_prompt_len max_prompt_tokens max_source_length "
        "prompt_length max_target_length",
    "examples over max_length are dropped and counted": "filter_overlong_prompts excess_length_strategy",
    "the optimizer is always AdamW, with betas 0.9 and 0.999":
        "optim optimizer optim_type optimizer_type adam_beta1 adam_beta2 adam_epsilon adam_betas betas "
        "beta1 beta2 optim_args optim_target_modules adam_eps optimizer_name",
    "trained weights are fp32, and precision is that of the arithmetic": "pure_bf16 grad_accum_dtype",
    "precision is that of the reference and of evaluation too":
        "reference_dtype bf16_full_eval fp16_full_eval ref_dtype",
    "seed is that of the data's order too": "data_seed",
    "the reference's log-probs are computed once and kept for later runs":
        "precompute_ref_log_probs precompute_ref_batch_size",
    "the reference does not change during a run": "sync_ref_model ref_model_mixup_alpha ref_model_sync_steps",
    "no dropout acts, but lora_dropout in sft and dft": "disable_dropout attention_dropout",
    "attention is computed per segment, in memory that is linear in the length":
        "flash_attn flash_attention flash_attention_2 attn_impl use_flash_attn use_flash_attention "
        "use_flash_attention_2 use_flash_attn_2 sdp_attention xformers_attention eager_attention",
    "log-probs are computed in chunks, so that logits are never kept":
        "use_liger_kernel liger_* enable_liger_kernel use_liger cut_cross_entropy use_logits_to_keep "
        "use_fused_kernels fused_lm_head use_unsloth use_unsloth_gc use_liger_loss",
    "gradient_checkpointing needs no settings":
        "gradient_checkpointing_kwargs gradient_checkpointing_use_reentrant "
        "activation_checkpointing_kwargs",
    "torchrun says on how many devices a run is, and the model is sharded over them":
        "deepspeed deepspeed_* ds_config zero_stage zpg adam_offload fsdp fsdp_* ddp ddp_* ds3_* "
        "local_rank world_size nnodes n_gpus_per_node num_gpus ngpu gpus n_gpu num_processes "
        "nproc_per_node tensor_parallel_size tensor_model_parallel_size pipeline_parallel_size "
        "pipeline_model_parallel_size context_parallel_size ulysses_sequence_parallel_size "
        "sequence_parallel_size sequence_parallel_degree ring_attn_size parallelism_config "
        "accelerate_config accelerator_config strategy colocate_all_models actor_num_nodes "
        "actor_num_gpus_per_node critic_num_nodes critic_num_gpus_per_node",
    "a GPU is used where there is one": "device device_map use_cpu no_cuda cpu gpu_id cuda",
    "a tracker's project and account are variables of the environment, such as WANDB_PROJECT":
        "wandb_* swanlab_* trackio_* project project_name entity tracker_project_name",
    "metrics are written to metrics.jsonl in the run's directory, and report_to names trackers":
        "mlflow_* use_mlflow comet_* logging_dir tensorboard_dir plot_loss",
    "save_every and eval_every count updates":
        "save_strategy eval_strategy evaluation_strategy logging_strategy saves_per_epoch evals_per_epoch",
    "final/ holds the last weights":
        "load_best_model_at_end metric_for_best_model greater_is_better early_stopping_patience "
        "early_stop_interval",
    "checkpoints hold what it takes to continue a run":
        "save_only_model save_optimizer save_hf_ckpt save_state",
    "models are saved as safetensors": "save_safetensors safe_serialization",
    "a run never overwrites another one": "overwrite_output_dir add_version",
    "step 0 is evaluated too": "eval_on_start do_first_eval val_before_train eval_first",
    "train.py trains, and evaluates where there are eval_data or eval_fraction": "do_train do_eval",
    "a run is not uploaded; its final/ can be": "push_to_hub push_to_hub_* hub_* create_model_card",
    "the own sampler draws the completions, with rollout_engine=vllm vLLM in the same process, or with "
    "rollout_engine=http://host:port a running vllm serve":
        "vllm_mode vllm_server_* vllm_num_engines vllm_model_impl vllm_enable_* "
        "sglang_* lmdeploy_* enable_prefix_caching enforce_eager use_transformers_paged "
        "refresh_vllm_every sleep_level",
    "a completion ends at the model's own stop tokens; `stop` adds strings":
        "stop_token stop_token_id stop_token_ids eos_token eos_token_id pad_token pad_token_id "
        "stop_tokens special_tokens",
    "ppo's critic starts from the reward model, or from the start model":
        "value_model critic_model critic_pretrain value_model_path value_model_name_or_path "
        "critic_model_path critic.model.path critic_model_name_or_path",
    "lr is the critic's too": "critic_learning_rate critic_lr value_lr critic.optim.lr value_learning_rate",
    "the algorithm says whether the KL stands in the reward or in the loss":
        "use_kl_loss use_kl_in_reward kl_in_reward kl_loss_type",
    "the weight of the KL does not change during a run":
        "target_kl kl_target kl_horizon horizon adap_kl_ctrl kl_ctrl.type ppo_target kl_ctrl.horizon "
        "kl_ctrl.target_kl",
    "all linear layers are LoRA's default targets": "lora_target_linear",
    "the file is named without a key: python train.py FILE.yml": "config config_file config_path recipe cfg",
    "that is --dry-run, on the command line": "dry_run",
    "--dry-run shows what a run would do, and --debug an error's traceback": "debug",
}

# names that look like a slip in one of our keys and are something else
OTHERS = set("load_in_8bit alpha mode step steps date top label_smoothing_factor lora_bias".split())

# parts of a dotted name that say where a key stands, not what it means
NEUTRAL = set(
    "train training trainer config cfg args hparams model data dataset policy actor actor_rollout_ref "
    "rollout optim optimizer loss policy_loss algorithm algo generation sampling logging trl lora peft grpo "
    "dpo sft ppo kto orpo run checkpoint scheduler sampling_params training_args hyperparameters".split())

ENTRY = re.compile(r"(\w+(?: and \w+)?)(?: of ([\w .]+?))?((?:: \w+)?(?: \(.*\))?)")      # a key of SAME
SECRET = re.compile(r"(token|secret|password|api_?key)(?![a-z])", re.IGNORECASE)    # not tokens, tokenizer
TEXT_TOKEN = re.compile(      # of a text: stop_token, token_level
    r"(^|_)(stop|eos|bos|pad|unk|sep|mask|end|start|special|image|video|audio|think|per|next|last|first)"
    r"_token|_?token_(?!\d+$)", re.IGNORECASE)


class Meaning(NamedTuple):
    key: str            # ours
    users: list[str]    # in which it means the same; [] = in all that have it
    note: str           # ": value", " (...)", both or ""


def is_secret(name: str) -> bool:
    return bool(SECRET.search(name)) and not TEXT_TOKEN.search(name)


def plain(name: str) -> str:
    """A name without what projects write differently: learning-rate, learningRate and learning_rate are
    one."""
    return re.sub(r"[-_]", "", name).lower()


def read_tables() -> tuple[dict[str, list[Meaning]], dict[str, str]]:
    """SAME and NOT_NEEDED by the plain names of others."""
    meanings, reasons = {}, {}
    for entry, names in SAME.items():
        key, users, note = ENTRY.fullmatch(entry).groups()
        meaning = Meaning(key, (users or "").split(), note or "")
        for name in names.split():
            meanings.setdefault(plain(name), []).append(meaning)
    for reason, names in NOT_NEEDED.items():
        reasons |= dict.fromkeys(map(plain, names.split()), reason)
    return meanings, reasons


MEANINGS, REASONS = read_tables()


def ends(name: str) -> list[str]:
    """A dotted name, and what is left of it without neutral parts before: a.b of train.a.b, and b where a is
    neutral."""
    parts, found = name.split("."), [name]
    while len(parts) > 1 and parts[0].lower() in NEUTRAL:
        parts = parts[1:]
        found.append(".".join(parts))
    return found


def same(name: str, known, user: str) -> Meaning | None:
    """What `name` is called here, if that is one of the `known` keys of `user`, an algorithm or a program."""
    for end in ends(name):
        for meaning in MEANINGS.get(plain(end), []):
            has_key = meaning.key.split()[0] in known
            if has_key and (not meaning.users or user in meaning.users):
                return meaning
    return None


def why_not(name: str) -> str | None:
    """Why a key of this name is not needed; None of one that is not in the table."""
    for end in ends(name):
        wanted = plain(end)
        beginnings = [wanted[:length] + "*" for length in range(len(wanted), 1, -1)]
        for candidate in (wanted, *beginnings):
            if candidate in REASONS:
                return REASONS[candidate]
    return None


def is_slip(word: str, right: str) -> bool:
    """Whether `word` is `right`, or that with one letter too many, too few or wrong, or two swapped, and two
    letters of it are still there."""
    start = len(os.path.commonprefix([word, right]))
    rest, wanted = word[start:], right[start:]
    if rest == wanted:
        return True
    swapped = wanted[1:2] + wanted[:1] + wanted[2:]
    if rest == swapped or rest[1:] == wanted or rest == wanted[1:]:
        return min(len(word), len(right)) >= 2
    return rest[1:] == wanted[1:] and len(right) >= 3


def misspelt(name: str, known) -> str | None:
    """The known key of which `name` is a misspelling: with at most one slip in each of its words, or in the
    whole where the slip is at a _; the most similar one."""
    words, found = name.lower().split("_"), []
    for key in known:
        parts = key.split("_")
        slips = [is_slip(word, right) for word, right in zip(words, parts)]
        same_length = len(words) == len(parts)
        if same_length and all(slips) or len(key) > 5 and is_slip(plain(name), plain(key)):
            found.append(key)
    return max(found, key=lambda key: difflib.SequenceMatcher(None, name, key).ratio(), default=None)


def advice(name: str, known, user: str, program: str = "train.py") -> str:
    """The end of the sentence about a key that is none of the `known` keys of `user`: "; fix: ...", perhaps
    after a reason."""
    if meaning := same(name, known, user):
        return f"; fix: write {meaning.key}{meaning.note}"
    if reason := why_not(name):
        return f": {reason}; fix: remove it"
    last = ends(name)[-1]
    key = next((key for key in known if plain(key) == plain(last)), None)
    if key is None and plain(last) not in MEANINGS and last not in OTHERS:
        key = misspelt(last, known)
    return f"; fix: write {key}" if key else f"; fix: remove it (python {program} --help lists the keys)"


def nested_advice(key: str, leaves: list[str], known) -> str:
    """The same about a YAML mapping or list under `key` with values at the dotted names `leaves`, whatever
    the algorithm."""
    whole, found = same(key, known, ""), {}
    for leaf in leaves:
        name = f"{key}.{leaf}"
        meaning, last = same(name, known, ""), ends(name)[-1]
        ours = meaning.key if meaning else last if last in known else None
        if ours:
            found.setdefault(ours, name)
    if whole and not found.keys() - {whole.key}:
        return f"; fix: write {whole.key}{whole.note}"
    reason = why_not(key)
    if reason and not found:
        return f": {reason}; fix: remove it"
    pairs = [f"{ours} for {name}" for ours, name in found.items()]
    shown = f": {', '.join(pairs[:6])}" if pairs else ""
    return f"; fix: keys are flat, write one 'key: value' per line{shown}"
