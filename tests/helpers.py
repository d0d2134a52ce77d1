"""What several test files use: scripts run here, in a process of their own or under torchrun; their files; tiny models."""

import bz2
import contextlib
import csv
import functools
import gc
import gzip
import io
import json
import lzma
import os
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import transformers

from configurator import configure
from tests import forks

# without this bfloat16 attention asks the processor itself whether it has AVX-512, and then fails, told not to use it
if os.environ.get('ATEN_CPU_CAPABILITY') in ('default', 'avx2'):
    torch.backends.mkldnn.enabled = False

ROOT = Path(__file__).resolve().parents[1]
SPEEDS = ('_per_second', 'sampling_share')  # ends of the names of metrics that depend on the machine

# ---- scripts ----


def collect_garbage():
    """Collect it now, if there is much, and not whenever python likes: in python 3.11 ast.parse fails (cpython issue 106905)
    where a collection within it runs a finalizer that parses, too, as every traceback that is printed does."""
    gc.disable()
    if gc.get_count()[0] > 100_000:
        gc.collect()


def run_script(script, *flags):
    """Run a script in this process, as if imported. Returns its globals; of two flags with one name the last counts."""
    from hf import load
    from runtime import checkpoint, guard

    load._configs.clear()  # a process of its own has read none
    given = {str(flag).partition('=')[0]: str(flag) for flag in flags}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', [script, *given.values()])
        patch.setattr(sys, 'excepthook', sys.excepthook)
        try:
            return runpy.run_path(str(ROOT / script), run_name='script')
        finally:
            # signals and the lock on out_dir are given back
            if not checkpoint.failed():
                checkpoint.wait()
                guard.end()


def python(*words, timeout=300, cwd=ROOT, **environment):
    """Run python in a process of its own, with the repository as its working directory. Returns it, with its text."""
    environment = os.environ | {name: str(value) for name, value in environment.items()}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=environment, timeout=timeout, capture_output=True, text=True)


def launch(world, plan, folder):
    """Do a plan on so many ranks, or with 0 in this process: tests/laws/launch.py has the words.

    Ranks are what torchrun would start, but forked from a process that has imported everything."""
    from tests.laws.launch import follow, rank

    plan = [[str(word) for word in command] for command in plan]
    if not world:
        return follow(plan)
    with socket.create_server(('127.0.0.1', 0)) as free:
        port = free.getsockname()[1]
    # one cache for the session: the toy world is tokenised once
    common = {'NANOPREF_CACHE': os.environ['NANOPREF_CACHE'], 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)}
    common |= {'WORLD_SIZE': str(world), 'LOCAL_WORLD_SIZE': str(world), 'GROUP_WORLD_SIZE': '1'}
    said = [Path(folder) / f'rank-{i}-of-{world}.txt' for i in range(world)]
    jobs = [(rank, plan, file, common | {'RANK': str(i), 'LOCAL_RANK': str(i)}) for i, file in enumerate(said)]
    assert forks.together(jobs) == [0] * world, [file.read_text()[-3000:] for file in said]


def end_process_group():
    """Leave the process group of one that a script has made here."""
    if dist.is_initialized():
        dist.destroy_process_group()


def cut_short(run, resumed, examples):
    """Copy a finished run as if it had died after so many examples."""
    shutil.copytree(run, resumed)
    for name in ('model', 'adapter'):
        shutil.rmtree(f'{resumed}/{name}', ignore_errors=True)
    config = Path(f'{resumed}/config.json')
    config.write_text(config.read_text().replace(f'{run}"', f'{resumed}"'))
    for checkpoint in Path(f'{resumed}/checkpoints').iterdir():
        if int(checkpoint.name) > int(examples):
            shutil.rmtree(checkpoint)


# ---- commands ----

RUN = 'dpo.py sft.py reward.py sample.py label.py ppo.py data.py tools.bench tools.plot tools.report feedback.score'.split()


def source_of(script):
    """Its file, as globals() has it there."""
    script = 'text.show' if script == 'data.py' else script
    return {'__file__': ROOT / (script if script.endswith('.py') else script.replace('.', '/') + '.py')}


def parse(command, monkeypatch):
    """Resolve a command's options as its script would, without running it."""
    words = shlex.split(command)
    script = next(word for word in words if word in RUN)
    arguments = words[words.index(script) + 1 :]
    if script in ('tools.plot', 'tools.report'):  # folders, not config files
        arguments = [word for word in arguments if word.startswith('-')]
    monkeypatch.chdir(ROOT)
    trains = script in ('dpo.py', 'sft.py', 'reward.py', 'ppo.py')
    # from the sources alone, so that parsing leaves the modules as they are
    return configure(source_of(script), arguments, SimpleNamespace(**source_of('training.py')) if trains else None)


# ---- files ----


def read_jsonl(file):
    """The rows of a .jsonl file."""
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def write_jsonl(file, rows):
    """Write rows as a .jsonl file. Returns its path, as a string."""
    Path(file).write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return str(file)


