"""Signals save and leave with a documented code, supervisors start again, one run at a time has a folder."""

import contextlib
import os
import random
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from helpers import ROOT, launch, metrics, python, read_jsonl, refused, same_bits

from runtime import guard
from tests import forks

FLAGS = ['--batch_size=16', '--n_examples=320', '--save_every=64', '--eval_every=96', '--n_eval_examples=16', '--lr=1e-3',
         '--warmup_steps=2', '--sample_during_eval', '--n_eval_model_samples=4', '--max_new_tokens=8', '--data_fraction=0.2',
         '--max_length=64', '--max_prompt_length=32']  # fmt: skip
STARTED = []
# nohup, under which these tests may run, has SIGHUP ignored
HEEDED = [number for number in guard.SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
CODES = dict.fromkeys(HEEDED, guard.SAVED) | {signal.SIGINT: guard.INTERRUPTED}
SAVED = 'saved: the same command continues from here'


@pytest.fixture(autouse=True)
def none_left():
    yield
    for process in STARTED:
        if process.poll() is None:
            kill(process.pid, *below(process.pid))
    STARTED.clear()


def start(out_dir, world=0, torchrun=('--standalone',), prefix=(), **environment):
    """dpo.py in the background; world: ranks under torchrun, with these options; prefix: of the command."""
    words = ['-m', 'torch.distributed.run', *torchrun, f'--nproc_per_node={world}'] if world else []
    words += ['dpo.py', *FLAGS, f'--out_dir={out_dir}']
    log = open(f'{out_dir}-{random.randrange(10**9)}.txt', 'w+')
    # a prefix is a command, and PYTHONPATH has a module that is imported already in a process that is forked
    how = {'cwd': ROOT, 'env': os.environ | environment}
    if prefix or 'PYTHONPATH' in environment:
        command = [*prefix, sys.executable, *words]
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, **how)
    else:
        process = forks.Popen(words, log=log.name, **how)
    process.log = log
    STARTED.append(process)
    return process


def after(out_dir, examples, *how, **environment):
    """dpo.py in the background, now that it has trained on more than so many further examples."""
    before, process = seen(out_dir), start(out_dir, *how, **environment)
    until(lambda: seen(out_dir) > before + examples, process)
    return process


def text(process):
    process.log.seek(0)
    return process.log.read()


def until(condition, process, seconds=120):
    """Wait for a condition, while the process lives."""
    deadline = time.time() + seconds
    while not condition():
        assert process.poll() is None and time.time() < deadline, text(process)[-3000:]
        time.sleep(0.02)


def end(process, code, seconds=180):
    """Wait for its end, with this exit code. Returns what it has said."""
    assert process.wait(seconds) == code, text(process)[-3000:]
    return text(process)


def saves(out, process, number, code):
    """Send a signal, and see it save what it has trained on, so that nothing is done twice. Returns what it has said."""
    process.send_signal(number)
    said = end(process, code)
    assert SAVED in said and (out / 'latest').read_text() == f'checkpoints/{seen(out):010d}\n'
    return said


def seen(folder):
    """Examples that a running run has trained on."""
    with contextlib.suppress(OSError, ValueError):
        return max(row['counters/examples'] for row in read_jsonl(folder / 'metrics.jsonl'))
    return 0


def below(pid):
    """The processes below one: torchrun's workers are in sessions of their own."""
    found = []
    with contextlib.suppress(OSError):
        files = [task / 'children' for task in Path(f'/proc/{pid}/task').iterdir()]
        found = [int(child) for file in files for child in file.read_text().split()]
    return found + [deeper for child in found for deeper in below(child)]


def kill(*pids):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def same(folder, whole):
    assert metrics(folder) == metrics(whole)
    assert (folder / 'samples.jsonl').read_text() == (whole / 'samples.jsonl').read_text()
    assert same_bits(folder / 'model', whole / 'model')


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """Uninterrupted runs on one and two processes, made when first asked for."""
    folder = tmp_path_factory.mktemp('signals')

    def get(world):
        if not (folder / f'{world}').exists():
            launch(world, [['dpo.py', *FLAGS, f'--out_dir={folder}/{world}']], folder)
        return folder / f'{world}'

    return get


