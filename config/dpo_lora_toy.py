# DPO with LoRA on the toy world (text/toy.py), from the model of sft_toy.py: 20 seconds on a laptop. Not a paper's experiment.
#     torchrun --nproc_per_node=2 dpo.py config/dpo_lora_toy.py
model = 'out/sft_toy/model'
data = 'toy'
loss = 'dpo'
beta = 4.0
lora_rank = 8
lora_alpha = 16.0
lr = 2e-3
lr_schedule = 'linear'
warmup_steps = 10
log_every = 1024
max_new_tokens = 48
out_dir = 'out/dpo_lora_toy'
