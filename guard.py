"""What can end a run early, and how it then ends without loss: signals, another run in its folder, numbers that are not finite,
too little memory or disk. All collectives are in fsdp.py and checkpoint.py; this decides, says and leaves.

Scripts import this first and call watch(), so that signals are heeded while everything else is imported. So nothing heavy is
imported up here: functions import torch and what needs it where they use it."""

import contextlib
import fcntl
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

from configurator import UserError, main_rank
from log import append, append_kept, check_names, check_out_dir, say, sync, writing

SAVED = 75  # exit code after SIGTERM or SIGUSR1: saved, start the same command again (EX_TEMPFAIL of sysexits.h)
INTERRUPTED = 130  # exit code after Ctrl-C: saved, too
PAUSE = 20  # seconds between two tries to write what cannot be lost
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

_code = 0  # the exit code that a signal to this process asks for
_stage = 'before'  # 'training': there are steps that a checkpoint must save; 'exporting'; 'over': all is written
_progress = None  # () -> a sentence about what is kept, for whoever stops a script that trains nothing
_before = {}  # signal -> what its handler was
_ends = None  # of the pipe that tells the listening thread of signals
_main = False  # whether the script is a process of its own
_lock = None  # the open file that holds the lock on out_dir


# ---- signals ----


def watch(name):
    """Heed signals from now on, where name is '__main__': as the first thing that a script does."""
    global _main
    if name == '__main__':
        _main = True
        _install()


def _install():
    """Have a thread of its own hear the signals: the main thread may be inside C code for minutes, such as a rendezvous."""
    global _ends
    if _ends:
        return
    _ends = os.pipe()
    os.set_blocking(_ends[1], False)
    signal.set_wakeup_fd(_ends[1], warn_on_full_buffer=False)
    for number in SIGNALS:
        # a handler must be there, or the system's own action would come first; it has nothing to do
        _before[number] = signal.signal(number, lambda *_: None)
    threading.Thread(target=_listen, args=(_ends[0],), daemon=True).start()


def _listen(end):
    """Read signals, a byte each, until the other end of the pipe is closed."""
    while heard := os.read(end, 1):
        if heard[0] in SIGNALS:
            _heed(heard[0])
    os.close(end)


def _uninstall():
    """Give the signals back to whoever had them."""
    global _ends
    if not _ends:
        return
    signal.set_wakeup_fd(-1)
    for number, handler in _before.items():
        signal.signal(number, handler)
    os.close(_ends[1])
    _ends = None


def _hold():
    """Before a fork: let signals wait until the child has taken its hands off the pipe, which is its parent's."""
    if _ends:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _let_go():
    if _ends:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _in_child():
    """In the child the signals do what they do in any process: pools end their workers with them."""
    global _ends
    if _ends:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        _let_go()
        _ends = None


os.register_at_fork(before=_hold, after_in_parent=_let_go, after_in_child=_in_child)


def _heed(number):
    """What a signal does: before the first step nothing can be lost, so leave at once; then, at the end of a step."""
    global _code
    if _stage == 'over':
        return
    # torchrun turns a second Ctrl-C into SIGTERM
    again = _code == INTERRUPTED and number in (signal.SIGINT, signal.SIGTERM)
    asked = INTERRUPTED if number == signal.SIGINT else SAVED
    name = signal.Signals(number).name
    if again or _stage == 'before':
        _leave_at_once(name, again, _code or asked)
    if not _code:
        hint = ' (Ctrl-C again: at once, without saving)' if asked == INTERRUPTED else ''
        what = 'stopping after this step' if _stage == 'training' else 'stopping as soon as the model is written'
        _write(f'{name}: {what}{hint}')
    _code = max(_code, asked)


def _leave_at_once(name, again, code):
    if again:
        _write(f'{name}: stopped at once: steps since the last checkpoint are lost')
    elif _lock:
        _write(f'{name}: stopped before the first step')
    else:
        _write(f'{name}: stopped')
    if _progress and main_rank():
        os.write(1, f'{_progress()}\n'.encode())
    os._exit(code)


def on_stop(progress):
    """For a script without steps, which a signal always ends at once. progress() -> a sentence about what is kept."""
    global _progress
    _progress = progress


def _write(text):
    if main_rank():
        os.write(2, f'\n{text}\n'.encode())  # print may be what the signal has interrupted


# ---- a run and its folder ----


def begin(out_dir, config, resume):
    """Heed signals from now on, and take out_dir for this run alone. Raises UserError where it cannot be had."""
    import fsdp

    global _code, _stage
    _code, _stage = 0, 'before'
    _install()
    before, made = sys.excepthook, [f for f in (Path(out_dir), *Path(out_dir).parents) if not f.exists()]
    sys.excepthook = lambda *error: (_tidy(out_dir, made), before(*error))
    fsdp.on_one_rank(lambda: _take(out_dir, config, resume))


