# TDPO2, arXiv:2404.11999, alpha 0.5, on Anthropic HH (--loss=tdpo1 for the first variant). The paper's runs used the DPO
# code on A100 80GB GPUs; it gives no time.
#     torchrun --nproc_per_node=4 dpo.py config/tdpo2_hh.py
model = 'out/sft_hh/model'
data = 'hh'
dtype = 'bfloat16'
loss = 'tdpo2'
beta = 0.1
alpha = 0.5
optimizer = 'RMSprop'
lr = 5e-6
out_dir = 'out/tdpo2_hh'
