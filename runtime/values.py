"""Validate option values (ranges, choices, no API keys), and set options that follow from others.

configurator.py calls problem() for each value, then settle() and conflict(). An option means the same in every script."""

import difflib
import math
import os
import re
from itertools import islice
from pathlib import Path

# option -> (minimum, maximum)
RANGES = {option: bounds for bounds, options in {
    (0, math.inf): 'skip_bad_steps lr warmup_steps weight_decay n_eval_examples save_every temperature retries center_coef kl_coef '
                   'vf_coef missing_eos_penalty w_good w_bad sft_coef alpha delta lam gamma a max_samples max_pairs max_letters',
    (0, 2**32 - 1): 'seed',  # multiples of it seed generators that take 64 bits
    (0, 1): 'noise_rate data_fraction frac_good frac_bad smooth',
    (0, 0.99): 'rho',
    (0, 0.9): 'lora_dropout',
    (1e-9, 1): 'top_p',  # 1e-9 stands for the smallest number above 0
    (1e-9, math.inf): 'max_grad_norm beta_prime lora_alpha clip value_clip beta tau mu importance_max peak_tflops',
    (1e-3, 1e6): 'timeout reward_timeout',
    (0, 1000): 'reward_workers',
    (1, 1000): 'concurrency threads width',
    (1, 100_000): 'n',
    (1, math.inf): 'batch_size max_tokens n_epochs n_examples eval_every keep_last log_every max_length max_prompt_length '
                   'max_new_tokens num_turns n_eval_model_samples n_steps prompt_tokens answer_tokens vocabulary lora_rank tp max_points rounds '
                   'minibatch_size ppo_epochs group_size sample_batch n_pairs n_held_out',
}.items() for option in options.split()}  # fmt: skip
# option -> allowed values
CHOICES = {
    'dtype': ('float32', 'bfloat16'), 'save_dtype': (None, 'float32', 'bfloat16', 'float16'), 'truncation': ('start', 'end'),
    'optimizer': ('AdamW', 'RMSprop', 'SGD'), 'lr_schedule': ('constant', 'linear', 'cosine'),
    'risk': ('cvar', 'erm', 'released'), 'gold': (None, 'toy'), 'quantize': (None, '4bit'), 'split': (None, 'train', 'test'),
    'shard': ('auto', 'none', 'grads', 'full'), 'attn': (None, 'sdpa', 'eager', 'flash_attention_2', 'flash_attention_3'),
    'activation_checkpointing': (False, True, 'selective'), 'task': (None, 'pairs', 'singles', 'sft', 'prompts'),
    'device_map': (None, 'balanced', 'balanced_low_0', 'sequential'),
}  # fmt: skip
# option that is a number -> the words that it may be as well
DIGITS = '[1-9][0-9]{0,5}'
WORDS = {'max_tokens': 'auto', 'save_every': f'auto|epoch_{DIGITS}'}
# environment variables that hold API keys. Options must not, because they are printed and saved
SECRETS = 'NANOPREF_API_KEY OPENAI_API_KEY HF_TOKEN HUGGING_FACE_HUB_TOKEN WANDB_API_KEY'.split()
MIN_KEY_LENGTH = 8  # shorter ones, such as EMPTY, are no secret, and may occur in texts

