# Ra-DPO2, arXiv:2505.20359, CVaR, on Anthropic HH (--loss=radpo1, --risk=erm, or --risk=released for what the authors' code
# computes). The original launches on 4 GPUs with FSDP; it gives no time.
#     torchrun --nproc_per_node=4 dpo.py config/radpo2_hh.py
model = 'out/sft_hh/model'
data = 'hh'
dtype = 'bfloat16'
loss = 'radpo2'
beta = 0.1
alpha = 0.5
risk = 'cvar'
mu = 0.98
optimizer = 'RMSprop'
lr = 5e-6
out_dir = 'out/radpo2_hh'
