"""What values of options make sense: ranges, choices, and texts that hold no key."""

import math
import os
import re

# for whichever of these options a script has: [low, high]
RANGES = {
    (0, math.inf): 'skip_bad_steps lr warmup_steps weight_decay n_eval_examples save_every temperature retries center_coef kl_coef '
                   'vf_coef missing_eos_penalty w_good w_bad sft_coef alpha delta lam',
    (0, 2**32 - 1): 'seed',  # multiples of it seed generators that take 64 bits
    (0, 1): 'noise_rate data_fraction frac_good frac_bad smooth',
    (0, 0.99): 'rho',
    (0, 0.9): 'lora_dropout',
    (1e-9, 1): 'top_p',
    (1e-9, math.inf): 'max_grad_norm beta_prime lora_alpha clip value_clip beta tau mu importance_max peak_tflops',
    (1e-3, 1e6): 'timeout reward_timeout',
    (0, 1000): 'reward_workers',
    (1, 1000): 'concurrency threads width',
    (1, math.inf): 'batch_size max_tokens n_epochs n_examples eval_every keep_last log_every max_length '
                   'max_prompt_length max_new_tokens num_turns n_eval_model_samples n_steps prompt_tokens '
                   'answer_tokens vocabulary n lora_rank tp minibatch_size ppo_epochs group_size sample_batch',
}  # fmt: skip
# or the choices
CHOICES = {
    'dtype': ('float32', 'bfloat16'), 'save_dtype': (None, 'float32', 'bfloat16', 'float16'), 'truncation': ('start', 'end'), 'optimizer': ('AdamW', 'RMSprop', 'SGD'),
    'lr_schedule': ('constant', 'linear', 'cosine'), 'risk': ('cvar', 'erm', 'released'), 'gold': (None, 'toy'),
    'quantize': (None, '4bit'),
    'shard': ('auto', 'none', 'grads', 'full'),
    'attn': (None, 'sdpa', 'eager', 'flash_attention_2', 'flash_attention_3'), 'split': (None, 'train', 'test'),
    'activation_checkpointing': (False, True, 'selective'),
    'task': (None, 'pairs', 'singles', 'sft', 'prompts'), 'device_map': (None, 'balanced', 'balanced_low_0', 'sequential'),
}  # fmt: skip

# they stay in the environment: no option may hold one, for options are printed and written down
SECRETS = ('NANOPREF_API_KEY', 'OPENAI_API_KEY', 'HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN', 'WANDB_API_KEY')


def problem(name, value):
    """Why the option cannot have this value, as the end of a sentence about it; None where it can."""
    bounds = next((pair for pair, names in RANGES.items() if name in names.split()), None)
    if bounds and type(value) in (int, float):
        if not bounds[0] <= value <= bounds[1]:
            return f'must lie between {bounds[0]} and {bounds[1]}, not {value}'
        if isinstance(value, float) and math.isinf(value) and name != 'max_grad_norm':
            return f'must be a finite number, not {value}'
    if isinstance(value, int) and abs(value) >= 2**63:
        return 'is an integer that no machine counts to'
    if name in ('max_tokens', 'save_every') and isinstance(value, str) and value != 'auto':
        return f'must be a number or auto, not {value!r}'
    if isinstance(value, str) and (wrong := text_problem(value)):
        return wrong
    if value not in CHOICES.get(name, (value,)):
        known = ', '.join(str(choice) for choice in CHOICES[name] if choice)
        return f'must be one of {known}, not {value!r}'
    return None


def text_problem(value):
    """The same of a text that no file name or tokenizer can hold, or that has a key in it; without showing that."""
    for variable in SECRETS:
        secret = os.environ.get(variable, '').strip()
        if len(secret) >= 8 and secret in value:
            return f'holds the key of {variable}; it stays in the environment, nothing else is needed'
    if re.search(r'://[^/?#\s]*@', value):
        return 'has a name or a password in its address; a key belongs in the environment'
    if '\0' in value or re.search('[\ud800-\udfff]', value):
        return 'has characters that are no text'
    return None


def looked_in(path):
    """The folder in which a relative path was looked for, as the end of a sentence that misses it; nothing of an absolute one."""
    path = os.path.expanduser(str(path))
    return '' if os.path.isabs(path) else f' in {os.getcwd()}'


# ---- options that follow from others ----