# option (with a value, or a remark on differences) -> its names in other projects
ELSEWHERE = {
    'lr': 'learning_rate', 'out_dir': 'output_dir exp_name run_name save_dir', 'n_epochs': 'num_train_epochs num_epochs epochs',
    'out_dir (its folder model is one for hf upload)': 'push_to_hub hub_model_id', 'n_examples (steps times batch_size)': 'max_steps',
    'model': 'model_name_or_path model_name pretrained model_id model_path base_model llm policy name_or_path load_from archive',
    'n_examples': 'num_examples n_prompts num_prompts max_samples max_train_samples',
    'model (its folder has the tokenizer)': 'tokenizer_name', 'model (its blocks are found)': 'block_name',
    'ref_model': 'ref_model_name_or_path', 'data': 'dataset_name dataset datasets train_file train_data prefs_path prompts prompt_data',
    'data (as in OWNER/NAME:CONFIG)': 'dataset_config', 'data (as in OWNER/NAME[SPLIT])': 'dataset_train_split',
    'eval_data': 'eval_dataset val_data eval_file', 'eval_data (as in OWNER/NAME[SPLIT])': 'dataset_test_split',
    'reward_model': 'reward_model_path reward_model_name_or_path', 'reward': 'reward_funcs reward_function custom_reward_function',
    'loss': 'loss_type loss_fn mode_loss', 'loss (tdpo1 or tdpo2, radpo1 or radpo2)': 'if_tdpo2 if_ra_dpo2',
    'device_map=balanced (BasicTrainer), tp=2 (TensorParallelTrainer) or torchrun (FSDPTrainer)': 'trainer',
    'batch_size (of all GPUs and microbatches together)': 'per_device_train_batch_size train_batch_size global_batch_size',
    'max_tokens (tokens of a microbatch; batch_size is the whole step)':
        'per_device_eval_batch_size eval_batch_size micro_batch_size gradient_accumulation_steps',
    'dtype=bfloat16': 'bf16 fp16', 'dtype': 'torch_dtype precision fsdp_policy_mp', 'dtype=float32': 'fp32',
    'activation_checkpointing': 'gradient_checkpointing', 'attn': 'attn_implementation flash_attn', 'optimizer': 'optim',
    'lr_schedule': 'lr_scheduler_type lr_scheduler', 'warmup_steps (a number of steps)': 'warmup_ratio',
    'max_length': 'max_seq_length max_seq_len cutoff_len sequence_len', 'max_prompt_length': 'max_prompt_len',
    'max_new_tokens': 'max_completion_length response_length generate_max_len', 'group_size': 'num_generations n_samples_per_prompt',
    'n': 'num_samples num_samples_per_prefix num_return_sequences', 'endpoint': 'base_url api_base', 'concurrency': 'num_workers',
    'endpoint (its key: NANOPREF_API_KEY in the environment)': 'api_key openai_api_key', 'truncation': 'truncation_mode truncation_side',
    'answers': 'model_outputs', 'against': 'reference_outputs', 'judge_model': 'annotators_config', 'judge_prompt': 'prompt_template',
    'log_every (examples)': 'logging_steps', 'save_every (examples)': 'save_steps save_strategy intermediate_checkpoints',
    'eval_every (examples)': 'eval_steps eval_strategy', 'keep_last': 'save_total_limit', 'wandb (a project), or tensorboard': 'report_to',
    'wandb': 'wandb_project', 'resume (on by default)': 'resume_from_checkpoint', 'lora_rank': 'lora_r use_peft use_lora',
    'lora_targets': 'lora_target_modules target_modules', 'quantize=4bit (with lora_rank)': 'load_in_4bit load_in_8bit',
    'cache_ref': 'precompute_ref_log_probs cache_reference_logprobs load_reference_logprobs',
    'gamma': 'simpo_gamma', 'beta_prime (beta-DPO: rho)': 'mode_weight', 'pack (on by default)': 'padding_free packing',
    'w_good': 'desirable_weight', 'w_bad': 'undesirable_weight', 'sample_during_eval': 'generate_during_eval',
    'frac_good': 'frac_unique_desirable', 'frac_bad': 'frac_unique_undesirable', 'mu': 'confidence_level',
    'sft_coef': 'sft_reg rpo_alpha', 'label_smoothing': 'robust_eps', 'importance': 'importance_correction',
    'max_grad_norm': 'clip_grad gradient_clipping', 'kl_coef': 'init_kl_coef kl_loss_coef', 'clip': 'cliprange epsilon clip_eps',
    'ppo_epochs': 'num_ppo_epochs num_iterations', 'minibatch_size': 'mini_batch_size', 'shard (under torchrun)': 'fsdp deepspeed',
    'chat (the template stands in the model folder)': 'chat_template', 'system': 'system_prompt', 'tau': 'discopop_tau',
}  # fmt: skip
# losses and data of other projects whose names are not near to ours, or nearer to the wrong one -> what to write here
NAMES_ELSEWHERE = {
    'sigmoid': 'dpo', 'exo_pair': 'exo', 'nca_pair': 'nca', 'bco_pair': 'bco', 'sppo_hard': 'sppo', 'aot_pair': 'aot',
    'sft': 'sft.py', 'csft': 'sft.py --control_tokens', 'ppo': 'ppo.py', 'grpo': 'ppo.py --loss=grpo',
    'ultrabin': 'ultrafeedback', 'ultrafeedback_binarized': 'ultrafeedback', 'hh_pairwise_noise': 'hh with --noise_rate',
}  # fmt: skip
# options that name a file, a folder, a model or somebody
NAMES = set('model data answers out_dir out eval_data ref_model reward_model critic against reward endpoint endpoint_model judge_model '
            'judge_prompt generator by columns wandb'.split())  # fmt: skip
