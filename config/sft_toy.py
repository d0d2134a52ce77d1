# SFT on the toy world (text/toy.py): half a minute on a laptop. Not a paper's experiment.
#     torchrun --nproc_per_node=2 sft.py config/sft_toy.py
model = 'toy'
data = 'toy'
n_epochs = 3
batch_size = 32
lr = 1e-2
lr_schedule = 'cosine'
warmup_steps = 20
log_every = 1024
n_eval_model_samples = 64
max_new_tokens = 48
out_dir = 'out/sft_toy'
