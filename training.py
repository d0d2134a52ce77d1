"""Everything around a step, which all training scripts share: set-up, resuming, logging, evaluation, checkpoints, export.

    run = training.Run(config)                 # ranks, signals, out_dir, tokenizer
    run.load_data(task='pairs')                # run.train, run.held_out; then load_policy, set_batching, count_data, check_room
    run.start('dpo')                           # from the newest checkpoint, or afresh
    for step in run.steps():                   # a data.Step: microbatches, made ahead in a thread
        columns = run.within_memory(run_step, step)  # the script's own run_step, backward=True for training
        run.update(step, columns, weight)      # one optimizer step
        run.finish_step(step)                  # saves where that is due, and obeys signals
    run.finish()                               # the exported model

The constants below are options of every script that imports this file; a script may redeclare one to change its default. The
functions read them as globals, and the script's own options as config.NAME. Runs are counted in examples over all ranks."""

import math
import time
from functools import cache, partial

import torch

import data
import fsdp
from configurator import UserError
from hf import export, generate, lora, parallel, sharded
from hf.attention import set_attention
from hf.load import fingerprints, load_tokenizer, stored_dtype
from hf.parts import core
from hf.probe import can_pack, check_positions
from runtime import checkpoint, errors, guard, log, ranks, room, values
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
lora_dropout = 0.0  # inside the adapters, in training; its result depends on the number of ranks and on max_tokens
lora_targets: str | None = None  # linear layers that get one, such as 'q_proj,v_proj'; None: all in the blocks
quantize: str | None = None  # 4bit: the weights beside the adapters in 4 bits, by bitsandbytes (QLoRA)
# evaluation and saving
eval_every: int | None = 19968  # evaluate after so many examples; None: only at start and end
n_eval_examples = 256  # how many held-out examples
do_first_eval = True  # evaluate before training
log_every = 1  # print a line after so many examples
save_every: int | str | None = 'auto'  # examples between checkpoints, or epoch_2; 0: none; auto: every 15 minutes
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