# options that hold a model's folder or hub id, and their special values
MODELS = ('model', 'ref_model', 'reward_model', 'critic')
NO_MODEL = (None, 'toy', 'gold', 'head', 'own')


def hint(name, options):
    """Return a phrase that suggests an option for an unknown name, such as 'here it is lr' for learning_rate."""
    # loss.beta -> beta, max-length -> max_length
    plain = name.rpartition('.')[2].replace('-', '_')
    ours_of = names_elsewhere(options)  # name in another project -> what to write here, such as {'learning_rate': 'lr'}
    # names of other projects have to be more alike (0.7) than ours (0.6): else the hint for reward_name would be exp_name
    close_theirs = difflib.get_close_matches(plain, ours_of, cutoff=0.7)
    # the best match comes first; a perfect one is a name of another project, or ours behind a prefix or with other dashes
    matches = difflib.get_close_matches(plain, {*close_theirs, *options}, n=3, cutoff=0.6)
    if not matches:
        return '--help lists the options (names of your own in a config file begin with _)'
    if matches[0] == plain:
        return f'here it is {ours_of.get(plain, plain)}'
    # several may be equally near: bata is beta or data
    ratio_of = {match: difflib.SequenceMatcher(None, match, plain).ratio() for match in matches}
    ours = {ours_of.get(match, match) for match in matches if ratio_of[match] == ratio_of[matches[0]]}
    return f'did you mean {" or ".join(sorted(ours))}?'


def did_you_mean(word, known):
    """Return '; did you mean NAME?' for the name in known that is nearest to a word, or ''. Case and folders do not count.

    For a name of another project: '; here it is NAME'."""
    if word in NAMES_ELSEWHERE:
        return f'; here it is {NAMES_ELSEWHERE[word]}'
    names = {os.path.basename(name).lower(): name for name in known}
    near = difflib.get_close_matches(os.path.basename(str(word)).lower(), names, 1)
    return f'; did you mean {names[near[0]]}?' if near else ''


def names_elsewhere(options):
    """Return {name in another project: what to write here} for these options, such as {'bf16': 'dtype=bfloat16'} for dtype."""
    found = {}
    for ours, theirs in ELSEWHERE.items():
        option = re.match(r'\w+', ours)[0]  # dtype of dtype=bfloat16
        if option in options:
            found |= dict.fromkeys(theirs.split(), ours)
    return found


def problem(name, value):
    """Return why value is invalid for an option, as a phrase that follows its name, or None if it is valid."""
    is_number = type(value) in (int, float)
    low, high = RANGES.get(name, (-math.inf, math.inf))
    if is_number and not low <= value <= high:
        least = 'above 0' if low == 1e-9 else f'at least {low}'  # 1e-9 in RANGES stands for it
        most = '' if high == math.inf else f' and at most {high}'
        return f'must be {least}{most}, not {value}'
    # infinity is invalid even if the range has no upper end; but max_grad_norm=inf turns clipping off
    if is_number and name in RANGES and abs(value) == math.inf and name != 'max_grad_norm':
        return f'must be a finite number, not {value}'
    if type(value) is int and abs(value) >= 2**63:
        return 'is an integer that no machine counts to'
    if name in WORDS and isinstance(value, str) and not re.fullmatch(WORDS[name], value):
        words = WORDS[name].replace('|', ' or ').replace(DIGITS, 'N')
        return f'must be a number or {words}, not {value!r}'
    if name in CHOICES and value not in CHOICES[name]:
        known = [str(choice) for choice in CHOICES[name] if choice]
        return f'must be one of {", ".join(known)}, not {value!r}{did_you_mean(value, known)}'
    # --out_dir=$UNSET would write to the working directory, and --against=$UNSET be left out; None is of a script: f'--out_dir={out}'
    if value in ('', 'None') and name in NAMES:
        return f'is {value or "empty"}: give it a name, or leave it out'
    # a text must hold no key and no bad character; the message does not quote it
    if not isinstance(value, str):
        return None
    for variable in SECRETS:
        secret = os.environ.get(variable, '').strip()
        if len(secret) >= MIN_KEY_LENGTH and secret in value:
            return f'holds the key of {variable}; it stays in the environment, nothing else is needed'
    # https://user:password@host/
    if re.search(r'://[^/?#\s]*@', value):
        return 'has a name or a password in its address; a key belongs in the environment'
    # NUL, and surrogates, which UTF-8 cannot encode
    if re.search('[\0\ud800-\udfff]', value):
        return 'has characters that are no text'
    return None