def test_every_signal_in_one_run(tmp_path, whole):
    """SIGTERM and Ctrl-C, wherever they hit, and a second Ctrl-C, which does not wait for the step; then the end of an unbroken
    run. SIGUSR1 and kill -9 are below. Beside it: a second run in the same folder is refused while the first goes on, and after the end."""
    out = tmp_path / 'run'
    # while the data is read nothing can be lost: it ends at once
    process = start(out, NANOPREF_CACHE=str(tmp_path / 'empty'))
    until(lambda: (out / '.lock').exists(), process)
    process.send_signal(signal.SIGTERM)
    assert 'SIGTERM: stopped' in end(process, guard.SAVED) and os.listdir(out) == ['.lock']
    for number in (signal.SIGTERM, signal.SIGINT):
        process = after(out, 16)
        if number == signal.SIGTERM:
            process.send_signal(signal.SIGSTOP)  # so that it is not done before the second has begun
            before = (out / 'metrics.jsonl').read_text()
            assert f'another run is using {out}' in refused('dpo.py', *FLAGS, f'--out_dir={out}')
            assert (out / 'metrics.jsonl').read_text() == before and process.poll() is None
            process.send_signal(signal.SIGCONT)
        said = saves(out, process, number, CODES[number])
        assert f'{number.name}: stopping after this step' in said and 'Traceback' not in said
    process = after(out, 16)
    os.kill(process.pid, signal.SIGSTOP)  # so that both are there before it can react
    process.send_signal(signal.SIGINT)
    os.kill(process.pid, signal.SIGCONT)
    time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    assert end(process, guard.INTERRUPTED) and not (out / 'model').exists()
    assert 'done' in end(start(out), 0)
    same(out, whole(0))
    assert len(os.listdir(whole(0) / 'checkpoints')) == 2  # by default
    assert 'holds this run already (finished)' in refused('dpo.py', *FLAGS, f'--out_dir={out}')
    same(out, whole(0))


def test_a_second_interrupt_is_called_that():
    """torchrun hands on a second Ctrl-C as SIGTERM, which nobody has sent."""
    sent = 'guard.on_signal(signal.SIGINT); guard.on_signal(signal.SIGTERM)'
    done = python('-c', f"import signal\nfrom runtime import guard\nguard._stage = 'training'\n{sent}")
    first, second = done.stderr.strip().split('\n\n')
    assert done.returncode == guard.INTERRUPTED and first.startswith('SIGINT: stopping after this step')
    assert second == 'SIGINT again: stopped at once: steps since the last checkpoint are lost'


def test_while_a_script_is_imported(tmp_path):
    """The first heavy import never ends, and says when it has begun. All other scripts heed signals before theirs, too."""
    stalls = f'import time; open({str(tmp_path / "begun")!r} + str(time.time_ns()), "w"); time.sleep(99)'
    (tmp_path / 'torch.py').write_text(stalls)
    processes = {number: start(tmp_path / 'run', PYTHONPATH=str(tmp_path)) for number in CODES}
    until(lambda: len(list(tmp_path.glob('begun*'))) == len(CODES), processes[signal.SIGINT])
    for number, process in processes.items():
        process.send_signal(number)
        assert end(process, CODES[number], 60).strip() == f'{number.name}: stopped'
    for script in 'sft dpo reward ppo sample label data tools/bench tools/plot tools/report feedback/score'.split():
        heavy = 'torch|numpy|transformers|tqdm|matplotlib|fsdp|training|datasets|data|losses|hf|rl|text|feedback'
        imports, watched, _ = (ROOT / f'{script}.py').read_text().partition('guard.watch(__name__)')
        assert watched and not re.search(rf'^(import|from) ({heavy})\b', imports, re.M), script


def test_in_a_rendezvous(tmp_path):
    """The main thread is in C++: as rank 0 it waits for the other rank, as rank 1 for a word of the store."""
    with socket.create_server(('127.0.0.1', 0)) as store:
        ports, common = (free_port(), store.getsockname()[1]), {'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1'}
        rank_0, rank_1 = (start(tmp_path / f'{i}', RANK=f'{i}', MASTER_PORT=f'{ports[i]}', **common) for i in range(2))
        store.settimeout(60)
        store.accept()
        until(lambda: listens(ports[0]), rank_0)
        for process, number in ((rank_0, signal.SIGINT), (rank_1, signal.SIGUSR1)):
            process.send_signal(number)
            assert 'Traceback' not in end(process, CODES[number], 30)


def listens(port):
    with socket.socket() as s:
        return s.connect_ex(('127.0.0.1', port)) == 0


def test_a_signal_to_a_forked_child_is_not_the_parents():
    """A pool ends its workers with SIGTERM; they have inherited the handlers, and the pipe that the parent listens to."""
    code = """import os, signal, time
from runtime import guard
heard = []
guard.on_signal = heard.append
guard.watch('__main__')
child = os.fork()
if not child:
    time.sleep(20)
    os._exit(0)
os.kill(child, signal.SIGTERM)
ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
def send(number):
    os.kill(os.getpid(), number)
    while number not in heard:
        time.sleep(0.01)
send(signal.SIGUSR1)
with guard.unblocked():
    send(signal.SIGINT)
print(ended, *map(int, heard), set(guard.SIGNALS) <= signal.pthread_sigmask(signal.SIG_BLOCK, []))"""
    assert python('-c', code).stdout == f'{-signal.SIGTERM} {signal.SIGUSR1:d} {signal.SIGINT:d} True\n'


