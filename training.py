"""What every training script does before, around and after its own step: set-up, resume, logging, evaluation's cadence, saving.

    run = training.begin(config)               # ranks, signals, out_dir, tokenizer
    run.load_data(task='pairs')                # run.train, run.held_out; then load_policy, choose_attention, check_room
    run.start('dpo ')                          # from the newest checkpoint, or afresh
    for step in run.steps():                   # microbatches, made ahead in a thread
        columns = run.compute(step, run_step)  # the script's own: forward and backward
        run.update(step, columns, weight)      # one optimizer step
        run.finish_step(step)                  # saves, and heeds signals, where that is due
    run.finish()                               # the exported model

The constants below are options of every script that imports this file; one that declares them again has its own default.
Counts are in examples, whatever the number of ranks.
"""

import math
import os
import time
from functools import cache, partial

import numpy as np
import torch

import fsdp
from configurator import UserError
from data import Step, make_batches, pack_probe, steps
from hf import export, generate, lora, parallel
from hf.load import fingerprints, kept_in, load_tokenizer
from hf.probe import can_pack, check_positions
from model import set_attention
from runtime import checkpoint, guard, log, room
from runtime.prefetch import prefetch
from text import show
from text.tokenise import ENOUGH, load_examples

# data
eval_data: str | None = None  # None: the test split of data, or a part of it held out
data_fraction = 1.0  # use this fraction of the training examples
num_turns = 1  # sharegpt: answers taken from a conversation
columns: str | None = None  # which column is what: 'prompt=question, system=system, chosen=good, rejected=bad'
chat = False  # texts become chats, so that the model's chat template applies
system: str | None = None  # a message of the system before every prompt; texts become chats
truncation = 'start'  # which end a too long prompt loses: start or end
skip_bad_rows = False  # count unreadable rows instead of stopping
# optimizer
optimizer = 'AdamW'  # AdamW, RMSprop or SGD
weight_decay = 0.0  # the optimizer's
lr_schedule = 'constant'  # after warm-up: constant, linear or cosine to zero
max_grad_norm = 10.0  # gradients are clipped to this norm
skip_bad_steps = 0  # leave out a step whose loss or gradient is not finite, so many times in a run; then stop
# LoRA
lora_rank: int | None = None  # train adapters of this rank instead of the model's weights
lora_alpha = 16.0  # their output is multiplied by alpha / rank
lora_dropout = 0.0  # inside the adapters, in training; depends on the number of ranks
lora_targets: str | None = None  # linear layers that get one, such as 'q_proj,v_proj'; None: all in the blocks
quantize: str | None = None  # 4bit: the weights beside the adapters in 4 bits, by bitsandbytes (QLoRA)
# evaluation and saving
eval_every: int | None = 19968  # evaluate after so many examples; None: only at start and end
n_eval_examples = 256  # how many held-out examples
do_first_eval = True  # evaluate before training
log_every = 1  # print a line after so many examples
save_every: int | str | None = 'auto'  # examples between checkpoints; 0: none; auto: every 15 minutes of a longer run
keep_last = 2  # checkpoints that are kept
save_dtype: str | None = None  # of the model that is left: float32, bfloat16, float16; None: as that which came in
resume = True  # continue from the newest checkpoint of out_dir
wandb: str | None = None  # a Weights & Biases project to log to
tensorboard = False  # log to tensorboard, too
# machine
max_tokens: int | str = 'auto'  # tokens of one microbatch of one rank; auto: what the memory holds
dtype = 'float32'  # compute type: float32 or bfloat16 (weights, gradients and sums stay float32)
tf32 = False  # float32 on a GPU: matrix products of 10 bits, faster
deterministic = False  # on a GPU: the same bits each time, slower (a CPU always gives them)
pack = True  # no padding
activation_checkpointing: bool | str = False  # recompute activations: a third slower; selective: the cheap half of them
shard = 'auto'  # full cuts weights, gradients, optimizer; grads gathers weights until backward; none: copies; auto: none or full
cpu_offload = False  # weights and optimizer in the CPU's memory; changes nothing where there is no GPU
tp = 1  # tensor parallel: so many neighbouring ranks hold a block together, FSDP does the rest
device_map: str | None = None  # 'balanced': one process without torchrun spreads the model over its GPUs
attn: str | None = None  # attention on padded batches, such as sdpa, eager, flash_attention_2; None: packed
trust_remote_code = False  # run code that comes with a model


