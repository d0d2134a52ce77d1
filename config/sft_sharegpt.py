# SFT of Llama-2-7B on a tenth of ShareGPT for 9 epochs: the first step of dpo-rlaif, arXiv:2402.12366. The original ran on 8
# A100 80GB in about 2 hours.
#     torchrun --nproc_per_node=8 sft.py config/sft_sharegpt.py
model = 'meta-llama/Llama-2-7b-hf'
data = 'sharegpt'
data_fraction = 0.1
num_turns = 1
n_epochs = 9
batch_size = 8
optimizer = 'RMSprop'
lr = 1e-6
dtype = 'bfloat16'
activation_checkpointing = True
out_dir = 'out/sft_sharegpt'