# names that other code has -> the name here, and what is different about it
ELSEWHERE = {
    'learning_rate': 'lr', 'output_dir': 'out_dir', 'exp_name': 'out_dir', 'num_train_epochs': 'n_epochs', 'num_epochs': 'n_epochs',
    'epochs': 'n_epochs', 'max_steps': 'n_examples (steps times batch_size)', 'model_name_or_path': 'model', 'model_name': 'model',
    'pretrained': 'model', 'model_id': 'model', 'tokenizer_name': 'model (its folder has the tokenizer)', 'dataset_name': 'data',
    'dataset': 'data', 'datasets': 'data', 'train_file': 'data', 'train_data': 'data', 'eval_dataset': 'eval_data',
    'val_data': 'eval_data', 'eval_file': 'eval_data', 'ref_model_name_or_path': 'ref_model', 'reward_model_path': 'reward_model',
    'reward_model_name_or_path': 'reward_model', 'reward_funcs': 'reward',
    'reward_function': 'reward', 'custom_reward_function': 'reward', 'loss_type': 'loss', 'loss_fn': 'loss', 'mode_loss': 'loss',
    'per_device_train_batch_size': 'batch_size (of all GPUs and microbatches together)',
    'train_batch_size': 'batch_size (of all GPUs and microbatches together)', 'global_batch_size': 'batch_size',
    'per_device_eval_batch_size': 'max_tokens (tokens of a microbatch)', 'eval_batch_size': 'max_tokens (tokens of a microbatch)',
    'micro_batch_size': 'max_tokens (tokens of a microbatch)',
    'gradient_accumulation_steps': 'max_tokens (tokens of a microbatch; batch_size is the whole step)',
    'bf16': 'dtype=bfloat16', 'fp16': 'dtype=bfloat16', 'torch_dtype': 'dtype', 'precision': 'dtype', 'fp32': 'dtype=float32',
    'gradient_checkpointing': 'activation_checkpointing', 'attn_implementation': 'attn', 'flash_attn': 'attn',
    'optim': 'optimizer', 'lr_scheduler_type': 'lr_schedule', 'lr_scheduler': 'lr_schedule',
    'warmup_ratio': 'warmup_steps (a number of steps)', 'max_seq_length': 'max_length', 'max_seq_len': 'max_length',
    'cutoff_len': 'max_length', 'sequence_len': 'max_length', 'max_completion_length': 'max_new_tokens',
    'response_length': 'max_new_tokens', 'num_generations': 'group_size', 'num_samples': 'n', 'logging_steps': 'log_every (examples)',
    'save_steps': 'save_every (examples)', 'eval_steps': 'eval_every (examples)', 'save_total_limit': 'keep_last',
    'report_to': 'wandb (a project), or tensorboard', 'wandb_project': 'wandb', 'resume_from_checkpoint': 'resume (on by default)',
    'lora_r': 'lora_rank', 'load_in_4bit': 'quantize=4bit (with lora_rank)', 'use_peft': 'lora_rank', 'use_lora': 'lora_rank', 'lora_target_modules': 'lora_targets',
    'precompute_ref_log_probs': 'cache_ref', 'cache_reference_logprobs': 'cache_ref', 'simpo_gamma': 'gamma', 'mode_weight': 'beta_prime',
    'desirable_weight': 'w_good', 'undesirable_weight': 'w_bad', 'frac_unique_desirable': 'frac_good',
    'frac_unique_undesirable': 'frac_bad', 'confidence_level': 'mu', 'sft_reg': 'sft_coef', 'rpo_alpha': 'sft_coef',
    'robust_eps': 'label_smoothing', 'importance_correction': 'importance', 'max_prompt_len': 'max_prompt_length',
    'clip_grad': 'max_grad_norm', 'gradient_clipping': 'max_grad_norm', 'num_samples_per_prefix': 'n', 'init_kl_coef': 'kl_coef',
    'chat_template': 'chat (the template stands in the model folder)', 'system_prompt': 'system',
}  # fmt: skip
# options of older versions: the value that changes nothing, since when there is no other, and why
GONE = {'compile': (False, '2026-11', 'compiled blocks were not faster on a CPU, nor tried on a GPU (docs/moved.md)')}
# options that name a model, and the values that name none
MODELS = ('model', 'ref_model', 'reward_model', 'critic')
NO_MODEL = (None, 'toy', 'gold', 'head', 'own')


def misplaced(word, before):
    """What is wrong with a word of the command line that is neither an option nor a config file. before: the word before it."""
    if before.startswith('--') and '=' not in before:
        return f'an option and its value are one word: {before}={word}'
    if '=' in word:
        name, _, value = word.partition('=')
        return f'{word!r} is no config file (.py); an option is written --{name.rpartition(".")[2]}={value}'
    return f'{word!r} is neither a config file (.py) nor an option (--name=value)'


def settle(config):
    """Give the options that follow from others their values, in place. Returns notes about them, as sentences."""
    notes = []
    # a run's folder stands for the model in it
    for name in MODELS:
        folder = config.get(name)
        if folder in NO_MODEL:
            continue
        inside = os.path.join(folder, 'model')
        if os.path.exists(os.path.join(inside, 'config.json')) and not _is_model(folder):
            config[name] = inside
            notes.append(f'{name} is {inside}, the model that the run in {folder} has left')

    # the prompt's share of the length
    if 'max_length' in config and config.get('max_prompt_length', 0) is None:
        half = config['max_length'] // 2
        config['max_prompt_length'] = half
        if config.origin['max_length'] != 'default':
            notes.append(f'max_prompt_length is {half}, half of max_length')
    return notes


def conflict(config):
    """Which options cannot be together, as a sentence; None where all can."""
    # ppo.py takes no answers from the data, unless it is offline
    if 'max_length' not in config or 'max_prompt_length' not in config or not config.get('offline', True):
        return None
    return no_room(config['max_length'], config['max_prompt_length'])


def no_room(max_length, max_prompt_length):
    """A sentence where lengths in tokens leave no room for an answer of one token and its end; else None."""
    if max_length < max_prompt_length + 2:
        return f'max_length {max_length} leaves no room for an answer behind max_prompt_length {max_prompt_length}'
    return None


def _is_model(folder):
    """Whether a folder holds a model itself. A run's folder has a config.json, too, but that is of the run."""
    return any(name.endswith(('.safetensors', '.safetensors.index.json', '.bin')) for name in os.listdir(folder))