def write_data(path, rows):
    """Write rows in the format, and compressed, as the name of the file says. Returns the path as a string."""
    import pyarrow.feather
    import pyarrow.parquet

    from text.readers import PACKED

    suffix, out = next((s for s in reversed(path.suffixes) if s not in PACKED), ''), io.StringIO()
    if suffix in ('.parquet', '.arrow'):
        write = pyarrow.parquet.write_table if suffix == '.parquet' else pyarrow.feather.write_feather
        write(pyarrow.Table.from_pylist(rows), str(path))
        return str(path)
    if suffix == '.json':
        json.dump(rows, out)
    elif suffix in ('.csv', '.tsv'):
        lines = csv.DictWriter(out, rows[0], delimiter='\t' if suffix == '.tsv' else ',')
        lines.writeheader()
        lines.writerows(rows)
    else:
        out.writelines(json.dumps(row) + '\n' for row in rows)
    content, packer = out.getvalue().encode(), {'.gz': gzip, '.bz2': bz2, '.xz': lzma}.get(path.suffix)
    if path.suffix == '.zst':
        with pyarrow.CompressedOutputStream(str(path), 'zstd') as stream:
            stream.write(content)
    else:
        path.write_bytes(packer.compress(content) if packer else content)
    return str(path)


def metrics(folder, split=None, without=SPEEDS):
    """Rows of a run's metrics.jsonl, of one split or all, without what depends on the machine."""
    rows = [row for row in read_jsonl(Path(folder) / 'metrics.jsonl') if split in (None, row['split'])]
    return [{name: value for name, value in row.items() if not name.endswith(without)} for row in rows]


def undocumented(folder):
    """Names in the metrics.jsonl of all runs in a folder that docs/numbers.md lacks, where S stands for train or eval."""
    text = (ROOT / 'docs/numbers.md').read_text()
    found = {name for file in Path(folder).rglob('metrics.jsonl') for row in read_jsonl(file) for name in row}
    general = {name: re.sub('train|eval', 'S', re.sub('^score_[a-z]+', 'score_NAME', name)) for name in found}
    return {name for name in found if f'`{name}`' not in text and f'`{general[name]}`' not in text}


def tensors(folder, pattern='*.safetensors'):
    """All tensors of the .safetensors files of a folder, by name."""
    from safetensors.torch import load_file

    return {name: value for file in sorted(Path(folder).glob(pattern)) for name, value in load_file(file).items()}


def same_bits(found, expected):
    """Whether two folders hold the same tensors under the same names."""
    a, b = tensors(found), tensors(expected)
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def turn(role, text, **more):
    """A message of a chat."""
    return {'role': role, 'content': text, **more}


user, assistant, system = (functools.partial(turn, role) for role in ('user', 'assistant', 'system'))


# ---- models, columns ----


def tiny_model(folder, name, **options):
    """Save a model of two layers, large random weights and the toy tokenizer. Returns the folder, as a string."""
    from text import toy

    sizes = {'vocab_size': 512, 'hidden_size': 32, 'intermediate_size': 48, 'num_hidden_layers': 2, 'num_attention_heads': 4,
             'max_position_embeddings': 128, 'bos_token_id': None, 'eos_token_id': None, 'pad_token_id': None}  # fmt: skip
    sizes |= {} if name in ('gpt_neox', 'gpt2') else {'num_key_value_heads': 2}
    config = transformers.AutoConfig.for_model(name, **(sizes | {'initializer_range': 0.2} | options))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        # norms and biases, which are 1 and 0 so far
        for parameter in model.parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, parameter.mean().item(), 0.3)
    model.save_pretrained(folder)
    toy.tokenizer().save_pretrained(folder)
    return str(folder)


def tiny_reward(folder, tokenizer=None):
    """Save a reward model of the toy world's size with random weights, padded with a token of its own. Returns its folder."""
    from hf.load import separate_pad
    from text import toy

    tokenizer, config = separate_pad(tokenizer or toy.tokenizer()), toy.model_config()
    config.num_labels, config.vocab_size, config.pad_token_id = 1, config.vocab_size + 1, tokenizer.pad_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def shrink_toy(patch, folder):
    """Give the toy world 200 pairs a split in place of thousands, and a cache of its own in the folder."""
    from text import toy

    pairs = toy.pairs
    patch.setattr(toy, 'pairs', lambda split, n=200: pairs(split, min(n, 200)))
    patch.setenv('NANOPREF_CACHE', str(folder / 'cache'))


def own_head(folder):
    """Give a saved model, whose config says that the head is the embedding, a different lm_head.weight all the same."""
    from safetensors.torch import load_file, save_file

    file = Path(folder) / 'model.safetensors'
    weights = load_file(file)
    (name,) = (name for name in weights if name.endswith(('embed_tokens.weight', 'wte.weight')))
    noise = torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(9))
    save_file(weights | {'lm_head.weight': 0.3 * noise}, file, {'format': 'pt'})


def with_ratios(columns):
    """Columns of losses.py, and the log-ratios of their log-probs pi* and ref*."""
    sides = [name.removeprefix('pi') for name in columns if name.startswith('pi')]
    ratios = {f'ratio{s}': columns[f'pi{s}'] - columns[f'ref{s}'] for s in sides if f'ref{s}' in columns}
    return {**columns, **ratios}


@contextlib.contextmanager
def silent():
    """Print nothing for a while."""
    with open(os.devnull, 'w') as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        yield


def sentence(call, *arguments):
    """The one sentence with which a call is refused."""
    from configurator import UserError

    with pytest.raises(UserError) as info:
        call(*arguments)
    message = str(info.value)
    assert message and '\n' not in message and len(message) < 600
    return message


def refused(script, *flags):
    """The one sentence with which a script, run in this process, refuses its command line."""
    return sentence(run_script, script, *flags)


# the losses that are documented here, and have numbers of their authors'; a fork may have more
LOSSES = """dpo cdpo robust ipo tdpo1 tdpo2 aot hinge dpop exo nca bco sppo apo_zero apo_down discopop sigmoid_norm slic simpo orpo
cpo kto drdpo beta_dpo radpo1 radpo2 kto_zero""".split()
