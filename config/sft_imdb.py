# SFT of GPT-2 large on the positive continuations of the IMDb pairs, the reference of radpo_imdb.py (TDPO, arXiv:2404.11999,
# and Ra-DPO, arXiv:2505.20359, the sentiment experiment). The original fits on one 80GB GPU; it gives no time.
#     torchrun --nproc_per_node=4 sft.py config/sft_imdb.py
model = 'openai-community/gpt2-large'
data = 'imdb'
dtype = 'bfloat16'
lr = 1e-5
out_dir = 'out/sft_imdb'
