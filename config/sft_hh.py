# SFT of Pythia-2.8B on the chosen answers of Anthropic HH: the reference of every *_hh.py beside this file (DPO,
# arXiv:2305.18290, and the code bases built on it). The original ran on 4 A100 80GB in about 1 h 30 min.
#     torchrun --nproc_per_node=4 sft.py config/sft_hh.py
model = 'EleutherAI/pythia-2.8b'
data = 'hh'
dtype = 'bfloat16'
optimizer = 'RMSprop'
lr = 5e-7
out_dir = 'out/sft_hh'
