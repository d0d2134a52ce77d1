# GRPO with a reward function of one's own on sums (experiments/sums.py), from the model of sft_sums.py: two minutes on a laptop.
#     python ppo.py config/grpo_sums.py
model = 'out/sft_sums/model'
data = 'out/sums/prompts.jsonl'
eval_data = 'out/sums/held_out.jsonl'
reward = 'experiments/sums.py:right'
loss = 'grpo'
group_size = 8
kl_coef = 0.0
n_examples = 49152
batch_size = 512
sample_batch = 512
minibatch_size = 128
ppo_epochs = 2
lr = 1e-3
lr_schedule = 'linear'
max_prompt_length = 8
max_new_tokens = 6
eval_every = 8192
out_dir = 'out/grpo_sums'