def begin(config):
    """A Run of these options: the ranks have met, signals are heeded, out_dir is this run's alone. Raises UserError."""
    # options that exclude one another, before anything is made
    adapters = lora.options(config)
    parallel.check(config)
    if activation_checkpointing == 'selective' and tp > 1:
        raise UserError('--activation_checkpointing=selective does not go with --tp')
    if not config.get('sample_during_eval', True):
        config.ignored(
            config.given('n_eval_model_samples max_new_tokens temperature top_p'), 'sample_during_eval is off'
        )

    # the ranks meet; then nobody else may write into out_dir
    rank, world, device = fsdp.setup(tp)
    if config.batch_size < world:
        raise UserError(f'batch_size {config.batch_size} is too small: one example for each of {world} ranks')
    choose_arithmetic(config, device)
    guard.begin(config.out_dir, config, resume)
    return Run(config, adapters, rank, world, device)


def choose_arithmetic(config, device):
    """Set how a GPU multiplies float32, and whether it gives the same bits each time. Say what is slow."""
    on_gpu, full = device.type == 'cuda', dtype == 'float32'
    fits = {'tf32': on_gpu and full, 'deterministic': on_gpu}
    without_effect = [name for name in fits if config[name] and not fits[name]]
    config.ignored(without_effect, 'it is for a GPU, and tf32 for float32')
    if on_gpu and full and device_map is None:
        slow = 'packed attention in float32 computes each answer by itself'
        log.say(f'note: on a GPU {slow}: --dtype=bfloat16 is several times faster')
    if not on_gpu and not full and (costs := room.bfloat16_costs()) > 2:
        log.say(f'note: this CPU takes {costs:.0f} times as long for bfloat16 as for float32: --dtype=float32')

    if tf32 and fits['tf32']:
        torch.set_float32_matmul_precision('high')
    # cuBLAS reads its variable at the first product; unfilled memory is never read here
    if deterministic and on_gpu:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False


