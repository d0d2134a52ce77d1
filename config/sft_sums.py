# SFT on sums with careless demonstrations that python -m experiments.sums writes: a minute on a laptop. Not a paper's experiment.
#     python sft.py config/sft_sums.py
model = 'toy'
data = 'out/sums/demonstrations.jsonl'
n_epochs = 16
batch_size = 64
lr = 2e-3
lr_schedule = 'cosine'
warmup_steps = 20
max_length = 16
log_every = 10240
n_eval_model_samples = 16
max_new_tokens = 6
out_dir = 'out/sft_sums'
