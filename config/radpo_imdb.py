# Ra-DPO2, arXiv:2505.20359, GPT-2 large on the IMDb pairs, starting from sft_imdb.py. The original launches on 4 GPUs; it
# gives no time.
#     torchrun --nproc_per_node=4 dpo.py config/radpo_imdb.py
model = 'out/sft_imdb/model'
data = 'imdb'
dtype = 'bfloat16'
loss = 'radpo2'
beta = 0.1
alpha = 0.5
risk = 'cvar'
mu = 0.98
lr = 5e-6
out_dir = 'out/radpo_imdb'
