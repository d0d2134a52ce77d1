"""Runs scripts one after another in one launch, for test_lora.py and test_parallel.py:  tests/many.py PLAN.json

The plan is a list of commands: [script, flag ...]; ['fails', file, script, flag ...], which writes the UserError to the file; or
['cut', run, resumed, examples], which copies a finished run as if it had died after so many examples."""

import contextlib
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

COMMON = ['--batch_size=12', '--n_examples=36', '--n_eval_examples=8', '--do_first_eval=false', '--warmup_steps=1',
          '--max_grad_norm=0.5', '--seed=3', '--max_length=64', '--max_prompt_length=32']  # fmt: skip


def launch(world, plan, file):
    """Run a plan on world ranks under torchrun, or with 0 in one process without it. file: where to keep the plan."""
    file.write_text(json.dumps([[str(word) for word in command] for command in plan]))
    torchrun = ['-m', 'torch.distributed.run', f'--nproc_per_node={world}'] if world else []
    environment = os.environ | {'NANOPREF_CACHE': str(file.parent / 'cache'), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, *torchrun, 'tests/many.py', str(file)], cwd=ROOT, env=environment, timeout=400,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def tiny_model(folder, name, **options):
    """A saved model of two layers, large random weights and the toy tokenizer."""
    import torch
    import transformers

    import toy

    sizes = {'vocab_size': 512, 'hidden_size': 32, 'intermediate_size': 48, 'num_hidden_layers': 2, 'num_attention_heads': 4,
             'max_position_embeddings': 128, 'bos_token_id': None, 'eos_token_id': None, 'pad_token_id': None}  # fmt: skip
    sizes |= {} if name in ('gpt_neox', 'gpt2') else {'num_key_value_heads': 2}
    config = transformers.AutoConfig.for_model(name, **(sizes | {'initializer_range': 0.2} | options))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases, which are 1 and 0 so far
                torch.nn.init.normal_(parameter, parameter.mean().item(), 0.3)
    model.save_pretrained(folder)
    toy.tokenizer().save_pretrained(folder)
    return str(folder)


def own_head(folder):
    """Give a saved model, whose config says that the head is the embedding, a different lm_head.weight all the same."""
    import torch
    from safetensors.torch import load_file, save_file

    file = Path(folder) / 'model.safetensors'
    weights = load_file(file)
    (name,) = (name for name in weights if name.endswith(('embed_tokens.weight', 'wte.weight')))
    noise = torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(9))
    save_file(weights | {'lm_head.weight': 0.3 * noise}, file, {'format': 'pt'})


def rows(folder):
    """The metrics of a run, without speeds."""
    found = map(json.loads, (Path(folder) / 'metrics.jsonl').read_text().splitlines())
    return [
        {k: v for k, v in row.items() if not k.endswith(('_per_second', 'padding_share', 'sampling_share'))}
        for row in found
    ]


def cut(run, resumed, examples):
    import torch.distributed as dist

    if int(os.environ.get('RANK', 0)) == 0:
        shutil.copytree(run, resumed)
        for name in ('model', 'adapter'):
            shutil.rmtree(f'{resumed}/{name}', ignore_errors=True)
        config = Path(f'{resumed}/config.json')
        config.write_text(config.read_text().replace(f'{run}"', f'{resumed}"'))
        for checkpoint in Path(f'{resumed}/checkpoints').iterdir():
            if int(checkpoint.name) > int(examples):
                shutil.rmtree(checkpoint)
    if dist.is_initialized():
        dist.barrier()


def main():
    import fsdp
    from configurator import UserError

    for command, *arguments in json.loads(Path(sys.argv[1]).read_text()):
        if command == 'cut':
            cut(*arguments)
            continue
        file, command, *flags = [*arguments[:1], *arguments[1:]] if command == 'fails' else ['', command, *arguments]
        sys.argv = [command, *flags]
        try:
            with open(os.devnull, 'w') as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
                runpy.run_path(str(ROOT / command), run_name='script')
        except UserError as error:
            if not file:
                raise
            Path(file).write_text(str(error))
    fsdp.leave()


if __name__ == '__main__':
    main()