def test_a_terminal_that_is_gone():
    """Under nohup its signal is none; a stream that nobody reads keeps no other signal from ending a script."""
    code = """import os, signal, time
from runtime import guard
signal.signal(signal.SIGHUP, signal.SIG_IGN)
guard.watch('__main__')
os.kill(os.getpid(), signal.SIGHUP)
os.close(2)
os.kill(os.getpid(), signal.SIGINT)
time.sleep(20)"""
    assert python('-c', code).returncode == guard.INTERRUPTED


def test_torchrun(tmp_path, whole):
    """A rank dies, and --max-restarts is enough; then SIGTERM, or SIGUSR1, which torchrun hands on if told to: one, by chance."""
    out, handed_on = tmp_path / 'run', 'SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1'
    process = start(out, 2, ['--standalone', '--max-restarts=3'], PET_SIGNALS_TO_HANDLE=handed_on)
    until(lambda: (out / 'latest').exists(), process)
    before = seen(out)
    kill(below(process.pid)[-1])
    until(lambda: text(process).count('resuming') == 1 and seen(out) > before, process)
    saves(out, process, random.choice([signal.SIGTERM, signal.SIGUSR1]), 1)  # 1 is torchrun's own code
    launch(2, [['dpo.py', *FLAGS, f'--out_dir={out}']], tmp_path)
    same(out, whole(2))


def test_killed_at_random_moments(tmp_path, monkeypatch, capsys):
    """The script soak.py, short; what it starts is forked."""
    flags = '--kills=2', '--per_run=2', '--processes=1', f'--seed={random.randrange(10**6)}', '--losses=beta_dpo'
    monkeypatch.setattr(sys, 'argv', ['soak', *flags, f'--folder={tmp_path}/soak'])
    monkeypatch.setattr(
        subprocess, 'Popen', lambda words, cwd, env, stdout, **how: forks.Popen(words[1:], cwd, env, stdout.name)
    )
    soak = runpy.run_module('experiments.attack.soak')
    code, said = soak['main'](), capsys.readouterr().out
    assert code == 0 and re.search(r'\b([2-9]) of \1 kills survived', said), said


def free_port():
    with socket.create_server(('127.0.0.1', 0)) as free:
        return free.getsockname()[1]


def namespaces():
    """Two network namespaces joined by a pair of interfaces: their names, and [(address, prefix of a command there)], or why not."""
    names = [f'nanopref{os.getpid()}{x}' for x in 'ab']
    addresses = {name: f'10.213.7.{i}' for i, name in enumerate(names, 1)}
    commands = [f'netns add {name}' for name in names]
    commands += [f'link add veth0 netns {names[0]} type veth peer name veth0 netns {names[1]}']
    for name, address in addresses.items():
        commands += [f'-n {name} addr add {address}/24 dev veth0']
        commands += [f'-n {name} link set {interface} up' for interface in ('veth0', 'lo')]
    if shutil.which('ip') is None:
        return names, 'there is no ip command here'
    for command in commands:
        done = subprocess.run(['ip', *command.split()], capture_output=True, text=True)
        if done.returncode:
            return names, f'ip {command}: {done.stderr.strip()}'
    return names, [(address, ['ip', 'netns', 'exec', name]) for name, address in addresses.items()]


@pytest.fixture
def hosts():
    """[(address, prefix of a command)] of two hosts: two namespaces, or, where they are not permitted, 127.0.0.1 twice."""
    names, found = namespaces()
    if isinstance(found, str):
        warnings.warn(f'one host stands for two, without network namespaces: {found}', stacklevel=1)
        found = [('127.0.0.1', [])] * 2
    try:
        yield found
    finally:
        for name in names:
            with contextlib.suppress(OSError):
                subprocess.run(['ip', 'netns', 'del', name], capture_output=True)


def test_two_hosts(tmp_path, whole, hosts):
    """Two agents train together; the second host dies, agent and worker; the first waits for it, and both continue."""
    out, port = tmp_path / 'run', free_port()

    def host(i):
        address, prefix = hosts[i]
        interface = 'lo' if address == '127.0.0.1' else 'veth0'
        agent = ['--nnodes=2', '--max-restarts=3', '--rdzv_backend=c10d', '--rdzv_id=7', f'--local-addr={address}',
                 f'--rdzv_endpoint={hosts[0][0]}:{port}', f'--rdzv_conf=is_host={int(i == 0)},keep_alive_interval=2']  # fmt: skip
        # without the variable an agent that stays does not tell a new one where to meet (torch 2.13)
        return start(out, 1, agent, prefix, GLOO_SOCKET_IFNAME=interface, TORCH_DISABLE_SHARE_RDZV_TCP_STORE='1')

    agents = [host(0), host(1)]
    until(lambda: (out / 'latest').exists(), agents[0])
    kill(agents[1].pid, *below(agents[1].pid))
    agents[1].wait()
    agents.append(host(1))
    said = end(agents[0], 0) + end(agents[2], 0)
    assert said.count('training dpo on 2 ranks') == 1 and said.count('resuming dpo on 2 ranks') >= 1
    same(out, whole(2))