class Run:
    """What one rank knows of a training run. Methods that reach other ranks are called on all of them together."""

    def __init__(self, config, adapters, rank, world, device):
        self.config, self.adapters = config, adapters
        self.rank, self.world, self.device = rank, world, device
        self.models = partial(fingerprints, config)  # what checkpoints say of them
        self.tokenizer = load_tokenizer(config.model, trust_remote_code)
        # with auto they become numbers: in choose_attention, and after the first steps
        self.max_tokens, self.save_every = max_tokens, save_every
        self.stamps = []  # when each of those has ended

    # ---- set-up, in this order ----

    def load_data(self, *, train=None, held_out=None, **options):
        """Load run.train and run.held_out. options: of load_examples, for both; train, held_out: more, for one of the two."""
        config = self.config
        names = 'seed max_length max_prompt_length truncation num_turns columns chat system skip_bad_rows'
        common = {name: config[name] for name in names.split()}
        common |= {'tokenizer': self.tokenizer, 'undivided': eval_data is not None}
        # a run of a few steps need not tokenise millions of rows: its examples are drawn from the first of them
        if config.n_examples and config.n_examples <= ENOUGH // 10:
            common['enough'] = {'train': ENOUGH, 'test': n_eval_examples}

        # one process of a host reads the text, the others find it in the cache
        for_train = common | options | {'data_fraction': data_fraction} | (train or {})
        for_eval = common | options | (held_out or {})
        self.task = for_train['task']
        self.train = fsdp.first_of_host(lambda: load_examples(config.data, 'train', **for_train))
        found = fsdp.first_of_host(lambda: load_examples(eval_data or config.data, 'test', **for_eval))
        self.held_out = found.select(slice(n_eval_examples))

    def used_rows(self):
        """The rows of the training examples that the steps take."""
        n, most = len(self.train), self.config.n_examples
        drawn = steps(n, self.config.batch_size, min(n, most or n), self.config.seed)
        return np.unique(np.concatenate([rows for _, rows in drawn]))

    def say_data(self, group=1):
        """Count the examples to come, in whole groups, and say what they are. group: answers to a prompt, where they count."""
        config, train = self.config, self.train
        # epochs, or fewer examples than they have
        total = config.n_epochs * len(train) * group
        self.total = min(total, config.n_examples or total) // group * group
        changed, notes = train.changes()
        sizes = f'{len(train):,} training examples ({int(train.lengths.sum()):,} tokens) and {len(self.held_out):,} to evaluate on'
        if n_eval_examples and not len(self.held_out):
            notes.append('note: there is nothing to evaluate on: --eval_data names a file of held-out examples')
        example = show.first(train, self.tokenizer, self.task)
        for text in (f'data: {sizes}; left out or changed: {changed}', *notes, example):
            log.say(text)

    def model_options(self):
        """Options that every model of the run is loaded with."""
        return {'tokenizer': self.tokenizer, 'trust_remote_code': trust_remote_code, 'seed': self.config.seed}

    def shard(self, build, **options):
        """A model on all ranks, see fsdp.shard."""
        options |= {'dtype': dtype, 'mode': shard, 'cpu_offload': cpu_offload, 'device_map': device_map}
        return fsdp.shard(build, self.device, **options)

    def load_policy(self, build):
        """The sharded model that trains, and its optimizer. build(empty) makes it on the CPU, as in fsdp.shard."""
        self.build = build  # the export needs it again
        self.policy = self.shard(build, activation_checkpointing=activation_checkpointing)
        if self.adapters:
            log.say(lora.describe(self.policy))
        # the adapters' dropout draws from this generator, and nothing else does
        torch.manual_seed(self.config.seed * 1_000_003 + self.rank)
        # what is left has the type of what came in: it is not twice as large
        if save_dtype is None:
            came_in = fsdp.shared(lambda: kept_in(self.config.model))
            self.config['save_dtype'] = 'bfloat16' if quantize else came_in
        self.optimizer = fsdp.make_optimizer(optimizer, self.policy, self.config.lr, weight_decay)

    def load_frozen(self, build, longest, what='the examples'):
        """A sharded model that does not train, reading sequences of up to longest tokens as the policy does."""
        model = self.shard(build, train=False)
        check_positions(model, longest, what)
        set_attention(model, self.packed, attn)
        return model

    def choose_attention(self, longest, what='the examples', share_prefix=True, *, forward=None, frozen=0, critic=None):
        """Decide how batches are packed, and how large they are. Raises UserError where the longest sequence does not fit.

        longest: its tokens; forward: the policy's pass that trains; frozen: how many models of its size are still to come;
        critic: a model inside the policy."""
        policy = self.policy
        inside = [policy] if critic is None else [policy, critic]
        for model in inside:
            check_positions(model, longest, what)
        if self.config.get('sample_during_eval'):
            check_positions(policy, self.held_out.longest_prompt() + self.config.max_new_tokens, 'samples')
        # packed if the architecture gives the same log-probs so
        wanted = pack and attn is None
        self.packed = can_pack(policy, *pack_probe(self.train, self.device), log.say, wanted=wanted)
        for model in inside:
            set_attention(model, self.packed, attn)
        self.layout = {'share_prefix': share_prefix, 'pad': not self.packed, 'device': self.device}

        # what a token keeps for backward is measured once, and where nobody asks never
        forward = forward or policy.response_logps
        self.bytes_per_token = cache(partial(room.bytes_per_token, policy, forward, self.train, self.packed))
        if max_tokens == 'auto':
            coming = frozen * sum(p.numel() for p in policy.parameters())
            per_token = self.bytes_per_token()
            self.max_tokens = room.choose_max_tokens(self.config, policy, per_token, self.train, self.packed, coming)

    def make_batches(self, examples, rows, **options):
        """(this rank's microbatches of a step, its tokens on all ranks, the same with padding), see data.make_batches."""
        options = {'max_tokens': self.max_tokens} | self.layout | options
        return make_batches(examples, rows, self.rank, self.world, **options)

    def check_room(self, *others):
        """Refuse a disk that is too small, warn of a memory that is, and of long examples. others: models in memory."""
        policy, per_token, train = self.policy, self.bytes_per_token, self.train
        fits = room.check_room(self.config, policy, per_token, train, self.total, self.packed, self.max_tokens, others)
        if save_every == 'auto' and not fits:
            self.save_every = 0
        long = self.train.lengths[self.train.lengths > self.max_tokens]
        if len(long):
            what = f'{len(long)} examples are longer than max_tokens={self.max_tokens} (the longest: {long.max()})'
            log.say(f'note: {what}: each gets a microbatch of its own')

    def start(self, what='', counts=None):
        """Resume from the newest checkpoint, or begin afresh; open the log. what, counts: name and size on the screen."""
        config, out_dir = self.config, self.config.out_dir
        # a checkpoint of other weights, data or options is refused
        self.identity = checkpoint.identify(config, self.models, self.train, self.held_out)
        latest = checkpoint.latest(out_dir, self.identity) if resume else None
        # what a checkpoint keeps beside weights and optimizer; older ones had the warm-up that was asked for
        self.state = {'examples': 0, 'evaluated': -1, 'bad_steps': 0, 'statistic': {}}
        self.state |= {'warmup': self.warmup(), 'max_tokens': self.max_tokens}
        if latest:
            self.state |= {'warmup': config.warmup_steps} | checkpoint.load(latest, self.policy, self.optimizer)
        self.seen = self.state.pop('examples')
        # the sums of a resumed run are added up in the same order
        if max_tokens == 'auto':
            self.max_tokens = self.state['max_tokens']

        # from here on the folder is this run's
        fsdp.on_one_rank(lambda: log.claim_out_dir(out_dir, config, self.identity['contents']))
        self.logger = log.Log(out_dir, self.total, self.seen, log_every, wandb, tensorboard, self.state['evaluated'])
        verb = 'resuming' if self.seen else 'training'
        counts = counts or f'examples, {config.batch_size} a step'
        self.logger.say(f'{verb} {what}on {self.world} ranks: {self.total} {counts}')

    def warmup(self):
        """Steps of warm-up: those asked for, but by default no more than a tenth of the run."""
        asked, most = self.config.warmup_steps, math.ceil(self.total / self.config.batch_size) // 10
        if self.config.origin['warmup_steps'] != 'default' or asked <= most:
            return asked
        log.say(f'note: {most or "no"} steps of warm-up, a tenth of this short run: --warmup_steps={asked} for more')
        return most

    # ---- steps ----

    def prepare(self, examples, first, rows):
        """Everything about a step that can be known before it: microbatches, labels, counts."""
        labels = {'good': torch.from_numpy(examples.good[rows])}
        if examples.margin is not None:
            labels['margin'] = torch.from_numpy(examples.margin[rows])
        return Step(first, rows, *self.make_batches(examples, rows), labels, examples, self.max_tokens)

    def prepared(self, examples, todo):
        """The steps (first, rows) of todo, prepared ahead in a thread."""
        return prefetch(self.prepare(examples, first, rows) for first, rows in todo)

    def steps(self):
        """Yield the steps from here to the end of the run."""
        self.clock = time.time()
        todo = steps(len(self.train), self.config.batch_size, self.total, self.config.seed, self.seen)
        for step in self.prepared(self.train, todo):
            self.waited = time.time() - self.clock
            yield step

    def memory(self, batches):
        """Around the work on microbatches: one sentence where they do not fit."""
        return guard.memory(batches, self.max_tokens)

    def compute(self, step, work, **options):
        """work(step, ...), forward and backward. Where memory is out and max_tokens is auto: again, with half of them.

        One process only, for other ranks would wait in a collective for the one that begins anew. Raises UserError."""
        while True:
            # it was prepared before max_tokens was halved
            if step.max_tokens > self.max_tokens:
                vars(step).update(vars(self.prepare(step.examples, step.first, step.rows)))
            try:
                with self.memory(step.batches):
                    return work(step, **options)
            except UserError as error:
                alone = all(len(batch.slot) == 1 for batch in step.batches)
                can_halve = max_tokens == 'auto' and self.world * tp == 1 and not alone
                if not can_halve or not hasattr(error, 'of_this_rank'):
                    raise
            # out here nothing holds the activations of that try any more; steps can be smaller than what fits
            self.optimizer.zero_grad(set_to_none=True)
            largest = max(batch.ids.numel() for batch in step.batches)
            self.max_tokens = self.state['max_tokens'] = min(self.max_tokens, largest) // 2
            log.say(
                f'memory: a microbatch of {largest} tokens does not fit: going on with max_tokens={self.max_tokens}'
            )

    def update(self, step, columns, weight):
        """One optimizer step on the gradients of step, whose examples weigh weight together. Returns whether it was done: a
        loss or gradient that is not finite leaves the weights alone, and is counted."""
        config = self.config
        n_steps = math.ceil(self.total / config.batch_size)
        factor = log.schedule(step.first // config.batch_size, n_steps, self.state['warmup'], lr_schedule)
        self.rate = config.lr * factor

        # gradients are averages of the ranks' weighted sums: times world, by weight, is the step's mean; NaN leaves the weights alone
        scale = math.nan
        if weight and guard.finite(columns):
            scale = self.world / float(weight)
        with self.memory(step.batches):
            self.norm = fsdp.update(self.policy, self.optimizer, self.rate, scale, max_grad_norm)
        if math.isfinite(self.norm):
            return True

        # raises UserError where too many steps were bad
        uid = self.train.uid[step.rows]
        guard.bad_step(config.out_dir, self.state, skip_bad_steps, step.first, step.rows, uid, self.norm, columns)
        return False

    def log_step(self, step, metrics):
        """A row of metrics.jsonl for a step."""
        # speeds count everything since the last step but evaluations and checkpoints
        now = time.time()
        elapsed, self.clock = now - self.clock, now
        n = len(step.rows)
        metrics |= {'grad_norm': self.norm, 'lr': self.rate, 'counters/step_examples': n}
        metrics['padding_share'] = 1 - step.tokens / step.allocated
        for name, amount in {'examples': n, 'tokens': step.tokens, 'data_wait': self.waited}.items():
            metrics[f'{name}_per_second'] = log.per_second(amount, elapsed)
        # what carries over from step to step
        metrics |= {f'state/{name}': value for name, value in self.state['statistic'].items()}
        if skip_bad_steps:
            metrics['counters/bad_steps'] = self.state['bad_steps']
        self.logger.row('train', step.seen, metrics)

    def finish_step(self, step):
        """Save where it is due, and do what signals have asked for."""
        if self.save_every == 'auto':
            self.choose_save_every(step)
        due = self.crossed(self.save_every, step.first, step.seen)
        if due:
            self.save(step.seen)
            self.clock = time.time()
        self.heed(step.seen, saved=due)

    def choose_save_every(self, step):
        """After four steps: as many examples as take 15 minutes, where the rest of the run takes longer. The same on all ranks."""
        self.stamps.append(time.time())
        if len(self.stamps) < 4:
            return
        # by the middle one of three times
        seconds = fsdp.shared(lambda: float(np.median(np.diff(self.stamps))))
        every = max(1, round(room.SAVE_AFTER / seconds)) * (step.seen - step.first)
        self.save_every = every if every < self.total - step.seen else 0
        if self.save_every:
            log.say(f'note: a checkpoint every {every:,} examples, about 15 minutes; --save_every=0: none')

    def crossed(self, every, first, seen):
        """Whether to do after the step from first to seen examples what is done every so many, but not at the end."""
        if not every or every == 'auto' or seen >= self.total:
            return False
        return seen // every > first // every

    def save(self, seen):
        """Begin to write a checkpoint."""
        state = self.state | {'run': self.identity}
        checkpoint.save(self.config.out_dir, seen, self.policy, self.optimizer, state, keep_last)

    def heed(self, seen, saved=False):
        """End here, saved, if a signal has asked for it. saved: there is a checkpoint already."""
        guard.boundary(partial(self.save, seen), self.logger.close, saved=saved)

    # ---- evaluation ----

    def eval_due_at_start(self):
        """Whether to evaluate before the first step: of a run, or of a resumed one whose evaluation was cut short."""
        if self.seen:
            return self.crossed(eval_every, self.seen - self.config.batch_size, self.seen)
        return do_first_eval

    def eval_due(self, step):
        """Whether to evaluate after this step."""
        return self.crossed(eval_every, step.first, step.seen)

    def evaluate(self, seen, run_step, summary, sample=None):
        """A row of metrics.jsonl from all held-out examples, unless there is one already.

        run_step(step) -> columns; summary(columns, split) -> metrics; sample(seen) -> more of them, with sample_during_eval."""
        n = len(self.held_out)
        if not n or seen <= self.state['evaluated']:
            return
        # all held-out examples, once, in their order
        parts = []
        todo = steps(n, self.config.batch_size, n, seed=0, shuffle=False)
        for step in self.prepared(self.held_out, todo):
            parts.append(self.compute(step, run_step))
            if guard.stop_asked():
                return  # an evaluation that was cut short is done again after the resume
        # one mean over all of them, not a mean of means
        columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        metrics = summary(columns, 'eval')
        if sample and self.config.sample_during_eval:
            metrics |= sample(seen)
        self.log_evaluation(seen, metrics)

    def sample(self, models, seen, measure=None):
        """Answers of models (name -> model) to held-out prompts, into samples.jsonl, see hf/generate.py."""
        config = self.config
        settings = {name: config[name] for name in ('max_new_tokens', 'temperature', 'top_p')}
        return generate.sample_held_out(self, models, config.n_eval_model_samples, seen, measure, **settings)

    def log_evaluation(self, seen, metrics):
        """A row of metrics.jsonl, unless a signal has cut the evaluation short."""
        if not guard.stop_asked():
            self.logger.row('eval', seen, metrics)
            self.state['evaluated'] = seen
        self.clock = time.time()

    # ---- the end ----

    def finish(self, build=None):
        """Write the model folder and its card. build: of what is exported, if it differs from what was trained."""
        folder = f'{self.config.out_dir}/model'
        # a signal that comes now finds everything saved
        self.heed(self.total)
        card, keep = partial(export.write_card, self.config.out_dir), partial(self.save, self.total)
        save_dtype = self.config['save_dtype']
        kept = guard.export(self.policy, self.tokenizer, build or self.build, folder, card, save_dtype, keep)
        self.logger.close()
        guard.end()
        rounded = f', rounded to {kept} (a new run with --save_dtype=float32 keeps all bits)'
        log.say(f'done: {folder}{rounded if kept != "float32" else ""}')


def gather(parts, batches, total):
    """Columns of this rank's microbatches -> columns of the whole step, in step order, equal on every rank.

    parts: name -> column, of each microbatch; total: examples of the step."""
    slots = [slot for batch in batches for slot in batch.slot]
    joined = {name: torch.cat([columns[name] for columns in parts]) for name in parts[0]}
    return fsdp.gather_columns(joined, slots, total)
