"""What every training script does before, around and after its own step: set-up, resume, logging, evaluation's cadence, saving.

    run = training.begin(config)               # ranks, signals, out_dir, tokenizer
    run.load_data(task='pairs')                # run.train, run.held_out; then load_policy, choose_attention, check_room
    run.start('dpo ')                          # from the newest checkpoint, or afresh
    for step in run.steps():                   # microbatches, made ahead in a thread
        columns = run.compute(step, run_step)  # the script's own: forward and backward
        run.update(step, columns, weight)      # one optimizer step
        run.finish_step(step)                  # saves where that is due, and obeys signals
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
    """Start a run: check its options, join the other ranks, handle signals, lock out_dir. Returns a Run. Raises UserError."""
    # options that exclude one another are refused before anything is made
    adapters = lora.options(config)
    parallel.check(config)
    if activation_checkpointing == 'selective' and tp > 1:
        raise UserError('--activation_checkpointing=selective does not go with --tp')
    # scripts that cannot sample have no such option
    if not config.get('sample_during_eval', True):
        of_samples = config.given('n_eval_model_samples max_new_tokens temperature top_p')
        config.ignored(of_samples, 'sample_during_eval is off')

    # the ranks meet; from then on nobody else may write into out_dir
    rank, world, device = fsdp.setup(tp)
    if config.batch_size < world:
        raise UserError(f'batch_size {config.batch_size} is too small: one example for each of {world} ranks')
    choose_arithmetic(config, device)
    guard.begin(config.out_dir, config, resume)
    return Run(config, adapters, rank, world, device)


def choose_arithmetic(config, device):
    """Set how a GPU multiplies float32 matrices, and whether it gives the same bits each time; print a note if dtype is slow here."""
    on_gpu, in_float32 = device.type == 'cuda', dtype == 'float32'
    use_tf32 = tf32 and on_gpu and in_float32
    if tf32 and not use_tf32:
        config.ignored(['tf32'], 'it is for float32 on a GPU')
    if deterministic and not on_gpu:
        config.ignored(['deterministic'], 'it is for a GPU')
    # notes on what is slow here
    if on_gpu and in_float32 and device_map is None:
        slow = 'packed attention in float32 computes each answer by itself'
        log.say(f'note: on a GPU {slow}: --dtype=bfloat16 is several times faster')
    if not on_gpu and not in_float32:
        costs = room.bfloat16_costs()
        if costs > 2:
            log.say(f'note: this CPU takes {costs:.0f} times as long for bfloat16 as for float32: --dtype=float32')

    if use_tf32:
        torch.set_float32_matmul_precision('high')
    if deterministic and on_gpu:
        # cuBLAS reads this variable at its first product, which is still to come
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.use_deterministic_algorithms(True)
        # torch would also fill every new tensor, which is slow; no code here reads one before it is written
        torch.utils.deterministic.fill_uninitialized_memory = False


class Run:
    """A training run, as one rank sees it. All ranks call its methods together, for many of them communicate."""

    def __init__(self, config, adapters, rank, world, device):
        self.config, self.adapters = config, adapters
        self.rank, self.world, self.device = rank, world, device
        self.models = partial(fingerprints, config)  # called when a checkpoint has to say which models it is of
        self.tokenizer = load_tokenizer(config.model, trust_remote_code)
        self.max_tokens = max_tokens  # 'auto' becomes a number in choose_attention
        self.save_every = save_every  # 'auto' becomes a number after the first steps
        self.stamps = []  # the times at which these steps ended

    # ---- set-up, in this order ----

    def load_data(self, *, train=None, held_out=None, **options):
        """Load run.train and run.held_out: the training examples, and those to evaluate on.

        options: of text.tokenise.load_examples, for both. train, held_out: options for one of the two, which count more."""
        config = self.config
        names = 'seed max_length max_prompt_length truncation num_turns columns chat system skip_bad_rows'
        common = {name: config[name] for name in names.split()}
        # with eval_data no part of data is held out
        common |= {'tokenizer': self.tokenizer, 'undivided': eval_data is not None}
        # a run of a few steps does not tokenise millions of rows: it draws its examples from the first ENOUGH of them
        if config.n_examples and config.n_examples <= ENOUGH // 10:
            common['enough'] = {'train': ENOUGH, 'test': n_eval_examples}

        # one process of each machine reads the text, the others find its tokens in the cache
        for_train = common | options | {'data_fraction': data_fraction} | (train or {})
        for_eval = common | options | (held_out or {})
        self.task = for_train['task']
        self.train = fsdp.first_of_host(lambda: load_examples(config.data, 'train', **for_train))
        found = fsdp.first_of_host(lambda: load_examples(eval_data or config.data, 'test', **for_eval))
        self.held_out = found.select(slice(n_eval_examples))

    def used_rows(self):
        """Return the rows of run.train that the steps take at least once, sorted. With a small n_examples that is not all."""
        n = len(self.train)
        # the first epoch takes every row, so later ones add none
        total = min(n, self.config.n_examples or n)
        all_steps = steps(n, self.config.batch_size, total, self.config.seed)
        return np.unique(np.concatenate([rows for _, rows in all_steps]))

    def say_data(self, group=1):
        """Set run.total, the number of examples to train on, and print what the data is.

        group: in ppo.py the examples are sampled answers, so many to a prompt; run.total is then a multiple of it."""
        config, train = self.config, self.train
        # all epochs, unless n_examples ends the run earlier
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
        """Return the options that every model of the run is loaded with."""
        return {'tokenizer': self.tokenizer, 'trust_remote_code': trust_remote_code, 'seed': self.config.seed}

    def shard(self, build, **options):
        """Make a model on all ranks, with the options of this run, see fsdp.shard."""
        options |= {'dtype': dtype, 'mode': shard, 'cpu_offload': cpu_offload, 'device_map': device_map}
        return fsdp.shard(build, self.device, **options)

    def load_policy(self, build):
        """Make run.policy, the model that trains, and run.optimizer. build(empty) makes the model on the CPU, see fsdp.shard."""
        self.build = build  # the export needs it again
        self.policy = self.shard(build, activation_checkpointing=activation_checkpointing)
        if self.adapters:
            log.say(lora.describe(self.policy))
        # only the adapters' dropout draws from torch's own generator
        torch.manual_seed(self.config.seed * 1_000_003 + self.rank)
        # by default the model is saved in the type it came in, so that its folder does not get twice as large
        if save_dtype is None:
            came_in = fsdp.shared(lambda: kept_in(self.config.model))
            self.config['save_dtype'] = 'bfloat16' if quantize else came_in
        self.optimizer = fsdp.make_optimizer(optimizer, self.policy, self.config.lr, weight_decay)

    def load_frozen(self, build, longest, what='the examples'):
        """Make a model that does not train, with the policy's attention, for sequences of up to `longest` tokens.

        Raises UserError where it has no positions for so many. what: their name in that sentence."""
        model = self.shard(build, train=False)
        check_positions(model, longest, what)
        set_attention(model, self.packed, attn)
        return model

    def choose_attention(self, longest, what='the examples', share_prefix=True, *, forward=None, frozen=0, critic=None):
        """Decide whether batches are packed (run.packed), and how many tokens a microbatch has (run.max_tokens).

        Raises UserError if the model has no positions for `longest`, the tokens of the longest sequence; what: its name in that
        sentence. share_prefix: a pair's prompt is computed once. forward: the policy's pass that trains; None: response_logps.
        frozen: how many models of the policy's size will be loaded later. critic: ppo.py's, a model inside the policy."""
        policy = self.policy
        models = [policy] if critic is None else [policy, critic]
        for model in models:
            check_positions(model, longest, what)
        if self.config.get('sample_during_eval'):
            check_positions(policy, self.held_out.longest_prompt() + self.config.max_new_tokens, 'samples')
        # packed, if this architecture then gives the log-probs that it gives for padded batches
        wanted = pack and attn is None
        self.packed = can_pack(policy, *pack_probe(self.train, self.device), log.say, wanted=wanted)
        for model in models:
            set_attention(model, self.packed, attn)
        self.layout = {'share_prefix': share_prefix, 'pad': not self.packed, 'device': self.device}

        # bytes that a token keeps for backward: measured when it is first asked for, once
        forward = forward or policy.response_logps
        self.bytes_per_token = cache(partial(room.bytes_per_token, policy, forward, self.train, self.packed))
        if max_tokens == 'auto':
            coming = frozen * sum(p.numel() for p in policy.parameters())  # weights that are still to be loaded
            per_token = self.bytes_per_token()
            self.max_tokens = room.choose_max_tokens(self.config, policy, per_token, self.train, self.packed, coming)

    def make_batches(self, examples, rows, **options):
        """Make the microbatches of a step. Returns (this rank's, tokens of all ranks, the same with padding), see data.py."""
        options = {'max_tokens': self.max_tokens} | self.layout | options
        return make_batches(examples, rows, self.rank, self.world, **options)

    def check_room(self, *others):
        """Refuse a disk without room for the model; print notes on memory, and on examples longer than a microbatch.

        others: models that are in memory beside the policy."""
        policy, per_token, train = self.policy, self.bytes_per_token, self.train
        fits = room.check_room(self.config, policy, per_token, train, self.total, self.packed, self.max_tokens, others)
        # by default there are checkpoints only where the disk has room for them, too
        if save_every == 'auto' and not fits:
            self.save_every = 0
        too_long = train.lengths[train.lengths > self.max_tokens]
        if len(too_long):
            what = (
                f'{len(too_long)} examples are longer than max_tokens={self.max_tokens} (the longest: {too_long.max()})'
            )
            log.say(f'note: {what}: each gets a microbatch of its own')

    def start(self, what='', counts=None):
        """Resume from the newest checkpoint, or begin at 0; open the log files; print which of the two, and how much is to do.

        what: the name of the run on the screen, such as 'dpo '. counts: the size of a step there. Raises UserError for a
        checkpoint of other weights, data or options. Sets run.seen (examples so far), run.state and run.logger."""
        config, out_dir = self.config, self.config.out_dir
        # the identity says of which weights, data and options a checkpoint is
        self.identity = checkpoint.identify(config, self.models, self.train, self.held_out)
        latest = checkpoint.latest(out_dir, self.identity) if resume else None
        # the state is what a checkpoint keeps beside weights and optimizer
        self.state = {'examples': 0, 'evaluated': -1, 'bad_steps': 0, 'statistic': {}}
        self.state |= {'warmup': self.warmup(), 'max_tokens': self.max_tokens}
        if latest:
            # checkpoints of older versions have no warm-up: theirs was always the one asked for
            self.state['warmup'] = config.warmup_steps
            self.state |= checkpoint.load(latest, self.policy, self.optimizer)
        self.seen = self.state.pop('examples')
        # a resumed run cuts its steps as before, so that sums are added up in the same order
        if max_tokens == 'auto':
            self.max_tokens = self.state['max_tokens']

        # from here on out_dir holds this run's files
        fsdp.on_one_rank(lambda: log.claim_out_dir(out_dir, config, self.identity['contents']))
        self.logger = log.Log(out_dir, self.total, self.seen, log_every, wandb, tensorboard, self.state['evaluated'])
        verb = 'resuming' if self.seen else 'training'
        counts = counts or f'examples, {config.batch_size} a step'
        self.logger.say(f'{verb} {what}on {self.world} ranks: {self.total} {counts}')

    def warmup(self):
        """Return the number of warm-up steps: warmup_steps, but if nobody has set it, no more than a tenth of the run."""
        asked = self.config.warmup_steps
        most = math.ceil(self.total / self.config.batch_size) // 10
        is_default = self.config.origin['warmup_steps'] == 'default'
        if not is_default or asked <= most:
            return asked
        log.say(f'note: {most or "no"} steps of warm-up, a tenth of this short run: --warmup_steps={asked} for more')
        return most

    # ---- steps ----

    def prepare(self, examples, first, rows):
        """Return the Step that begins after `first` examples and takes these rows of examples, with its microbatches and labels."""
        labels = {'good': torch.from_numpy(examples.good[rows])}
        if examples.margin is not None:
            labels['margin'] = torch.from_numpy(examples.margin[rows])
        return Step(first, rows, *self.make_batches(examples, rows), labels, examples, self.max_tokens)

    def prepared(self, examples, todo):
        """Yield a Step for each (first, rows) of todo. A thread prepares the next one while this one is computed."""
        return prefetch(self.prepare(examples, first, rows) for first, rows in todo)

    def steps(self):
        """Yield the Steps from here to the end of the run. The time that each was waited for is in run.waited, in seconds."""
        self.clock = time.time()
        todo = steps(len(self.train), self.config.batch_size, self.total, self.config.seed, self.seen)
        for step in self.prepared(self.train, todo):
            self.waited = time.time() - self.clock
            yield step

    def memory(self, batches):
        """Return a context for work on microbatches: where memory runs out inside, it raises a UserError that says what helps."""
        return guard.memory(batches, self.max_tokens)

    def compute(self, step, work, **options):
        """Return work(step, **options), a forward and perhaps a backward pass over a step's microbatches.

        Where memory runs out and max_tokens is 'auto', max_tokens is halved, and the step is computed again. That is done in
        one process only: with several, the other ranks would wait for ever in a collective. Else UserError is raised."""
        while True:
            # a step that was prepared before max_tokens was halved is cut again
            if step.max_tokens > self.max_tokens:
                vars(step).update(vars(self.prepare(step.examples, step.first, step.rows)))
            try:
                with self.memory(step.batches):
                    return work(step, **options)
            except UserError as error:
                out_of_memory = hasattr(error, 'of_this_rank')  # guard.memory has marked it so
                in_one_process = self.world * tp == 1
                can_be_cut = any(len(batch.slot) > 1 for batch in step.batches)
                if not (out_of_memory and max_tokens == 'auto' and in_one_process and can_be_cut):
                    raise
            # out here, after the except clause, nothing holds the activations of that try any more
            self.optimizer.zero_grad(set_to_none=True)
            # a step may have been smaller than max_tokens: halve what did not fit
            largest = max(batch.ids.numel() for batch in step.batches)
            self.max_tokens = self.state['max_tokens'] = min(self.max_tokens, largest) // 2
            new = f'going on with max_tokens={self.max_tokens}'
            log.say(f'memory: a microbatch of {largest} tokens does not fit: {new}')

    def update(self, step, columns, weight):
        """Make one optimizer step with the gradients of a step. Returns whether it was made.

        columns: of the whole step. weight: the sum of its examples' weights. If a loss or a gradient is not finite, or the
        weight is 0, the weights of the model stay as they are, and the step counts as bad; UserError after too many of those."""
        config = self.config
        n_steps = math.ceil(self.total / config.batch_size)
        factor = log.schedule(step.first // config.batch_size, n_steps, self.state['warmup'], lr_schedule)
        self.rate = config.lr * factor

        # the gradients are (sum of weighted gradients) / world; this makes them the weighted mean over the step
        scale = math.nan  # makes the norm NaN, at which fsdp.update leaves the weights alone
        if weight and guard.finite(columns):
            scale = self.world / float(weight)
        with self.memory(step.batches):
            self.norm = fsdp.update(self.policy, self.optimizer, self.rate, scale, max_grad_norm)
        if math.isfinite(self.norm):
            return True

        # a bad step: counted, or the end of the run
        uid = self.train.uid[step.rows]
        guard.bad_step(config.out_dir, self.state, skip_bad_steps, step.first, step.rows, uid, self.norm, columns)
        return False

    def log_step(self, step, metrics):
        """Write a row of metrics.jsonl for a step: these metrics, the gradient's norm, the learning rate, and speeds."""
        # seconds since the last step; evaluations and checkpoints have set the clock anew, so they do not count
        now = time.time()
        elapsed, self.clock = now - self.clock, now
        n = len(step.rows)
        metrics |= {'grad_norm': self.norm, 'lr': self.rate, 'counters/step_examples': n}
        metrics['padding_share'] = 1 - step.tokens / step.allocated
        for name, amount in {'examples': n, 'tokens': step.tokens, 'data_wait': self.waited}.items():
            metrics[f'{name}_per_second'] = log.per_second(amount, elapsed)
        # the loss's statistic carries over from step to step
        metrics |= {f'state/{name}': value for name, value in self.state['statistic'].items()}
        if skip_bad_steps:
            metrics['counters/bad_steps'] = self.state['bad_steps']
        self.logger.row('train', step.seen, metrics)

    def finish_step(self, step):
        """End a step: save if a checkpoint is due, and end the run if a signal has asked for it."""
        if self.save_every == 'auto':
            self.choose_save_every(step)  # stays 'auto' for the first steps, after which nothing is due
        due = self.crossed(self.save_every, step.first, step.seen)
        if due:
            self.save(step.seen)
            self.clock = time.time()
        self.obey_signals(step.seen, saved=due)

    def choose_save_every(self, step):
        """After four steps set save_every to the examples of about 15 minutes; to 0 if the rest of the run takes less than that."""
        self.stamps.append(time.time())
        if len(self.stamps) < 4:
            return
        # the median of three steps' times, from one rank, so that all ranks choose the same
        seconds = fsdp.shared(lambda: float(np.median(np.diff(self.stamps))))
        every = max(1, round(room.SAVE_AFTER / seconds)) * (step.seen - step.first)
        self.save_every = every if every < self.total - step.seen else 0
        if self.save_every:
            log.say(f'note: a checkpoint every {every:,} examples, about 15 minutes; --save_every=0: none')

    def crossed(self, every, first, seen):
        """Whether the step from `first` to `seen` examples has crossed a multiple of `every`. Never at the end of the run."""
        if not every or every == 'auto' or seen >= self.total:
            return False
        return seen // every > first // every

    def save(self, seen):
        """Begin to write a checkpoint, in the background."""
        state = self.state | {'run': self.identity}
        checkpoint.save(self.config.out_dir, seen, self.policy, self.optimizer, state, keep_last)

    def obey_signals(self, seen, saved=False):
        """If a signal has asked for it, save a checkpoint and end the process. saved: there is a checkpoint already."""
        guard.boundary(partial(self.save, seen), self.logger.close, already_started=saved)

    # ---- evaluation ----

    def eval_due_at_start(self):
        """Whether to evaluate before the first step. A resumed run does it where an evaluation was due when it ended."""
        if self.seen:
            return self.crossed(eval_every, self.seen - self.config.batch_size, self.seen)
        return do_first_eval

    def eval_due(self, step):
        """Whether to evaluate after this step."""
        return self.crossed(eval_every, step.first, step.seen)

    def evaluate(self, seen, run_step, summary, sample=None):
        """Evaluate on all held-out examples, and write a row of metrics.jsonl. Does nothing if this was done before a resume.

        run_step(step) -> columns. summary(columns, split) -> metrics. sample(seen) -> further metrics, if sample_during_eval
        is on. Nothing is logged if a signal asks to stop meanwhile; the resumed run then evaluates again."""
        n = len(self.held_out)
        if not n or seen <= self.state['evaluated']:
            return
        # all held-out examples, once, in their order
        parts = []
        todo = steps(n, self.config.batch_size, n, seed=0, shuffle=False)
        for step in self.prepared(self.held_out, todo):
            parts.append(self.compute(step, run_step))
            if guard.stop_asked():
                return
        # the metrics are over all examples at once, not means of the steps' means
        columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        metrics = summary(columns, 'eval')
        if sample and self.config.sample_during_eval:
            metrics |= sample(seen)
        self.log_evaluation(seen, metrics)

    def sample(self, models, seen, measure=None):
        """Write answers of models (name -> model) to held-out prompts into samples.jsonl, see generate.sample_held_out."""
        config = self.config
        settings = {name: config[name] for name in ('max_new_tokens', 'temperature', 'top_p')}
        return generate.sample_held_out(self, models, config.n_eval_model_samples, seen, measure, **settings)

    def log_evaluation(self, seen, metrics):
        """Write a row of metrics.jsonl, and note in run.state that it is there; neither if a signal has cut the evaluation short."""
        if not guard.stop_asked():
            self.logger.row('eval', seen, metrics)
            self.state['evaluated'] = seen
        self.clock = time.time()

    # ---- the end ----

    def finish(self, build=None):
        """Write the trained model's folder and its card, and close the log.

        build: makes the model that is exported, if it differs from the one that was trained (ppo.py's has a value head)."""
        folder = f'{self.config.out_dir}/model'
        # a signal that has come by now ends the run here, with a checkpoint
        self.obey_signals(self.total)
        card, keep = partial(export.write_card, self.config.out_dir), partial(self.save, self.total)
        save_dtype = self.config['save_dtype']
        kept = guard.export(self.policy, self.tokenizer, build or self.build, folder, card, save_dtype, keep)
        self.logger.close()
        guard.end()
        rounded = f', rounded to {kept} (a new run with --save_dtype=float32 keeps all bits)'
        log.say(f'done: {folder}{rounded if kept != "float32" else ""}')


def gather(parts, batches, total):
    """Return the columns of the whole step, name -> (total,), in step order and equal on every rank.

    parts: the columns of each of this rank's microbatches, name -> (examples of it,). total: the step's examples."""
    slots = [slot for batch in batches for slot in batch.slot]
    joined = {name: torch.cat([columns[name] for columns in parts]) for name in parts[0]}
    return fsdp.gather_columns(joined, slots, total)