class Run:
    """State of a training run on one rank. Many methods communicate, so all ranks must call them together.

    total: examples of the run; seen: those before its start, above 0 after a resume. state: what a checkpoint holds besides weights
    and optimizer, a dict. Its 'evaluated' is the number of examples seen at the last evaluation. norm, rate: gradient norm and
    learning rate of the last update. clock: when the last row was logged; waited: seconds that the loop then waited for data."""

    def __init__(self, config):
        """Check the options, join the process group, install signal handlers, lock out_dir. Raises UserError."""
        self.config = config
        self.adapters = lora.adapter_options(config)  # a dict, or None without --lora_rank
        parallel.check(config)
        for names, why in values.without_effect(config):
            config.report_unused(names, why)
        # a rank here is a group of tp processes, which take the same examples
        self.rank, self.world_size, self.device = ranks.setup(tp, config)
        if config.batch_size < self.world_size:
            needed = f'one example for each of {self.world_size} ranks'
            raise UserError(f'batch_size {config.batch_size} is too small: {needed}')
        parallel.choose_arithmetic(config, self.device)
        guard.begin(config.out_dir, config, resume)
        self.tokenizer = load_tokenizer(config.model, trust_remote_code)
        self.max_tokens = max_tokens  # an option; set_batching replaces 'auto' by a number
        self.save_every = save_every  # an option; finish_step replaces 'auto' by a number, after a few steps
        self.step_ends = []  # end times of those first steps

    # ---- set-up, in this order ----

    def load_data(self, *, train=None, held_out=None, **options):
        """Load the examples run.train and run.held_out. options: of load_examples, for both; train, held_out: those for one of the two."""
        config = self.config
        names = 'seed max_length max_prompt_length truncation num_turns columns chat system skip_bad_rows'
        common = {name: config[name] for name in names.split()} | {'tokenizer': self.tokenizer} | options
        common['undivided'] = eval_data is not None  # then no part of data is held out
        test_data = eval_data or config.data
        for_train = common | {'data_fraction': data_fraction, 'enough': self.enough(config.data)} | (train or {})
        for_test = common | {'enough': self.enough(test_data)} | (held_out or {})
        self.task = for_train['task']
        # one process per host tokenises, the others read its cache
        self.train = ranks.first_of_host(lambda: load_examples(config.data, 'train', **for_train))
        test_split = ranks.first_of_host(lambda: load_examples(test_data, 'test', **for_test))
        self.held_out = test_split.select(slice(n_eval_examples))

    def enough(self, source):
        """Return how many examples of each split of a source a short run tokenises, {'train': ..., 'test': ...}; None: all of them."""
        if '+' in source or not self.config.n_examples:  # of 'hh+shp', the first examples would all be of hh
            return None
        # a run is short if the first ENOUGH examples, after these options have left some out, are ten times what it takes
        fractions = (data_fraction, self.config.get('frac_good', 1), self.config.get('frac_bad', 1))
        fraction = math.prod(share for share in fractions if share > 0)
        is_short = 10 * self.config.n_examples <= fraction * ENOUGH
        return {'train': ENOUGH, 'test': n_eval_examples} if is_short else None

    def count_data(self, answers_each=1):
        """Set run.epoch, its examples, and run.total, and print a summary of the data. ppo.py's are answers: answers_each to a prompt."""
        self.epoch = len(self.train) * answers_each
        n_examples = min(self.config.n_epochs * self.epoch, self.config.n_examples or math.inf)
        self.total = n_examples // answers_each * answers_each  # rounded down to whole prompts
        for line in show.summary(self, n_eval_examples):
            log.say(line)

    def model_options(self):
        """Return loading options that are common to all models of the run."""
        return {'tokenizer': self.tokenizer, 'trust_remote_code': trust_remote_code, 'seed': self.config.seed}

    def _load(self, build, **options):
        """Return the model that build(empty) makes, on all ranks, with this run's options. options: more of fsdp.shard's."""
        options |= {'dtype': dtype, 'mode': shard, 'cpu_offload': cpu_offload, 'device_map': device_map}
        return fsdp.shard(build, self.device, **options)

    def load_policy(self, build):
        """Set run.policy and run.optimizer. build(empty): make the transformers model on the CPU, without weights if empty."""
        self.build = build  # for finish(), which exports such a model
        self.policy = self._load(build, activation_checkpointing=activation_checkpointing)
        if self.adapters:
            log.say(lora.describe(self.policy))
        # torch's global generator is used by the adapters' dropout only
        torch.manual_seed(self.config.seed * 1_000_003 + self.rank)
        # default: save the model in the dtype of the files that it came in, but bfloat16 if these weights have become 4-bit ones
        if save_dtype is None:
            read_dtype = partial(stored_dtype, self.config.model)
            self.config['save_dtype'] = 'bfloat16' if quantize else ranks.from_rank_0(read_dtype)
        self.optimizer = fsdp.make_optimizer(optimizer, self.policy, self.config.lr, weight_decay)

    def load_frozen(self, build):
        """Build and return a frozen model, such as the reference, for the batches that set_batching has chosen. Raises UserError."""
        model = self._load(build, train=False)
        check_positions(model, *self.longest)
        set_attention(model, self.packed, attn)
        return model

    def set_batching(self, longest, noun='the examples', share_prefix=True, *, forward=None, n_models=0):
        """Set run.packed (packed or padded batches) and run.max_tokens (of a microbatch). UserError if the model has too few positions.

        longest: tokens of the longest sequence; noun: of the sequences, for messages. share_prefix: pairs compute their prompt once.
        forward: the training pass, if not response_logps. n_models: number of frozen models to be loaded after this."""
        policy = self.policy
        self.longest = longest, noun  # for load_frozen
        # with ppo.py's --critic, the policy holds a critic, which is a whole model
        critic = getattr(core(policy), 'critic', None)
        with_attention = [policy] if critic is None else [policy, critic]
        for model in with_attention:
            check_positions(model, longest, noun)
        if self.config.get('sample_during_eval'):
            check_positions(policy, self.held_out.longest_prompt() + self.config.max_new_tokens, 'samples')
        # pack if the options allow it, and if the model then computes the same log-probs as on padded batches (can_pack)
        self.packed = can_pack(policy, self.train, self.device, wanted=pack and attn is None)
        for model in with_attention:
            set_attention(model, self.packed, attn)
        # of data.make_batches
        self.batching = {'share_prefix': share_prefix, 'pad': not self.packed, 'device': self.device}
        forward = forward or policy.response_logps
        # () -> bytes of activations that a token takes. They are measured at the first call: not at all if nobody asks
        self.bytes_per_token = cache(partial(room.bytes_per_token, policy, forward, self.train, self.packed))
        if max_tokens == 'auto':
            self.max_tokens = room.choose_max_tokens(self, n_models)
        policy.reshard()  # policy.parameters() are the trained weights again, of which somebody may make an optimizer

    def check_room(self, *frozen):
        """Raise UserError if the disk lacks room; log notes on memory and long examples. frozen: other models in memory, or None.

        If checkpoints do not fit, save_every='auto' becomes 0: none are written."""
        if not room.check_room(self, frozen):
            self.save_every = 0

    def start(self, method='', units=None, n_steps=None):
        """Resume from the newest checkpoint, or start from scratch. Sets run.seen, run.state and run.logger.

        method, units: words for log.say_start. n_steps: optimizer steps of the run; None: one for batch_size examples. UserError for a
        checkpoint of other weights, data or options."""
        config, out_dir = self.config, self.config.out_dir
        sharded.check_trained(self.policy, self.optimizer)
        # this tells the run from others: options, hashes of the data, and fingerprints, hashes of the models
        self.identity = checkpoint.identify(config, partial(fingerprints, config), self.train, self.held_out)
        newest = checkpoint.latest(out_dir, self.identity) if resume else None
        self.n_steps = n_steps or math.ceil(self.total / config.batch_size)
        # the state at the beginning of a run; evaluated=-1: not even at 0 examples
        self.state = {'examples': 0, 'evaluated': -1, 'bad_steps': 0, 'statistic': {}, 'max_tokens': self.max_tokens}
        # checkpoints of older versions lack 'warmup', which then was always the option
        self.state['warmup'] = config.warmup_steps if newest else log.warmup_steps(config, self.n_steps)
        if newest:
            self.state |= checkpoint.load(newest, self.policy, self.optimizer)
        self.seen = self.state.pop('examples')  # save() takes the number as an argument
        # after a resume, the same microbatches as before, for bitwise equal sums
        if max_tokens == 'auto' and self.max_tokens != self.state['max_tokens']:
            self.max_tokens = self.state['max_tokens']
            advice = '--max_tokens=NUMBER if it does not fit here'
            log.say(f'memory: going on with max_tokens={self.max_tokens}, as before: {advice}')

        # write config.json, and delete rows of logs that this run will write again
        ranks.on_rank_0(lambda: log.claim_out_dir(out_dir, config, self.identity['contents']))
        ranks.on_rank_0(lambda: log.cut_back(out_dir, self.seen, self.state['evaluated']))
        self.logger = log.Log(out_dir, self.total, self.seen, every=log_every, wandb=wandb, tensorboard=tensorboard)
        log.say_start(self, method, units, newest)

    # ---- steps ----

    def make_step(self, examples, rows, first=0, max_tokens=None):
        """Return the Step of these rows of Examples. first: examples taken before it. max_tokens: of a microbatch, if not the run's."""
        labels = {'good': torch.from_numpy(examples.good[rows])}
        if examples.margin is not None:
            labels['margin'] = torch.from_numpy(examples.margin[rows])
        # read it only once, because this runs in a thread, and within_memory() may halve it at any moment
        limit = max_tokens or self.max_tokens
        # (this rank's microbatches, tokens on all ranks, tokens with padding)
        packed_step = data.make_batches(examples, rows, self.rank, self.world_size, limit, **self.batching)
        return data.Step(first, rows, *packed_step, labels=labels, examples=examples, max_tokens=limit)

    def steps(self):
        """Yield the remaining Steps of the run, made ahead in a thread."""
        self.clock = time.perf_counter()  # log_row, evaluations and checkpoints reset it
        starts = data.steps(len(self.train), self.config.batch_size, self.total, self.config.seed, start=self.seen)
        for step in prefetch(self.make_step(self.train, rows, first) for first, rows in starts):
            self.waited = time.perf_counter() - self.clock
            yield step

    def within_memory(self, run_step, step, **options):
        """Return run_step(step, **options). If memory runs out, halve max_tokens='auto' in a single process, else raise UserError."""
        while True:
            # a step that was made before max_tokens was halved: make its microbatches anew, in place, as the caller goes on with it
            if step.max_tokens > self.max_tokens:
                remade = self.make_step(step.examples, step.rows, step.first)
                vars(step).update(vars(remade))
            try:
                with errors.on_full_memory_of(step.batches, self.max_tokens):
                    return run_step(step, **options)
            except UserError as error:
                # not on several ranks, tp of which hold one model: the others would wait forever in a collective
                may_halve = max_tokens == 'auto' and self.world_size * tp == 1
                # can_split: memory ran out, and in a microbatch of several examples
                if not (may_halve and errors.can_split(error, step.batches)):
                    raise
            # clean up, outside of the except block, in which the traceback would still keep the activations alive
            with errors.on_full_memory_of(step.batches, self.max_tokens):
                sharded.abandon_backward(self.policy)
            self.optimizer.zero_grad(set_to_none=True)
            largest = max(batch.ids.numel() for batch in step.batches)
            half = min(self.max_tokens, largest) // 2
            log.say(f'memory: a microbatch of {largest} tokens does not fit: going on with max_tokens={half}')
            self.max_tokens = self.state['max_tokens'] = half

    def update(self, step, columns, weight, number=None, rows=None):
        """Apply the gradients of a Step. Returns False if it is bad and was skipped. UserError after more than skip_bad_steps of them.

        columns: name -> (n,), of the examples; weight: the sum of their weights in the gradient. A step is bad if a column or the
        gradient norm is not finite, or if weight is 0. From ppo.py: number of the optimizer step; rows, (n,): of prompts in run.train."""
        config = self.config
        if number is None:
            number, rows = step.first // config.batch_size, step.rows
        self.rate = config.lr * log.schedule(number, self.n_steps, self.state['warmup'], lr_schedule)
        # fsdp.update gets gradients that are (sum of weighted gradients) / ranks: times scale, they are the weighted mean
        # over the step. In a bad step scale is NaN: then the norm is NaN on every rank, and fsdp.update changes nothing
        is_finite = all(column.isfinite().all() for column in columns.values())
        scale = self.world_size / float(weight) if weight != 0 and is_finite else math.nan
        with errors.on_full_memory_of(step.batches, self.max_tokens):
            # not the global max_grad_norm: ppo.py declares its own
            self.norm = fsdp.update(self.policy, self.optimizer, self.rate, scale, config.max_grad_norm)
        if math.isfinite(self.norm):
            return True
        guard.bad_step(self, step.first, rows, columns)  # counts it, and writes its examples to bad_step.jsonl
        return False

    def log_step(self, step, metrics):
        """Log a training row: metrics plus gradient norm, learning rate, share of padding, and what log_row adds."""
        padding_share = 1 - step.n_tokens / step.n_allocated
        row = metrics | {'grad_norm': self.norm, 'lr': self.rate, 'padding_share': padding_share}
        self.log_row(row, step.seen, len(step.rows), step.n_tokens, data_wait_per_second=self.waited)

    def log_row(self, row, seen, n, n_tokens, **seconds):
        """Log a training row after `seen` examples, and the speed of its n examples of n_tokens tokens. seconds: see log.speeds."""
        # time since the last row, without evaluations and checkpoints, which reset the clock
        elapsed = time.perf_counter() - self.clock
        row |= log.speeds(n, n_tokens, elapsed, **seconds)
        self.clock = time.perf_counter()
        row |= {f'state/{name}': value for name, value in self.state['statistic'].items()}  # a running mean, say
        if skip_bad_steps:
            row['counters/bad_steps'] = self.state['bad_steps']
        self.logger.row('train', seen, row)

    def finish_step(self, step):
        """Save a checkpoint if one is due, and stop the run if a signal has asked for it."""
        # for save_every='auto', time the first steps. Until then it stays 'auto', and no checkpoint is due
        if self.save_every == 'auto':
            self.step_ends.append(time.perf_counter())
            self.save_every = room.save_every_of(self.step_ends, step, self.total)
        due = self.crossed(self.save_every, step.first, step.seen)
        if due:
            self.save(step.seen)
            self.clock = time.perf_counter()
        self.obey_signals(step.seen, saved=due)

    def crossed(self, every, first, seen):
        """Return whether a step, `first` to `seen` examples, crosses a multiple of `every`. False if 'auto', or at the end, always due."""
        if not every or every == 'auto' or seen >= self.total:
            return False
        return seen // every > first // every

    def save(self, seen):
        """Start writing a checkpoint, after `seen` examples, in the background; the newest keep_last are kept."""
        state = self.state | {'run': self.identity}
        checkpoint.save(self.config.out_dir, seen, self.policy, self.optimizer, state, keep_last=keep_last)

    def obey_signals(self, seen, saved=False):
        """Exit if a signal has asked for it, after saving a checkpoint. saved: save(seen) has been called already."""
        guard.obey_signals(partial(self.save, seen), self.logger.close, already_started=saved)

    # ---- evaluation ----

    def eval_due_at_start(self):
        """Return whether to evaluate before the first step. After a resume: whether the last step before it has made that due."""
        if not self.seen:
            return do_first_eval
        return self.crossed(eval_every, first=self.seen - self.config.batch_size, seen=self.seen)

    def eval_due(self, step):
        """Return whether to evaluate after this step."""
        return self.crossed(eval_every, step.first, step.seen)

    def evaluate(self, seen, run_step, summary, sample=None):
        """Evaluate on all held-out examples and log the metrics. No-op if that was done already, before a resume.

        seen: number of training examples so far. run_step(step) -> columns of the step, name -> (n,). summary(columns, split) ->
        metrics. sample(seen) -> more metrics, if sample_during_eval. After a signal nothing is logged: the resumed run starts over."""
        n = len(self.held_out)
        if not n or seen <= self.state['evaluated']:
            return
        by_step = []  # the columns of one step after the other, in the order of the examples
        starts = data.steps(n, self.config.batch_size, total=n, seed=0, shuffle=False)
        for step in prefetch(self.make_step(self.held_out, rows, first) for first, rows in starts):
            by_step.append(self.within_memory(run_step, step))
            if guard.stop_asked():
                return
        # metrics over all examples, not means of per-step means
        columns = {name: torch.cat([of_step[name] for of_step in by_step]) for name in by_step[0]}
        metrics = summary(columns, 'eval')
        if sample and self.config.sample_during_eval:
            metrics |= sample(seen)
        self.log_evaluation(seen, metrics)

    @errors.on_full_memory('sampled answers do not fit beside the model; lower n_eval_model_samples or max_new_tokens')
    def sample(self, models, seen, measure=None):
        """Sample answers of models (name -> model) to held-out prompts into samples.jsonl, after training on `seen` examples.

        measure(Examples of n answers) -> {column: (n,)}, written beside them. Returns {name: {column: (n,)}}, {} after a stop signal."""
        config = self.config
        # kto has a good and a bad example of each prompt: one is enough. All examples of other losses are good
        good = self.held_out.select(self.held_out.good)
        examples = good.select(slice(config.n_eval_model_samples))
        settings = {name: config[name] for name in ('max_new_tokens', 'temperature', 'top_p')}
        return generate.sample_held_out(self, models, examples, seen, measure, **settings)

    def log_evaluation(self, seen, metrics):
        """Log an evaluation row and record it in run.state, unless a signal has interrupted the evaluation."""
        if not guard.stop_asked():
            self.logger.row('eval', seen, metrics)
            self.state['evaluated'] = seen
        self.policy.reshard()  # policy.parameters() are the trained weights again, of which somebody may take a mean
        self.clock = time.perf_counter()  # log_row counts no time of evaluations

    # ---- the end ----

    def finish(self, build=None, leave=False):
        """Export the model with its card to out_dir/model. build(empty): makes it in place of load_policy's (ppo.py). leave: then exit."""
        folder = f'{self.config.out_dir}/model'
        self.obey_signals(self.total)  # a pending signal stops the run here, with a checkpoint
        card = partial(export.write_card, self.config.out_dir)
        # not the global save_dtype, which may be None: load_policy has set that of config
        options = {'build': build or self.build, 'folder': folder, 'card': card, 'dtype': self.config['save_dtype']}
        write = partial(export.write_model, self.policy, self.tokenizer, **options)
        # the dtype that was written. If write() fails, guard.export saves a checkpoint
        written = guard.export(self.policy, write, save=partial(self.save, self.total))
        self.logger.close()
        guard.end()
        note = f', rounded to {written} (a new run with --save_dtype=float32 keeps all bits)'
        log.say(f'done: {folder}{note if written != "float32" else ""}')
        if leave:
            ranks.leave()
