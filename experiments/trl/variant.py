"""TRL's DPOTrainer as a variant of bench.py: its own training loop, one optimizer step at a time, on the same token ids.

trl           its defaults (activation checkpointing on, live reference)
trl_fastest   no checkpointing, reference log-probs precomputed (their time is not counted)
trl_cuda      no checkpointing, live reference, and the scoring of answers alone, which TRL switches on with CUDA only

pip install trl==1.16.0     # beside requirements.txt, in an environment of its own
"""

import copy
import tempfile
import threading

import torch

from configurator import UserError

OPTIMIZERS = {'AdamW': 'adamw_torch_fused', 'RMSprop': 'rmsprop', 'SGD': 'sgd'}  # transformers' names


class TrlVariant:
    """Between load() and free(), runs trainer.train() in a thread that waits before every step until bench.py says go."""

    def __init__(self, name, build, step_pairs, tools, threads, half, optimizer):
        """build() -> a model; step_pairs: pairs of a microbatch; tools: clock, reset_peak and peak_memory of bench.py.

        half: compute in bfloat16, beside float32 weights; optimizer: its name in torch."""
        self.name, self.build, self.step_pairs, self.threads = name, build, step_pairs, threads
        self.half, self.optimizer = half, optimizer
        self.clock, self.reset_peak, self.peak_memory = tools
        self.times, self.passes, self.peak, self.running = [], [], 0.0, False

    def load(self, examples, steps):
        """Make the trainer, for these steps (k, batch_size): rows of the examples."""
        try:
            import datasets
            import tokenizers
            import transformers
            import trl.trainer.utils as utils
            from trl import DPOConfig, DPOTrainer
        except ImportError as error:
            problem = f'the variant {self.name} needs trl==1.16.0 ({error})'
            raise UserError(f'{problem}; leave it out of --variants') from None
        name, clock, variant, model = self.name, self.clock, self, self.build()
        self.go, self.done, self.error = threading.Event(), threading.Event(), None

        class Steps(transformers.TrainerCallback):
            def on_step_begin(self, *args, **kwargs):
                variant.go.wait()
                variant.go.clear()
                variant.start = clock()

            def on_step_end(self, *args, **kwargs):
                variant.times.append(clock() - variant.start)
                variant.done.set()

        class Trainer(DPOTrainer):
            def _prepare_dataset(self, dataset, *args):
                return dataset  # token ids already

            def _get_train_sampler(self, *args):
                return torch.utils.data.SequentialSampler(self.train_dataset)

        rows = []
        for i in steps.flatten():
            prompt, answers = examples[i]
            parts = zip(('prompt_ids', 'chosen_ids', 'rejected_ids'), (prompt, *answers), strict=True)
            rows.append({name: ids.tolist() for name, ids in parts})
        fast = {} if name == 'trl' else {'gradient_checkpointing': False}
        args = DPOConfig(
            output_dir=tempfile.mkdtemp(), per_device_train_batch_size=self.step_pairs,
            gradient_accumulation_steps=steps.shape[1] // self.step_pairs, max_steps=len(steps), learning_rate=1e-6,
            max_grad_norm=10.0, max_length=None, report_to=[], save_strategy='no', disable_tqdm=True, bf16=self.half, fp16=False,
            use_cpu=not torch.cuda.is_available(), dataloader_pin_memory=False, logging_strategy='no',
            precompute_ref_log_probs=name == 'trl_fastest', optim=OPTIMIZERS[self.optimizer], **fast,
        )  # fmt: skip
        model.config.use_cache = False
        model.set_attn_implementation('sdpa')
        one_word = tokenizers.Tokenizer(tokenizers.models.WordLevel({'<e>': 0}, '<e>'))
        token = transformers.PreTrainedTokenizerFast(tokenizer_object=one_word, eos_token='<e>', pad_token='<e>')
        ref = {} if name == 'trl_fastest' else {'ref_model': copy.deepcopy(model)}
        self.trainer = Trainer(model=model, args=args, train_dataset=datasets.Dataset.from_list(rows), processing_class=token,
                               callbacks=[Steps()], **ref)  # fmt: skip
        # the scoring function asks this whether it may leave out the other positions
        self.utils, self.before = utils, utils._use_triton
        if name == 'trl_cuda':
            utils._use_triton = lambda device: variant.running or variant.before(device)
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def free(self):
        """Give the memory back: the trainer has done all its steps, and ends by itself."""
        self.thread.join()
        self.utils._use_triton = self.before
        del self.trainer, self.thread

    def work(self):
        if self.threads:
            torch.set_num_threads(self.threads)
        try:
            self.trainer.train()
        except BaseException as error:
            self.error = error
            self.done.set()

    def step(self, examples, index):
        self.reset_peak()
        self.running = True
        self.go.set()
        self.done.wait()
        self.done.clear()
        self.running = False
        if self.error:
            raise self.error
        self.peak = max(self.peak, self.peak_memory())
