"""What values of options make sense: ranges, choices, and texts that hold no key."""

import math
import os
import re

# for whichever of these options a script has: [low, high]
RANGES = {
    (0, math.inf): 'skip_bad_steps lr warmup_steps weight_decay n_eval_examples temperature retries center_coef kl_coef '
                   'vf_coef missing_eos_penalty w_good w_bad sft_coef alpha delta lam',
    (0, 2**32 - 1): 'seed',  # multiples of it seed generators that take 64 bits
    (0, 1): 'noise_rate data_fraction frac_good frac_bad smooth',
    (0, 0.99): 'rho',
    (0, 0.9): 'lora_dropout',
    (1e-9, 1): 'top_p',
    (1e-9, math.inf): 'max_grad_norm beta_prime lora_alpha clip value_clip beta tau mu importance_max peak_tflops',
    (1e-3, 1e6): 'timeout',
    (1, 1000): 'concurrency threads width',
    (1, math.inf): 'batch_size max_tokens n_epochs n_examples eval_every save_every keep_last log_every max_length '
                   'max_prompt_length max_new_tokens num_turns n_eval_model_samples n_steps prompt_tokens '
                   'answer_tokens vocabulary n lora_rank tp minibatch_size ppo_epochs group_size sample_batch',
}  # fmt: skip
# or the choices
CHOICES = {
    'dtype': ('float32', 'bfloat16'), 'truncation': ('start', 'end'), 'optimizer': ('AdamW', 'RMSprop', 'SGD'),
    'lr_schedule': ('constant', 'linear', 'cosine'), 'risk': ('cvar', 'erm', 'released'), 'gold': (None, 'toy'),
    'shard': ('auto', 'none', 'grads', 'full'),
    'attn': (None, 'sdpa', 'eager', 'flash_attention_2', 'flash_attention_3'), 'split': (None, 'train', 'test'),
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
    if isinstance(value, str) and (wrong := text_problem(value)):
        return wrong
    if value not in CHOICES.get(name, (value,)):
        known = ', '.join(choice for choice in CHOICES[name] if choice)
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
