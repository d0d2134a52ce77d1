"""Runs scripts one after another in one launch, for test_lora.py and test_parallel.py:  tests/many.py PLAN.json

The plan is a list of commands: [script, flag ...], or ['cut', run, resumed, examples], which copies a finished run as if it had
died after so many examples."""

import contextlib
import json
import os
import runpy
import shutil
import sys
from pathlib import Path

import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import fsdp  # noqa: E402


def cut(run, resumed, examples):
    if int(os.environ.get('RANK', 0)) == 0:
        shutil.copytree(run, resumed)
        shutil.rmtree(f'{resumed}/model')
        config = Path(f'{resumed}/config.json')
        config.write_text(config.read_text().replace(f'{run}"', f'{resumed}"'))
        for checkpoint in Path(f'{resumed}/checkpoints').iterdir():
            if checkpoint.name > f'{examples:010d}':
                shutil.rmtree(checkpoint)
    if dist.is_initialized():
        dist.barrier()


def main():
    for command, *arguments in json.loads(Path(sys.argv[1]).read_text()):
        if command == 'cut':
            cut(*arguments)
            continue
        sys.argv = [command, *arguments]
        with open(os.devnull, 'w') as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            runpy.run_path(str(ROOT / command), run_name='script')


main()
fsdp.leave()