def looked_in(path, folder=None):
    """Return ' in WORKING_DIR' for a missing relative path, and ' (did you mean PATH?)' for one that is near, or in folder."""
    path = Path(os.path.expanduser(path))
    where = '' if path.is_absolute() else f' in {os.getcwd()}'
    # the missing parts of out/sampel/samples.jsonl: itself and out/sampel. The last is misspelt
    missing = [part for part in (path, *path.parents) if not os.path.exists(part)]
    if not missing:
        return where
    neighbours = islice(Path(folder or missing[-1].parent).glob('*'), 2000)  # to compare names takes time
    # with ./ before it: a path such as sft alone would be taken for an option's name in another project
    hint = did_you_mean(f'./{missing[-1]}', neighbours).removeprefix('; ')
    return f'{where} ({hint})' if hint else where


def settle(config):
    """Set options of config that follow from others, in place. Returns notes about them for the user."""
    notes = []
    for name, value in config.items():
        # the shell leaves the ~ of --out_dir=~/x as it is
        if str(value).startswith('~/'):
            config[name] = os.path.expanduser(value)
    # --model=out/dpo, the out_dir of a run, means out/dpo/model
    for name in MODELS:
        folder = config.get(name)
        # special values, such as 'toy', are no folders
        if folder in NO_MODEL or not os.path.exists(f'{folder}/model/config.json'):
            continue
        # out/dpo may also be a model itself, with weights
        if not re.search(r'\.(safetensors|bin)\b', ' '.join(os.listdir(folder))):
            config[name] = f'{folder}/model'
            notes.append(f'{name} is {config[name]}, the model that the run in {folder} has left')
    # max_prompt_length=None means half of max_length; some scripts have neither
    if 'max_length' in config and config.get('max_prompt_length', 0) is None:
        half = config['max_length'] // 2
        config['max_prompt_length'] = half
        if config.origin['max_length'] != 'default':
            notes.append(f'max_prompt_length is {half}, half of max_length')
    return notes


def without_effect(config):
    """Return [(names of options, why setting them has no effect)] for a training script's options on data and evaluation."""
    found = []
    # only the reader of sharegpt takes num_turns
    if 'sharegpt' not in f'{config.data} {config.eval_data}':
        found.append((['num_turns'], 'it is for sharegpt'))
    if not config.n_eval_examples:
        switched_on = [name for name in ('eval_every', 'sample_during_eval') if config.get(name)]
        found.append((switched_on, 'there is nothing to evaluate on (n_eval_examples is 0)'))
    # scripts that cannot sample have no such option
    if not config.get('sample_during_eval', True):
        # a config file may set these for when sampling is on, so only those on the command line count
        given = config.given('n_eval_model_samples max_new_tokens temperature top_p')
        found.append((given, 'sample_during_eval is off'))
    elif config.get('temperature') == 0:
        found.append((['top_p'], 'temperature 0 takes the likeliest token'))
    return found


def wrong_environment():
    """Return a sentence about a variable of the environment that torchrun sets, and that has an impossible value, or None."""
    for name in 'RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_PORT'.split():
        value = os.environ.get(name, '1')
        lowest = 0 if name.endswith('RANK') else 1
        if not value.isdecimal() or not lowest <= int(value) < 2**16:
            return f'the environment has {name}={value}, which cannot be: unset it, or start with torchrun'
    return None


def conflict(config):
    """Return a sentence about options that exclude each other, or None."""
    # ppo.py cuts answers of the data (its option offline), but not sampled ones
    if not config.get('offline', True):
        return None
    length = config.get('max_length')
    of_prompt = config.get('max_prompt_length')
    # + 2: an answer has at least a token and its end token
    if None not in (length, of_prompt) and length < of_prompt + 2:
        least = max(3, of_prompt + 2)  # 3: half of it for the prompt, and these two
        return f'max_length {length} leaves no room for an answer behind max_prompt_length {of_prompt}: {least} will do'
    return None


def printable(text):
    """Return a text for a terminal, with control characters, which could move its cursor, replaced by codes such as \\x1b."""
    # tabs and line breaks stay, and so do the two colours of text/show.py
    control = r'(?!\x1b\[(?:32|0)m)[^\t\n\x20-\x7e\xa0-\U0010ffff]'
    return re.sub(control, lambda found: f'\\x{ord(found[0]):02x}', text)
