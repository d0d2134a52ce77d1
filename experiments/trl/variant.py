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


class TrlVariant:
    """Runs trainer.train() in a thread that waits before every step until bench.py says go."""

    def __init__(self, name, model, examples, order, batch_size, step_pairs, clock, reset_peak, peak_memory, threads):
        try:
            import datasets
            import transformers
            import trl.trainer.utils as utils
            from trl import DPOConfig, DPOTrainer
        except ImportError as error:
            raise UserError(f'the variant {name} needs trl==1.16.0 ({error}); leave it out of --variants') from None
        self.name, self.times, self.peak, self.threads, self.running = name, [], 0.0, threads, False
        self.reset_peak, self.peak_memory = reset_peak, peak_memory
        self.go, self.done, self.error = threading.Event(), threading.Event(), None
        variant = self

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
        for i in order:
            prompt, (chosen, rejected) = examples[i]
            rows.append(
                {'prompt_ids': prompt.tolist(), 'chosen_ids': chosen.tolist(), 'rejected_ids': rejected.tolist()}
            )
        fast = {} if name == 'trl' else {'gradient_checkpointing': False}
        args = DPOConfig(
            output_dir=tempfile.mkdtemp(), per_device_train_batch_size=step_pairs,
            gradient_accumulation_steps=batch_size // step_pairs, max_steps=len(order) // batch_size, learning_rate=1e-6,
            max_grad_norm=10.0, max_length=None, report_to=[], save_strategy='no', disable_tqdm=True, bf16=False, fp16=False,
            use_cpu=not torch.cuda.is_available(), dataloader_pin_memory=False, logging_strategy='no',
            precompute_ref_log_probs=name == 'trl_fastest', **fast,
        )  # fmt: skip
        model.config.use_cache = False
        model.set_attn_implementation('sdpa')
        token = transformers.PreTrainedTokenizerFast(tokenizer_object=_no_tokenizer(), eos_token='<e>', pad_token='<e>')
        ref = {} if name == 'trl_fastest' else {'ref_model': copy.deepcopy(model)}
        self.trainer = Trainer(model=model, args=args, train_dataset=datasets.Dataset.from_list(rows), processing_class=token,
                               callbacks=[Steps()], **ref)  # fmt: skip
        if name == 'trl_cuda':  # the scoring function asks this whether it may leave out the other positions
            before = utils._use_triton
            utils._use_triton = lambda device: self.running or before(device)
        threading.Thread(target=self.work, daemon=True).start()

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


def _no_tokenizer():
    import tokenizers

    return tokenizers.Tokenizer(tokenizers.models.WordLevel({'<e>': 0}, '<e>'))
