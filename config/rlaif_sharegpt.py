# DPO of Llama-2-7B on a judge's preferences between two of its own answers: the second step of dpo-rlaif, arXiv:2402.12366
# (experiments/papers/rlaif_sharegpt.sh makes them). beta and the 3 epochs are those of its README, for 8 A100 80GB and about 2 h 45 min; RMSprop
# and lr those of the DPO code, from which it comes: not checked against the paper.
#     torchrun --nproc_per_node=4 dpo.py config/rlaif_sharegpt.py
model = 'out/sft_sharegpt/model'
data = 'out/label/annotations.json'
loss = 'dpo'
beta = 0.05
n_epochs = 3
batch_size = 64
optimizer = 'RMSprop'
lr = 5e-7
dtype = 'bfloat16'
activation_checkpointing = True
out_dir = 'out/rlaif_sharegpt'