def _tidy(out_dir, made):
    """A run that fails before it writes anything leaves no folder behind. made: the folders that were not there."""
    with contextlib.suppress(OSError):
        if made and main_rank() and os.listdir(out_dir) == ['.lock']:
            os.remove(Path(out_dir) / '.lock')
            for folder in made:
                folder.rmdir()


def _take(out_dir, config, resume):
    """Lock out_dir, and check that it suits this run. The system drops the lock when the process ends, however it does."""
    import card

    global _lock
    if _lock:
        _lock.close()
    check_names(out_dir, resume)
    model = Path(out_dir) / 'model'
    if model.exists() and not (model / 'README.md').exists():
        card.write(out_dir)  # of a finished run: older versions could be killed before they wrote it
    check_out_dir(out_dir, config, resume)  # before anything is made there, and again when nobody else can change it
    with writing(f'to out_dir {out_dir}'):
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        _lock = open(Path(out_dir) / '.lock', 'a')
    for _attempt in range(10):  # a process that was just killed may take a moment to go
        try:
            fcntl.flock(_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            time.sleep(0.2)
        except OSError as error:  # some network file systems
            say(f'note: {out_dir} cannot be locked ({error.strerror}): see to it that no second run uses it')
            break
    else:
        raise UserError(f'another run is using {out_dir}: wait for its end, or choose another --out_dir')
    check_out_dir(out_dir, config, resume)


def asked_here():
    """Whether this process has been told to stop. Ranks may differ: for work whose result is thrown away if any has."""
    return _code != 0


def stop_asked():
    """Whether any rank has been told to stop: the same answer on all, which call this together.

    Also raises UserError, on all, if the checkpoint that is being written has failed."""
    import checkpoint
    import fsdp

    code, failed = fsdp.largest([_code, int(checkpoint.failed())])
    if failed:
        checkpoint.wait()
    return code


def boundary(save, close, saved=False):
    """Call it after every step: does what signals have asked for, on all ranks together. save() begins a checkpoint, unless
    one of this step is saved already; close() has the trackers write what they hold."""
    import checkpoint
    import fsdp

    global _stage
    _stage = 'training'
    if code := stop_asked():

        def write():
            nonlocal saved
            if not saved:
                save()
            saved = False  # where it fails, the next try begins anew
            checkpoint.wait()

        until_written(write)
        close()
        say('saved: the same command continues from here')
        fsdp.leave(code)


def until_written(write):
    """write(), on all ranks together, again and again while it fails: what was trained is in this process alone.

    A signal that comes while it waits asks for one last try; then the UserError is raised."""
    told, given_up, code = False, False, stop_asked()
    while True:
        try:
            return write()
        except UserError as error:
            if given_up:
                raise UserError(f'{error}. Given up: what was trained since the last checkpoint is lost') from None
            if not told:
                say(f'warning: {error}. What was trained is kept in memory: make room, or mend what else is wrong; it is '
                    f'tried again every {PAUSE} seconds, until a signal (Ctrl-C) gives it up')  # fmt: skip
            told = True
        for _second in range(PAUSE):
            time.sleep(1)
            given_up = stop_asked() > code
            if given_up:
                break


def export(model, tokenizer, build, folder, card=None):
    """checkpoint.export, and rows that wait for room, until they have succeeded. On all ranks together."""
    import checkpoint
    import fsdp

    global _stage
    _stage = 'exporting'

    def write():
        fsdp.on_one_rank(append_kept)
        checkpoint.export(model, tokenizer, build, folder, card)

    until_written(write)


def end():
    """Wait for the last checkpoint, and give signals and out_dir back."""
    import checkpoint

    global _lock, _stage
    checkpoint.wait()
    # everything is written: a process that ends in a moment needs no signal for it
    _stage = 'over'
    if not _main:
        _uninstall()
    if _lock:
        _lock.close()
        _lock = None


# ---- numbers and memory ----


def finite(columns):
    """Whether all columns of a step (name -> tensor) hold numbers only, no NaN and no infinity."""
    return all(bool(values.isfinite().all()) for values in columns.values())


def bad_step(out_dir, state, allowed, first, index, uid, norm, columns):
    """A step whose loss or gradient is not finite, called before the weights are touched, on all ranks.

    Writes the offending examples with their columns to out_dir/bad_step.jsonl: their place in the step, index in the training
    set, and uid, the hash of their text. Where the columns are finite and the gradient is not, that is the whole step. Counts
    in state['bad_steps'], and raises UserError beyond the allowed number."""
    import torch

    import fsdp

    broken = torch.stack([~values.isfinite() for values in columns.values()]).any(0)
    places = broken.nonzero().flatten().tolist() or list(range(len(index)))
    what = 'loss' if broken.any() else 'gradient'
    file = Path(out_dir) / 'bad_step.jsonl'

    def write():
        lines = []
        for i in places:
            row = {
                'examples': first + len(index),
                'what': what,
                'place': i,
                'index': int(index[i]),
                'uid': int(uid[i]),
            }
            row |= {name: values[i].item() for name, values in columns.items()} | {'grad_norm': norm}
            row = {k: v if not isinstance(v, float) or math.isfinite(v) else str(v) for k, v in row.items()}
            lines.append(json.dumps(row) + '\n')
        append(file, ''.join(lines))
        with contextlib.suppress(OSError):  # it has been said
            sync(file)

    fsdp.on_one_rank(write)
    state['bad_steps'] += 1
    where = f'the {what} of the step from {first} to {first + len(index)} examples is not finite'
    those = f'{len(places)} of its examples are in {file}'
    if state['bad_steps'] > allowed:
        count = f' ({allowed} such steps were skipped before)' if allowed else ''
        raise UserError(f'{where}{count}; {those}: look at them, lower the learning rate, or allow --skip_bad_steps')
    say(f'warning: {where}: skipped, {state["bad_steps"]} of {allowed} allowed; {those}')


def check_room(config, policy, forward, train, total, packed, others=()):
    """Before the first step: refuse a disk that cannot hold what the run will leave, and say on a CPU what memory it takes.

    config: the script's options; forward(batch) -> a tensor, the pass of the policy that trains; train: the Examples; total:
    how many of them; others: more models in memory, or None. On all ranks together. Raises UserError."""
    import torch

    import fsdp

    sizes = _sizes(policy, config['optimizer'])
    fsdp.on_one_rank(lambda: _check_disk(config, sizes, total))
    if not torch.cuda.is_available():
        others = [m for m in others if m is not None and m is not policy]
        state = sizes['state'] + sum(p.numel() * p.element_size() for m in others for p in m.parameters())
        _check_memory(config, policy, forward, train, packed, state)


def _sizes(policy, optimizer):
    """Bytes of the exported model, of a checkpoint, and of weights, gradients and optimizer in memory, all ranks together."""
    moments = {'AdamW': 2, 'RMSprop': 1, 'SGD': 0}[optimizer]
    named = list(policy.named_parameters())
    # ppo's value head or critic is in checkpoints, but not in the model that it leaves
    left = [p for name, p in named if not {'critic', 'value_head'} & set(name.split('.'))]
    trained = sum(p.numel() for _, p in named if p.requires_grad)
    frozen = sum(p.numel() * p.element_size() for _, p in named if not p.requires_grad)
    return {
        'model': 4 * sum(p.numel() for p in left),
        'checkpoint': 4 * trained * (1 + moments),
        'state': 4 * trained * (2 + moments) + frozen,
    }


def _check_disk(config, sizes, total):
    """Raise UserError where the disk of out_dir has no room for the model, and for the checkpoints that will be kept."""
    out_dir, every = config['out_dir'], config['save_every']
    # one more than are kept, since an old one goes when the new one is complete
    count = min(config['keep_last'] + 1, (total - 1) // every) if every else 0
    there = len([f for f in Path(out_dir).glob('checkpoints/*') if f.name.isdigit()])
    more = max(0, count - there)
    need, free = sizes['model'] + more * sizes['checkpoint'], shutil.disk_usage(out_dir).free
    if need > free:
        what = f'the model takes {_size(sizes["model"])}'
        if more:
            what += f', and {more} checkpoints take {_size(sizes["checkpoint"])} each'
        raise UserError(
            f'{out_dir} lies on a disk with {_size(free)} free: {what}; make room, or choose another --out_dir'
        )


def _check_memory(config, policy, forward, train, packed, state):
    """Say what the largest microbatch takes, and warn where the machine has less. state: bytes of what stays."""
    import torch.distributed as dist

    per_token = bytes_saved(policy, forward, train, packed)
    # activation checkpointing: a block's activations are there while backward is in it
    recomputing = [m for m in policy.modules() if m.training]
    for block in recomputing:
        block.training = False
    if recomputing:
        per_token += bytes_saved(policy, forward, train, packed) / len(recomputing)
    for block in recomputing:
        block.training = True
    tokens = max(config['max_tokens'], int(train.lengths.max()))
    # where whole steps are smaller: no more than their longest examples
    ranks, here = dist.get_world_size(), int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    if packed and 'minibatch_size' not in config:
        longest = sorted(train.lengths)[-config['batch_size'] :]
        most = int(sum(longest)) * (1 if config.get('share_prefix', True) else 2)
        tokens = min(tokens, max(int(longest[-1]), most // ranks))
    state, activations, has = state / ranks * here, per_token * tokens * here, machine_memory()
    text = f'a microbatch of up to {tokens:,} tokens takes about {_size(activations)}, weights, gradients and optimizer {_size(state)}'
    text += f', of the {_size(has)} of this machine' if has else ''
    if not has or state + activations <= has:
        return say(f'memory: {text}')
    fits = int((has - state) / (per_token * here))
    advice = f'lower --max_tokens to {fits:,}, which changes no result, or try --activation_checkpointing'
    if fits < train.lengths.max():
        advice = 'try --activation_checkpointing, shorter examples (--max_length), --lora_rank, or a smaller model'
    say(f'warning: memory: {text}: the system may kill this process; {advice}')


def bytes_saved(policy, forward, train, packed):
    """Bytes that one token's forward keeps for backward, from a forward of one example of ordinary length."""
    import torch

    import fsdp
    from data import pack

    middle = sorted(range(len(train)), key=lambda i: train.lengths[i])[len(train) // 2]
    batch = pack([train[middle]], [0], pad=not packed)
    own, kept = set(), {}

    def storage_of(tensor):
        # tensor parallelism: this rank's part
        return (tensor.to_local() if hasattr(tensor, 'to_local') else tensor).untyped_storage()

    def note(tensor):
        storage = storage_of(tensor)
        if storage.data_ptr() not in own:
            # the tensor goes along: while it lives, nothing else gets its address
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    # compiling for this one forward would take minutes
    eager = torch.compiler.set_stance('force_eager')
    # a draw of the adapters' dropout would change what training draws
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), fsdp.unsharded(policy), eager:
        own |= {storage_of(p).data_ptr() for p in policy.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            forward(batch)
    return sum(size for size, _ in kept.values()) / batch.ids.numel()


def machine_memory():
    """Bytes of memory of this machine, or of the control group of this process where that has less; None: not known."""
    try:
        limits = [os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')]
    except (ValueError, OSError):
        return None
    with contextlib.suppress(OSError, ValueError):
        for line in Path('/proc/self/cgroup').read_text().splitlines():
            _, controllers, path = line.split(':', 2)
            # version 2 has one tree for everything, version 1 one for memory
            root, name = Path('/sys/fs/cgroup'), 'memory.max'
            if controllers and 'memory' not in controllers.split(','):
                continue
            if controllers:
                root, name = root / 'memory', 'memory.limit_in_bytes'
            # a group has no more than any that it lies in; a container may see its own as the root
            for folder in (root / path.lstrip('/'), *(root / path.lstrip('/')).parents):
                with contextlib.suppress(OSError, ValueError):
                    limits.append(int((folder / name).read_text()))
    return min(limits)


def _size(number):
    """Bytes for people: 1.2 GB."""
    return f'{number / 1e9:.1f} GB' if number >= 1e9 else f'{number / 1e6:.1f} MB'


def out_of_memory(error):
    """Where there was no memory left, 'the GPU' or 'this machine', or None for an error of another kind."""
    text = str(error)
    if type(error).__name__ == 'OutOfMemoryError' or re.search('CUDA.*out of memory|CUBLAS_STATUS_ALLOC_FAILED', text):
        return 'the GPU'
    if isinstance(error, MemoryError) or re.search("can't allocate memory|Cannot allocate memory", text):
        return 'this machine'
    return None


def explained(error, advice):
    """The error itself, or where it says that memory is out, a UserError in its place. advice: what did not fit; what to do."""
    where = out_of_memory(error)
    if where is None or isinstance(error, UserError):
        return error
    better = UserError(f'{where} is out of memory: {advice}')
    better.of_this_rank = True
    return better


@contextlib.contextmanager
def memory_for(advice):
    """Around work, or above a function that does it: where it does not fit into memory, a sentence with this advice."""
    try:
        yield
    except Exception as error:
        better = explained(error, advice)
        if better is error:
            raise
        raise better from None


@contextlib.contextmanager
def memory(batches, max_tokens):
    """Around the work on microbatches: say what to lower where it does not fit, on whichever rank it happens."""
    longest = max((batch.ids.numel() for batch in batches), default=0)
    alone = all(len(batch.place) == 1 for batch in batches)
    lower = 'max_length, since one example fills it' if alone else 'max_tokens, which changes no result'
    advice = f'the longest microbatch has {longest} tokens (max_tokens={max_tokens}); lower {lower}'
    with memory_for(f'{advice}; then try --activation_checkpointing, --dtype=bfloat16 or more GPUs'):
        yield
